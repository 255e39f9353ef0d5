"""The checkpoint protocol: what makes every message count once (worker processes; no I/O, no clock, no driver).

Each protocol is a generator: it yields *operations*, is sent their results, and has the errors of operations thrown
into it. `speedlayer.workers.sinks.postgres.statements` carries the operations out on a real connection; a simulated
database can carry out the same ones. The rules live here and nowhere else:

* rows and dead letters come first, the checkpoints last, and COMMIT goes out only if every checkpoint moved;
* a checkpoint that did not move means its part is fenced: roll back, and write the rest without that part;
* an error before COMMIT is surely rolled back; a connection that breaks under COMMIT leaves the fate unknown;
* what a claim returns is final, since the claim locks the checkpoint that a late flush would have to move.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Optional, TypeVar, Union

from speedlayer.workers.errors import ConnectionLost, FateUnknown, SinkContended, SinkError
from speedlayer.workers.protocol import LaneKey, Part, Seed

T = TypeVar("T")


# --- Values -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """A server process, told apart from a later one with the same pid by when it started."""

    pid: int
    started_at: datetime


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a lane in the database. ``next_offset`` is None until the lane's start is set."""

    epoch: int
    owner: str
    next_offset: Optional[int]
    topic_id: Optional[str]
    leader_epoch: int
    backend: Optional[Backend]


@dataclass(frozen=True)
class Counts:
    """What became of a part's messages; their sum is the number of messages."""

    rows: int
    filtered: int
    dead_lettered: int


@dataclass(frozen=True)
class Move:
    """One checkpoint's step from ``start`` to ``end``, valid under ``epoch`` and ``owner`` alone."""

    lane: LaneKey
    epoch: int
    owner: str
    start: int
    end: int
    leader_epoch: int
    counts: Counts


# --- Operations ---------------------------------------------------------------------------------------------------


class Purpose(enum.Enum):
    """What a transaction is for; it chooses the time limits that the transaction runs under."""

    FLUSH = "flush"
    CLAIM = "claim"


@dataclass(frozen=True)
class Begin:
    """Open a transaction, READ COMMITTED and READ WRITE whatever the defaults are."""

    purpose: Purpose


@dataclass(frozen=True)
class WriteRows:
    """Write the rows of these parts. Returns a `Counts` for each, in their order."""

    parts: tuple[int, ...]


@dataclass(frozen=True)
class WriteDeadLetters:
    """Write the dead letters that `WriteRows` found in these parts."""

    parts: tuple[int, ...]


@dataclass(frozen=True)
class Advance:
    """Move the checkpoints by compare-and-set, in key order. Returns the lanes that moved."""

    moves: tuple[Move, ...]


@dataclass(frozen=True)
class LockCheckpoint:
    """Lock the lane's checkpoint until the transaction ends. Returns it, or None if there is none."""

    lane: LaneKey


@dataclass(frozen=True)
class RaiseEpoch:
    """Make ``owner`` the owner under the next epoch, with the backend that will flush. Returns the new checkpoint."""

    lane: LaneKey
    owner: str
    backend: Optional[Backend]


@dataclass(frozen=True)
class EvictOldOwner:
    """Outside a transaction: end the recorded backend of the lane, if it is what holds the checkpoint's lock."""

    lane: LaneKey


@dataclass(frozen=True)
class SetStart:
    """Set the locked checkpoint's next offset and topic id, by compare-and-set. Returns whether it was set.

    The leader epoch is forgotten: that of the old offset says nothing of the new one.
    """

    lane: LaneKey
    epoch: int
    owner: str
    expected: Optional[int]
    start: int
    topic_id: Optional[str]


@dataclass(frozen=True)
class RecordGap:
    """Record that the offsets in ``[start, end)`` were skipped, and why."""

    lane: LaneKey
    start: Optional[int]
    end: int
    reason: str


@dataclass(frozen=True)
class Commit:
    """Send COMMIT on its own. `ConnectionLost` from here means that the answer did not arrive."""


@dataclass(frozen=True)
class Rollback:
    """Undo everything since `Begin`. Never fails: a connection that can not roll back is closed."""


Operation = Union[
    Begin,
    WriteRows,
    WriteDeadLetters,
    Advance,
    LockCheckpoint,
    RaiseEpoch,
    EvictOldOwner,
    SetStart,
    RecordGap,
    Commit,
    Rollback,
]


# --- Protocols ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlushResult:
    """The indexes of the parts that were written, what became of their messages, and the parts that were fenced."""

    written: tuple[int, ...]
    counts: tuple[Counts, ...]
    fenced: tuple[int, ...]


