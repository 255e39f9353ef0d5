"""The workers as the core sees them: credit granted, flights under way, restarts (supervisor process, pure)."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Optional

from speedlayer.supervisor.core.config import RESTART_BACKOFF_LIMIT_SECONDS, RESTART_BACKOFF_SECONDS
from speedlayer.supervisor.core.events import Partition
from speedlayer.workers import protocol as p
from speedlayer.workers.protocol import Phase


class WorkerState(enum.Enum):
    """Where a worker is in its life."""

    WAITING = "waiting"  # to be started, once its back-off is over
    STARTING = "starting"
    READY = "ready"
    FINISHING = "finishing"
    EXITED = "exited"


@dataclass(frozen=True)
class FlightPart:
    """One part of a flight that is under way: which lane, after which of its claims, from where to where. ``first`` and
    ``last`` are the offsets of its first and last message, where there are any.

    It is the claim that tells an old flight from one of ours: a database that falls back to an earlier state (a
    fail-over, a restored backup) may give the same epoch twice.
    """

    partition: Partition
    claim_id: int
    start: int
    end: int
    messages: int
    first: int
    last: int


@dataclass(frozen=True)
class FlightRecord:
    """A flight that was dispatched and not yet reported."""

    flight_id: int
    pipeline: str
    worker: str
    parts: tuple[FlightPart, ...]
    rows: int
    size_bytes: int
    dispatched_at: float
    condemned: bool = False
    phase: Optional[Phase] = None  # what the worker does with it; None while it waits, in the queue or blocked
    phase_since: float = 0.0
    blocked: bool = False  # it waits for its next attempt
    told_long: bool = False  # that it takes long


@dataclass(frozen=True)
class Killed:
    """Why we killed a worker. ``flight_id`` names the flight in whose user code it hung, and whose messages may be
    guilty of that; None: for a reason that no message is to blame for.
    """

    reason: str
    flight_id: Optional[int] = None


@dataclass
class Worker:
    """One worker slot; the process in it changes with each ``incarnation``."""

    name: str
    state: WorkerState = WorkerState.WAITING
    incarnation: int = 0
    pid: Optional[int] = None
    start_at: float = 0.0
    restarts: int = 0
    deaths_in_a_row: int = 0
    boot_failures: int = 0
    credit_flights: int = 0
    credit_bytes: int = 0
    flights: dict[int, FlightRecord] = field(default_factory=dict)
    killed: Optional[Killed] = None  # we have ended it, and its exit is on the way
    killed_at: float = 0.0
    started_at: float = 0.0
    heard_at: float = 0.0  # when it last said anything at all
    claims_heard: dict[str, float] = field(default_factory=dict)  # by pipeline: when its claim thread was last heard of
    flushes_heard: dict[str, float] = field(default_factory=dict)  # by pipeline: and its flush thread
    orders_sent: int = 0
    orders_taken: int = 0
    orders_at: float = 0.0  # since when it owes us the next order
    hangs_in_a_row: int = 0

    @property
    def size_bytes(self) -> int:
        """Payload that the worker holds."""
        return sum(flight.size_bytes for flight in self.flights.values())

    def flights_of(self, pipeline: str) -> list[FlightRecord]:
        """The flights of one pipeline that it has."""
        return [flight for flight in self.flights.values() if flight.pipeline == pipeline]

    def entered(self, flight_id: int, phase: Optional[Phase], now: float) -> None:
        """A flight has come to a phase; None: it waits for its next attempt."""
        record = self.flights.get(flight_id)
        if record is not None:
            self.flights[flight_id] = replace(record, phase=phase, phase_since=now, blocked=phase is None)

    def start(self, now: float) -> None:
        """A new process begins."""
        self.state, self.started_at, self.heard_at = WorkerState.STARTING, now, now
        self.incarnation += 1
        self.orders_sent = self.orders_taken = 0
        self.claims_heard.clear()
        self.flushes_heard.clear()

    def ordered(self, now: float) -> None:
        """An order goes to it."""
        if self.orders_sent == self.orders_taken:
            self.orders_at = now
        self.orders_sent += 1

    def said(self, report: p.Report, now: float) -> None:
        """It reported something, for the watchdog to know when which part of it was last heard of."""
        self.heard_at = now
        if isinstance(report, (p.Claimed, p.Fenced, p.ClaimDelayed)):
            self.claims_heard[report.lane.pipeline] = now
        elif isinstance(report, (p.FlushReport, p.FlushFailed, p.FlushBlocked, p.PhaseEntered)):
            self.flushes_heard[report.pipeline] = now
        elif isinstance(report, p.Alive):
            if report.orders != self.orders_taken:
                self.orders_taken, self.orders_at = report.orders, now
            for pipeline in report.moved:
                self._got_on(pipeline, now)

    def _got_on(self, pipeline: str, now: float) -> None:
        """Filters and maps have begun another record: they are slow, and do not hang."""
        for record in self.flights_of(pipeline):
            if record.phase is Phase.TRANSFORM:
                self.flights[record.flight_id] = replace(record, phase_since=now)

    def room(self, pipeline: str) -> int:
        """Bytes of a pipeline that may still be sent to it; 0 without credit.

        A worker writes each pipeline on a thread of its own, and its credit is for each: one that waits for its table
        takes nothing from the others. An idle thread takes anything: a message larger than the credit travels alone.
        """
        flights = self.flights_of(pipeline)
        if self.state is not WorkerState.READY or len(flights) >= self.credit_flights:
            return 0
        return max(self.credit_bytes - sum(flight.size_bytes for flight in flights), 0 if flights else 1)

    def died(self, now: float, sought: bool = False) -> None:
        """Take note of the exit and set the time of the next start: at once if quarantine has sought this death."""
        if self.state is WorkerState.STARTING:
            self.boot_failures += 1
        delay = min(RESTART_BACKOFF_LIMIT_SECONDS, RESTART_BACKOFF_SECONDS * 2**self.deaths_in_a_row)
        if sought:
            delay = 0.0
        else:
            self.deaths_in_a_row += 1
        self.restarts += 1
        self.state, self.pid, self.start_at = WorkerState.WAITING, None, now + delay
        self.flights.clear()
        self.killed = None

    def showed_life(self) -> None:
        """A flush came through: the next death is the first one again."""
        self.deaths_in_a_row = self.hangs_in_a_row = 0


class Workforce:
    """All workers, by name."""

    def __init__(self, count: int) -> None:
        self._workers = {name: Worker(name) for name in (f"worker-{index}" for index in range(count))}

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def __getitem__(self, name: str) -> Worker:
        return self._workers[name]

    def ready(self) -> list[Worker]:
        """Those that take orders."""
        return [worker for worker in self if worker.state is WorkerState.READY]

    def flights_of(self, pipeline: str) -> list[FlightRecord]:
        """The flights of one pipeline that are under way."""
        return [flight for worker in self for flight in worker.flights_of(pipeline)]

    def queues_drained(self, pipeline: str) -> bool:
        """Whether no flight of the pipeline waits in a queue: each worker has at most the one that it is writing."""
        return all(len(worker.flights_of(pipeline)) <= 1 for worker in self)
