"""A simulated PostgreSQL: it carries out the operations of `speedlayer.workers.checkpoint`, for many at once.

Transactions are READ COMMITTED: a statement sees what is committed when it has its locks. Row locks are held until the
transaction ends. Between a client and its backend there is a network, and each may be gone without the other knowing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Optional

from simulation.kafka import Message
from simulation.world import Process, Task, World
from speedlayer.workers import checkpoint as cp
from speedlayer.workers.checkpoint import Backend, Checkpoint, Counts
from speedlayer.workers.errors import ConnectionLost, SinkContended, SinkError, SinkMisconfigured, SinkUnavailable
from speedlayer.workers.protocol import LaneKey, Part

# As `speedlayer.workers.sinks.postgres` sets them, or near it.
CLAIM_LOCK_TIMEOUT_SECONDS = 0.5
IDLE_IN_TRANSACTION_SECONDS = 30.0
SILENT_SECONDS = 2.0
CONNECTION_CHECK_SECONDS = 2.0
GHOST_SECONDS = 4.0  # what the guardian's looks come to

# A fail-over loses at most so many of the last commits.
KEPT_COMMITS = 16

Reply = Callable[[Any, Optional[BaseException]], None]


class Transaction:
    """What a backend has done since BEGIN."""

    __slots__ = (
        "checkpoints",
        "condemned",
        "dead",
        "filtered",
        "found_dead",
        "gaps",
        "moves",
        "purpose",
        "rows",
        "starts",
    )

    def __init__(self, purpose: cp.Purpose) -> None:
        self.purpose = purpose
        self.rows: list[Message] = []
        self.filtered: list[Message] = []
        self.condemned: list[Message] = []
        self.found_dead: list[tuple[int, list[Message]]] = []
        self.dead: list[Message] = []
        self.moves: list[cp.Move] = []
        self.starts: list[cp.SetStart] = []
        self.gaps: list[cp.RecordGap] = []
        self.checkpoints: dict[LaneKey, Checkpoint] = {}


class Rows(list[Part]):
    """The parts to write; those of a condemned flight become dead letters, whatever is in them."""

    def __init__(self, parts: list[Part], condemned: bool = False) -> None:
        super().__init__(parts)
        self.condemned = condemned


def _becomes(message: Message, condemned: bool) -> str:
    """What a worker makes of a message that it has survived."""
    if condemned:
        return "dead"
    return "row" if message.fate == "accomplice" else message.fate


class BackendProcess:
    """A server process."""

    __slots__ = ("alive", "client", "held", "identity", "idle_since", "on_end", "transaction", "waiting")

    def __init__(self, identity: Backend, client: str, now: float) -> None:
        self.identity = identity
        self.client = client
        self.alive = True
        self.transaction: Optional[Transaction] = None
        self.held: list[Any] = []
        self.waiting: Optional[Waiter] = None
        self.idle_since: Optional[float] = now
        self.on_end: Callable[[], None] = lambda: None


class Waiter:
    """A backend that waits for a lock."""

    __slots__ = ("backend", "done", "fail", "go_on", "resource")

    def __init__(
        self, backend: BackendProcess, resource: Any, go_on: Callable[[], None], fail: Callable[[SinkError], None]
    ) -> None:
        self.backend, self.resource, self.go_on, self.fail = backend, resource, go_on, fail
        self.done = False


class Undo:
    """How to take one commit back, for a fail-over that loses it."""

    __slots__ = ("checkpoints", "statuses")

    def __init__(self) -> None:
        self.checkpoints: list[tuple[LaneKey, Optional[Checkpoint]]] = []
        self.statuses: list[tuple[Message, int]] = []


class Server:
    """The database. ``on_commit`` looks at every transaction before it becomes visible."""

    def __init__(self, world: World, on_commit: Callable[[Server, Transaction, Undo], None], keyed: bool) -> None:
        self.world = world
        self.random = world.stream("postgres")
        self.on_commit = on_commit
        self.keyed = keyed  # rows have a unique key: writers of one key wait for each other
        self.checkpoints: dict[LaneKey, Checkpoint] = {}
        self.backends: dict[Backend, BackendProcess] = {}
        self.commits: deque[Undo] = deque(maxlen=KEPT_COMMITS)
        self.commit_count = 0
        self.fell_back = False  # a fail-over has lost commits
        self.lowered: set[LaneKey] = set()  # lanes whose checkpoint has gone back, by a seek or a fail-over
        self.flush_lock_timeout_seconds = 3.0
        # Faults
        self.up = True
        self.slowness = 1.0
        self.loss = 0.0  # of each round trip
        self.deadlock = 0.0  # of each wait for a lock, and of each write
        self.full = False
        self.missing: set[str] = set()  # pipelines whose table is missing
        self.locked: dict[str, list[Waiter]] = {}  # pipelines whose table somebody has locked
        self._pids = 0
        self._holders: dict[Any, BackendProcess] = {}
        self._waiters: dict[Any, list[Waiter]] = {}
        self._do: dict[type, Callable[[BackendProcess, Any, Any, Reply], None]] = {
            cp.Begin: self._begin,
            cp.WriteRows: self._write_rows,
            cp.WriteDeadLetters: self._write_dead_letters,
            cp.Advance: self._advance,
            cp.LockCheckpoint: self._lock_checkpoint,
            cp.RaiseEpoch: self._raise_epoch,
            cp.SetStart: self._set_start,
            cp.RecordGap: self._record_gap,
            cp.EvictOldOwner: self._evict,
            cp.Commit: self._commit,
            cp.Rollback: self._roll_back,
            Refresh: self._refresh,
        }

    # --- connections ------------------------------------------------------------------------------------------------

    def open(self, client: str) -> BackendProcess:
        """Fork a backend."""
        self._pids += 1
        backend = BackendProcess(Backend(self._pids, self.world.now), client, self.world.now)  # type: ignore[arg-type]
        self.backends[backend.identity] = backend
        return backend

    def end(self, backend: BackendProcess) -> None:
        """The backend is terminated, or notices that its client is gone."""
        if not backend.alive:
            return
        backend.alive = False
        del self.backends[backend.identity]
        if backend.waiting is not None:
            self._forget(backend.waiting)
        backend.transaction = None
        self._release(backend)
        self.world.after(self.random.uniform(0.0, 0.01), backend.on_end)

    def end_if_idle(self, backend: BackendProcess, since: Optional[float]) -> None:
        """idle_in_transaction_session_timeout."""
        if backend.alive and since is not None and backend.idle_since == since and backend.transaction is not None:
            self.world.say("postgres", f"ends {backend.client}: idle in transaction")
            self.end(backend)

    def stop(self) -> None:
        """The server goes down; what was not committed is gone."""
        self.up = False
        for backend in list(self.backends.values()):
            self.end(backend)

    def lose_commits(self, count: int) -> int:
        """A fail-over to a standby that was behind: the last commits never were."""
        self.stop()
        self.fell_back = True
        lost = 0
        while self.commits and lost < count:
            undo = self.commits.pop()
            for message, status in reversed(undo.statuses):
                message.status = status
            self.lowered.update(lane for lane, _ in undo.checkpoints)
            for lane, checkpoint in reversed(undo.checkpoints):
                if checkpoint is None:
                    self.checkpoints.pop(lane, None)
                else:
                    self.checkpoints[lane] = checkpoint
            lost += 1
        return lost

    # --- operations -------------------------------------------------------------------------------------------------

    def execute(self, backend: BackendProcess, operation: Any, payload: Any, reply: Reply) -> None:
        """Carry out one statement of a client."""
        backend.idle_since = None

        def answer(result: Any, error: Optional[BaseException]) -> None:
            backend.idle_since = self.world.now
            reply(result, error)

        try:
            self._do[type(operation)](backend, operation, payload, answer)
        except SinkError as error:
            answer(None, error)

    def _begin(self, backend: BackendProcess, operation: cp.Begin, payload: Any, reply: Reply) -> None:
        assert backend.transaction is None, "BEGIN inside a transaction"
        backend.transaction = Transaction(operation.purpose)
        reply(None, None)

    def _write_rows(self, backend: BackendProcess, operation: cp.WriteRows, parts: Rows, reply: Reply) -> None:
        pipeline = parts[0].lane.pipeline
        if self.full:
            raise SinkUnavailable("could not extend file: no space left on device", sqlstate="53100")
        if pipeline in self.missing:
            raise SinkMisconfigured("the table does not exist", sqlstate="42P01", remedy="create it")
        if self.random.random() < self.deadlock:
            raise SinkContended("deadlock detected", sqlstate="40P01")
        messages = [message for part in parts for chunk in part.chunks for message in chunk.offsets]

        def write() -> None:
            self.world.after(self._service_seconds(len(messages)), finish)

        def finish() -> None:
            if backend.alive and backend.transaction is not None:
                reply(self._wrote(backend.transaction, operation.parts, parts), None)

        rows = [message for message in messages if _becomes(message, parts.condemned) == "row"]
        keys = sorted({(pipeline, message.key) for message in rows}) if self.keyed else []
        fail = self._failing(reply)
        if pipeline in self.locked:
            waiter = Waiter(backend, None, lambda: self._acquire_rest(backend, keys, write, fail), fail)
            self.locked[pipeline].append(waiter)
            self._start_waiting(waiter)
        else:
            self._acquire(backend, keys, write, fail)

    def _service_seconds(self, rows: int) -> float:
        return (0.004 + 0.002 * rows) * self.slowness * self.random.uniform(0.5, 2.0)

    @staticmethod
    def _wrote(transaction: Transaction, indexes: tuple[int, ...], parts: Rows) -> tuple[Counts, ...]:
        counts = []
        for index, part in zip(indexes, parts, strict=True):
            dead: list[Message] = []
            rows = filtered = 0
            for chunk in part.chunks:
                for message in chunk.offsets:
                    fate = _becomes(message, parts.condemned)
                    if fate == "row":
                        transaction.rows.append(message)
                        rows += 1
                    elif fate == "filtered":
                        transaction.filtered.append(message)
                        filtered += 1
                    else:
                        dead.append(message)
            transaction.found_dead.append((index, dead))
            transaction.condemned += dead if parts.condemned else []
            counts.append(Counts(rows, filtered, len(dead)))
        return tuple(counts)

    def _write_dead_letters(self, backend: BackendProcess, operation: Any, payload: Any, reply: Reply) -> None:
        transaction = self._transaction(backend)
        for index, dead in transaction.found_dead:
            if index in operation.parts:
                transaction.dead.extend(dead)
        reply(None, None)

    def _advance(self, backend: BackendProcess, operation: cp.Advance, payload: Any, reply: Reply) -> None:
        if self.random.random() < self.deadlock:
            raise SinkContended("deadlock detected", sqlstate="40P01")
        known = [move.lane for move in operation.moves if move.lane in self.checkpoints]

        def move() -> None:
            transaction = self._transaction(backend)
            moved = set()
            for step in operation.moves:
                row = transaction.checkpoints.get(step.lane) or self.checkpoints.get(step.lane)
                if row is None or not self._may_move(row, step):
                    continue
                leader_epoch = step.leader_epoch if step.leader_epoch >= 0 else row.leader_epoch
                transaction.checkpoints[step.lane] = Checkpoint(
                    row.epoch, row.owner, step.end, row.topic_id, leader_epoch, row.backend
                )
                transaction.moves.append(step)
                moved.add(step.lane)
            reply(frozenset(moved), None)

        self._acquire(backend, known, move, self._failing(reply))

    @staticmethod
    def _may_move(row: Checkpoint, step: cp.Move) -> bool:
        return row.epoch == step.epoch and row.owner == step.owner and row.next_offset == step.start

    def _lock_checkpoint(self, backend: BackendProcess, operation: Any, payload: Any, reply: Reply) -> None:
        if operation.lane not in self.checkpoints:
            reply(None, None)  # nothing that could be locked, even if somebody is inserting it
            return

        def locked() -> None:
            reply(self.checkpoints.get(operation.lane), None)

        self._acquire(backend, [operation.lane], locked, self._failing(reply))

    def _raise_epoch(self, backend: BackendProcess, operation: cp.RaiseEpoch, payload: Any, reply: Reply) -> None:
        def raised() -> None:
            row = self.checkpoints.get(operation.lane)
            if row is None:
                new = Checkpoint(1, operation.owner, None, None, -1, operation.backend)
            else:
                new = Checkpoint(
                    row.epoch + 1, operation.owner, row.next_offset, row.topic_id, row.leader_epoch, operation.backend
                )
            self._transaction(backend).checkpoints[operation.lane] = new
            reply(new, None)

        self._acquire(backend, [operation.lane], raised, self._failing(reply))

    def _set_start(self, backend: BackendProcess, operation: cp.SetStart, payload: Any, reply: Reply) -> None:
        def set_start() -> None:
            transaction = self._transaction(backend)
            row = transaction.checkpoints.get(operation.lane) or self.checkpoints.get(operation.lane)
            same = row is not None and row.epoch == operation.epoch and row.owner == operation.owner
            if row is None or not same or row.next_offset != operation.expected:
                reply(False, None)
                return
            topic_id = operation.topic_id if operation.topic_id is not None else row.topic_id
            transaction.checkpoints[operation.lane] = Checkpoint(
                row.epoch, row.owner, operation.start, topic_id, -1, row.backend
            )
            transaction.starts.append(operation)
            reply(True, None)

        self._acquire(backend, [operation.lane], set_start, self._failing(reply))

    def _record_gap(self, backend: BackendProcess, operation: cp.RecordGap, payload: Any, reply: Reply) -> None:
        self._transaction(backend).gaps.append(operation)
        reply(None, None)

    def _evict(self, backend: BackendProcess, operation: cp.EvictOldOwner, payload: Any, reply: Reply) -> None:
        row, holder = self.checkpoints.get(operation.lane), self._holders.get(operation.lane)
        if row is not None and holder is not None and holder.identity == row.backend and self._is_silent(holder):
            self.world.say("postgres", f"{backend.client} ends {holder.client}, a stopped owner")
            self.end(holder)
        reply(None, None)

    def _is_silent(self, backend: BackendProcess) -> bool:
        silent_since = backend.idle_since
        return (
            backend.transaction is not None
            and silent_since is not None
            and self.world.now - silent_since >= SILENT_SECONDS
        )

    def _commit(self, backend: BackendProcess, operation: cp.Commit, payload: Any, reply: Reply) -> None:
        transaction = self._transaction(backend)
        undo = Undo()
        undo.checkpoints = [(lane, self.checkpoints.get(lane)) for lane in transaction.checkpoints]
        self.lowered.update(start.lane for start in transaction.starts if start.start < (start.expected or 0))
        self.on_commit(self, transaction, undo)
        self.checkpoints.update(transaction.checkpoints)
        self.commits.append(undo)
        self.commit_count += 1
        backend.transaction = None
        self._release(backend)
        reply(None, None)

    def _roll_back(self, backend: BackendProcess, operation: cp.Rollback, payload: Any, reply: Reply) -> None:
        backend.transaction = None
        self._release(backend)
        reply(None, None)

    def _refresh(self, backend: BackendProcess, operation: Refresh, payload: Any, reply: Reply) -> None:
        """A transaction of its own that names the backend which flushes; it gives up where a claim is under way."""

        def done() -> None:
            for lane, claim in operation.lanes.items():
                row = self.checkpoints.get(lane)
                if row is not None and (row.epoch, row.owner) == claim:
                    self.checkpoints[lane] = Checkpoint(
                        row.epoch, row.owner, row.next_offset, row.topic_id, row.leader_epoch, backend.identity
                    )
            self._release(backend)
            reply(None, None)

        def fail(error: SinkError) -> None:
            self._release(backend)
            reply(None, error)

        # For the length of its waits it counts as a transaction of the claim's kind.
        backend.transaction = Transaction(cp.Purpose.CLAIM)
        known = sorted(lane for lane in operation.lanes if lane in self.checkpoints)
        self._acquire_rest(backend, known, done, fail)
        backend.transaction = None

    @staticmethod
    def _transaction(backend: BackendProcess) -> Transaction:
        assert backend.transaction is not None, "a statement outside of a transaction"
        return backend.transaction

    # --- locks ------------------------------------------------------------------------------------------------------

    def _failing(self, reply: Reply) -> Callable[[SinkError], None]:
        return lambda error: reply(None, error)

    def _acquire(
        self,
        backend: BackendProcess,
        resources: list[Any],
        go_on: Callable[[], None],
        fail: Callable[[SinkError], None],
    ) -> None:
        """Lock one after the other, waiting where somebody else has the lock."""
        for index, resource in enumerate(resources):
            holder = self._holders.get(resource)
            if holder is None:
                self._holders[resource] = backend
                backend.held.append(resource)
            elif holder is not backend:
                if self.random.random() < self.deadlock:
                    raise SinkContended("deadlock detected", sqlstate="40P01")
                rest = partial(self._acquire_rest, backend, resources[index + 1 :], go_on, fail)
                waiter = Waiter(backend, resource, rest, fail)
                self._waiters.setdefault(resource, []).append(waiter)
                self._start_waiting(waiter)
                return
        go_on()

    def _acquire_rest(
        self,
        backend: BackendProcess,
        resources: list[Any],
        go_on: Callable[[], None],
        fail: Callable[[SinkError], None],
    ) -> None:
        try:
            self._acquire(backend, resources, go_on, fail)
        except SinkError as error:
            fail(error)

    def _start_waiting(self, waiter: Waiter) -> None:
        backend = waiter.backend
        backend.waiting = waiter
        claim = backend.transaction is not None and backend.transaction.purpose is cp.Purpose.CLAIM
        timeout = CLAIM_LOCK_TIMEOUT_SECONDS if claim else self.flush_lock_timeout_seconds
        self.world.after(timeout, self._time_out, waiter)
        if not claim:
            self.world.after(GHOST_SECONDS, self._end_ghost, waiter)

    def _time_out(self, waiter: Waiter) -> None:
        if not waiter.done:
            self._forget(waiter)
            waiter.fail(SinkContended("canceling statement due to lock timeout", sqlstate="55P03"))

    def _end_ghost(self, waiter: Waiter) -> None:
        """What the guardian of the waiting session comes to: an old owner, stopped in a transaction, is ended."""
        holder = self._holders.get(waiter.resource)
        if not waiter.done and holder is not None and self._is_silent(holder):
            self.world.say("postgres", f"{holder.client} is ended: its locks held up {waiter.backend.client}")
            self.end(holder)

    def _forget(self, waiter: Waiter) -> None:
        waiter.done = True
        waiter.backend.waiting = None
        for queue in (self._waiters.get(waiter.resource, ()), *self.locked.values()):
            if waiter in queue:
                queue.remove(waiter)  # type: ignore[union-attr]

    def _release(self, backend: BackendProcess) -> None:
        held, backend.held = backend.held, []
        for resource in held:
            del self._holders[resource]
            queue = self._waiters.get(resource)
            if queue:
                waiter = queue.pop(0)
                self._holders[resource] = waiter.backend
                waiter.backend.held.append(resource)
                self._grant(waiter)

    def _grant(self, waiter: Waiter) -> None:
        waiter.done = True
        waiter.backend.waiting = None
        self.world.after(0.0, self._go_on, waiter)

    @staticmethod
    def _go_on(waiter: Waiter) -> None:
        if waiter.backend.alive:
            waiter.go_on()

    def lock_table(self, pipeline: str) -> None:
        """Somebody locks the table of a pipeline."""
        self.locked.setdefault(pipeline, [])

    def unlock_table(self, pipeline: str) -> None:
        """The lock is gone; everybody who waited goes on."""
        for waiter in self.locked.pop(pipeline, []):
            self._grant(waiter)


class Refresh:
    """Not of the protocol: the session names its new backend in the checkpoints (`Statements.refresh_backend`)."""

    __slots__ = ("lanes",)

    def __init__(self, lanes: dict[LaneKey, tuple[int, str]]) -> None:
        self.lanes = lanes


class Link:
    """A client's connection. One call at a time."""

    def __init__(self, process: Process, server: Server, backend: BackendProcess) -> None:
        self.process, self.server, self.backend = process, server, backend
        self.world = process.world
        self.open = True
        self._task: Optional[Task] = None
        self._call = 0
        backend.on_end = self._reset

    def call(self, operation: Any, payload: Any = None) -> Callable[[Task], None]:
        """What a thread yields to have an operation carried out."""

        def start(task: Task) -> None:
            self._start(task, operation, payload)

        return start

    def _start(self, task: Task, operation: Any, payload: Any) -> None:
        world, server = self.world, self.server
        if not self.open:
            if type(operation) is cp.Rollback:  # never fails: a closed connection is rolled back
                world.after(0.0, task.resume)
            else:
                world.after(0.0, task.resume, None, ConnectionLost("connection already closed"))
            return
        self._task = task
        self._call += 1
        delay = server.random.uniform(0.0005, 0.004)
        if server.loss and server.random.random() < server.loss:
            self._lose(server.random.choice(("request", "answer", "late")), operation, payload)
            return
        world.after(delay, self._arrive, self._call, operation, payload)

    def _lose(self, how: str, operation: Any, payload: Any) -> None:
        """The network fails under this call: before, during or after what the server does about it."""
        world, random = self.world, self.server.random
        if world.listening:
            world.say("network", f"{self.backend.client}: {type(operation).__name__} loses its {how}")
        if how == "request":
            world.after(random.uniform(0.0, 0.5), self.cut)
        elif how == "answer":
            world.after(random.uniform(0.0005, 0.01), self._arrive, -1, operation, payload)
            world.after(random.uniform(0.01, 0.5), self.cut)
        else:
            world.after(random.uniform(0.0, 0.2), self.cut)
            world.after(random.uniform(0.2, 2.0), self._arrive, -1, operation, payload)

    def _arrive(self, call: int, operation: Any, payload: Any) -> None:
        if not self.backend.alive:
            self.world.after(0.001, self._reset)
            return

        def reply(result: Any, error: Optional[BaseException]) -> None:
            if self.backend.alive:
                self.world.after(self.server.random.uniform(0.0005, 0.004), self._answer, call, result, error)

        self.server.execute(self.backend, operation, payload, reply)

    def _answer(self, call: int, result: Any, error: Optional[BaseException]) -> None:
        if call == self._call and self._task is not None:
            task, self._task = self._task, None
            task.resume(result, error)

    def _reset(self) -> None:
        """The server says that there is no such backend."""
        if self.open:
            self.open = False
            self._fail()

    def _fail(self) -> None:
        if self._task is not None:
            task, self._task = self._task, None
            task.resume(None, ConnectionLost("server closed the connection unexpectedly", sqlstate="57P01"))

    def cut(self) -> None:
        """The client loses the connection; the backend lives on until it notices."""
        if not self.open:
            return
        self.open = False
        self._fail()
        self._abandon(self.server.random.choice((0.0, 0.1, 2.0, 5.0)))

    def terminate(self) -> None:
        """The server ends the backend; the client hears of it."""
        self.server.end(self.backend)

    def close(self, hard: bool = False) -> None:
        """The client goes. Killed in the middle of a statement, its backend notices a little later."""
        if self.open:
            self.open = False
            self._abandon(CONNECTION_CHECK_SECONDS * self.server.random.random() if hard and self._task else 0.0)
        self._task = None

    def _abandon(self, after_seconds: float) -> None:
        self.world.after(after_seconds, self.server.end, self.backend)

    def stopped(self) -> None:
        """The client was stopped: if it stays so, its transaction is idle."""
        since = self.backend.idle_since
        self.world.after(IDLE_IN_TRANSACTION_SECONDS, self.server.end_if_idle, self.backend, since)
