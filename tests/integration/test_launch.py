"""Every way to start a daemon from Python: filters and maps arrive in the workers, which load no Kafka library."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fixtures.kafka import Broker, Message
from fixtures.postgres import execute, query
from fixtures.processes import Child
from fixtures.waiting import wait_until
from speedlayer.supervisor.control import ControlClient
from speedlayer.supervisor.errors import NoDaemon
from speedlayer.supervisor.exit_codes import ExitCode

# A lambda, a closure, a named function, a class, a global that is set after the function, and an imported helper.
PIPELINE = """
import helper
from speedlayer.supervisor import KafkaSource, SimpleStreamingEngine
from speedlayer.workers import PostgreSQLSink

engine = SimpleStreamingEngine(
    {{"bootstrap.servers": "{servers}", "group.id": "{group}", "session.timeout.ms": 6000}},
    workers=2, start_method="{start_method}", control_socket="{socket}",
)

def multiply_by(factor):
    def multiply(order):
        order["amount"] = order["amount"] * factor
        return order
    return multiply

class Tag:
    def __init__(self, tag):
        self.tag = tag
    def __call__(self, order):
        order["tag"] = self.tag + LATE
        return order

def named(order):
    order["amount"] = helper.add_one(order["amount"])
    return order

orders = engine.dataframe(KafkaSource("{topic}"))
orders = orders.filter(lambda order: order["status"] != "CANCELLED").map(multiply_by(10)).map(Tag("t")).map(named)
orders.sink(PostgreSQLSink("{dsn}", table="orders"))
LATE = "-late"

if __name__ == "__main__":
    engine.run()
"""

HELPER = "def add_one(n): return n + 1\n"

# Looks into the live workers: each writes down what it has loaded, when it gets a record.
SPY = """
import sys, pathlib
def add_one(n):
    loaded = [name for name in ("confluent_kafka", "speedlayer.supervisor.supervisor") if name in sys.modules]
    pathlib.Path("{seen}").write_text(repr(loaded))
    return n + 1
"""

WAYS = {
    "speedlayer run": ["-m", "speedlayer.supervisor", "run", "pipeline.py"],
    "the console script": ["-c", "from speedlayer.supervisor.cli import main; main()", "run", "pipeline.py"],
    "python file.py": ["pipeline.py"],
    "python -m": ["-m", "pipeline"],
}


@pytest.fixture
def launch(kafka: Broker, topic: str, postgres_dsn: str, tmp_path: Path) -> Iterator[Callable[..., Child]]:
    execute(postgres_dsn, "CREATE TABLE orders (order_id bigint, status text, amount bigint, tag text)")
    children: list[Child] = []

    def start(arguments: list[str], start_method: str = "spawn", helper: str = HELPER, **changes: Any) -> Child:
        values = {"servers": kafka.bootstrap_servers, "group": f"group-{topic}", "topic": topic, "dsn": postgres_dsn}
        values |= {"start_method": start_method, "socket": str(tmp_path / "s"), **changes}
        (tmp_path / "pipeline.py").write_text(PIPELINE.format(**values))
        (tmp_path / "helper.py").write_text(helper)
        child = Child([sys.executable, *arguments], log=tmp_path / "daemon.log", cwd=tmp_path, env=dict(os.environ))
        child.start()
        children.append(child)
        return child

    yield start
    for child in children:
        family = psutil.Process(child.pid).children(recursive=True) if child.running else []
        child.kill()
        psutil.wait_procs(family, timeout=20)


def amounts(dsn: str) -> list[tuple[Any, ...]]:
    return query(dsn, "SELECT order_id, amount, tag FROM orders ORDER BY order_id")


def produce_orders(kafka: Broker, topic: str) -> None:
    kafka.produce(
        topic,
        [
            Message(b'{"order_id": 1, "status": "NEW", "amount": 2}'),
            Message(b'{"order_id": 2, "status": "CANCELLED", "amount": 3}'),
            Message(b'{"order_id": 3, "status": "NEW", "amount": 4}'),
        ],
    )


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
@pytest.mark.parametrize("way", WAYS)
def test_callables_of_every_kind_arrive_however_the_daemon_is_started(
    launch: Callable[..., Child], kafka: Broker, topic: str, postgres_dsn: str, way: str, start_method: str
) -> None:
    produce_orders(kafka, topic)
    child = launch(WAYS[way], start_method)
    expected = [(1, 21, "t-late"), (3, 41, "t-late")]
    wait_until(lambda: amounts(postgres_dsn) == expected, f"{expected}", diagnose=child.log_tail)
    assert child.stop() == ExitCode.OK


@pytest.mark.parametrize("way", WAYS)
def test_a_live_worker_has_not_loaded_the_kafka_library(
    launch: Callable[..., Child], kafka: Broker, topic: str, tmp_path: Path, way: str
) -> None:
    seen = tmp_path / "seen"
    produce_orders(kafka, topic)
    child = launch(WAYS[way], helper=SPY.format(seen=seen))
    wait_until(seen.exists, "a worker has seen a record", diagnose=child.log_tail)
    wait_until(lambda: seen.read_text() != "", "it has written down what it loaded", diagnose=child.log_tail)
    assert seen.read_text() == "[]"


def test_an_engine_is_chosen_by_its_name_when_there_are_several(
    kafka: Broker, topic: str, postgres_dsn: str, tmp_path: Path
) -> None:
    execute(postgres_dsn, "CREATE TABLE orders (order_id bigint)")
    (tmp_path / "two.py").write_text(
        "from speedlayer.supervisor import KafkaSource, SimpleStreamingEngine\n"
        "from speedlayer.workers import PostgreSQLSink\n"
        f"config = {{'bootstrap.servers': '{kafka.bootstrap_servers}', 'group.id': 'group-{topic}'}}\n"
        f"first = SimpleStreamingEngine(config, control_socket='{tmp_path}/first')\n"
        f"second = SimpleStreamingEngine(config, control_socket='{tmp_path}/second')\n"
        "for engine in (first, second):\n"
        f"    engine.dataframe(KafkaSource('{topic}')).sink(PostgreSQLSink('{postgres_dsn}', table='orders'))\n"
        "del engine\n"
    )
    command = [sys.executable, "-m", "speedlayer.supervisor", "run", "two.py"]
    unnamed = Child(command, log=tmp_path / "unnamed.log", cwd=tmp_path)
    unnamed.start()
    assert unnamed.wait(timeout_seconds=60) == ExitCode.CONFIGURATION
    assert "choose one with --engine: first, second" in unnamed.log_text()
    named = Child([*command, "--engine", "second"], log=tmp_path / "named.log", cwd=tmp_path)
    named.start()
    try:
        wait_until(lambda: answers(tmp_path / "second"), "the second engine runs", diagnose=named.log_tail)
        assert not (tmp_path / "first").exists()
        assert named.stop() == ExitCode.OK
    finally:
        named.kill()


def answers(path: Path) -> bool:
    try:
        return bool(ControlClient(path).call("status")["ok"])
    except NoDaemon:
        return False
