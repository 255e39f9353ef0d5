"""Looks once a second at what is written and what is behind, and keeps it: the curve of the report, and the stalls.

Runs in the campaign's process, on a thread of its own, on ways that no fault disturbs. A look that fails (the database
restarts) leaves a hole in the curve, and is no end of a stall.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psycopg2
import psycopg2.extensions

LOOK_SECONDS = 1.0

# A stall that is shorter is the ordinary rhythm of batches, commits and rebalances.
STALL_SECONDS = 3.0

Lane = tuple[str, int]  # topic and partition

_WRITTEN = """
SELECT topic, partition, next_offset, rows + filtered + dead_lettered
FROM speedlayer.checkpoints WHERE next_offset IS NOT NULL
"""


@dataclass(frozen=True)
class Look:
    """What one look saw; ``written`` and ``behind`` are messages, None when the database did not answer."""

    at: float
    written: int | None
    behind: int | None


@dataclass(frozen=True)
class Stall:
    """A partition was behind and its checkpoint did not move; ``ended`` is None while that goes on."""

    lane: Lane
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def undisturbed(self, windows: Sequence[tuple[float, float | None, str]]) -> float:
        """For how long of it, at a stretch, no fault was under way."""
        longest, free_since = 0.0, self.began
        for began, ended, _ in sorted(windows, key=lambda window: window[0]):
            longest = max(longest, min(began, self.ended) - free_since)
            free_since = max(free_since, self.ended if ended is None else ended)
        return max(longest, self.ended - free_since, 0.0)

    def __str__(self) -> str:
        return f"{self.lane[0]} {self.lane[1]} for {self.seconds:.1f} s"


class StallClock:
    """Tells, lane by lane, since when a lane is behind and has not moved. Pure: it is told what was seen when."""

    def __init__(self) -> None:
        self._offsets: dict[Lane, int] = {}
        self._since: dict[Lane, float] = {}
        self.stalls: list[Stall] = []

    def saw(self, at: float, offsets: Mapping[Lane, int], ends: Mapping[Lane, int]) -> None:
        for lane, end in ends.items():
            offset = offsets.get(lane, 0)
            since = self._since.get(lane)
            # A fail-over may take a checkpoint back: that is no progress.
            if since is not None and (offset > self._offsets.get(lane, 0) or offset >= end):
                self._over(Stall(lane, since, at))
                del self._since[lane]
            self._offsets[lane] = offset
            if offset < end:
                self._since.setdefault(lane, at)

    def under_way(self, at: float) -> list[Stall]:
        return [Stall(lane, since, at) for lane, since in self._since.items() if at - since >= STALL_SECONDS]

    def _over(self, stall: Stall) -> None:
        if stall.seconds >= STALL_SECONDS:
            self.stalls.append(stall)


class Observer:
    """Looks until `stop`. ``dsn`` leads to the primary, whichever it is; ``ends`` says what was acknowledged."""

    def __init__(self, dsn: str, ends: Callable[[], Mapping[Lane, int]]) -> None:
        self._dsn, self._ends = dsn, ends
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._connection: psycopg2.extensions.connection | None = None
        self._thread = threading.Thread(target=self._run, name="observer")
        self._clock = StallClock()
        self.looks: list[Look] = []
        self.offsets: Mapping[Lane, int] = {}

    def start(self) -> Observer:
        self._thread.start()
        return self

    def begin_anew(self) -> None:
        """Forget the stalls so far: before everything runs there is nothing to promise."""
        with self._lock:
            self._clock = StallClock()

    def stop(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(30)
        if self._connection is not None:
            self._connection.close()

    def stalls(self) -> list[Stall]:
        """Those that are over, and those that go on."""
        with self._lock:
            return self._clock.stalls + self._clock.under_way(time.monotonic())

    def last(self) -> Look | None:
        return self.looks[-1] if self.looks else None

    def _run(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            self.looks.append(self._look())

    def _look(self) -> Look:
        ends = self._ends()
        try:
            rows = self._query()
        except psycopg2.Error:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            return Look(time.monotonic(), None, None)
        offsets = {(topic, partition): offset for topic, partition, offset, _ in rows}
        at = time.monotonic()
        with self._lock:
            self.offsets = offsets
            self._clock.saw(at, offsets, ends)
        behind = sum(max(0, end - offsets.get(lane, 0)) for lane, end in ends.items())
        return Look(at, sum(row[3] for row in rows), behind)

    def _query(self) -> list[tuple[str, int, int, int]]:
        if self._connection is None:
            self._connection = psycopg2.connect(
                self._dsn, connect_timeout=2, application_name="observer", options="-c statement_timeout=2000"
            )
            self._connection.autocommit = True
        with self._connection.cursor() as cursor:
            # The checkpoints are made by the first worker that comes.
            cursor.execute("SELECT to_regclass('speedlayer.checkpoints') IS NOT NULL")
            if not cursor.fetchone()[0]:
                return []
            cursor.execute(_WRITTEN)
            return list(cursor.fetchall())
