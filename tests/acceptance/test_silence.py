"""A daemon that gets no message for ten seconds says why."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fixtures.daemon import Daemon, pipeline_toml
from fixtures.kafka import Broker
from fixtures.postgres import execute


@pytest.fixture
def start(kafka: Broker, postgres_dsn: str, start_daemon: Callable[..., Daemon]) -> Callable[..., Daemon]:
    """Starts a daemon on a topic and does not wait."""
    execute(postgres_dsn, "CREATE TABLE events (number int)")

    def start(topic: str, group: str) -> Daemon:
        source = pipeline_toml(
            bootstrap_servers=kafka.bootstrap_servers, group_id=group, dsn=postgres_dsn, topic=topic, table="events"
        )
        return start_daemon(source, wait=False)

    return start


def test_it_says_that_the_topic_is_empty_or_missing_or_read_to_its_end_or_all_taken(
    kafka: Broker, start: Callable[..., Daemon]
) -> None:
    empty, full = kafka.create_topic(partitions=1), kafka.create_topic(partitions=1)
    kafka.produce(full, [b'{"number": 1}'])
    # All of them at once, since each takes its ten seconds.
    daemons = {
        "the topic is empty": start(empty, empty),
        "the end of the topic is reached; everything is written": start(full, full),
        "no partition of no-such-topic is assigned to this daemon": start("no-such-topic", "no-such-topic"),
    }
    owner = daemons["the end of the topic is reached; everything is written"]
    owner.wait_until_reading()
    daemons[f"no partition of {full} is assigned to this daemon"] = start(full, full)
    paused = start(empty, empty + "-paused")
    paused.wait_until_reading()
    assert paused.call("pause")["ok"]
    daemons["it is held (paused): an operator paused it"] = paused
    for reason, daemon in daemons.items():
        line = daemon.process.wait_for_log("no message for 10 s", timeout_seconds=40)
        assert reason in line
    assert (
        "Unknown topic or partition" in daemons["no partition of no-such-topic is assigned to this daemon"].log_text()
    )
