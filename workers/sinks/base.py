"""What a sink is: a description that travels to the workers, and the session that writes there.

A `Sink` is built in the user's program (supervisor side) and shipped to every worker, so it holds settings only: no
connection, no file, no thread. `Sink.open` runs in a worker and returns a `SinkSession`, which does the work.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from speedlayer.workers.protocol import Claim, Claimed, Fenced, Flight, Phase, Seed


@dataclass(frozen=True)
class WriteOutcome:
    """What a committed flight amounts to. ``fenced`` holds the indexes of the parts that were left out."""

    duration_seconds: float
    rows: int
    filtered: int
    dead_lettered: int
    fenced: tuple[int, ...] = ()


def _tell_nobody(flight: Flight, phase: Phase) -> None:
    """A session without a supervisor has nobody to announce its phases to."""


@dataclass(frozen=True)
class SinkContext:
    """What a worker tells a sink when it opens it.

    ``transform`` turns the decoded record into the record to write, None to filter it out; what it raises makes a dead
    letter. ``log`` takes (level, message, fields).

    ``announce`` is to be called by `SinkSession.write` before it enters a phase of a flight, in every attempt: DECODE
    before the messages are looked at, TRANSFORM before the user's code, DATABASE before anything that may wait for the
    destination. A worker that dies, or does not come to an end, in one of the first two puts the messages under
    suspicion; in DATABASE it does not, nor where nothing is announced.
    """

    pipeline: str
    worker: str
    transform: Optional[Callable[[Any], Any]]
    log: Callable[[int, str, dict[str, Any]], None]
    application_name: str = "speedlayer"
    announce: Callable[[Flight, Phase], None] = _tell_nobody


class SinkSession(abc.ABC):
    """An open sink in one worker. `write` runs on the pipeline's flush thread, the rest on its claim thread."""

    @abc.abstractmethod
    def write(self, flight: Flight) -> WriteOutcome:
        """Write the flight's rows, dead letters and checkpoints in one transaction.

        Raises the errors of `speedlayer.workers.errors`, each of which says whether the batch can be tried again
        (`SinkUnavailable`, `SinkContended`, `SinkMisconfigured`, `StreamingOverloadException`: surely rolled back) or
        what became of it is not known (`FateUnknown`).
        """

    @abc.abstractmethod
    def claim(self, claim: Claim) -> Claimed:
        """Make the claim's owner the owner of the lane; raises the same errors as `write`."""

    @abc.abstractmethod
    def seed(self, seed: Seed) -> Claimed | Fenced:
        """Move the lane's first offset by compare-and-set; raises the same errors as `write`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close the connections; what is not committed is rolled back."""


@dataclass(frozen=True, kw_only=True)
class Sink(abc.ABC):
    """A destination and how hard to push it.

    ``batch_size`` (rows), ``batch_bytes`` and ``flush_interval_seconds`` close a batch, whichever comes first.
    ``slow_flush_threshold`` (s), ``max_slow_flushes`` and ``pause_seconds`` are the three strikes; None takes the
    engine's setting.
    """

    batch_size: int = field(default=10_000)
    batch_bytes: int = field(default=4 * 1024 * 1024)
    flush_interval_seconds: float = field(default=0.2)
    slow_flush_threshold: Optional[float] = None
    max_slow_flushes: Optional[int] = None
    pause_seconds: Optional[float] = None

    @abc.abstractmethod
    def describe(self) -> str:
        """Name the destination for people, without any secret in it."""

    @abc.abstractmethod
    def open(self, context: SinkContext) -> SinkSession:
        """Open the sink in a worker. Must not need the database to be reachable: connect on first use."""


def columns_of(key: str | Sequence[str]) -> tuple[str, ...]:
    """Normalise the ``key`` of a sink: one name or several."""
    return (key,) if isinstance(key, str) else tuple(key)
