"""The ledger: what is known of each partition we own, and which state may follow which (supervisor process, pure).

A lane's three offsets always stand in this order::

    flushed  <=  dispatched  <=  expected
       |             |              |
       |             |              the next offset to read: everything below it was read, or passed for good reason
       |             everything below it is in a flight or written
       everything below it is final in PostgreSQL

A lane that loses the certainty about its flights (a worker died, a COMMIT was not answered, it was fenced) drops what
it holds and claims again: what the claim returns is final, and reading goes on from there.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Optional

from speedlayer.supervisor.core.events import Partition, Slice
from speedlayer.supervisor.core.quarantine import Suspicion
from speedlayer.workers.protocol import LaneKey


class LaneState(enum.Enum):
    """Where a lane is on its way from assignment to reading."""

    PENDING = "pending"  # assigned to us; the claim is not sent (no worker is ready, or a back-off runs)
    CLAIMING = "claiming"  # a worker has the claim
    INSPECTING = "inspecting"  # claimed; the broker is asked for the topic's id and the log's range
    SEEDING = "seeding"  # the first offset, or one past a gap, is being written
    HELD = "held"  # ours, and not read: a pause, or no room
    FETCHING = "fetching"  # ours, and read
    STOPPED = "stopped"  # going on would lose rows or surprise somebody; an operator decides


TRANSITIONS: dict[LaneState, frozenset[LaneState]] = {
    LaneState.PENDING: frozenset({LaneState.CLAIMING}),
    LaneState.CLAIMING: frozenset({LaneState.INSPECTING, LaneState.PENDING}),
    LaneState.INSPECTING: frozenset({LaneState.SEEDING, LaneState.HELD, LaneState.STOPPED, LaneState.PENDING}),
    LaneState.SEEDING: frozenset({LaneState.HELD, LaneState.PENDING}),
    LaneState.HELD: frozenset({LaneState.FETCHING, LaneState.PENDING, LaneState.STOPPED}),
    LaneState.FETCHING: frozenset({LaneState.HELD, LaneState.PENDING, LaneState.STOPPED}),
    LaneState.STOPPED: frozenset({LaneState.PENDING}),
}


class IllegalTransition(AssertionError):
    """The core tried a change of state that the table forbids: a fault in the core, never in its input."""


@dataclass(frozen=True)
class SeekTarget:
    """Where an operator wants a lane to go on: exactly one of the fields, or ``edge`` "earliest" / "latest"."""

    offset: Optional[int] = None
    edge: Optional[str] = None
    timestamp_ms: Optional[int] = None

    def __str__(self) -> str:
        if self.offset is not None:
            return f"offset {self.offset}"
        return self.edge if self.edge is not None else f"timestamp {self.timestamp_ms} ms"


@dataclass
class OpenBatch:
    """What a lane has read and not yet dispatched. ``opened_at`` is when its first message (or moved position) came."""

    slices: deque[Slice] = field(default_factory=deque)
    rows: int = 0
    size_bytes: int = 0
    opened_at: Optional[float] = None

    def add(self, piece: Slice, now: float) -> None:
        """Take a slice in."""
        self.slices.append(piece)
        self.rows += piece.count
        self.size_bytes += piece.size_bytes
        if self.opened_at is None:
            self.opened_at = now

    def count_below(self, offset: int) -> int:
        """How many messages it holds before the offset."""
        whole = sum(piece.count for piece in self.slices if piece.last < offset)
        return whole + sum(
            piece.chunk.count_below(offset) for piece in self.slices if piece.first < offset <= piece.last
        )

    def take_first(self, count: int, separator: bytes, now: float) -> list[Slice]:
        """Take so many messages out, oldest first; a slice is cut where it holds more."""
        taken: list[Slice] = []
        while count:
            piece = self.slices.popleft()
            if piece.count > count:
                piece, rest = piece.split(count, separator)
                self.slices.appendleft(rest)
            taken.append(piece)
            count -= piece.count
            self.rows -= piece.count
            self.size_bytes -= piece.size_bytes
        self.opened_at = now if self.slices else None
        return taken

    def take(self, rows: int, size_bytes: int, now: float) -> list[Slice]:
        """Take slices out, oldest first, while they fit; at least one, so that a huge message travels alone."""
        taken: list[Slice] = []
        while self.slices:
            piece = self.slices[0]
            if taken and (piece.count > rows or piece.size_bytes > size_bytes):
                break
            taken.append(self.slices.popleft())
            rows -= piece.count
            size_bytes -= piece.size_bytes
            self.rows -= piece.count
            self.size_bytes -= piece.size_bytes
        self.opened_at = now if self.slices else None
        return taken


@dataclass
class Lane:
    """One partition that we own, or are about to."""

    partition: Partition
    key: LaneKey
    state: LaneState = LaneState.PENDING
    reason: str = ""
    since: float = 0.0
    # The claim: which worker made it, under which owner token and epoch. The epoch is None while it is not known to be
    # ours. Each claim has a token of its own: a fail-over that loses one may give its epoch to the next.
    worker: Optional[str] = None
    owner: str = ""
    epoch: Optional[int] = None
    claim_id: int = 0
    claim_not_before: float = 0.0
    claim_delay: str = ""  # why the database does not answer the claim
    fenced_in_a_row: int = 0
    polled_since_fenced: bool = True
    # The broker's view.
    topic_id: Optional[str] = None
    inspect_request: int = 0
    inspect_not_before: Optional[float] = None
    low_watermark: Optional[int] = None
    high_watermark: Optional[int] = None  # where what can be read ends: the last stable offset, unless uncommitted is
    watermarks_at: float = 0.0
    seek: Optional[SeekTarget] = None
    moving: bool = False  # held until all is written, then claimed by another worker
    # The three offsets, and the generation in which `expected` is read.
    flushed: int = 0
    has_checkpoint: bool = False
    dispatched: int = 0
    expected: int = 0
    generation: int = 0
    leader_epoch: int = -1
    batch: OpenBatch = field(default_factory=OpenBatch)
    in_flight: int = 0
    uncommitted: bool = False
    suspicion: Optional[Suspicion] = None  # messages over which workers died; it outlives claims
    seen: tuple[object, ...] = ()  # by the watchdog: how the lane stood when it last moved
    moved_at: float = 0.0
    stall: str = ""  # what the watchdog has last done about it, while it stands still
    check_at: Optional[float] = None  # when the checkpoint is looked at again, if all stays quiet till then

    def move(self, state: LaneState, now: float, reason: str = "") -> None:
        """Change the state; raises `IllegalTransition` for one that the table does not know."""
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransition(f"{self.partition}: {self.state.value} -> {state.value}")
        self.state, self.since, self.reason, self.claim_delay = state, now, reason, ""

    def begin_at(self, offset: int) -> None:
        """Everything below ``offset`` is final; nothing above it was read."""
        self.flushed = self.dispatched = self.expected = offset
        self.has_checkpoint = True

    def forget(self) -> int:
        """Drop what is held and all that was certain; returns the bytes freed. A claim must follow."""
        freed = self.batch.size_bytes
        self.batch = OpenBatch()
        self.epoch, self.worker, self.moving = None, None, False
        self.in_flight = 0
        self.claim_id = self.inspect_request = 0
        self.inspect_not_before = self.check_at = None
        self.expected = self.dispatched = self.flushed
        return freed

    @property
    def quarantined(self) -> bool:
        """Whether one of its messages is searched for that kills workers."""
        return self.suspicion is not None and self.suspicion.quarantined

    @property
    def lag(self) -> Optional[int]:
        """Messages (offsets, rather) between what is written and the end of the log; None while unknown."""
        if self.high_watermark is None or not self.has_checkpoint:
            return None
        return max(0, self.high_watermark - self.flushed)

    @property
    def position_moved(self) -> bool:
        """Whether the position passed offsets that no open batch covers."""
        return not self.batch.slices and self.expected > self.dispatched


class Ledger:
    """All lanes, by partition."""

    def __init__(self) -> None:
        self._lanes: dict[Partition, Lane] = {}

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes.values())

    def __len__(self) -> int:
        return len(self._lanes)

    def get(self, partition: Partition) -> Optional[Lane]:
        """The lane of a partition, if it is ours."""
        return self._lanes.get(partition)

    def add(self, lane: Lane) -> None:
        """Own a partition."""
        self._lanes[lane.partition] = lane

    def remove(self, partition: Partition) -> Optional[Lane]:
        """Own it no longer."""
        return self._lanes.pop(partition, None)

    def of_pipeline(self, pipeline: str) -> list[Lane]:
        """The lanes that one pipeline reads."""
        return [lane for lane in self if lane.key.pipeline == pipeline]

    def of_group(self, group: str) -> list[Lane]:
        """The lanes of one consumer group."""
        return [lane for lane in self if lane.partition.group == group]

    def of_worker(self, worker: str) -> list[Lane]:
        """The lanes whose claim a worker has made or is making."""
        return [lane for lane in self if lane.worker == worker]
