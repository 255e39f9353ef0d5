"""What the core wants done, as values (supervisor process). The shell carries them out, in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional, Union

from speedlayer.supervisor.core.events import Partition
from speedlayer.workers.protocol import Claim, Flight, Seed


@dataclass(frozen=True)
class Resume:
    """Read the partition from ``offset`` on. Its messages belong to ``generation``."""

    partition: Partition
    offset: int
    leader_epoch: int
    generation: int


@dataclass(frozen=True)
class Pause:
    """Stop reading the partition; what librdkafka has prefetched of it is dropped."""

    partition: Partition


@dataclass(frozen=True)
class Inspect:
    """Ask the broker about the partition. ``want_committed``: there is no checkpoint, so the group's commit counts.

    ``timestamp_ms`` asks for the first offset at or after that time, too.
    """

    partition: Partition
    request: int
    want_committed: bool = False
    timestamp_ms: Optional[int] = None


@dataclass(frozen=True)
class Dispatch:
    """Put a flight on the worker's queue (the worker has granted the credit)."""

    worker: str
    flight: Flight


@dataclass(frozen=True)
class SendClaim:
    """Put a claim on the worker's queue."""

    worker: str
    claim: Claim


@dataclass(frozen=True)
class SendSeed:
    """Put a seed on the worker's queue."""

    worker: str
    seed: Seed


@dataclass(frozen=True)
class CommitOffsets:
    """Tell the group how far the rows are, asynchronously; nothing depends on it."""

    group: str
    offsets: Mapping[Partition, int]


@dataclass(frozen=True)
class StartWorker:
    """Start a worker process."""

    worker: str
    incarnation: int


@dataclass(frozen=True)
class FinishWorker:
    """Let the worker write what it has and exit."""

    worker: str


@dataclass(frozen=True)
class KillWorker:
    """End the worker now; what it was writing is read again after a new claim."""

    worker: str


@dataclass(frozen=True)
class RebuildConsumer:
    """Close the consumer of the group and make a new one."""

    group: str
    reason: str


@dataclass(frozen=True)
class RenewScout:
    """Let the scout go, which no longer answers, and ask another one from now on."""

    reason: str


@dataclass(frozen=True)
class LeaveGroups:
    """Commit, leave every group, close the consumers; bounded in time."""


@dataclass(frozen=True)
class Reply:
    """Answer the command ``token``."""

    token: int
    answer: Mapping[str, Any]


@dataclass(frozen=True)
class Log:
    """Tell the operator. ``level`` is that of the logging module; the message says the consequence."""

    level: int
    message: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stop:
    """The daemon is done."""

    exit_code: int
    reason: str


Action = Union[
    Resume,
    Pause,
    Inspect,
    Dispatch,
    SendClaim,
    SendSeed,
    CommitOffsets,
    StartWorker,
    FinishWorker,
    KillWorker,
    RebuildConsumer,
    RenewScout,
    LeaveGroups,
    Reply,
    Log,
    Stop,
]

# The levels of the logging module, named here so that the core needs no logging.
INFO, WARNING, ERROR = 20, 30, 40
