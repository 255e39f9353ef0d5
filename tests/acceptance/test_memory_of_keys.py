"""Keys and headers count in the memory budget, although librdkafka does not count them in its prefetch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from fixtures.daemon import Daemon, pipeline_toml
from fixtures.kafka import Broker, Message
from fixtures.memory import MemoryWatch
from fixtures.postgres import execute, locked, scalar

MB = 1 << 20
BUDGET_MB = 32
MB_A_PROCESS = 70
MESSAGES = 6000
LARGE_BYTES = 50_000


def messages(where: str) -> Iterator[Message]:
    """Small values with something large beside them: 300 MB in all."""
    large = os.urandom(LARGE_BYTES)
    for number in range(MESSAGES):
        key, headers = (large, []) if where == "key" else (None, [("large", large)])
        yield Message(b'{"number": %d}' % number, key=key, headers=headers, partition=number % 2)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["key", "header"])
def test_a_backlog_of_large_keys_or_headers_waits_within_the_budget(
    kafka: Broker, postgres_dsn: str, start_daemon: Callable[..., Daemon], where: str
) -> None:
    execute(postgres_dsn, "CREATE TABLE events (number int)")
    topic = kafka.create_topic(partitions=2)
    kafka.produce(topic, messages(where))
    source = pipeline_toml(
        bootstrap_servers=kafka.bootstrap_servers,
        group_id=topic,
        dsn=postgres_dsn,
        topic=topic,
        table="events",
        workers={"count": 1},
        memory={"budget_mb": BUDGET_MB},
    )
    with locked(postgres_dsn, "events"):
        daemon = start_daemon(source, wait=False)
        daemon.wait_until_listening()
        with MemoryWatch(daemon.pid) as watch:
            daemon.process.wait_for_log("fewer messages are prefetched", timeout_seconds=60)
            daemon.wait_until(
                lambda status: "memory" in status["pipelines"][0]["holds"], "the budget is full", timeout_seconds=60
            )
    daemon.wait_until_caught_up(kafka.end_offsets(topic), topic)
    peak = watch.peak
    print(f"at most {peak.pss_bytes / MB:.0f} MB in {peak.processes} processes")
    assert peak.pss_bytes <= (BUDGET_MB + MB_A_PROCESS * peak.processes) * MB
    assert scalar(postgres_dsn, "SELECT count(*) FROM events") == MESSAGES
    assert scalar(postgres_dsn, "SELECT count(DISTINCT number) FROM events") == MESSAGES
