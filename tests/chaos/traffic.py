"""What is written to the topics meanwhile. Runs in the campaign's process, on a thread of its own.

Every message follows from its topic and its number alone, and what the brokers acknowledged is remembered by partition
and offset: so the tables can be compared with the topics even where retention has taken the messages since.
"""

from __future__ import annotations

import json
import threading
import time
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer

from chaos.stage import Stream

Lane = tuple[str, int]  # topic and partition

# Of the upserted tables: few enough that one batch holds several messages of a key.
KEYS = 400

# One message in so many is no row: it must become a dead letter.
BAD_EVERY = 211

# A message that no broker takes for so long is a failure of the campaign's own stage: one broker at a time is away.
DELIVERY_SECONDS = 240.0


def document(number: int) -> dict[str, Any]:
    """The record of this number."""
    return {
        "number": number,
        "key": key_of(number),
        "text": f'{number} said "ä\t{"x" * (number % 97)}\\"',
        "price": number % 100_000 / 4,
    }


def key_of(number: int) -> int:
    """Spread as chance would, so that the messages of one key are not evenly far apart."""
    return number * 2_654_435_761 % (1 << 32) * KEYS >> 32


def is_bad(number: int) -> bool:
    return number % BAD_EVERY == BAD_EVERY - 1


def value(number: int, stream: Stream) -> bytes:
    """The message of this number. A bad one does not fit its column, or, for an upsert, is no JSON at all: a record
    that a newer one of its key replaces within one batch is never written, and so can not turn out not to fit.
    """
    record = document(number)
    if is_bad(number) and not stream.upserts:
        record["price"] = "much"
    text = json.dumps(record, ensure_ascii=False).encode()
    return text[:-1] if is_bad(number) and stream.upserts else text


@dataclass
class Acknowledged:
    """What one partition holds: the numbers of its messages and their offsets, both ascending."""

    numbers: array[int] = field(default_factory=lambda: array("q"))
    offsets: array[int] = field(default_factory=lambda: array("q"))

    def offset_of(self, number: int) -> int | None:
        index = bisect_left(self.numbers, number)
        return self.offsets[index] if index < len(self.numbers) and self.numbers[index] == number else None


class Traffic:
    """Produces to all streams at a steady pace. A context manager; `stop` waits until everything is acknowledged."""

    def __init__(self, bootstrap_servers: str, streams: Sequence[Stream], per_second: float) -> None:
        self._streams = {stream.topic: stream for stream in streams}
        share = sum(stream.share for stream in streams)
        self._per_second = {stream.topic: per_second * stream.share / share for stream in streams}
        self._partitions = {stream.topic: stream.partitions for stream in streams}
        self._producer = Producer(
            {
                "bootstrap.servers": bootstrap_servers,
                "enable.idempotence": True,
                "acks": "all",
                "linger.ms": 5,
                "delivery.timeout.ms": int(DELIVERY_SECONDS * 1000),
                "reconnect.backoff.max.ms": 500,
                "topic.metadata.refresh.interval.ms": 2000,
                "log_level": 0,
            }
        )
        self._lock = threading.Lock()
        self._acknowledged: dict[Lane, Acknowledged] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="traffic")
        self.sent = dict.fromkeys(self._streams, 0)
        self.failures: list[str] = []

    def start(self) -> Traffic:
        self._thread.start()
        return self

    def stop(self) -> None:
        """End it, and wait until everything that was sent is acknowledged."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(DELIVERY_SECONDS + 30)
        left = self._producer.flush(DELIVERY_SECONDS)
        if left:
            self.failures.append(f"{left} messages were never acknowledged")

    def abandon(self) -> None:
        """End it, whatever is still to be acknowledged."""
        self._over.set()
        self._producer.purge()
        if self._thread.is_alive():
            self._thread.join(30)

    def grown(self, topic: str, partitions: int) -> None:
        """Write to this many partitions from now on."""
        self._partitions[topic] = partitions

    def ends(self) -> dict[Lane, int]:
        """The offset after the last acknowledged message of each partition."""
        with self._lock:
            return {lane: taken.offsets[-1] + 1 for lane, taken in self._acknowledged.items()}

    def acknowledged(self) -> dict[Lane, Acknowledged]:
        return self._acknowledged

    @property
    def total(self) -> int:
        with self._lock:
            return sum(len(taken.numbers) for taken in self._acknowledged.values())

    def _run(self) -> None:
        started = time.monotonic()
        try:
            while not self._over.is_set():
                elapsed = time.monotonic() - started
                for topic, stream in self._streams.items():
                    while self.sent[topic] < elapsed * self._per_second[topic] and not self._over.is_set():
                        self._send(stream, self.sent[topic])
                        self.sent[topic] += 1
                self._producer.poll(0.01)
        except BaseException as failure:  # told by the campaign
            self.failures.append(f"the producer failed: {failure!r}")

    def _send(self, stream: Stream, number: int) -> None:
        count = self._partitions[stream.topic]
        # The messages of one key have an order only within one partition.
        partition = (key_of(number) if stream.upserts else number) % (stream.partitions if stream.upserts else count)
        while True:
            try:
                self._producer.produce(
                    stream.topic,
                    value(number, stream),
                    key=b"%d" % key_of(number),
                    partition=partition,
                    on_delivery=lambda error, message, number=number: self._delivered(error, message, number),
                )
                return
            except BufferError:
                self._producer.poll(0.1)
            except KafkaException as error:
                # A new partition that this producer has not heard of yet.
                if error.args[0].code() != KafkaError._UNKNOWN_PARTITION:
                    raise
                partition = number % stream.partitions

    def _delivered(self, error: Any, message: Any, number: int) -> None:
        if error is not None:
            self.failures.append(f"{message.topic()} {message.partition()}: {error}")
            return
        with self._lock:
            taken = self._acknowledged.setdefault((message.topic(), message.partition()), Acknowledged())
            taken.numbers.append(number)
            taken.offsets.append(message.offset())
