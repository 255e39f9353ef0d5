"""A message that kills its worker becomes a dead letter, alone; nothing is lost, written twice or out of order."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from fixtures.compare import assert_table_equals
from fixtures.daemon import Daemon, pipeline_toml
from fixtures.kafka import Broker, Message
from fixtures.postgres import execute, query
from fixtures.waiting import wait_until

PARTITIONS = 4

# Some fifteen workers start, one after the other, for each guilty message: a few seconds, and more on a busy machine.
SEARCH_SECONDS = 240.0

TABLE = "CREATE TABLE events (number bigint, arrived bigserial)"

# What a map does with a message that says so. Each is beyond what `try` could catch in the worker.
STEPS = """
import ctypes, os, resource, time

def _exhaust():
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20), hard))
    kept = []
    while True:
        kept.append(bytearray(8 << 20))

DEEDS = {
    "segfault": lambda: ctypes.string_at(0),
    "exit": lambda: os._exit(7),
    "memory": _exhaust,
}

def deadly(record):
    deed = record.pop("deed", None)
    if deed is not None:
        DEEDS[deed]()
    return record

def slow(record):
    if record.pop("slow", False):
        with open("mapping.new", "w") as file:
            file.write(str(os.getpid()))
        os.rename("mapping.new", "mapping")
        time.sleep(1.0)
    return record
