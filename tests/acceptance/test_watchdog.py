"""What stands still is repaired, and told; what is merely slow is left alone."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from fixtures.compare import assert_table_equals
from fixtures.daemon import Daemon, pipeline_toml
from fixtures.kafka import Broker, Message
from fixtures.postgres import execute, locked, query
from fixtures.waiting import wait_until

PARTITIONS = 4
STALL_SECONDS = 10

# What a map does with a message that says so: one leaves the interpreter to the other threads, one keeps it.
STEPS = """
import ctypes
import time

def slow(record):
    time.sleep(0.1)
    return record

def _loop():
    while True:
        pass

def _keep():
    ctypes.PyDLL(None).sleep(3600)

DEEDS = {"loop": _loop, "keep": _keep}

def deadly(record):
    deed = record.pop("deed", None)
    if deed is not None:
        DEEDS[deed]()
    return record
"""


def produce(broker: Broker, topic: str, numbers: range, marks: dict[int, dict[str, Any]] | None = None) -> None:
    broker.produce(
        topic,
        [
            Message(json.dumps({"number": x, **(marks or {}).get(x, {})}).encode(), partition=x % PARTITIONS)
            for x in numbers
        ],
    )


def source(broker: Broker, topic: str, dsn: str, user_code_seconds: float = 60.0, **pipeline: Any) -> str:
    return pipeline_toml(
        bootstrap_servers=broker.bootstrap_servers,
        group_id=topic,
        dsn=dsn,
        topic=topic,
        table="events",
        workers={"count": 1},
        postgres={"dsn": dsn, "connect_timeout_seconds": 2},
        watchdog={"stall_seconds": STALL_SECONDS, "user_code_seconds": user_code_seconds},
        pipeline=pipeline,
    )


def check_rows(dsn: str, numbers: set[int]) -> None:
    assert_table_equals(dsn, "events", [{"number": number} for number in numbers], ("number",))


@pytest.mark.parametrize("deed", ["loop", "keep"])
def test_a_message_on_which_user_code_hangs_becomes_a_dead_letter(
    kafka: Broker, postgres_dsn: str, start_daemon: Callable[..., Daemon], deed: str
) -> None:
    execute(postgres_dsn, "CREATE TABLE events (number bigint)")
    topic = kafka.create_topic(partitions=PARTITIONS)
    produce(kafka, topic, range(40), {17: {"deed": deed}})
    daemon = start_daemon(
        source(kafka, topic, postgres_dsn, 1.0, map="steps:deadly"), files={"steps.py": STEPS}, wait=False
    )
    daemon.wait_until_listening()
    daemon.wait_until_caught_up(kafka.end_offsets(topic), topic)
    check_rows(postgres_dsn, set(range(40)) - {17})
    ((value, reason),) = query(postgres_dsn, "SELECT value, reason FROM speedlayer.dead_letters")
    assert json.loads(bytes(value))["number"] == 17
    assert reason == "killed its worker twice: it hung in user code for 1 s, in the phase transform"
    assert daemon.status()["repairs"]["restart the worker"] >= 2


def test_a_map_that_is_slow_over_many_records_is_left_alone(
    kafka: Broker, postgres_dsn: str, start_daemon: Callable[..., Daemon]
) -> None:
    """The batch takes several times as long as one record may."""
    execute(postgres_dsn, "CREATE TABLE events (number bigint)")
    topic = kafka.create_topic(partitions=PARTITIONS)
    produce(kafka, topic, range(80))
    daemon = start_daemon(source(kafka, topic, postgres_dsn, 2.0, map="steps:slow"), files={"steps.py": STEPS})
    daemon.wait_until_caught_up(kafka.end_offsets(topic), topic)
    check_rows(postgres_dsn, set(range(80)))
    assert max(counts for (counts,) in query(postgres_dsn, "SELECT count(*) FROM events GROUP BY xmin")) > 30
    assert daemon.status()["workers"][0]["restarts"] == 0


def test_a_flush_that_waits_for_a_lock_is_told_and_not_killed(
    kafka: Broker, postgres_dsn: str, start_daemon: Callable[..., Daemon]
) -> None:
    execute(postgres_dsn, "CREATE TABLE events (number bigint)")
    topic = kafka.create_topic(partitions=PARTITIONS)
    produce(kafka, topic, range(10))
    daemon = start_daemon(source(kafka, topic, postgres_dsn))
    daemon.wait_until_caught_up(kafka.end_offsets(topic), topic)
    with locked(postgres_dsn, "events"):
        produce(kafka, topic, range(10, 20))
        daemon.wait_until(lambda status: status["workers"][0]["long_flushes"] == 1, "the long flush is told")
        # As long again: whatever would kill it has had its time.
        told_at = time.monotonic()
        wait_until(lambda: time.monotonic() - told_at > STALL_SECONDS + 5, "as much time has passed again")
        assert daemon.status()["workers"][0]["restarts"] == 0
    daemon.wait_until_caught_up(kafka.end_offsets(topic), topic)
    check_rows(postgres_dsn, set(range(20)))
    assert not any(daemon.status()["repairs"].values())


def test_a_worker_that_is_stopped_is_restarted(
    kafka: Broker, postgres_dsn: str, start_daemon: Callable[..., Daemon]
) -> None:
    execute(postgres_dsn, "CREATE TABLE events (number bigint)")
    topic = kafka.create_topic(partitions=PARTITIONS)
    produce(kafka, topic, range(10))
    daemon = start_daemon(source(kafka, topic, postgres_dsn))
    daemon.wait_until_caught_up(kafka.end_offsets(topic), topic)
    os.kill(daemon.status()["workers"][0]["pid"], signal.SIGSTOP)
    produce(kafka, topic, range(10, 20))
    daemon.wait_until_caught_up(kafka.end_offsets(topic), topic)
    check_rows(postgres_dsn, set(range(20)))
    assert "has not given a sign of life for 10 s" in daemon.log_text()


def test_the_lag_grows_while_the_pipeline_is_paused(
    kafka: Broker, postgres_dsn: str, start_daemon: Callable[..., Daemon]
) -> None:
    execute(postgres_dsn, "CREATE TABLE events (number bigint)")
    topic = kafka.create_topic(partitions=PARTITIONS)
    produce(kafka, topic, range(10))
    daemon = start_daemon(source(kafka, topic, postgres_dsn))
    daemon.wait_until_caught_up(kafka.end_offsets(topic), topic)
    assert daemon.call("pause")["ok"]
    for begin, end in ((10, 110), (110, 310)):
        produce(kafka, topic, range(begin, end))
        daemon.wait_until(lambda status: status["pipelines"][0]["lag"] == end - 10, f"the lag is {end - 10}")  # noqa: B023
    assert query(postgres_dsn, "SELECT count(*) FROM events") == [(10,)]
