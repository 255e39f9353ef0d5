"""A daemon that the tests start, hurt and stop leaves nothing behind, and what it wrote can be compared."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable

import psutil
import pytest

from fixtures.compare import assert_table_equals, values_of
from fixtures.daemon import Daemon, pipeline_toml, toml
from fixtures.kafka import Broker, Message
from fixtures.memory import MemoryWatch
from fixtures.postgres import execute
from fixtures.processes import lives
from fixtures.waiting import holds_for, wait_until

COLUMNS = ("id", "text")


@pytest.fixture
def source(kafka: Broker, postgres_dsn: str, topic: str) -> str:
    execute(postgres_dsn, "CREATE TABLE sunk (id bigint, text text)")
    return pipeline_toml(
        bootstrap_servers=kafka.bootstrap_servers,
        group_id=f"group-of-{topic}",
        dsn=postgres_dsn,
        topic=topic,
        table="public.sunk",
        workers={"count": 2},
    )


def produce(kafka: Broker, topic: str, first: int, count: int) -> None:
    kafka.produce(topic, [Message(json.dumps({"id": n, "text": "x"}).encode()) for n in range(first, first + count)])


def test_a_killed_daemon_takes_its_workers_along_and_starts_again(
    kafka: Broker, topic: str, postgres_dsn: str, source: str, start_daemon: Callable[..., Daemon]
) -> None:
    daemon = start_daemon(source)
    workers = [psutil.Process(pid) for pid in daemon.wait_for_workers(2)]
    produce(kafka, topic, 0, 2_000)
    daemon.wait_until_caught_up(kafka.end_offsets(topic), topic)
    daemon.kill()
    assert not any(map(lives, workers))
    daemon.start()
    produce(kafka, topic, 2_000, 2_000)
    daemon.wait_until_caught_up(kafka.end_offsets(topic), topic)
    assert daemon.stop() == 0, daemon.tail()
    assert_table_equals(postgres_dsn, "sunk", values_of(kafka.read(topic)), COLUMNS)


def test_a_killed_worker_is_replaced(source: str, start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(source)
    (victim, other) = daemon.wait_for_workers(2)
    daemon.kill_worker(victim)
    daemon.wait_until(lambda status: victim not in [one["pid"] for one in status["workers"]], "the victim is gone")
    pids = daemon.wait_for_workers(2)
    assert other in pids
    assert victim not in pids


def test_a_frozen_daemon_says_nothing_until_it_is_thawed(source: str, start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(source)
    workers = daemon.wait_for_workers(2)
    daemon.freeze(workers=True)
    for pid in (daemon.pid, *workers):
        assert psutil.Process(pid).status() == psutil.STATUS_STOPPED
    holds_for(lambda: psutil.Process(daemon.pid).status() == psutil.STATUS_STOPPED, "it is stopped", seconds=0.3)
    daemon.thaw()
    assert daemon.status()["state"] == "running"


def test_a_frozen_daemon_is_cleaned_up(source: str, start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(source)
    family = [psutil.Process(pid) for pid in (daemon.pid, *daemon.wait_for_workers(2))]
    daemon.freeze(workers=True)
    daemon.close()
    assert not any(map(lives, family))


def test_the_memory_of_all_processes_is_summed(source: str, start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(source)
    daemon.wait_for_workers(2)
    with MemoryWatch(daemon.pid, interval_seconds=0.02) as watch:
        wait_until(lambda: len(watch.samples) >= 5, "five samples are taken")
    assert watch.peak.processes >= 3
    one = psutil.Process(daemon.pid).memory_full_info().pss
    assert one < watch.peak.pss_bytes < 20 * one


def test_a_daemon_that_ends_at_once_is_told_with_its_log(start_daemon: Callable[..., Daemon]) -> None:
    with pytest.raises(AssertionError, match=r"the daemon ended with 3(?s:.*)pipeline\.toml"):
        start_daemon("[kafka]\nnonsense = 1\n")


@pytest.mark.parametrize(
    "start", ["child.start()", "thread = Thread(target=child.start); thread.start(); thread.join()"]
)
def test_a_child_dies_with_the_test_run(start: str) -> None:
    """Asked of the kernel at its start, so that it holds however the test run ends."""
    import subprocess
    import sys

    code = (
        "import os, pathlib, sys, tempfile\n"
        "from threading import Thread\n"
        "from fixtures.processes import Child\n"
        "child = Child(['sleep', '600'], log=pathlib.Path(tempfile.mkdtemp(), 'log'))\n"
        f"{start}\n"
        "print(child.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    child = psutil.Process(pid)
    wait_until(lambda: child.name() == "sleep", "the child has become its command")
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    wait_until(lambda: not lives(child), "the child is gone")


def test_toml_is_written_as_it_is_read() -> None:
    import sys

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    settings = {
        "kafka": {"bootstrap.servers": 'a"b\\c', "n": 1, "on": True},
        "pipelines": [{"name": "x", "topics": ["a", "b"], "brake": {"pause_seconds": 0.5}}, {"name": "y"}],
    }
    assert tomllib.loads(toml(settings)) == settings