"""

SAYS = {
    "segfault": "killed its worker twice: signal 11 (SIGSEGV), in the phase transform",
    "exit": "killed its worker twice: exit code 7, in the phase transform",
    "memory": "killed its worker twice: no memory was left, in the phase transform",
}


def produce(broker: Broker, topic: str, count: int, marks: dict[int, dict[str, Any]]) -> None:
    """Numbered messages that go round the partitions; ``marks`` adds fields to some of them."""
    broker.produce(
        topic,
        [
            Message(json.dumps({"number": number, **marks.get(number, {})}).encode(), partition=number % PARTITIONS)
            for number in range(count)
        ],
    )


def source(broker: Broker, topic: str, dsn: str, function: str, workers: int, **pipeline: Any) -> str:
    return pipeline_toml(
        bootstrap_servers=broker.bootstrap_servers,
        group_id=topic,
        dsn=dsn,
        topic=topic,
        table="events",
        workers={"count": workers},
        pipeline={"map": f"steps:{function}", **pipeline},
    )


def numbers_of_dead_letters(dsn: str) -> list[int]:
    found = query(dsn, "SELECT value FROM speedlayer.dead_letters")
    return sorted(json.loads(bytes(value))["number"] for (value,) in found)


def check_rows(dsn: str, numbers: Collection[int]) -> None:
    """Exactly these numbers are rows, each once, and those of one partition in their order."""
    assert_table_equals(dsn, "events", [{"number": number} for number in numbers], ("number",))
    setbacks = query(
        dsn,
        "SELECT number, before FROM (SELECT number, lag(number) OVER (PARTITION BY number %% %s ORDER BY arrived) AS"
        " before FROM events) AS pairs WHERE before >= number",
        (PARTITIONS,),
    )
    assert setbacks == []


def deaths(daemon: Daemon) -> int:
    return sum(int(worker["restarts"]) for worker in daemon.status()["workers"])


@pytest.mark.parametrize("workers", [1, 2])
def test_exactly_the_messages_that_kill_become_dead_letters(
    kafka: Broker, postgres_dsn: str, start_daemon: Callable[..., Daemon], workers: int
) -> None:
    execute(postgres_dsn, TABLE)
    topic = kafka.create_topic(partitions=PARTITIONS)
    count = 8000
    # Two in one batch, one in the partition beside it, one far behind, each in its own way.
    guilty = {400: "segfault", 1600: "exit", 401: "memory", 7999: "segfault"}
    produce(kafka, topic, count, {number: {"deed": deed} for number, deed in guilty.items()})
    daemon = start_daemon(source(kafka, topic, postgres_dsn, "deadly", workers), files={"steps.py": STEPS}, wait=False)
    daemon.wait_until_listening()
    daemon.wait_until_caught_up(kafka.end_offsets(topic), topic, timeout_seconds=SEARCH_SECONDS)

    assert numbers_of_dead_letters(postgres_dsn) == sorted(guilty)
    check_rows(postgres_dsn, set(range(count)) - guilty.keys())
    reasons = query(postgres_dsn, "SELECT value, reason FROM speedlayer.dead_letters")
    for value, reason in reasons:
        assert reason == SAYS[json.loads(bytes(value))["deed"]]
    counted = query(postgres_dsn, "SELECT sum(rows), sum(filtered), sum(dead_lettered) FROM speedlayer.checkpoints")
    assert [tuple(map(int, row)) for row in counted] == [(count - len(guilty), 0, len(guilty))]
    pipeline = daemon.pipeline()
    assert (pipeline["condemned"], pipeline["dead_lettered"], pipeline["quarantined_lanes"]) == (4, 4, 0)
    log = daemon.log_text()
    assert log.count("it becomes a dead letter") == len(guilty)
    assert "leaves quarantine" in log


def test_one_message_among_thousands_is_found_in_some_log2_deaths(
    kafka: Broker, postgres_dsn: str, start_daemon: Callable[..., Daemon]
) -> None:
    execute(postgres_dsn, TABLE)
    topic = kafka.create_topic(partitions=PARTITIONS)
    count = 4 * 8192
    produce(kafka, topic, count, {4: {"deed": "segfault"}})
    daemon = start_daemon(source(kafka, topic, postgres_dsn, "deadly", 2), files={"steps.py": STEPS}, wait=False)
    daemon.wait_until_listening()
    daemon.wait_until_caught_up(kafka.end_offsets(topic), topic, timeout_seconds=SEARCH_SECONDS)
    assert numbers_of_dead_letters(postgres_dsn) == [4]
    check_rows(postgres_dsn, set(range(count)) - {4})
    # Two deaths of the whole batch, one for each half of it, and the second one of the message alone.
    assert deaths(daemon) <= 2 + math.ceil(math.log2(10_000)) + 1


def test_the_rest_flows_on_while_a_message_is_searched_for(
    kafka: Broker, postgres_dsn: str, start_daemon: Callable[..., Daemon]
) -> None:
    """Partitions that are not suspected are written while the search still goes on, by the other worker."""
    execute(postgres_dsn, TABLE)
    topic = kafka.create_topic(partitions=PARTITIONS)
    daemon = start_daemon(source(kafka, topic, postgres_dsn, "deadly", 2), files={"steps.py": STEPS})
    guilty = range(0, 8000, 4)  # every message of partition 0: the search never comes to an end here
    produce(kafka, topic, 8000, {number: {"deed": "segfault"} for number in guilty})
    ends = kafka.end_offsets(topic)
    daemon.wait_until(
        lambda status: (
            all(
                lane["next_offset"] == ends[lane["partition"]] or lane["partition"] == 0
                for lane in status["pipelines"][0]["lanes"]
            )
            and status["pipelines"][0]["quarantined_lanes"] == 1
        ),
        "the other partitions are written",
    )
    check_rows(postgres_dsn, [number for number in range(8000) if number % 4])


def test_a_kill_from_outside_makes_no_dead_letter(
    kafka: Broker, postgres_dsn: str, start_daemon: Callable[..., Daemon]
) -> None:
    """Workers are killed in the middle of a map, again and again over the same messages: all of them become rows."""
    execute(postgres_dsn, TABLE)
    topic = kafka.create_topic(partitions=PARTITIONS)
    produce(kafka, topic, 400, {200: {"slow": True}})
    daemon = start_daemon(source(kafka, topic, postgres_dsn, "slow", 1), files={"steps.py": STEPS}, wait=False)
    flag: Path = daemon.folder / "mapping"
    for _ in range(4):
        wait_until(flag.exists, "the map is under way", diagnose=daemon.tail)
        pid = int(flag.read_text())
        flag.unlink()
        daemon.kill_worker(pid)
    daemon.wait_until_caught_up(kafka.end_offsets(topic), topic, timeout_seconds=SEARCH_SECONDS)
    assert numbers_of_dead_letters(postgres_dsn) == []
    check_rows(postgres_dsn, range(400))
    log = daemon.log_text()
    assert "a worker died over these messages (signal 9 (SIGKILL), in the phase transform)" in log
    assert "the partition is in quarantine" in log
    assert "leaves quarantine" in log
