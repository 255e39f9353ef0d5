"""How long to wait before the next attempt, and until when (worker processes).

tenacity runs the loop; what is particular to us is here: the wait depends on what stands in the way, starts anew when
that changes, and is ended at once by a request to finish.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception
from tenacity.stop import stop_base
from tenacity.wait import wait_base

from speedlayer.workers.errors import (
    FateUnknown,
    SinkContended,
    SinkError,
    SinkMisconfigured,
    SinkUnavailable,
    StreamingOverloadException,
)
from speedlayer.workers.protocol import BlockKind

T = TypeVar("T")

# Seconds of the first wait and of the longest, for each kind of block. A server that is away is probed gently; a
# deadlock is over as soon as it is reported; a missing table is mended by people, who take their time.
WAIT_SECONDS: dict[BlockKind, tuple[float, float]] = {
    BlockKind.UNAVAILABLE: (0.2, 10.0),
    BlockKind.CONTENDED: (0.05, 1.0),
    BlockKind.MISCONFIGURED: (1.0, 5.0),
}

# An error that only a fault in the code explains is tried this often in a row before the batch is given up (the
# supervisor then claims its partitions and reads it again).
INTERNAL_ATTEMPTS = 3

# After `Finish` a batch gets this many more attempts: enough for a deadlock or a lost connection, within any deadline.
FINISHING_ATTEMPTS = 3
FINISHING_WAIT_SECONDS = 0.3

_DOUBLINGS_LIMIT = 20  # 2**20 times any first wait is over every limit, and a float still holds it


@dataclass(frozen=True)
class Block:
    """What stands in the way of a flight, as an operator reads it. ``pause_seconds`` overrides the usual wait."""

    kind: BlockKind
    reason: str
    remedy: str = ""
    sqlstate: Optional[str] = None
    pause_seconds: Optional[float] = None
    internal: bool = False


def block_of(error: BaseException) -> Block:
    """Tell what an error of a flush or a claim means for the next attempt."""
    if isinstance(error, StreamingOverloadException):
        return Block(BlockKind.OVERLOADED, str(error), pause_seconds=error.pause_seconds)
    if isinstance(error, SinkError):
        for kind, error_type in (
            (BlockKind.UNAVAILABLE, SinkUnavailable),
            (BlockKind.CONTENDED, SinkContended),
            (BlockKind.MISCONFIGURED, SinkMisconfigured),
        ):
            if isinstance(error, error_type):
                return Block(kind, str(error), error.remedy, error.sqlstate)
    return Block(
        BlockKind.MISCONFIGURED,
        f"internal error: {summary_of(error)}",
        "report it with the worker's log",
        internal=True,
    )


def summary_of(error: BaseException) -> str:
    """One line of an unexpected exception: its type, its message and the innermost place."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


class Backoff:
    """Exponential waits with jitter, counted anew whenever the kind of the block changes."""

    def __init__(self, uniform: Callable[[float, float], float] = random.uniform) -> None:
        self._uniform = uniform
        self._kind: Optional[BlockKind] = None
        self._count = 0

    def wait_seconds(self, block: Block) -> float:
        """The wait before the attempt that follows this block: between half and all of the exponential step."""
        if block.pause_seconds is not None:
            return block.pause_seconds
        if block.kind is not self._kind:
            self._kind, self._count = block.kind, 0
        first, longest = WAIT_SECONDS[block.kind]
        step = min(longest, first * 2.0 ** min(self._count, _DOUBLINGS_LIMIT))
        self._count += 1
        return step * self._uniform(0.5, 1.0)


class _WaitForBlock(wait_base):
    """tenacity's wait: what the backoff says, but short once we are to finish."""

    def __init__(self, backoff: Backoff, finishing: Callable[[], bool]) -> None:
        self._backoff, self._finishing = backoff, finishing

    def __call__(self, retry_state: RetryCallState) -> float:
        wait_seconds = self._backoff.wait_seconds(block_of(_error_of(retry_state)))
        return min(wait_seconds, FINISHING_WAIT_SECONDS) if self._finishing() else wait_seconds


class _StopWhenHopeless(stop_base):
    """tenacity's stop: never for the database's sake, soon when we are to finish or when the fault is our own."""

    def __init__(self, finishing: Callable[[], bool]) -> None:
        self._finishing = finishing
        self._internal = 0
        self._since_finish = 0

    def __call__(self, retry_state: RetryCallState) -> bool:
        block = block_of(_error_of(retry_state))
        self._internal = self._internal + 1 if block.internal else 0
        self._since_finish += self._finishing()
        # Overloaded means that nothing is wanted for a while: when we are to finish, that is the last word.
        hopeless = block.kind is BlockKind.OVERLOADED and self._finishing()
        return hopeless or self._internal >= INTERNAL_ATTEMPTS or self._since_finish > FINISHING_ATTEMPTS


def _error_of(retry_state: RetryCallState) -> BaseException:
    assert retry_state.outcome is not None
    error = retry_state.outcome.exception()
    assert error is not None
    return error


def let_go_of_frames(error: BaseException) -> None:
    """Drop the tracebacks of an error that is kept, through a wait or in a cycle: their frames hold the batch."""
    seen: Optional[BaseException] = error
    while seen is not None:
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__


def with_patience(
    attempt: Callable[[], T],
    *,
    on_blocked: Callable[[Block, float, int], None],
    sleep: Callable[[float], None],
    finishing: Callable[[], bool],
    backoff: Optional[Backoff] = None,
) -> T:
    """Call ``attempt`` until it succeeds; `FateUnknown` is final, and so is the error of a hopeless attempt.

    ``on_blocked`` is told the block, the seconds until the next attempt and the number of the failed one, before each
    wait. ``sleep`` may return early.
    """

    def before_sleep(retry_state: RetryCallState) -> None:
        error = _error_of(retry_state)
        block = block_of(error)
        if not block.internal:
            let_go_of_frames(error)
        on_blocked(block, retry_state.upcoming_sleep, retry_state.attempt_number)

    retrying = Retrying(
        sleep=sleep,
        stop=_StopWhenHopeless(finishing),
        wait=_WaitForBlock(backoff or Backoff(), finishing),
        retry=retry_if_exception(lambda error: isinstance(error, Exception) and not isinstance(error, FateUnknown)),
        before_sleep=before_sleep,
        reraise=True,
    )
    try:
        return retrying(attempt)
    finally:
        # tenacity's object is in a cycle with its thread-local state, and lives until the collector comes by. What
        # `on_blocked` refers to must not: that is a batch, and batches pile up long before the collector sees a need.
        retrying.before_sleep = None
