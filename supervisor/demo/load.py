"""Produces the scenario's messages at their pace, and logs each one (demo process, a thread of its own).

The log is what the run is judged by: every message that Kafka acknowledged must be a row or a dead letter at the end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional

from speedlayer.supervisor.demo.orders import make_order
from speedlayer.supervisor.demo.scenario import Scenario
from speedlayer.supervisor.errors import SpeedlayerError

# The pace is kept in steps of this length: short enough to look steady, long enough to cost nothing.
STEP_SECONDS = 0.01

# Messages that go out in one step at most, so that a stop is noticed soon, whatever the rate.
STEP_MESSAGES = 5000

# How long the last messages may take to be acknowledged.
FLUSH_TIMEOUT_SECONDS = 30.0

PRODUCER_PROPERTIES: Mapping[str, Any] = {
    # Without it a retry may write a message twice, and the audit would blame the daemon.
    "enable.idempotence": True,
    "linger.ms": 5,
    "message.timeout.ms": 60_000,
    # Its lines would tear the live view; what matters comes back with the deliveries.
    "log_level": 0,
}


class LoadError(SpeedlayerError):
    """The messages could not be produced, so the run proves nothing."""


class Load:
    """A thread that produces between `start` and the scenario's end (or `stop`)."""

    def __init__(self, kafka: Mapping[str, Any], topic: str, scenario: Scenario, folder: Path) -> None:
        from confluent_kafka import Producer

        self._producer = Producer({**PRODUCER_PROPERTIES, **kafka})
        self._topic = topic
        self._scenario = scenario
        self.log_path = folder / "produced.tsv"
        self.broken_path = folder / "broken.tsv"
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self._failure: Optional[BaseException] = None
        self.sent = 0
        self.acknowledged = 0
        # The offset after the last acknowledged message of each partition.
        self.ends: dict[int, int] = {}

    def start(self) -> None:
        """Begin to produce."""
        self._thread.start()

    def stop(self) -> None:
        """Stop producing, whether or not the scenario is over."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def finished(self) -> bool:
        """Whether all messages of the scenario were acknowledged. Raises `LoadError` if one was not."""
        if self._failure is not None:
            raise LoadError(f"the messages could not be produced: {self._failure}") from self._failure
        return self._thread.ident is not None and not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with self.log_path.open("w", encoding="utf-8") as log, self.broken_path.open("wb") as broken:
                self._produce(log, broken)
            left = self._producer.flush(FLUSH_TIMEOUT_SECONDS)
            if left:
                raise LoadError(f"{left} messages were not acknowledged within {FLUSH_TIMEOUT_SECONDS:g} s")
        except Exception as error:
            self._failure = error

    def _produce(self, log: Any, broken: Any) -> None:
        started, total = time.monotonic(), self._scenario.messages
        while self.sent < total and not self._stopping.wait(STEP_SECONDS):
            due = self._scenario.due(time.monotonic() - started)
            for number in range(self.sent, min(due, self.sent + STEP_MESSAGES)):
                created_at = datetime.now(timezone.utc).isoformat()
                order = make_order(number, created_at)
                self._send(order.key, order.value)
                if order.log_line is None:
                    broken.write(b"\\\\x" + order.value.hex().encode() + b"\n")
                else:
                    log.write(order.log_line)
                self.sent = number + 1
            self._producer.poll(0)
            if self._failure is not None:
                return

    def _send(self, key: bytes, value: bytes) -> None:
        while True:
            try:
                self._producer.produce(self._topic, value, key, on_delivery=self._delivered)
                return
            except BufferError:  # the broker is slower than we are
                self._producer.poll(0.05)

    def _delivered(self, error: Any, message: Any) -> None:
        if error is not None:
            self._failure = LoadError(str(error))
            return
        self.acknowledged += 1
        self.ends[message.partition()] = message.offset() + 1
