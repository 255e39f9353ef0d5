"""The flush thread of one pipeline in a worker: flights in, reports out (worker processes).

Each pipeline has a thread of its own, so that one whose table is locked or missing holds up no other.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace

import msgspec

from speedlayer.workers.errors import FateUnknown, SinkError
from speedlayer.workers.protocol import (
    EXIT_OUT_OF_MEMORY,
    FailureKind,
    Flight,
    FlushBlocked,
    FlushFailed,
    FlushReport,
    LaneKey,
)
from speedlayer.workers.reporter import Reporter, cut
from speedlayer.workers.retry import FINISHING_WAIT_SECONDS, Block, block_of, let_go_of_frames, with_patience
from speedlayer.workers.sinks.base import SinkSession, WriteOutcome


class FlushDesk:
    """Writes the flights of one pipeline in their order, each for as long as it takes."""

    def __init__(
        self, session: SinkSession, reporter: Reporter, epoch_of: Callable[[LaneKey], int], *, pipeline: str
    ) -> None:
        self._session = session
        self._reporter = reporter
        self._epoch_of = epoch_of
        self._pipeline = pipeline
        self._inbox: queue.SimpleQueue[Flight | None] = queue.SimpleQueue()
        self._finishing = threading.Event()

    def put(self, flight: Flight) -> None:
        """Take in a flight (any thread)."""
        self._inbox.put(flight)

    def finish(self) -> None:
        """No flight comes any more: write what is here, without patience for what can not be written (any thread)."""
        self._finishing.set()
        self._inbox.put(None)

    def serve(self) -> None:
        """Work until the inbox is done; the thread's target."""
        while self._handle_next():
            pass

    def _handle_next(self) -> bool:
        # No name outlives this call: a flight's bytes are given back before the next one is waited for.
        flight = self._inbox.get()
        if flight is None:
            return False
        self._handle(flight)
        return True

    def _handle(self, flight: Flight) -> None:
        taken_at = time.monotonic()
        failures = 0

        def on_blocked(block: Block, retry_seconds: float, attempt: int) -> None:
            nonlocal failures
            failures = attempt
            self._reporter.send(
                FlushBlocked(
                    flight.flight_id,
                    flight.pipeline,
                    block.kind,
                    cut(block.reason),
                    cut(block.remedy),
                    block.sqlstate,
                    retry_seconds,
                    attempt,
                )
            )

        try:
            outcome = with_patience(
                lambda: self._write(flight),
                on_blocked=on_blocked,
                sleep=self._sleep,
                finishing=self._finishing.is_set,
            )
        except BaseException as error:
            self._report_failure(flight, error)
            let_go_of_frames(error)
            return
        self._reporter.send(
            FlushReport(
                flight.flight_id,
                flight.pipeline,
                outcome.duration_seconds,
                time.monotonic() - taken_at,
                outcome.rows,
                outcome.filtered,
                outcome.dead_lettered,
                failures,
                list(outcome.fenced),
            )
        )

    def _write(self, flight: Flight) -> WriteOutcome:
        """Write what may still be written: a part whose lane was claimed again since is fenced without a question."""
        stale = [index for index, part in enumerate(flight.parts) if part.epoch < self._epoch_of(part.lane)]
        if not stale:
            return self._write_or_die(flight)
        fresh = [index for index in range(len(flight.parts)) if index not in set(stale)]
        if not fresh:
            return WriteOutcome(0.0, 0, 0, 0, tuple(stale))
        outcome = self._write_or_die(msgspec.structs.replace(flight, parts=[flight.parts[index] for index in fresh]))
        return replace(outcome, fenced=tuple(sorted([*stale, *(fresh[index] for index in outcome.fenced)])))

    def _write_or_die(self, flight: Flight) -> WriteOutcome:
        """Write it; without memory the process ends, so that the next one begins with all that there is.

        Trying again here would fail for ever. If the supervisor sees that it happens while the same messages are
        decoded or transformed, it sends fewer of them at a time, and finds the one that takes too much.
        """
        try:
            return self._session.write(flight)
        except MemoryError as error:
            let_go_of_frames(error)
            try:
                self._reporter.log(
                    logging.CRITICAL,
                    f"no memory is left for a flight of {self._pipeline}; the worker ends, and is started again",
                    {"pipeline": self._pipeline, "flight_id": flight.flight_id},
                )
            finally:
                os._exit(EXIT_OUT_OF_MEMORY)

    def _report_failure(self, flight: Flight, error: BaseException) -> None:
        if isinstance(error, FateUnknown):
            kind, reason = FailureKind.FATE_UNKNOWN, str(error)
        else:
            kind, reason = FailureKind.ABANDONED, block_of(error).reason
            self._tell_of_a_fault(flight, error)
        sqlstate = error.sqlstate if isinstance(error, SinkError) else None
        self._reporter.send(FlushFailed(flight.flight_id, flight.pipeline, kind, cut(reason), sqlstate))

    def _tell_of_a_fault(self, flight: Flight, error: BaseException) -> None:
        """Log the traceback of what no failure of the sink explains."""
        if block_of(error).internal:
            self._reporter.log(
                logging.ERROR,
                "a flush failed on a fault in the code; its partitions are claimed and read again\n"
                + "".join(traceback.format_exception(error)[-6:]),
                {"pipeline": self._pipeline, "flight_id": flight.flight_id},
            )

    def _sleep(self, seconds: float) -> None:
        """Wait; a request to finish ends a long wait, and what is left of the attempts is made at short ones."""
        if self._finishing.is_set():
            time.sleep(min(seconds, FINISHING_WAIT_SECONDS))
        else:
            self._finishing.wait(seconds)
