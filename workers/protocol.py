"""The wire messages between the supervisor and its workers (both processes import this module).

The supervisor puts *orders* on a worker's queue, and the worker writes *reports* to its report pipe. Each message is a
tagged msgspec struct encoded as MessagePack, so that only ``bytes`` ever cross the process boundary: an object that
cannot be pickled would be dropped by a queue's feeder thread without an error, and unpickling is never needed.

A report stays below ``REPORT_LIMIT_BYTES`` (less than PIPE_BUF), which makes its write atomic: a worker that is killed
half-way through a write can not leave half a report behind.
"""

from __future__ import annotations

import enum
from array import array
from bisect import bisect_left
from typing import Union

import msgspec

# PIPE_BUF is 4,096 bytes on Linux; the connection adds a 4-byte length, the rest is slack.
REPORT_LIMIT_BYTES = 4000

# What each message of a chunk takes besides its key, value and headers: its offset, its timestamp, two lengths.
NUMBERS_BYTES = 24

# A worker that has no memory left ends with this exit code: what it was about to decode or transform may be to blame.
EXIT_OUT_OF_MEMORY = 6


class LaneKey(msgspec.Struct, frozen=True, order=True, array_like=True):
    """What a checkpoint is kept for: one lane of one partition, as read by one pipeline of one consumer group.

    The fields, in this order, are the primary key of ``speedlayer.checkpoints``; locks are taken in this order.
    ``lane`` is 0 until the records of one partition are spread over several workers.
    """

    cluster: str
    group: str
    pipeline: str
    topic: str
    partition: int
    lane: int = 0


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive messages of one partition as one ``consume()`` call returned them, in a few large byte strings.

    ``offsets`` and ``timestamps`` (ms since the epoch, -1 if unknown) are packed ``array("q")``; ``key_lengths`` and
    ``value_lengths`` are packed ``array("i")``, -1 for null. ``keys`` is the keys end to end. ``values`` is the values
    joined by the flight's ``separator`` (a null value takes no bytes, and its separators stay), so that JSON values can
    be decoded by one call. ``headers`` maps the index of a message to its headers, only where there are any.
    """

    count: int
    offsets: bytes
    timestamps: bytes
    key_lengths: bytes
    value_lengths: bytes
    keys: bytes
    values: bytes
    headers: dict[int, list[tuple[str, Union[bytes, None]]]]

    @property
    def size_bytes(self) -> int:
        """What counts for the memory budget."""
        headers = sum(len(name) + len(value or b"") for pairs in self.headers.values() for name, value in pairs)
        return len(self.keys) + len(self.values) + headers + NUMBERS_BYTES * self.count

    def count_below(self, offset: int) -> int:
        """How many of its messages stand before the offset."""
        return bisect_left(array("q", self.offsets), offset)

    def offset_of(self, index: int) -> int:
        """The offset of the message at ``index``."""
        return array("q", self.offsets)[index]

    def split(self, index: int, separator: bytes) -> tuple[Chunk, Chunk]:
        """Cut it before the message at ``index``: two chunks, as if they had been read one after the other."""
        if not 0 < index < self.count:
            raise ValueError(f"a chunk of {self.count} messages can not be cut before the one at {index}")
        long, short = array("q").itemsize * index, array("i").itemsize * index
        keys = sum(length for length in array("i", self.key_lengths[:short]) if length > 0)
        values = sum(length for length in array("i", self.value_lengths[:short]) if length > 0)
        values += len(separator) * (index - 1)
        first = Chunk(
            index,
            self.offsets[:long],
            self.timestamps[:long],
            self.key_lengths[:short],
            self.value_lengths[:short],
            self.keys[:keys],
            self.values[:values],
            {at: pairs for at, pairs in self.headers.items() if at < index},
        )
        rest = Chunk(
            self.count - index,
            self.offsets[long:],
            self.timestamps[long:],
            self.key_lengths[short:],
            self.value_lengths[short:],
            self.keys[keys:],
            self.values[values + len(separator) :],
            {at - index: pairs for at, pairs in self.headers.items() if at >= index},
        )
        return first, rest


class Part(msgspec.Struct, frozen=True, array_like=True):
    """One partition's share of a flight: the messages in ``[start, end)``, to be written under ``epoch`` and ``owner``.

    ``owner`` is the token of the lane's claim, one of its own for each: a fail-over that loses a claim's commit may
    give the same epoch twice, to the same supervisor even.

    ``end`` may be past the last message (compaction, control records, aborted transactions), and a part may hold no
    message at all, when only the position moved.
    """

    lane: LaneKey
    epoch: int
    owner: str
    start: int
    end: int
    leader_epoch: int  # of the last message, -1 if unknown
    chunks: list[Chunk]

    @property
    def messages(self) -> int:
        """How many messages the part holds."""
        return sum(chunk.count for chunk in self.chunks)


# --- Orders: supervisor -> worker ---------------------------------------------------------------------------------


class Flight(msgspec.Struct, frozen=True, tag="flight"):
    """Write these parts, all of one pipeline, in one transaction with their checkpoints.

    ``separator`` stands between the values of every chunk, commas included (`,"…",`), and between chunks when a worker
    joins them. It carries a secret nonce, so no message can imitate it.

    ``condemned`` is the reason why every message of the flight goes to the dead letters unseen: neither decoded nor
    transformed, since that has killed workers.
    """

    flight_id: int
    pipeline: str
    separator: bytes
    parts: list[Part]
    condemned: Union[str, None] = None


class Claim(msgspec.Struct, frozen=True, tag="claim"):
    """Raise the lane's epoch, make ``owner`` its owner, and report where its rows end. ``claim_id`` comes back."""

    claim_id: int
    lane: LaneKey
    owner: str


