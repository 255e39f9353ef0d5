"""SIGTERM under load: exit 0 within the deadline, and nothing is flushed twice after the next start."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable

import pytest

from fixtures.compare import assert_table_equals, values_of
from fixtures.daemon import EXIT_OK, Daemon, pipeline_toml
from fixtures.kafka import Broker, PacedProducer
from fixtures.postgres import execute, locked, scalar

DEADLINE_SECONDS = 8.0
COLUMNS = ("number", "text")


def event(number: int) -> bytes:
    return json.dumps({"number": number, "text": f"event {number}"}).encode()


def source(bootstrap: str, topic: str, dsn: str) -> str:
    return pipeline_toml(
        bootstrap_servers=bootstrap,
        group_id=topic,
        dsn=dsn,
        topic=topic,
        table="events",
        shutdown={"deadline_seconds": DEADLINE_SECONDS},
        pipeline={"batch_rows": 500},
    )


def rows(dsn: str) -> int:
    return int(scalar(dsn, "SELECT count(*) FROM events"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_drains_and_exits_with_0(
    kafka: Broker, postgres_dsn: str, start_daemon: Callable[..., Daemon], number: signal.Signals
) -> None:
    execute(postgres_dsn, "CREATE TABLE events (number int, text text)")
    topic = kafka.create_topic(partitions=2)
    daemon = start_daemon(source(kafka.bootstrap_servers, topic, postgres_dsn))
    with PacedProducer(kafka, topic, event, per_second=3000) as producer:
        daemon.wait_until(lambda s: s["pipelines"][0]["rows"] > 3000, "rows flow")
        began = time.monotonic()
        assert daemon.stop(number) == EXIT_OK
        assert time.monotonic() - began < DEADLINE_SECONDS
        written = rows(postgres_dsn)
        checkpointed = int(scalar(postgres_dsn, "SELECT sum(next_offset) FROM speedlayer.checkpoints"))
        assert written == checkpointed, "rows and checkpoints agree after the stop"
        daemon.start()
        daemon.wait_until(lambda s: s["pipelines"][0]["rows"] > 3000, "rows flow again")
        producer.stop()
    daemon.wait_until_caught_up(kafka.end_offsets(topic), topic)
    assert_table_equals(postgres_dsn, "events", values_of(kafka.read(topic)), COLUMNS)


def test_it_stops_within_the_deadline_although_the_table_is_locked(
    kafka: Broker, postgres_dsn: str, start_daemon: Callable[..., Daemon]
) -> None:
    execute(postgres_dsn, "CREATE TABLE events (number int, text text)")
    topic = kafka.create_topic(partitions=2)
    daemon = start_daemon(source(kafka.bootstrap_servers, topic, postgres_dsn))
    with locked(postgres_dsn, "events"):
        kafka.produce(topic, map(event, range(5000)))
        daemon.wait_until(lambda s: s["pipelines"][0]["flights"] > 0, "a flush waits")
        began = time.monotonic()
        assert daemon.stop(timeout_seconds=DEADLINE_SECONDS + 10) == EXIT_OK
        assert time.monotonic() - began < DEADLINE_SECONDS + 5
    daemon.start()
    daemon.wait_until_caught_up(kafka.end_offsets(topic), topic)
    assert_table_equals(postgres_dsn, "events", values_of(kafka.read(topic)), COLUMNS)


def test_a_second_signal_hurries_the_stop(
    kafka: Broker, postgres_dsn: str, start_daemon: Callable[..., Daemon]
) -> None:
    execute(postgres_dsn, "CREATE TABLE events (number int, text text)")
    topic = kafka.create_topic(partitions=1)
    daemon = start_daemon(source(kafka.bootstrap_servers, topic, postgres_dsn))
    with locked(postgres_dsn, "events"):
        kafka.produce(topic, map(event, range(500)))
        daemon.wait_until(lambda s: s["pipelines"][0]["flights"] > 0, "a flush waits")
        began = time.monotonic()
        daemon.process.send(signal.SIGTERM)
        daemon.process.wait_for_log("stopping (SIGTERM)")
        assert daemon.stop() == EXIT_OK
        assert time.monotonic() - began < DEADLINE_SECONDS / 2, "it did not wait for the deadline"
    daemon.start()
    daemon.wait_until_caught_up(kafka.end_offsets(topic), topic)
    assert_table_equals(postgres_dsn, "events", values_of(kafka.read(topic)), COLUMNS)


def test_it_stops_within_the_deadline_with_the_broker_out_of_reach(
    start_broker: Callable[..., Broker], postgres_dsn: str, start_daemon: Callable[..., Daemon]
) -> None:
    broker = start_broker(proxied=True)
    assert broker.proxy is not None
    execute(postgres_dsn, "CREATE TABLE events (number int, text text)")
    topic = broker.create_topic(partitions=2)
    daemon = start_daemon(source(broker.proxied_bootstrap_servers, topic, postgres_dsn))
    with PacedProducer(broker, topic, event, per_second=2000) as producer:
        daemon.wait_until(lambda s: s["pipelines"][0]["rows"] > 1000, "rows flow")
        broker.proxy.deaf()
        began = time.monotonic()
        assert daemon.stop(timeout_seconds=60) == EXIT_OK
        assert time.monotonic() - began < DEADLINE_SECONDS + 6, "leaving the group has a bound of its own"
        broker.proxy.heal()
        daemon.start()
        daemon.wait_until(lambda s: s["pipelines"][0]["rows"] > 1000, "rows flow again")
        producer.stop()
    daemon.wait_until_caught_up(broker.end_offsets(topic), topic)
    assert_table_equals(postgres_dsn, "events", values_of(broker.read(topic)), COLUMNS)
