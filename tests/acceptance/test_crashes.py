"""Kill -9, again and again, while messages flow into a table without a key: nothing is lost, nothing is there twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fixtures.compare import assert_table_equals, values_of
from fixtures.daemon import Daemon, pipeline_toml
from fixtures.kafka import Broker, PacedProducer
from fixtures.killing import Fate, Killer
from fixtures.open_flushes import OpenFlushes
from fixtures.orders import EVENT_COLUMNS, EVENTS_TABLE, event
from fixtures.postgres import PostgresServer, execute, query
from fixtures.proxy import Proxy
from fixtures.waiting import wait_until

MESSAGES_PER_SECOND = 2_000


@pytest.mark.slow
def test_rows_equal_the_log_although_workers_and_supervisor_are_killed_in_the_middle_of_flushes(
    kafka: Broker,
    postgres: PostgresServer,
    postgres_dsn: str,
    start_proxy: Callable[..., Proxy],
    start_daemon: Callable[..., Daemon],
) -> None:
    execute(postgres_dsn, EVENTS_TABLE)
    topic = kafka.create_topic(partitions=4)
    proxy = start_proxy(postgres.host, postgres.port).start()
    source = pipeline_toml(
        bootstrap_servers=kafka.bootstrap_servers,
        group_id=topic,
        dsn=postgres_dsn.replace(f":{postgres.port}/", f":{proxy.port}/"),
        topic=topic,
        table="events",
        kafka={"session.timeout.ms": 3000},  # how long the group waits for a supervisor that was killed
        pipeline={"batch_seconds": 0.01},
    )
    daemon = start_daemon(source)
    producing = PacedProducer(kafka, topic, event, per_second=MESSAGES_PER_SECOND)
    with OpenFlushes(postgres_dsn, "events") as flushes, producing as producer:
        killer = Killer(daemon, flushes, proxy)
        wait_until(lambda: query(postgres_dsn, "SELECT 1 FROM events LIMIT 1"), "rows flow", diagnose=daemon.tail)
        for _ in range(2):
            killer.worker_in_flush()
            killer.worker_at_checkpoint()
            killer.supervisor_in_flush()
            killer.worker_in_flush()
            killer.worker_at_commit(Fate.DELIVERED)
            killer.worker_in_flush()
            killer.worker_at_checkpoint()
            killer.supervisor_at_checkpoint()
            killer.worker_at_commit(Fate.SILENT)
            killer.worker_in_flush()
        killer.worker_while_it_boots()
        killer.worker_at_commit(Fate.DROPPED)
        killer.everything_in_flush()
        killer.supervisor_at_commit(Fate.DELIVERED)
        produced_before_the_last_crash = producer.sent
        wait_until(lambda: producer.sent > produced_before_the_last_crash, "messages outlast the crashes")

    assert killer.count("worker") + killer.count("supervisor") >= 20
    assert killer.count("supervisor") >= 5
    assert killer.with_open_flush >= 10
    assert killer.between_rows_and_commit >= 3
    assert "an old owner's that was stopped in a transaction" in daemon.log_text(), "a silent victim's backend is ended"
    ends = kafka.end_offsets(topic)
    daemon.wait_until_caught_up(ends, topic)
    assert_table_equals(postgres_dsn, "events", values_of(kafka.read(topic)), EVENT_COLUMNS)
    assert query(postgres_dsn, "SELECT sum(rows), sum(filtered), sum(dead_lettered) FROM speedlayer.checkpoints") == [
        (producer.sent, 0, 0)
    ], "every message is counted once"
