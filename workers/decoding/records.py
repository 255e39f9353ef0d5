"""What a worker makes of a flight: records to write, records filtered out, and records that can not be written.

Runs in the worker. Messages are named by their *ordinal*: 0 for the flight's first message, counted over its parts and
their chunks in order. An ordinal is cheap to carry, and `FlightIndex` finds the message again for a dead letter.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Optional

from speedlayer.workers.errors import StreamingOverloadException
from speedlayer.workers.protocol import Chunk, Flight

# In a reason: enough to recognise the cause, however long the value that an exception quotes.
REASON_LIMIT_CHARACTERS = 1000


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


class DamagedFlight(Exception):
    """A chunk's lengths and its bytes do not fit together: a fault of speedlayer, never of a message."""


def _piece(lengths: array[int], joined: bytes, index: int, between: int) -> Optional[bytes]:
    """The piece at ``index`` of pieces of these lengths (-1: null) with ``between`` bytes from one to the next."""
    length = lengths[index]
    if length < 0:
        return None
    start = sum(size for size in lengths[:index] if size > 0) + between * index
    return joined[start : start + length]


class FlightIndex:
    """Finds a flight's messages by ordinal."""

    def __init__(self, flight: Flight) -> None:
        self.flight = flight
        self._chunks: list[tuple[int, Chunk]] = [
            (part, chunk) for part, content in enumerate(flight.parts) for chunk in content.chunks if chunk.count
        ]
        # Where each chunk and each part begins, and where the last ends.
        self._chunk_bounds = [0, *accumulate(chunk.count for _, chunk in self._chunks)]
        self.part_bounds = [0, *accumulate(part.messages for part in flight.parts)]

    def __len__(self) -> int:
        return self.part_bounds[-1]

    @property
    def chunks(self) -> Iterator[Chunk]:
        """The chunks that hold messages, in the order of the ordinals."""
        return (chunk for _, chunk in self._chunks)

    def part_of(self, ordinal: int) -> int:
        """The index of the part that holds the message."""
        return bisect_right(self.part_bounds, ordinal) - 1

    def message(self, ordinal: int) -> Message:
        """The message itself; O(chunk), so for dead letters, not for rows."""
        if not 0 <= ordinal < len(self):
            raise IndexError(ordinal)
        which = bisect_right(self._chunk_bounds, ordinal) - 1
        part, chunk = self._chunks[which]
        index = ordinal - self._chunk_bounds[which]
        lane = self.flight.parts[part].lane
        return Message(
            part=part,
            topic=lane.topic,
            partition=lane.partition,
            offset=array("q", chunk.offsets)[index],
            timestamp_ms=array("q", chunk.timestamps)[index],
            key=_piece(array("i", chunk.key_lengths), chunk.keys, index, 0),
            value=_piece(array("i", chunk.value_lengths), chunk.values, index, len(self.flight.separator)),
            headers=[(name, value) for name, value in chunk.headers.get(index, ())],
        )

    def joined(self) -> bytes:
        """All values with the separator between them."""
        chunks = self._chunks
        return chunks[0][1].values if len(chunks) == 1 else self.flight.separator.join(c.values for _, c in chunks)

    def has_null_values(self) -> bool:
        """Whether any message has no value at all."""
        return any(-1 in array("i", chunk.value_lengths) for _, chunk in self._chunks)

    def values(self) -> Iterator[Optional[bytes]]:
        """The value of every message, None for null."""
        between = len(self.flight.separator)
        for _, chunk in self._chunks:
            position, values = 0, chunk.values
            for length in array("i", chunk.value_lengths):
                if length < 0:
                    yield None
                else:
                    yield values[position : position + length]
                    position += length
                position += between
            if position - between != len(values):
                raise DamagedFlight(f"a chunk's values have {len(values)} bytes, its lengths say {position - between}")


