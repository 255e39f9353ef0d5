"""What happens to the supervisor, as values (supervisor process). The shell makes them; the core answers with actions.

Every event carries ``at``, the monotonic time in seconds at which the shell saw it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Optional, Union

from speedlayer.workers.protocol import Chunk, Report


class Partition(NamedTuple):
    """A partition of a topic as one consumer group reads it."""

    group: str
    topic: str
    partition: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}"


@dataclass(frozen=True)
class Slice:
    """Consecutive messages of one partition out of one ``consume()`` call.

    ``end`` is the position after the call where it is known to hold (no exception, same generation), else the last
    offset + 1. ``generation`` is that of the partition when the call began.
    """

    partition: Partition
    generation: int
    first: int
    last: int
    end: int
    count: int
    size_bytes: int
    leader_epoch: int
    chunk: Chunk

    def split(self, index: int, separator: bytes) -> tuple[Slice, Slice]:
        """Cut it before the message at ``index``. Offsets without a message between the two go with the second.

        The leader epoch is known of the last message alone.
        """
        first, rest = self.chunk.split(index, separator)
        cut, size_bytes = first.offset_of(index - 1), min(first.size_bytes, self.size_bytes)
        return (
            replace(self, last=cut, end=cut + 1, count=index, size_bytes=size_bytes, leader_epoch=-1, chunk=first),
            replace(
                self,
                first=rest.offset_of(0),
                count=self.count - index,
                size_bytes=self.size_bytes - size_bytes,
                chunk=rest,
            ),
        )


@dataclass(frozen=True)
class Event:
    """Something that happened at the monotonic time ``at`` (s)."""

    at: float


@dataclass(frozen=True)
class Started(Event):
    """The shell is up; start the workers."""


@dataclass(frozen=True)
class Tick(Event):
    """Time has passed."""


@dataclass(frozen=True)
class Assigned(Event):
    """The group gave us partitions. Nothing is read from them before the core says `Resume`."""

    cluster: str
    partitions: tuple[Partition, ...]


@dataclass(frozen=True)
class Revoked(Event):
    """The group took partitions away; they are already unassigned. ``lost``: without asking first."""

    partitions: tuple[Partition, ...]
    lost: bool = False


@dataclass(frozen=True)
class Polled(Event):
    """A ``consume()`` call returned normally."""

    group: str
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class PositionMoved(Event):
    """The position of a partition passed offsets that hold no message for us (control records, compaction)."""

    partition: Partition
    generation: int
    end: int


@dataclass(frozen=True)
class PositionsUnknown(Event):
    """``consume()`` raised: librdkafka may have moved past messages that nobody got."""

    group: str
    reason: str


class FetchProblem(enum.Enum):
    """Why the broker serves no message from an offset; any other error of a partition is a `ConsumerTrouble`."""

    OUT_OF_RANGE = "offset out of range"
    LOG_TRUNCATED = "log truncated"


@dataclass(frozen=True)
class FetchFailed(Event):
    """The broker refuses to serve a partition from the offset that was asked for."""

    partition: Partition
    generation: int
    problem: FetchProblem
    message: str


@dataclass(frozen=True)
class Inspected(Event):
    """The broker's answer about a partition: topic id, range of the log, what the group has committed.

    ``committed`` is None without a commit. ``target`` answers a seek to a timestamp. With ``error`` nothing else holds.
    """

    partition: Partition
    request: int
    topic_id: Optional[str] = None
    low: int = 0
    high: int = 0
    committed: Optional[int] = None
    committed_by_us: bool = False
    target: Optional[int] = None
    error: Optional[str] = None


@dataclass(frozen=True)
class Watermarks(Event):
    """Where the log of each partition begins and ends, asked for every few seconds, paused or not."""

    marks: Mapping[Partition, tuple[int, int]]


@dataclass(frozen=True)
class SurveyFailed(Event):
    """The broker did not tell the watermarks; who asked it is well."""

    reason: str


@dataclass(frozen=True)
class TopicIds(Event):
    """The ids of the topics now; None where the broker has none to tell."""

    group: str
    ids: Mapping[str, Optional[str]]


@dataclass(frozen=True)
class ConsumerTrouble(Event):
    """librdkafka reported an error, of the whole consumer or a topic of its. ``fatal``: it will never work again."""

    group: str
    code: str
    message: str
    fatal: bool = False


@dataclass(frozen=True)
class Reported(Event):
    """A worker wrote a report. ``incarnation`` tells the worker from one of the same name that died before."""

    worker: str
    incarnation: int
    report: Report


@dataclass(frozen=True)
class WorkerExited(Event):
    """A worker process is gone. ``exit_code`` is negative for a signal."""

    worker: str
    incarnation: int
    exit_code: Optional[int]


@dataclass(frozen=True)
class Command(Event):
    """An operator's wish. The core answers with one `Reply` that carries ``token``, at once or when it is done."""

    token: int
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StopRequested(Event):
    """SIGTERM, SIGINT or a command: drain and stop; ``hurry``: do not wait for the drain."""

    reason: str
    hurry: bool = False


AnyEvent = Union[
    Started,
    Tick,
    Assigned,
    Revoked,
    Polled,
    PositionMoved,
    PositionsUnknown,
    FetchFailed,
    Inspected,
    Watermarks,
    SurveyFailed,
    TopicIds,
    ConsumerTrouble,
    Reported,
    WorkerExited,
    Command,
    StopRequested,
]
