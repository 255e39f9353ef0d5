"""An embedded Kafka: the mock cluster of librdkafka, which lives in the memory of a producer (demo process).

It listens on loopback and serves other processes: produce, fetch, consumer groups, offsets. It is right for a machine
with nothing but Python on it, and no stand-in for a real broker: it holds about 5 MB a partition and forgets the oldest
messages beyond that, has no topic ids, and can neither make nor delete topics (a metadata request makes them).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

# What a partition of the mock cluster may hold unread. It drops the oldest messages at 5 MB, so this leaves a margin.
BACKLOG_LIMIT_BYTES = 4 * 1024 * 1024

# A new topic gets this many partitions, and there is no way to ask for another number.
PARTITIONS = 4

METADATA_TIMEOUT_SECONDS = 10.0

# With librdkafka's defaults a second member of the group waits for ever; with these it is in within seconds.
CONSUMER_PROPERTIES = {"session.timeout.ms": "6000", "heartbeat.interval.ms": "500"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbeddedKafka:
    """A running mock cluster: where it listens, and what its consumers have to set."""

    bootstrap_servers: str
    consumer_properties: dict[str, str] = field(default_factory=lambda: dict(CONSUMER_PROPERTIES))


@contextlib.contextmanager
def embedded_kafka(topic: str) -> Iterator[EmbeddedKafka]:
    """Run a mock cluster with one broker and one topic for the length of the block."""
    from confluent_kafka import Producer

    # The cluster ends with the producer that made it; this one never sends a message.
    host = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "mock"}, logger=_log)
    try:
        metadata = host.list_topics(topic, timeout=METADATA_TIMEOUT_SECONDS)
        brokers = ",".join(f"{broker.host}:{broker.port}" for broker in metadata.brokers.values())
        yield EmbeddedKafka(brokers)
    finally:
        del host


def backlog_problem(unread_bytes: float, partitions: int = PARTITIONS) -> str | None:
    """Say why the mock cluster can not hold this many unread bytes, or None if it can."""
    limit = BACKLOG_LIMIT_BYTES * partitions
    if unread_bytes <= limit:
        return None
    return (
        f"the backlog may reach {unread_bytes / 1e6:.1f} MB, and the embedded broker holds {limit / 1e6:.1f} MB "
        f"({BACKLOG_LIMIT_BYTES / 1e6:.1f} MB for each of {partitions} partitions) before it forgets messages; lower "
        "--rate or --seconds, or name a real broker with --broker"
    )
