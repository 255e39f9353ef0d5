"""What a database could take: rows over the time in which at least one flush was open (pure).

In a phase without pressure the database is idle most of the time, and what it wrote says nothing of what it could have
written. While a flush is open it is working, or keeps somebody waiting: what comes out of that time is its capacity.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Optional


class Flush(NamedTuple):
    """One committed transaction: when it began and when its rows were visible (seconds), and how many rows."""

    began: float
    ended: float
    rows: int


def measure_capacity(flushes: Iterable[Flush], start: float, end: float) -> Optional[float]:
    """Rows per second of open flushes, from those that lie within ``[start, end]``; None if there are none."""
    rows = 0
    busy_seconds = 0.0
    reached = start
    for flush in sorted(flushes):
        if flush.began < start or flush.ended > end:
            continue
        rows += flush.rows
        # Flushes overlap: each adds only the time that no earlier one has covered.
        busy_seconds += max(0.0, flush.ended - max(flush.began, reached))
        reached = max(reached, flush.ended)
    return rows / busy_seconds if busy_seconds > 0 else None


def rows_per_step(flushes: Iterable[Flush], start: float, steps: int, step_seconds: float) -> list[float]:
    """Rows per second that became visible in each of ``steps`` stretches from ``start`` on."""
    counts = [0] * steps
    for flush in flushes:
        step = int((flush.ended - start) // step_seconds)
        if 0 <= step < steps:
            counts[step] += flush.rows
    return [count / step_seconds for count in counts]