class Seed(msgspec.Struct, frozen=True, tag="seed"):
    """Compare-and-set the lane's next offset from ``expected`` (None: no checkpoint yet) to ``start``.

    With ``gap_reason`` the skipped range ``[expected, start)`` is recorded in ``speedlayer.gaps`` in the same
    transaction. The answer is a `Claimed` with the same ``claim_id`` and the new offset, or `Fenced`.
    """

    claim_id: int
    lane: LaneKey
    owner: str
    epoch: int
    expected: Union[int, None]
    start: int
    topic_id: Union[str, None]
    gap_reason: Union[str, None] = None


class Finish(msgspec.Struct, frozen=True, tag="finish"):
    """No more orders will come: write what is queued, report `Stopped`, exit."""


Order = Union[Flight, Claim, Seed, Finish]


# --- Reports: worker -> supervisor --------------------------------------------------------------------------------


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The worker has booted, and grants each pipeline this much credit. A finished flight gives its own back."""

    pid: int
    credit_flights: int
    credit_bytes: int


class BootFailed(msgspec.Struct, frozen=True, tag="boot-failed"):
    """The worker can not start (a transform that does not load, say); starting it again would not help."""

    reason: str


class Claimed(msgspec.Struct, frozen=True, tag="claimed"):
    """The lane is ours under ``epoch``; rows are final up to ``next_offset`` (None: there is no checkpoint yet)."""

    claim_id: int
    lane: LaneKey
    epoch: int
    next_offset: Union[int, None]
    topic_id: Union[str, None]
    leader_epoch: int


class ClaimDelayed(msgspec.Struct, frozen=True, tag="claim-delayed"):
    """The database does not answer the claim yet; the worker goes on trying. For the operator's eyes."""

    claim_id: int
    lane: LaneKey
    reason: str
    sqlstate: Union[str, None]


class Fenced(msgspec.Struct, frozen=True, tag="fenced"):
    """A `Seed` found another epoch or owner: the lane has a new owner."""

    claim_id: int
    lane: LaneKey


class FlushReport(msgspec.Struct, frozen=True, tag="flushed"):
    """The flight is committed, except for the parts whose indexes are in ``fenced`` (nothing of those was written).

    ``duration_seconds`` is the time of the transaction, BEGIN to the answer of COMMIT; it is what the brake judges.
    ``busy_seconds`` is the time from taking the flight from the queue to here, retries and waits included.
    """

    flight_id: int
    pipeline: str
    duration_seconds: float
    busy_seconds: float
    rows: int
    filtered: int
    dead_lettered: int
    retries: int
    fenced: list[int]


