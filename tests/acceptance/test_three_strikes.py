"""The seed's rule, on a real database that is really slow: a lock that a flush waits for makes it slow."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fixtures.compare import assert_table_equals, values_of
from fixtures.daemon import Daemon, pipeline_toml
from fixtures.kafka import Broker
from fixtures.postgres import connect, execute, query, scalar
from fixtures.waiting import holds_for, wait_until

THRESHOLD_SECONDS = 0.4
PAUSE_SECONDS = 3.0

BRAKE = {"mode": "simple", "slow_flush_threshold": THRESHOLD_SECONDS, "max_slow_flushes": 3}


@pytest.fixture
def braked(kafka: Broker, postgres_dsn: str, start_daemon: Callable[..., Daemon]) -> Braked:
    """A pipeline with one partition and one worker, so that one flush follows the other."""
    execute(postgres_dsn, "CREATE TABLE events (number int, text text)")
    topic = kafka.create_topic(partitions=1)
    source = pipeline_toml(
        bootstrap_servers=kafka.bootstrap_servers,
        group_id=topic,
        dsn=postgres_dsn,
        topic=topic,
        table="events",
        workers={"count": 1},
        brake={**BRAKE, "pause_seconds": PAUSE_SECONDS},
        pipeline={"batch_seconds": 0.05},
    )
    return Braked(kafka, topic, postgres_dsn, start_daemon(source))


class Braked:
    """The pipeline under test, and the means to make one flush slow or normal."""

    def __init__(self, kafka: Broker, topic: str, dsn: str, daemon: Daemon) -> None:
        self.kafka, self.topic, self.dsn, self.daemon = kafka, topic, dsn, daemon
        self._next = 0

    def produce(self, count: int = 1) -> None:
        numbers = range(self._next, self._next + count)
        self._next += count
        self.kafka.produce(self.topic, [json.dumps({"number": n, "text": "x" * 20}).encode() for n in numbers])

    @contextlib.contextmanager
    def table_locked(self) -> Iterator[None]:
        with contextlib.closing(connect(self.dsn)) as connection, connection.cursor() as cursor:
            cursor.execute("BEGIN; LOCK TABLE events IN ACCESS EXCLUSIVE MODE")
            yield
            cursor.execute("ROLLBACK")

    def flush_waits(self) -> bool:
        waiting = query(
            self.dsn,
            "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'speedlayer/%%'"
            " AND datname = current_database() AND wait_event_type = 'Lock'",
        )
        return bool(waiting[0][0])

    def slow_flush(self) -> dict[str, Any]:
        """Write one message while the table is locked for longer than the threshold; returns the status after it."""
        flushes = self.daemon.pipeline()["flushes"]
        with self.table_locked():
            self.produce()
            wait_until(self.flush_waits, "the flush waits for the lock", diagnose=self.daemon.tail)
            holds_for(self.flush_waits, "the flush waits", seconds=THRESHOLD_SECONDS * 1.25)
        return self._after(flushes + 1)

    def normal_flush(self) -> dict[str, Any]:
        flushes = self.daemon.pipeline()["flushes"]
        self.produce()
        return self._after(flushes + 1)

    def _after(self, flushes: int) -> dict[str, Any]:
        self.daemon.wait_until(lambda s: s["pipelines"][0]["flushes"] == flushes, f"flush {flushes} is reported")
        return self.daemon.pipeline()

    def assert_complete(self) -> None:
        self.daemon.wait_until_caught_up(self.kafka.end_offsets(self.topic), self.topic)
        assert_table_equals(self.dsn, "events", values_of(self.kafka.read(self.topic)), ("number", "text"))


def test_slow_flushes_count_up_normal_ones_count_down_and_never_below_zero(braked: Braked) -> None:
    seen = [braked.normal_flush()["slow_count"]]
    for flush in (braked.slow_flush, braked.slow_flush, braked.normal_flush, braked.normal_flush, braked.normal_flush):
        status = flush()
        seen.append(status["slow_count"])
        assert status["overload_count"] == 0
        assert status["state"] == "running"
    assert seen == [0, 1, 2, 1, 0, 0]
    assert braked.daemon.pipeline()["last_flush_seconds"] < THRESHOLD_SECONDS
    braked.assert_complete()


def test_the_third_strike_pauses_reading_loses_nothing_and_ends_by_itself(braked: Braked) -> None:
    braked.slow_flush()
    braked.slow_flush()
    began = time.monotonic()
    tripped = braked.slow_flush()
    assert tripped["slow_count"] == 0, "the count returns to 0 when it trips"
    assert tripped["overload_count"] == 1
    assert tripped["state"] == "overloaded"
    assert "3 slow flushes" in tripped["reason"], "the reason can be read by an operator"
    assert 0 < tripped["paused_until_seconds"] <= PAUSE_SECONDS
    tripping = scalar(braked.dsn, "SELECT count(*) FROM events WHERE number = 2")
    assert tripping == 1, "the flush that tripped the brake is in the table, once"

    braked.produce(50)
    holds_for(
        lambda: scalar(braked.dsn, "SELECT count(*) FROM events") == 3,
        "nothing is written while paused",
        seconds=PAUSE_SECONDS * 0.5,
    )
    assert braked.daemon.lanes()[0]["state"] == "held"

    resumed = braked.daemon.wait_until(
        lambda s: s["pipelines"][0]["state"] == "running", "it resumes by itself", timeout_seconds=PAUSE_SECONDS * 3
    )["pipelines"][0]
    assert time.monotonic() - began >= PAUSE_SECONDS
    assert resumed["paused_until_seconds"] is None
    braked.assert_complete()
    status = braked.daemon.pipeline()
    assert (status["overload_count"], status["slow_count"]) == (1, 0)


def test_a_sink_that_overloads_in_a_worker_pauses_the_engine_and_keeps_its_batch(
    kafka: Broker, postgres_dsn: str, start_daemon: Callable[..., Daemon]
) -> None:
    execute(postgres_dsn, "CREATE TABLE events (number int, text text)")
    topic = kafka.create_topic(partitions=1)
    source = f"""