@dataclass(frozen=True)
class ClaimResult:
    """The lane's checkpoint under its new owner, and the backend that the old owner had flushed with."""

    checkpoint: Checkpoint
    previous: Optional[Backend]


def flush(parts: Sequence[Part]) -> Generator[Operation, Any, FlushResult]:
    """Write the parts in one transaction, leaving out those that turn out to be fenced."""
    if len({part.lane for part in parts}) != len(parts):
        raise ValueError("two parts of one flight belong to the same lane: the second could never be written")
    remaining, fenced = tuple(range(len(parts))), set[int]()
    while remaining:
        try:
            yield Begin(Purpose.FLUSH)
            counts: tuple[Counts, ...] = yield WriteRows(remaining)
            if any(count.dead_lettered for count in counts):
                yield WriteDeadLetters(remaining)
            moved: Collection[LaneKey] = yield Advance(_moves(parts, remaining, counts))
        except Exception:
            yield Rollback()
            raise
        lost = {index for index in remaining if parts[index].lane not in moved}
        if not lost:
            yield from _commit()
            return FlushResult(remaining, counts, tuple(sorted(fenced)))
        yield Rollback()
        fenced |= lost
        remaining = tuple(index for index in remaining if index not in lost)
    return FlushResult((), (), tuple(sorted(fenced)))


def _moves(parts: Sequence[Part], indexes: Sequence[int], counts: Sequence[Counts]) -> tuple[Move, ...]:
    """The steps in key order: locks that everybody takes in one order can not deadlock."""
    moves = (
        Move(part.lane, part.epoch, part.owner, part.start, part.end, part.leader_epoch, count)
        for part, count in zip([parts[index] for index in indexes], counts, strict=True)
    )
    return tuple(sorted(moves, key=lambda move: move.lane))


def _commit() -> Generator[Operation, Any, None]:
    """Commit; an answer that says no is a rollback, no answer is an unknown fate."""
    try:
        yield Commit()
    except ConnectionLost as error:
        raise FateUnknown(f"no answer to COMMIT: {error}", sqlstate=error.sqlstate, remedy=error.remedy) from error
    except SinkError:
        yield Rollback()
        raise
    except Exception as error:
        # Nobody knows how far COMMIT came; a claim does, once the connection is closed.
        yield Rollback()
        raise FateUnknown(f"COMMIT ended in {type(error).__name__}: {error}") from error


def claim(lane: LaneKey, owner: str, backend: Optional[Backend]) -> Generator[Operation, Any, ClaimResult]:
    """Take the lane over. A flush that is just committing holds the lock, so what is returned is final.

    A claim whose COMMIT had no answer may simply be made again: it raises the epoch once more.
    """
    try:
        yield Begin(Purpose.CLAIM)
        before: Optional[Checkpoint] = yield LockCheckpoint(lane)
        after: Checkpoint = yield RaiseEpoch(lane, owner, backend)
        yield Commit()
    except SinkContended:
        yield Rollback()
        yield EvictOldOwner(lane)
        raise
    except Exception:
        yield Rollback()
        raise
    return ClaimResult(after, before.backend if before else None)


def seed(order: Seed) -> Generator[Operation, Any, Optional[Checkpoint]]:
    """Move the lane's start from ``expected`` to ``start``; None if the lane has another owner, epoch or offset.

    A seed whose COMMIT had no answer may be made again: where the offset is there already, nothing more is done.
    """
    try:
        yield Begin(Purpose.CLAIM)
        before: Optional[Checkpoint] = yield LockCheckpoint(order.lane)
        if before is None or (before.epoch, before.owner) != (order.epoch, order.owner):
            yield Rollback()
            return None
        if before.next_offset != order.expected:
            yield Rollback()
            return before if before.next_offset == order.start else None
        moved: bool = yield SetStart(order.lane, order.epoch, order.owner, order.expected, order.start, order.topic_id)
        if not moved:
            yield Rollback()
            return None
        if order.gap_reason is not None:
            yield RecordGap(order.lane, order.expected, order.start, order.gap_reason)
        yield Commit()
    except Exception:
        yield Rollback()
        raise
    topic_id = order.topic_id if order.topic_id is not None else before.topic_id
    return Checkpoint(before.epoch, before.owner, order.start, topic_id, -1, before.backend)


def run(protocol: Generator[Operation, Any, T], execute: Callable[[Operation], Any]) -> T:
    """Drive a protocol to its end: carry out each operation, and hand back its result or its error."""
    try:
        operation = next(protocol)
        while True:
            try:
                result = execute(operation)
            except Exception as error:
                operation = protocol.throw(error)
            else:
                operation = protocol.send(result)
    except StopIteration as stop:
        value: T = stop.value
        return value
