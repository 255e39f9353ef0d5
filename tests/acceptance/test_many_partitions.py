"""Many partitions with little traffic share their transactions: a commit for each would be hundreds a second."""

from __future__ import annotations

import time
from collections.abc import Callable

from fixtures.compare import assert_table_equals, values_of
from fixtures.daemon import Daemon, pipeline_toml
from fixtures.history import WRITTEN_BY
from fixtures.kafka import Broker, PacedProducer
from fixtures.orders import EVENT_COLUMNS, EVENTS_TABLE, event
from fixtures.postgres import execute, query, scalar
from fixtures.waiting import wait_until

PARTITIONS = 200
MESSAGES_PER_SECOND = 300
MESSAGES = 6 * PARTITIONS
WORKERS = 2
BATCH_SECONDS = 0.5


def test_two_hundred_partitions_with_little_traffic_need_few_commits(
    kafka: Broker, postgres_dsn: str, start_daemon: Callable[..., Daemon]
) -> None:
    execute(postgres_dsn, f"{EVENTS_TABLE}; ALTER TABLE events ADD COLUMN {WRITTEN_BY}")
    topic = kafka.create_topic(partitions=PARTITIONS)
    daemon = start_daemon(
        pipeline_toml(
            bootstrap_servers=kafka.bootstrap_servers,
            group_id=topic,
            dsn=postgres_dsn,
            topic=topic,
            table="events",
            workers={"count": WORKERS},
            pipeline={"batch_seconds": BATCH_SECONDS},
        )
    )
    daemon.wait_until(
        lambda status: [lane["state"] for lane in status["pipelines"][0]["lanes"]] == ["fetching"] * PARTITIONS,
        "every partition is read",
    )
    began = time.monotonic()
    with PacedProducer(
        kafka, topic, lambda number: event(number, partitions=PARTITIONS), per_second=MESSAGES_PER_SECOND
    ) as producer:
        wait_until(lambda: producer.sent >= MESSAGES, "each partition has got some messages")
    daemon.wait_until_caught_up(kafka.end_offsets(topic), topic)
    seconds = time.monotonic() - began

    transactions = scalar(postgres_dsn, "SELECT count(DISTINCT written_by) FROM events")
    assert transactions <= WORKERS * (seconds / BATCH_SECONDS + 2), "each worker commits once in a batch's time"
    assert daemon.pipeline()["flushes"] == transactions
    log = kafka.read(topic)
    assert len(log) == producer.sent > MESSAGES - 1
    assert {record.partition for record in log} == set(range(PARTITIONS))
    assert_table_equals(postgres_dsn, "events", values_of(log), EVENT_COLUMNS)
    counted = query(postgres_dsn, "SELECT count(*), sum(rows) FROM speedlayer.checkpoints WHERE rows > 0")
    assert counted == [(PARTITIONS, len(log))], "each partition has its own checkpoint"
    kafka.delete_topic(topic)
