"""The claim thread of one pipeline in a worker: claims, seeds, and a look at flushes that take long (worker processes).

It has a connection of its own, so a flush that is stuck on one table keeps no partition from starting. Claims that can
not be made yet take turns: one that is blocked holds up no other.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, Union, runtime_checkable

from speedlayer.workers.protocol import BlockKind, Claim, ClaimDelayed, Claimed, LaneKey, Report, Seed
from speedlayer.workers.reporter import Reporter, cut
from speedlayer.workers.retry import Backoff, Block, block_of, summary_of
from speedlayer.workers.sinks.base import SinkSession

# How often the thread looks at a flush that takes long.
GUARD_INTERVAL_SECONDS = 1.0

ClaimOrder = Union[Claim, Seed]


@runtime_checkable
class Guarding(Protocol):
    """A session that wants to look at its own flushes once a second."""

    def guard(self) -> None:
        """See whether a flush is held up by somebody who should not."""


@dataclass(eq=False)
class _Pending:
    """An order that is not answered yet."""

    order: ClaimOrder
    due_at: float = 0.0
    backoff: Backoff = field(default_factory=Backoff)


class ClaimDesk:
    """Answers the claims and seeds of one pipeline, each for as long as it takes."""

    def __init__(
        self, session: SinkSession, reporter: Reporter, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._session = session
        self._reporter = reporter
        self._clock = clock
        self._inbox: queue.SimpleQueue[ClaimOrder | None] = queue.SimpleQueue()
        self._pending: deque[_Pending] = deque()
        self._epochs: dict[LaneKey, int] = {}
        # While the database is away one probe speaks for all claims.
        self._closed_until = 0.0
        self._closed_backoff = Backoff()
        self._guard_due_at = 0.0
        self._guard_trouble: str | None = None

    def put(self, order: ClaimOrder) -> None:
        """Take in an order (any thread)."""
        self._inbox.put(order)

    def stop(self) -> None:
        """Answer nothing more (any thread)."""
        self._inbox.put(None)

    def epoch_of(self, lane: LaneKey) -> int:
        """The epoch under which this worker last claimed the lane, -1 if it never did (any thread)."""
        return self._epochs.get(lane, -1)

    def serve(self) -> None:
        """Work until `stop`; the thread's target."""
        while self._take_in():
            pending = self._next_due()
            if pending is not None:
                self._try(pending)
            self._guard()

    def _take_in(self) -> bool:
        """Move what has come from the inbox to the pending; waits only if nothing is due. False: stop."""
        timeout = self._seconds_until_due()
        while True:
            try:
                order = self._inbox.get(timeout=timeout) if timeout > 0 else self._inbox.get_nowait()
            except queue.Empty:
                return True
            if order is None:
                return False
            self._supersede(order)
            self._pending.append(_Pending(order))
            timeout = 0.0

    def _supersede(self, order: ClaimOrder) -> None:
        """Forget what this order replaces: an older claim made late would fence the newer one of the same lane."""
        self._pending = deque(
            pending
            for pending in self._pending
            if pending.order.lane != order.lane or (isinstance(order, Seed) and isinstance(pending.order, Claim))
        )

    def _seconds_until_due(self) -> float:
        waits = [max(pending.due_at, self._closed_until) for pending in self._pending]
        if isinstance(self._session, Guarding):
            waits.append(self._guard_due_at)
        due_at = min(waits, default=self._clock() + GUARD_INTERVAL_SECONDS)
        return max(0.0, min(due_at - self._clock(), GUARD_INTERVAL_SECONDS))

    def _next_due(self) -> _Pending | None:
        now = self._clock()
        if now < self._closed_until:
            return None
        for pending in self._pending:
            if pending.due_at <= now:
                self._pending.remove(pending)
                return pending
        return None

    def _try(self, pending: _Pending) -> None:
        order = pending.order
        try:
            answer: Report = self._session.claim(order) if isinstance(order, Claim) else self._session.seed(order)
        except Exception as error:
            self._postpone(pending, block_of(error))
            if block_of(error).internal:
                self._reporter.log(logging.ERROR, f"a claim failed: {summary_of(error)}", {"lane": str(order.lane)})
            return
        self._closed_until, self._closed_backoff = 0.0, Backoff()
        if isinstance(answer, Claimed):
            # Whatever it was before: where the checkpoints were dropped, epochs begin at 1 again.
            self._epochs[answer.lane] = answer.epoch
        self._reporter.send(answer)

    def _postpone(self, pending: _Pending, block: Block) -> None:
        now = self._clock()
        if block.kind is BlockKind.CONTENDED:
            pending.due_at = now + pending.backoff.wait_seconds(block)
        else:
            self._closed_until = now + self._closed_backoff.wait_seconds(block)
        self._pending.append(pending)
        reason = f"{block.reason} — {block.remedy}" if block.remedy else block.reason
        order = pending.order
        self._reporter.send(ClaimDelayed(order.claim_id, order.lane, cut(reason), block.sqlstate))

    def _guard(self) -> None:
        """Have the session look at its flush; trouble is told once, and stands in nobody's way."""
        now = self._clock()
        if not isinstance(self._session, Guarding) or now < self._guard_due_at:
            return
        self._guard_due_at = now + GUARD_INTERVAL_SECONDS
        try:
            self._session.guard()
            self._guard_trouble = None
        except Exception as error:
            trouble = summary_of(error)
            if trouble != self._guard_trouble:
                self._reporter.log(logging.WARNING, f"can not see what a long flush waits for: {trouble}", {})
            self._guard_trouble = trouble