class FailureKind(enum.Enum):
    """Why a flight did not end as rows."""

    FATE_UNKNOWN = "fate-unknown"  # the answer to COMMIT was lost: claim, and go on from what the claim returns
    ABANDONED = "abandoned"  # surely rolled back, and the worker no longer keeps the batch


class FlushFailed(msgspec.Struct, frozen=True, tag="flush-failed"):
    """The flight's batch is no longer held by the worker. Its lanes must be claimed again."""

    flight_id: int
    pipeline: str
    kind: FailureKind
    reason: str
    sqlstate: Union[str, None]


class BlockKind(enum.Enum):
    """Why a flight waits in the worker, not committed and not lost."""

    UNAVAILABLE = "unavailable"  # the server is away, starting, full, read-only, out of connections
    CONTENDED = "contended"  # deadlock, serialization failure, lock timeout: the transaction is tried again
    MISCONFIGURED = "misconfigured"  # missing table or column, no permission, wrong password: somebody must mend it
    OVERLOADED = "overloaded"  # a sink raised StreamingOverloadException


class FlushBlocked(msgspec.Struct, frozen=True, tag="flush-blocked"):
    """The flight could not be written now; the worker keeps it and tries again after ``retry_seconds``.

    Sent once for each failed attempt. The block ends with the flight's `FlushReport` or `FlushFailed`.
    """

    flight_id: int
    pipeline: str
    kind: BlockKind
    reason: str
    remedy: str
    sqlstate: Union[str, None]
    retry_seconds: float
    attempt: int


class Phase(enum.Enum):
    """What the worker does with a flight. Only the first two run on what is in its messages, and can not wait for
    anybody: a worker that dies in them, or does not come to their end, may have been killed by one of the messages.
    """

    DECODE = "decode"  # and encode the rows, where there is no transform
    TRANSFORM = "transform"  # the user's filters and maps, and encoding what they returned
    DATABASE = "database"


class PhaseEntered(msgspec.Struct, frozen=True, tag="phase"):
    """The worker is about to begin the phase of the flight. Until the first one, the flight waits in its queue.

    Every attempt begins anew: a flight that was blocked enters DECODE after DATABASE.
    """

    flight_id: int
    pipeline: str
    phase: Phase


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """The process runs, and other threads than the one at work get their turn. Said every few seconds.

    A flush that waits for the database leaves it audible; a process that is stopped, or whose user code keeps the
    interpreter for itself, is not heard. ``orders`` is how many orders it has taken off its queue so far. ``moved``
    names the pipelines whose filters and maps have begun another record since the last sign of life: they are slow at
    most.
    """

    orders: int
    moved: list[str] = []


class WorkerLog(msgspec.Struct, frozen=True, tag="log"):
    """A log line for the supervisor to print, so that one process alone writes to the log."""

    level: int
    message: str
    fields: dict[str, Union[str, int, float, bool, None]] = {}


class Stopped(msgspec.Struct, frozen=True, tag="stopped"):
    """Everything that was queued is written or reported; the process exits next."""


Report = Union[
    Ready,
    BootFailed,
    Claimed,
    ClaimDelayed,
    Fenced,
    FlushReport,
    FlushFailed,
    FlushBlocked,
    PhaseEntered,
    Alive,
    WorkerLog,
    Stopped,
]

_encoder = msgspec.msgpack.Encoder()
_order_decoder: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_report_decoder: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def encode_order(order: Order) -> bytes:
    """Encode an order for a worker's queue."""
    return _encoder.encode(order)


def decode_order(frame: bytes) -> Order:
    """Decode an order; raises `msgspec.DecodeError` on bytes that are none."""
    return _order_decoder.decode(frame)


def encode_report(report: Report) -> bytes:
    """Encode a report for the pipe; raises `ValueError` if it could not be written atomically."""
    frame = _encoder.encode(report)
    if len(frame) > REPORT_LIMIT_BYTES:
        raise ValueError(f"a {type(report).__name__} of {len(frame)} bytes is over {REPORT_LIMIT_BYTES}")
    return frame


def decode_report(frame: bytes) -> Report:
    """Decode a report; raises `msgspec.DecodeError` on bytes that are none."""
    return _report_decoder.decode(frame)