@dataclass(frozen=True)
class Records:
    """The records of one flight. ``rows[i]`` came from the message ``ordinals[i]``; both ascend with the flight.

    ``rows`` is what `TableWriter.write` takes, whole or in slices; what a row is, the decoder decides. ``filtered``
    holds ordinals. ``unknown_fields`` names fields that no column has and for which records died: a reason to load the
    table again before believing it. ``plain`` says that no message held a backslash, and so no string can hold a
    character that COPY wants escaped.
    """

    index: FlightIndex
    rows: list[Any]
    ordinals: Sequence[int]
    filtered: tuple[int, ...] = ()
    dead: tuple[DeadRecord, ...] = ()
    unknown_fields: frozenset[str] = frozenset()
    plain: bool = False

    def without_parts(self, parts: Collection[int]) -> Records:
        """The same records without those of the given (fenced) parts."""
        fenced = set(parts)
        part_of = self.index.part_of
        kept = [position for position, ordinal in enumerate(self.ordinals) if part_of(ordinal) not in fenced]
        return replace(
            self,
            rows=[self.rows[position] for position in kept],
            ordinals=[self.ordinals[position] for position in kept],
            filtered=tuple(ordinal for ordinal in self.filtered if part_of(ordinal) not in fenced),
            dead=tuple(record for record in self.dead if part_of(record.ordinal) not in fenced),
        )

    def counts(self) -> list[PartCounts]:
        """Rows, filtered and dead messages of each part of the flight, in its order."""
        bounds = self.index.part_bounds
        rows = _split(self.ordinals, bounds)
        filtered = _split(sorted(self.filtered), bounds)
        dead = _split(sorted(record.ordinal for record in self.dead), bounds)
        return [PartCounts(*counts) for counts in zip(rows, filtered, dead, strict=True)]

    def bury(self, dead: Iterable[DeadRecord], unknown_fields: Iterable[str] = ()) -> Records:
        """The same records, with these (found guilty while writing, say) moved from ``rows`` to ``dead``."""
        died = tuple(dead)
        if not died:
            return self
        ordinals = {record.ordinal for record in died}
        kept = [position for position, ordinal in enumerate(self.ordinals) if ordinal not in ordinals]
        return replace(
            self,
            rows=[self.rows[position] for position in kept],
            ordinals=[self.ordinals[position] for position in kept],
            dead=tuple(sorted((*self.dead, *died), key=lambda record: record.ordinal)),
            unknown_fields=self.unknown_fields.union(unknown_fields),
        )


def _split(ordinals: Sequence[int], bounds: Sequence[int]) -> Iterator[int]:
    """How many of the ascending ordinals lie between each two bounds."""
    cuts = [bisect_left(ordinals, bound) for bound in bounds]
    return (end - start for start, end in pairwise(cuts))


def apply_transform(records: Records, transform: Callable[[Any], Any]) -> Records:
    """Run the transform over every row: None is filtered out, what raises or returns no object becomes dead.

    The rows must be dicts (`TableWriter.decoder(transformed=True)`). An overload that the transform raises passes.
    """
    rows: list[Any] = []
    ordinals: list[int] = []
    filtered: list[int] = []
    dead: list[DeadRecord] = []
    for ordinal, row in zip(records.ordinals, records.rows, strict=True):
        try:
            result = transform(row)
        except (StreamingOverloadException, MemoryError, KeyboardInterrupt):
            raise  # none is the record's fault: the batch is kept
        except BaseException as error:  # SystemExit, asyncio's CancelledError: the batch must not fail for ever
            dead.append(DeadRecord(ordinal, shorten_reason(reason_of(error))))
            continue
        if result is None:
            filtered.append(ordinal)
        elif isinstance(result, dict):
            # A map may fill one dict of its own again and again: what it holds now is this record.
            rows.append(result if result is row else dict(result))
            ordinals.append(ordinal)
        else:
            dead.append(DeadRecord(ordinal, f"the transform returned no dict but a {type(result).__name__}"))
    return replace(
        records,
        rows=rows,
        ordinals=ordinals,
        filtered=(*records.filtered, *filtered),
        dead=tuple(sorted((*records.dead, *dead), key=lambda record: record.ordinal)),
        plain=False,
    )


def reason_of(error: BaseException) -> str:
    """An exception as the reason of a dead letter. A `TransformError` already names its step."""
    from speedlayer.workers.transform import TransformError

    if isinstance(error, TransformError):
        return str(error)
    return f"the transform failed: {type(error).__name__}: {error}"


def shorten_reason(reason: str) -> str:
    """Cut a reason, and take out what PostgreSQL's text can not hold."""
    reason = reason.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
    return reason if len(reason) <= REASON_LIMIT_CHARACTERS else reason[: REASON_LIMIT_CHARACTERS - 1] + "…"
