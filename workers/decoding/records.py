"""What a worker makes of a flight: records to write, records filtered out, and records that can not be written.

Runs in the worker. Messages are named by their *ordinal*: 0 for the flight's first message, counted over its parts and
their chunks in order. An ordinal is cheap to carry and `FlightIndex` finds the message again when a dead letter wants it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

from speedlayer.workers.protocol import Flight


@dataclass(frozen=True)
class DeadRecord:
    """One message that can not become a row, and why. ``sqlstate`` is set where the server (or its rule) said so."""

    ordinal: int
    reason: str
    sqlstate: Optional[str] = None


class Message(NamedTuple):
    """One message of a flight, taken out of the chunk's byte strings again (for a dead letter)."""

    part: int
    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: Optional[bytes]
    value: Optional[bytes]
    headers: list[tuple[str, Optional[bytes]]]


class PartCounts(NamedTuple):
    """What a part's checkpoint counts: the sum is the part's messages."""

    rows: int
    filtered: int
    dead_lettered: int


class FlightIndex:
    """Finds a flight's messages by ordinal."""

    def __init__(self, flight: Flight) -> None:
        raise NotImplementedError

    def part_of(self, ordinal: int) -> int:
        """The index of the part that holds the message."""
        raise NotImplementedError

    def message(self, ordinal: int) -> Message:
        """The message itself; O(chunk), so for dead letters, not for rows."""
        raise NotImplementedError


class Records:
    """The records of one flight. ``rows[i]`` came from the message ``ordinals[i]``; both ascend with the flight.

    ``rows`` is what `TableWriter.write` takes, whole or in slices (a row's type is the decoder's business). ``filtered``
    holds ordinals, ``dead`` holds `DeadRecord`s. ``unknown_fields`` names the fields that no column has and for which
    records died: a reason to load the table again before believing it.
    """

    index: FlightIndex
    rows: list[Any]
    ordinals: Sequence[int]
    filtered: list[int]
    dead: list[DeadRecord]
    unknown_fields: frozenset[str]

    def without_parts(self, parts: Collection[int]) -> Records:
        """The same records without those of the given (fenced) parts."""
        raise NotImplementedError

    def counts(self) -> list[PartCounts]:
        """Rows, filtered and dead messages of each part of the flight, in its order."""
        raise NotImplementedError

    def bury(self, dead: Sequence[DeadRecord]) -> Records:
        """The same records, with these (found guilty while writing, say) moved from ``rows`` to ``dead``."""
        raise NotImplementedError


def apply_transform(records: Records, transform: Callable[[Any], Any]) -> Records:
    """Run the transform over every row: None is filtered out, what raises or returns no object becomes dead."""
    raise NotImplementedError
