"""A worker's voice: reports on the pipe, one at a time, each in one write (worker processes)."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any, Protocol

from speedlayer.workers.protocol import (
    Alive,
    FailureKind,
    Flight,
    FlushFailed,
    FlushReport,
    Phase,
    PhaseEntered,
    Report,
    WorkerLog,
    encode_report,
)

# Without a reader there is nobody left to work for.
EXIT_ORPHANED = 4

# A report is shorter than PIPE_BUF, and carries at most two texts.
TEXT_LIMIT_BYTES = 1_500
FIELD_LIMIT_BYTES = 150
FIELDS_LIMIT = 8

# What a sign of life names of pipelines, each with so much around its name.
MOVED_LIMIT_BYTES = 3_000
FRAMING_BYTES = 5


class _Pipe(Protocol):
    def send_bytes(self, buf: bytes, /) -> None: ...


class Reporter:
    """Writes reports from any thread."""

    def __init__(self, pipe: _Pipe, log_level: int = logging.INFO) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self.log_level = log_level
        self.orders_taken = 0  # by the order thread; each sign of life tells it
        self._counters: dict[str, Callable[[], int]] = {}
        self._counted: dict[str, int] = {}

    def send(self, report: Report) -> None:
        """Write a report; ends the process if nobody reads any more."""
        try:
            frame = encode_report(report)
        except ValueError:
            frame = encode_report(_in_short(report))
        with self._lock:
            try:
                self._pipe.send_bytes(frame)
            except OSError:
                os._exit(EXIT_ORPHANED)

    def announce(self, flight: Flight, phase: Phase) -> None:
        """Say what is about to be done with a flight. It is in the pipe before that begins, so it survives a crash."""
        self.send(PhaseEntered(flight.flight_id, flight.pipeline, phase))

    def count_records(self, pipeline: str, begun: Callable[[], int]) -> None:
        """Have the signs of life tell whether this number of a pipeline's records has risen."""
        self._counters[pipeline] = begun

    def give_sign_of_life(self) -> None:
        """Say that the process runs, what it has taken, and where user code gets on."""
        counted = {pipeline: begun() for pipeline, begun in list(self._counters.items())}
        moved = [pipeline for pipeline, begun in counted.items() if begun != self._counted.get(pipeline, 0)]
        told, size_bytes = [], 0
        for pipeline in moved:
            size_bytes += len(pipeline.encode()) + FRAMING_BYTES
            if size_bytes > MOVED_LIMIT_BYTES:
                break  # its turn comes with the next sign, before those that are told now
            told.append(pipeline)
            self._counters[pipeline] = self._counters.pop(pipeline)
            self._counted[pipeline] = counted[pipeline]
        self.send(Alive(self.orders_taken, told))

    def log(self, level: int, message: str, fields: dict[str, Any]) -> None:
        """Have the supervisor print a line."""
        if level < self.log_level:
            return
        short = {
            cut(str(name), FIELD_LIMIT_BYTES): value
            if value is None or isinstance(value, (bool, int, float))
            else cut(str(value), FIELD_LIMIT_BYTES)
            for name, value in list(fields.items())[:FIELDS_LIMIT]
        }
        self.send(WorkerLog(level, cut(message, TEXT_LIMIT_BYTES), short))


def _in_short(report: Report) -> Report:
    """A report that says as much as fits of one that is too long."""
    if isinstance(report, FlushReport):
        # More fenced parts than can be named: claims will tell what was written.
        reason = f"{len(report.fenced)} parts were fenced, too many to name"
        return FlushFailed(report.flight_id, report.pipeline, FailureKind.FATE_UNKNOWN, reason, None)
    raise ValueError(f"{type(report).__name__} does not fit into a report")


def cut(text: str, limit_bytes: int = TEXT_LIMIT_BYTES) -> str:
    """Cut a text to so many bytes of UTF-8, and make it encodable."""
    raw = text.encode("utf-8", "backslashreplace")
    if len(raw) <= limit_bytes:
        return raw.decode("utf-8")
    return raw[: limit_bytes - 3].decode("utf-8", "ignore") + "…"


class ReportHandler(logging.Handler):
    """Passes what user code and libraries log in a worker on to the supervisor's log."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record; the last line of a traceback stands for it."""
        message = self.format(record)
        self._reporter.log(record.levelno, message, {"logger": record.name})