import os
from speedlayer.supervisor import KafkaSource, SimpleStreamingEngine
from speedlayer.workers import PostgreSQLSink, StreamingOverloadException

FLAG = os.environ["FLAG_FILE"]

def busy_once(record):
    if record["number"] == 3 and not os.path.exists(FLAG):
        open(FLAG, "w").close()
        raise StreamingOverloadException("the map is overwhelmed", pause_seconds={PAUSE_SECONDS})
    return record

engine = SimpleStreamingEngine(
    {{"bootstrap.servers": "{kafka.bootstrap_servers}", "group.id": "{topic}"}}, workers=1
)
stream = engine.dataframe(KafkaSource("{topic}")).map(busy_once)
stream.sink(PostgreSQLSink("{postgres_dsn}", table="events"))
if __name__ == "__main__":
    engine.run()
"""
    from fixtures.workspace import private_folder

    with private_folder("flag") as folder:
        daemon = start_daemon(source, suffix=".py", env={"FLAG_FILE": str(folder / "flag")})
        began = time.monotonic()
        kafka.produce(topic, [json.dumps({"number": n, "text": "t"}).encode() for n in range(10)])
        status = daemon.wait_until(
            lambda s: s["pipelines"][0]["overload_count"] == 1, "the overload arrives", timeout_seconds=20
        )["pipelines"][0]
        assert status["state"] == "overloaded"
        assert "the map is overwhelmed" in status["reason"]
        daemon.wait_until_caught_up(kafka.end_offsets(topic), topic)
        assert time.monotonic() - began >= PAUSE_SECONDS
        assert (folder / "flag").exists()
    assert_table_equals(postgres_dsn, "events", values_of(kafka.read(topic)), ("number", "text"))
    assert scalar(postgres_dsn, "SELECT count(*) FROM speedlayer.dead_letters") == 0
