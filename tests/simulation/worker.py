"""A simulated worker process: real checkpoint protocol and real patience, simulated threads, pipes and connections.

It mirrors `speedlayer.workers.worker`, `flushing`, `claiming` and `sinks.postgres.session`: for each pipeline a flush
thread and a claim thread, each with a connection of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Optional

from simulation.postgres import Link, Refresh, Rows, Server
from simulation.world import Mailbox, Process, Script, World
from speedlayer.workers import checkpoint as cp
from speedlayer.workers import protocol as p
from speedlayer.workers.errors import (
    ConnectionLost,
    FateUnknown,
    SinkContended,
    SinkError,
    SinkUnavailable,
    StreamingOverloadException,
)
from speedlayer.workers.retry import FINISHING_ATTEMPTS, FINISHING_WAIT_SECONDS, Backoff, Block, block_of

# SIGSEGV, of a map.
KILLED_BY_A_MESSAGE = -11

ALIVE_INTERVAL_SECONDS = 0.5

# Longer than any history.
HANG_SECONDS = 1000.0

Deliver = Callable[["SimulatedWorker", p.Report], None]


@dataclass
class Protocols:
    """The generators that a worker drives; a mutant has others."""

    flush: Callable[..., Any] = cp.flush
    claim: Callable[..., Any] = cp.claim
    seed: Callable[..., Any] = cp.seed
    acknowledge_early: bool = False


class SimulatedWorker(Process):
    """One worker process. ``deliver`` puts a report on its pipe."""

    def __init__(
        self,
        world: World,
        server: Server,
        name: str,
        worker: str,
        incarnation: int,
        pipelines: list[str],
        credit: tuple[int, int],
        deliver: Deliver,
        protocols: Protocols,
    ) -> None:
        super().__init__(world, f"{name}.{incarnation}")
        self.server = server
        self.worker, self.incarnation = worker, incarnation
        self.random = world.stream(f"worker {name} {incarnation}")
        self.protocols = protocols
        self.delay = 0.0  # what its reports take on top of the usual
        self.strikes: dict[p.Phase, int] = {}  # how many workers of its supervisor are still to be killed in a phase
        self.transform_seconds = 0.003  # at most, for each flight
        self.overload = False  # its sink raises StreamingOverloadException
        self.exiting = False
        self.keeps_interpreter = False  # user code that hangs lets no other thread run
        self.hang_next = False  # the next flight that is transformed never comes back
        self.mute = False  # nothing that it reports arrives any more
        self._orders_taken = 0
        self.finishing = False
        self.on_exit: Callable[[int], None] = lambda code: None
        self._deliver = deliver
        self._credit = credit
        self._orders_at = self._reports_at = 0.0
        self.desks = {pipeline: PipelineDesk(self, pipeline) for pipeline in pipelines}
        self.run(self._boot())

    def _boot(self) -> Script:
        yield self.random.uniform(0.02, 0.3)
        self.report(p.Ready(1, *self._credit))
        self.run(self._signs_of_life())
        for desk in self.desks.values():
            self.run(desk.flushes())
            self.run(desk.claims())

    def _signs_of_life(self) -> Script:
        while not self.exiting:
            if not self.keeps_interpreter:
                self.report(p.Alive(self._orders_taken))
            yield ALIVE_INTERVAL_SECONDS

    # --- orders in, reports out -----------------------------------------------------------------------------------

    def put(self, order: p.Order) -> None:
        """The supervisor puts an order on the queue; it arrives after those before it."""
        now = self.world.now
        self._orders_at = max(self._orders_at, now + self.random.uniform(0.0005, 0.005))
        self.later(self._orders_at - now, self._arrived, order)

    def _arrived(self, order: p.Order) -> None:
        self._orders_taken += 1
        if isinstance(order, p.Flight):
            self.desks[order.pipeline].flights.put(order)
        elif isinstance(order, p.Finish):
            self.finishing = True
            for desk in self.desks.values():
                desk.flights.put(None)
                desk.wake_claims()
        else:
            self.desks[order.lane.pipeline].take_order(order)

    def report(self, report: p.Report) -> None:
        """Write a report; the pipe keeps the order, and what is in it outlives the worker."""
        if self.mute:
            return
        now = self.world.now
        self._reports_at = max(self._reports_at, now + self.random.uniform(0.0002, 0.003) + self.delay)
        self.world.after(self._reports_at - now, self._deliver, self, report)

    def enter(self, flight: p.Flight, phase: p.Phase) -> None:
        """Announce a phase; somebody may be waiting for that."""
        self.report(p.PhaseEntered(flight.flight_id, flight.pipeline, phase))
        if self.strikes.get(phase, 0):
            self.strikes[phase] -= 1
            self.later(self.random.uniform(0.0, 0.002), self.exit, -9)

    def finished_one(self) -> None:
        """A flush thread has run out of work after `Finish`."""
        if all(desk.finished for desk in self.desks.values()):
            self.report(p.Stopped())
            self.later(0.01, self.exit, 0)

    # --- the end --------------------------------------------------------------------------------------------------

    def exit(self, code: int) -> None:
        """The process ends."""
        if not self.alive:
            return
        self.die()
        for desk in self.desks.values():
            desk.close(hard=code != 0)
            if code != KILLED_BY_A_MESSAGE and len(desk.looked_at) == 1:
                desk.looked_at[0].bystander += 1
        # Its exit is noticed after what it wrote has been read.
        delay = max(0.0, self._reports_at - self.world.now) + self.random.uniform(0.001, 0.05)
        self.world.after(delay, self.on_exit, code)

    def fail_to_boot(self, says_why: bool) -> None:
        """Die before being ready, or say what is wrong and end."""
        if says_why:
            self.report(p.BootFailed("the transform does not load"))
        self.exit(3 if says_why else -9)

    def freeze(self) -> None:
        """SIGSTOP: the server waits for a client that says nothing."""
        super().freeze()
        for desk in self.desks.values():
            desk.stopped()


class PipelineDesk:
    """One pipeline in a worker: two threads, two connections."""

    def __init__(self, worker: SimulatedWorker, pipeline: str) -> None:
        self.worker, self.pipeline = worker, pipeline
        self.world = worker.world
        self.flights = Mailbox()
        self.finished = False
        self.looked_at: list[Any] = []  # what is being decoded or transformed
        self._flush_link: Optional[Link] = None
        self._claim_link: Optional[Link] = None
        self._named: dict[p.LaneKey, Any] = {}
        self._epochs: dict[p.LaneKey, int] = {}
        self._orders: deque[_Pending] = deque()
        self._orders_bell = Mailbox()
        self._closed_until = 0.0
        self._closed_backoff = self._backoff()

    def _backoff(self) -> Backoff:
        return Backoff(self.worker.random.uniform)

    @property
    def links(self) -> list[Link]:
        """The open connections."""
        return [link for link in (self._flush_link, self._claim_link) if link is not None and link.open]

    def close(self, hard: bool) -> None:
        """The process is gone."""
        for link in self.links:
            link.close(hard)

    def stopped(self) -> None:
        """The process was stopped."""
        for link in self.links:
            link.stopped()

    # --- connections ------------------------------------------------------------------------------------------------

    def _connect(self) -> Generator[Any, Any, Link]:
        yield self.worker.random.uniform(0.002, 0.01)
        server = self.worker.server
        if not server.up:
            raise SinkUnavailable("connection refused", sqlstate="08006")
        if server.loss and server.random.random() < server.loss:
            raise SinkUnavailable("timeout expired", sqlstate="08001")
        return Link(self.worker, server, server.open(f"{self.worker.name}/{self.pipeline}"))

    def _flush_connection(self) -> Generator[Any, Any, Link]:
        if self._flush_link is None or not self._flush_link.open:
            link = yield from self._connect()
            if self._flush_link is None or not self._flush_link.open:  # the other thread may have been faster
                self._flush_link = link
            else:
                link.close()
        return self._flush_link

    def _claim_connection(self) -> Generator[Any, Any, Link]:
        if self._claim_link is None or not self._claim_link.open:
            self._claim_link = yield from self._connect()
        return self._claim_link

    @staticmethod
    def _drive(
        protocol: Generator[Any, Any, Any],
        link: Link,
        parts: Optional[list[p.Part]] = None,
        condemned: bool = False,
    ) -> Generator[Any, Any, Any]:
        """`checkpoint.run`, with the thread waiting for each operation."""
        try:
            operation = next(protocol)
            while True:
                payload = None
                if type(operation) is cp.WriteRows and parts is not None:
                    payload = Rows([parts[index] for index in operation.parts], condemned)
                try:
                    result = yield link.call(operation, payload)
                except SinkError as error:
                    if type(operation) is cp.Rollback:
                        link.close()
                        operation = protocol.send(None)
                    else:
                        operation = protocol.throw(error)
                else:
                    operation = protocol.send(result)
        except StopIteration as stop:
            return stop.value

    # --- flush thread -----------------------------------------------------------------------------------------------

    def flushes(self) -> Script:
        """Write the flights in their order."""
        while True:
            flight = yield from self.flights.get()
            if flight is None:
                self.finished = True
                self.worker.finished_one()
                return
            yield from self._handle(flight)

    def _handle(self, flight: p.Flight) -> Script:
        worker, taken_at = self.worker, self.world.now
        backoff, attempts, since_finish = self._backoff(), 0, 0
        if worker.protocols.acknowledge_early:
            self._report_flushed(flight, taken_at, cp.FlushResult(tuple(range(len(flight.parts))), (), ()), 0)
        while True:
            try:
                result = yield from self._write(flight)
            except FateUnknown as error:
                self._report_failed(flight, p.FailureKind.FATE_UNKNOWN, str(error), error.sqlstate)
                return
            except (SinkError, StreamingOverloadException) as error:
                block = block_of(error)
                attempts += 1
                since_finish += worker.finishing
                hopeless = block.kind is p.BlockKind.OVERLOADED and worker.finishing
                if hopeless or since_finish > FINISHING_ATTEMPTS:
                    self._report_failed(flight, p.FailureKind.ABANDONED, block.reason, block.sqlstate)
                    return
                wait = backoff.wait_seconds(block)
                yield from self._wait_out(flight, block, wait, attempts)
            else:
                if not worker.protocols.acknowledge_early:
                    self._report_flushed(flight, taken_at, result, attempts)
                return

    def _wait_out(self, flight: p.Flight, block: Block, wait: float, attempt: int) -> Script:
        worker = self.worker
        if worker.finishing:
            wait = min(wait, FINISHING_WAIT_SECONDS)
        worker.report(
            p.FlushBlocked(
                flight.flight_id,
                flight.pipeline,
                block.kind,
                block.reason,
                block.remedy,
                block.sqlstate,
                wait,
                attempt,
            )
        )
        until = self.world.now + wait
        while self.world.now < until and not worker.finishing:  # `Finish` ends a long wait
            yield min(0.1, until - self.world.now)
        if worker.finishing:
            yield min(FINISHING_WAIT_SECONDS, max(0.0, until - self.world.now))

    def _write(self, flight: p.Flight) -> Generator[Any, Any, cp.FlushResult]:
        """A part whose lane this worker has claimed again since is fenced without a question."""
        stale = [i for i, part in enumerate(flight.parts) if part.epoch < self._epochs.get(part.lane, -1)]
        fresh = [i for i in range(len(flight.parts)) if i not in stale]
        if not fresh:
            return cp.FlushResult((), (), tuple(stale))
        result = yield from self._write_fresh(flight, [flight.parts[i] for i in fresh])
        return cp.FlushResult(
            tuple(fresh[i] for i in result.written), result.counts, (*stale, *(fresh[i] for i in result.fenced))
        )

    def _write_fresh(self, flight: p.Flight, parts: list[p.Part]) -> Generator[Any, Any, cp.FlushResult]:
        self._began_at = self.world.now
        if self.worker.overload:
            raise StreamingOverloadException("the sink wants a rest", pause_seconds=0.5)
        reused = self._flush_link is not None and self._flush_link.open
        link = yield from self._flush_connection()
        if flight.condemned is None:
            yield from self._look_at(flight, parts)
        else:
            self.worker.enter(flight, p.Phase.DATABASE)
        stale = [x for x in parts if self._named.get(x.lane) != link.backend.identity]
        if stale:
            try:
                yield link.call(Refresh({x.lane: (x.epoch, x.owner) for x in stale}))
                self._named.update({x.lane: link.backend.identity for x in stale})
            except SinkContended:
                pass  # a claim is under way; the next flush tries again
        self._began_at = self.world.now
        try:
            return (
                yield from self._drive(self.worker.protocols.flush(parts), link, parts, flight.condemned is not None)
            )
        except ConnectionLost:
            if reused and self.world.now - self._began_at < 0.01:
                # It had died while it was idle: no news for anybody. (The session knows it by BEGIN having failed.)
                return (yield from self._write_fresh(flight, parts))
            raise

    def _look_at(self, flight: p.Flight, parts: list[p.Part]) -> Script:
        """Decode and transform, which takes a little time in which the process may die, and be it of a message."""
        worker = self.worker
        self.looked_at = [message for part in parts for chunk in part.chunks for message in chunk.offsets]
        fates = [message.fate for message in self.looked_at]
        deadly = "poison" in fates or fates.count("accomplice") > 1
        for phase in (p.Phase.DECODE, p.Phase.TRANSFORM):
            worker.enter(flight, phase)
            yield worker.random.uniform(0.0005, worker.transform_seconds if self.looked_at else 0.001)
            if worker.hang_next:
                worker.hang_next = False
                worker.keeps_interpreter = worker.random.random() < 0.5
                yield HANG_SECONDS
            if deadly and worker.random.random() < 0.5:
                break
        if deadly:
            worker.exit(KILLED_BY_A_MESSAGE)
            yield 1.0  # which this process does not see
        self.looked_at = []
        worker.enter(flight, p.Phase.DATABASE)

    def _report_flushed(self, flight: p.Flight, taken_at: float, result: cp.FlushResult, retries: int) -> None:
        now = self.world.now
        counts = result.counts
        self.worker.report(
            p.FlushReport(
                flight.flight_id,
                flight.pipeline,
                now - self._began_at if result.written and counts else 0.0,
                now - taken_at,
                sum(x.rows for x in counts),
                sum(x.filtered for x in counts),
                sum(x.dead_lettered for x in counts),
                retries,
                sorted(result.fenced),
            )
        )

    def _report_failed(self, flight: p.Flight, kind: p.FailureKind, reason: str, sqlstate: Optional[str]) -> None:
        self.worker.report(p.FlushFailed(flight.flight_id, flight.pipeline, kind, reason, sqlstate))

    _began_at = 0.0

    # --- claim thread -----------------------------------------------------------------------------------------------

    def take_order(self, order: Any) -> None:
        """A claim or a seed has come; it replaces what it makes obsolete."""
        self._orders = deque(
            x
            for x in self._orders
            if x.order.lane != order.lane or (isinstance(order, p.Seed) and isinstance(x.order, p.Claim))
        )
        self._orders.append(_Pending(order, self._backoff()))
        self.wake_claims()

    def wake_claims(self) -> None:
        """Something is new."""
        self._orders_bell.put(None)

    def claims(self) -> Script:
        """Answer claims and seeds, each for as long as it takes; those that can not be made yet take turns."""
        while True:
            pending = self._next_due()
            if pending is not None:
                yield from self._try(pending)
            elif self._orders:
                yield 0.05
            else:
                yield from self._orders_bell.get()

    def _next_due(self) -> Optional[_Pending]:
        now = self.world.now
        if now >= self._closed_until:
            for pending in self._orders:
                if pending.due_at <= now:
                    self._orders.remove(pending)
                    return pending
        return None

    def _try(self, pending: _Pending) -> Script:
        order = pending.order
        try:
            answer = yield from self._with_claims(order)
        except SinkError as error:
            self._postpone(pending, block_of(error))
            return
        self._closed_until, self._closed_backoff = 0.0, self._backoff()
        if isinstance(answer, p.Claimed):
            self._epochs[answer.lane] = max(answer.epoch, self._epochs.get(answer.lane, -1))
        self.worker.report(answer)

    def _with_claims(self, order: Any) -> Generator[Any, Any, p.Report]:
        reused = self._claim_link is not None and self._claim_link.open
        try:
            return (yield from self._answer(order))
        except ConnectionLost:
            if not reused:
                raise
        return (yield from self._answer(order))

    def _answer(self, order: Any) -> Generator[Any, Any, p.Report]:
        link = yield from self._claim_connection()
        protocols = self.worker.protocols
        if isinstance(order, p.Claim):
            backend = (yield from self._flush_connection()).backend.identity
            result = yield from self._drive(protocols.claim(order.lane, order.owner, backend), link)
            self._named[order.lane] = backend
            found = result.checkpoint
        else:
            found = yield from self._drive(protocols.seed(order), link)
            if found is None:
                return p.Fenced(order.claim_id, order.lane)
        return p.Claimed(order.claim_id, order.lane, found.epoch, found.next_offset, found.topic_id, found.leader_epoch)

    def _postpone(self, pending: _Pending, block: Block) -> None:
        now = self.world.now
        if block.kind is p.BlockKind.CONTENDED:
            pending.due_at = now + pending.backoff.wait_seconds(block)
        else:
            self._closed_until = now + self._closed_backoff.wait_seconds(block)
        # The real desk looks through its inbox again before the next attempt: what came meanwhile may replace this.
        if not any(x.order.lane == pending.order.lane for x in self._orders):
            self._orders.append(pending)
        order = pending.order
        self.worker.report(p.ClaimDelayed(order.claim_id, order.lane, block.reason, block.sqlstate))


@dataclass
class _Pending:
    """An order of the claim thread that is not answered yet."""

    order: Any
    backoff: Backoff
    due_at: float = 0.0
