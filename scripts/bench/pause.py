"""How long reading takes to go on after a pause: librdkafka's pause and resume against unassign and assign.

Prints the median time from the resume to the first message, over several trials, for both group protocols.
"""

from __future__ import annotations

import argparse
import statistics
import time
import uuid

from confluent_kafka import Consumer, TopicPartition
from servers import broker, messages

TOPIC = "orders"
HOLD_SECONDS = 1.0


class Reader:
    """A consumer of one topic that assigns its partitions itself."""

    def __init__(self, bootstrap: str, protocol: str) -> None:
        self._pending: list[TopicPartition] = []
        conf = {
            "bootstrap.servers": bootstrap,
            "group.id": uuid.uuid4().hex,
            "group.protocol": protocol,
            "auto.offset.reset": "error",
            "enable.auto.commit": False,
            "fetch.queue.backoff.ms": 10,
        }
        if protocol == "classic":
            conf["partition.assignment.strategy"] = "cooperative-sticky"
        self.consumer = Consumer(conf)
        self.consumer.subscribe([TOPIC], on_assign=self._on_assign, on_revoke=self._on_revoke)
        while not self._pending:
            self.consumer.consume(1, 0.02)
        self.offsets = {partition.partition: 0 for partition in self._pending}
        self.assign()

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        consumer.incremental_assign([])
        self._pending.extend(partitions)

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        consumer.incremental_unassign([])

    def assign(self) -> None:
        """Read every partition from where it was left."""
        self.consumer.incremental_assign([TopicPartition(TOPIC, number, at) for number, at in self.offsets.items()])

    def partitions(self) -> list[TopicPartition]:
        """All partitions."""
        return [TopicPartition(TOPIC, number) for number in self.offsets]

    def read(self, count: int) -> None:
        """Read so many messages."""
        while count > 0:
            for message in self.consumer.consume(min(count, 2000), 0.02):
                assert message.error() is None, message.error()
                self.offsets[message.partition()] = message.offset() + 1
                count -= 1

    def idle(self) -> None:
        """Keep polling while nothing is read."""
        until = time.monotonic() + HOLD_SECONDS
        while time.monotonic() < until:
            assert not self.consumer.consume(1, 0.02), "a message came in a pause"

    def first_message_seconds(self) -> float:
        """Wait for the next message."""
        began = time.monotonic()
        self.read(1)
        return time.monotonic() - began


def by_pause(reader: Reader) -> float:
    """Pause and resume."""
    reader.consumer.pause(reader.partitions())
    reader.idle()
    reader.consumer.resume(reader.partitions())
    return reader.first_message_seconds()


def by_assignment(reader: Reader) -> float:
    """Unassign, and assign where it was left."""
    reader.consumer.incremental_unassign(reader.partitions())
    reader.idle()
    reader.assign()
    return reader.first_message_seconds()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=5)
    options = parser.parse_args()
    with broker() as kafka:
        kafka.create_topic(TOPIC, partitions=1)
        kafka.produce(TOPIC, messages(300_000, 1))
        print("\nfrom the resume to the first message, ms: median (minimum–maximum)\n")
        print("| group.protocol | pause, resume | unassign, assign |\n|---|---|---|")
        for protocol in ("classic", "consumer"):
            reader = Reader(kafka.bootstrap_servers, protocol)
            cells = []
            for way in (by_pause, by_assignment):
                times = []
                for _ in range(options.trials):
                    reader.read(10_000)
                    times.append(way(reader) * 1000)
                cells.append(f"{statistics.median(times):.0f} ({min(times):.0f}–{max(times):.0f})")
            reader.consumer.close()
            print(f"| {protocol} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
