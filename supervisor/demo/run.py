"""Plays a scenario from the first message to the report (demo process).

The main thread leads: it starts and stops the parts, changes the phases, takes the samples and feeds the view. The load
and the competitor have threads of their own. Nothing here decides how the daemon behaves; it is only watched.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Optional

from speedlayer.supervisor.demo.broker import Broker
from speedlayer.supervisor.demo.capacity import Flush, measure_capacity
from speedlayer.supervisor.demo.competitor import Competitor, Gate
from speedlayer.supervisor.demo.daemon import PAUSE_SECONDS, SLOW_FLUSH_THRESHOLD_SECONDS, Daemon, DaemonPlan
from speedlayer.supervisor.demo.database import Audit, Database
from speedlayer.supervisor.demo.embedded_kafka import backlog_problem
from speedlayer.supervisor.demo.load import Load
from speedlayer.supervisor.demo.orders import RECORD_BYTES
from speedlayer.supervisor.demo.recorder import Recorder, take_sample
from speedlayer.supervisor.demo.report import PhaseReport, Report
from speedlayer.supervisor.demo.scenario import Phase, Scenario
from speedlayer.supervisor.demo.view import View
from speedlayer.supervisor.errors import SpeedlayerError

# How often the daemon is asked for its state.
SAMPLE_SECONDS = 0.2

# How often to look whether the competitor has got its lock, which takes as long as the flushes that are open.
LOCK_LOOK_SECONDS = 0.005

# How long the daemon may take until all partitions are read: two workers boot, the group settles.
READY_TIMEOUT_SECONDS = 60.0

# How long the rest may take to be written once everything is produced.
DRAIN_TIMEOUT_SECONDS = 120.0

# No flush shall be let through in less than the strikes' threshold while the database is meant to be slow.
MINIMUM_HOLD_SECONDS = 1.03 * SLOW_FLUSH_THRESHOLD_SECONDS


class Interrupted(Exception):
    """The user wants to stop: nothing is reported, everything is removed."""


@dataclass(frozen=True)
class Parts:
    """What a run is made of. ``interrupted`` is set by the signal handlers."""

    scenario: Scenario
    broker: Broker
    database: Database
    plan: DaemonPlan
    folder: Path
    view: View
    interrupted: threading.Event

    def pause(self, seconds: float) -> None:
        """Wait a moment; raises `Interrupted` when the user wants to stop."""
        if self.interrupted.wait(seconds):
            raise Interrupted


@dataclass(frozen=True)
class Outcome:
    """What a run found out: the report, and what the plot is drawn from."""

    report: Report
    recorder: Recorder
    flushes: list[Flush]


class Run:
    """One run of a scenario."""

    def __init__(self, parts: Parts, kind: str, needs_brake: bool) -> None:
        self._parts = parts
        self._kind = kind
        self._needs_brake = needs_brake
        self._recorder = Recorder(PAUSE_SECONDS)
        self._phase_starts: list[float] = []
        self._phase = -1
        self._started = 0.0
        self._database_started = 0.0
        self._clock_offset = 0.0
        self._competitor: Optional[Competitor] = None

    def play(self) -> Outcome:
        """Play the scenario and return what came of it."""
        parts = self._parts
        with self._daemon() as daemon, self._load() as load:
            parts.view.say(f"starting the daemon: speedlayer run {daemon.file.name}, {parts.plan.workers} workers")
            self._wait_until_ready(daemon)
            self._begin()
            load.start()
            with self._competition():
                self._watch(daemon, load)
                produced_until = self._elapsed_there()
            unread = self._drain(daemon, load)
            ended = self._elapsed()
            parts.view.say("stopping the daemon (SIGTERM)")
            exit_code = daemon.stop()
            parts.view.say("comparing the table with what was produced")
            audit = self._audit(load)
        borders = [*self._phase_starts, produced_until]
        return self._outcome(load, audit, unread, borders, ended, exit_code)

    # --- before the first message -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _daemon(self) -> Iterator[Daemon]:
        daemon = Daemon(self._parts.plan, self._parts.folder)
        daemon.start()
        try:
            yield daemon
        finally:
            daemon.close()

    @contextlib.contextmanager
    def _load(self) -> Iterator[Load]:
        parts = self._parts
        load = Load(parts.broker.client, parts.broker.topic, parts.scenario, parts.folder)
        try:
            yield load
        finally:
            load.stop()

    def _wait_until_ready(self, daemon: Daemon) -> None:
        """Wait until every partition is read: the first flush shall be as fast as the others."""
        deadline = time.monotonic() + READY_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            status = daemon.status()
            if status is not None and _is_ready(status):
                return
            self._parts.pause(SAMPLE_SECONDS)
        raise SpeedlayerError(
            f"the daemon did not begin to read within {READY_TIMEOUT_SECONDS:g} s:\n{daemon.log_tail()}"
        )

    def _begin(self) -> None:
        """Set both clocks to 0: ours, and the database's, in which the flushes' times are."""
        before, before_monotonic = time.time(), time.monotonic()
        self._database_started = self._parts.database.now()
        after, after_monotonic = time.time(), time.monotonic()
        # Half of the round trip lies before the server's look at its clock.
        self._started = (before_monotonic + after_monotonic) / 2
        self._clock_offset = self._database_started - (before + after) / 2

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _elapsed_there(self) -> float:
        """The same by the database's clock, for what is compared with the flushes' times."""
        return self._parts.database.now() - self._database_started

    # --- while messages are produced ----------------------------------------------------------------------------

    def _watch(self, daemon: Daemon, load: Load) -> None:
        while not load.finished:
            self._follow_phase()
            self._look(daemon, load)
            # A phase begins when it is due, and not at the next look.
            left = self._parts.scenario.phase_ends_at(self._phase) - self._elapsed()
            self._parts.pause(min(SAMPLE_SECONDS, left) if left > 0 else SAMPLE_SECONDS)

    def _look(self, daemon: Daemon, load: Load) -> None:
        """Take a sample, if the daemon answers, and show it."""
        status = daemon.status()
        if status is None:
            return
        sample = take_sample(
            self._elapsed(), max(self._phase, 0), load.acknowledged, dict(load.ends), status, daemon.memory_bytes()
        )
        for event in self._recorder.add(sample):
            self._parts.view.tell(event)
        self._parts.view.show(self._recorder.samples[-1])
        problem = backlog_problem(sample.lag * RECORD_BYTES) if self._parts.broker.embedded else None
        if problem is not None:
            raise SpeedlayerError(problem)
        if self._competitor is not None:
            self._competitor.check()

    def _follow_phase(self) -> None:
        """Enter the phase that it is time for."""
        scenario, elapsed = self._parts.scenario, self._elapsed()
        while self._phase < scenario.phase_at(elapsed):
            self._phase += 1
            self._enter(scenario.phases[self._phase])

    def _enter(self, phase: Phase) -> None:
        # A slow phase lasts from the first lock to just before the release: what gets through before it and after it
        # belongs to its neighbours.
        border = self._elapsed_there()
        self._release()
        text = f"{phase.name}: {phase.rate:,.0f} messages/s"
        if phase.capacity is not None:
            self._compete(phase.capacity)
            border = self._elapsed_there()
            text += f"; a competitor's lock leaves {phase.capacity:,.0f} rows/s"
        self._phase_starts.append(border)
        self._tell_capacity()
        self._parts.view.tell(self._recorder.note(border, text))

    def _tell_capacity(self) -> None:
        """Tell what the database could take in the phase that has just ended."""
        if len(self._phase_starts) < 2:
            return
        start, end = self._phase_starts[-2:]
        name = self._parts.scenario.phases[self._phase - 1].name
        capacity = measure_capacity(self._flushes(), start, end)
        measured = "nothing was written" if capacity is None else f"{capacity:,.0f} rows/s"
        self._parts.view.tell(self._recorder.note(end, f"{name} is over; measured capacity: {measured}"))

    def _flushes(self) -> list[Flush]:
        """The flushes so far, in seconds since the first message."""
        start = self._database_started
        return [Flush(began - start, ended - start, rows) for began, ended, rows in self._parts.database.flushes()]

    # --- the competitor -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _competition(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._release()

    def _compete(self, rows_per_second: float) -> None:
        parts = self._parts
        gate = Gate(rows_per_second, parts.scenario.batch_rows, MINIMUM_HOLD_SECONDS)
        self._competitor = Competitor(parts.database.dsn, parts.database.table, gate)
        self._competitor.start()
        while not self._competitor.locked.is_set():
            self._competitor.check()
            self._parts.pause(LOCK_LOOK_SECONDS)

    def _release(self) -> None:
        competitor, self._competitor = self._competitor, None
        if competitor is not None:
            competitor.stop()

    # --- after the last message ---------------------------------------------------------------------------------

    def _drain(self, daemon: Daemon, load: Load) -> int:
        """Wait until everything is written and the brake is off; return how many messages are not."""
        deadline = time.monotonic() + DRAIN_TIMEOUT_SECONDS
        while True:
            self._look(daemon, load)
            latest = self._recorder.latest
            if latest is not None and latest.lag == 0 and latest.overload_reason is None:
                return 0
            if time.monotonic() > deadline:
                return latest.lag if latest is not None else load.acknowledged
            self._parts.pause(SAMPLE_SECONDS)

    def _audit(self, load: Load) -> Audit:
        database = self._parts.database
        return self._interruptible(
            lambda: database.audit(load.log_path, load.broken_path, self._clock_offset), database.cancel
        )

    def _interruptible(self, work: Callable[[], Audit], cancel: Callable[[], None]) -> Audit:
        """Do work that blocks on a thread of its own, so that a Ctrl-C need not wait for its end."""
        results: list[Any] = []

        def do() -> None:
            try:
                results.append(work())
            except Exception as error:
                results.append(error)

        thread = threading.Thread(target=do, name="audit", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                self._parts.pause(0.0)
                thread.join(0.1)
        except Interrupted:
            cancel()
            thread.join()
            raise
        (result,) = results
        if isinstance(result, BaseException):
            raise result
        assert isinstance(result, Audit)
        return result

    def _outcome(
        self, load: Load, audit: Audit, unread: int, borders: list[float], ended: float, exit_code: int
    ) -> Outcome:
        parts, recorder = self._parts, self._recorder
        flushes = self._flushes()
        report = Report(
            kind=self._kind,
            broker=parts.broker.description,
            database=parts.database.description,
            seconds=ended,
            workers=parts.plan.workers,
            batch_rows=parts.scenario.batch_rows,
            produced=load.acknowledged,
            unread=unread,
            audit=audit,
            phases=tuple(self._phase_reports(flushes, borders)),
            brake_events=tuple(recorder.brake_events),
            needs_brake=self._needs_brake,
            peak_lag=recorder.peak_lag,
            peak_memory_bytes=recorder.peak_memory_bytes,
            daemon_exit_code=exit_code,
            plot=None,
        )
        return Outcome(report, recorder, flushes)

    def _phase_reports(self, flushes: list[Flush], borders: list[float]) -> Iterator[PhaseReport]:
        for phase, (start, end) in zip(self._parts.scenario.phases, pairwise(borders), strict=True):
            produced = self._recorder.produced_at(end) - self._recorder.produced_at(start)
            written = sum(flush.rows for flush in flushes if start <= flush.ended < end)
            yield PhaseReport(
                phase.name,
                start,
                end,
                produced / (end - start),
                written / (end - start),
                measure_capacity(flushes, start, end),
            )


def _is_ready(status: dict[str, Any]) -> bool:
    lanes = status["pipelines"][0]["lanes"]
    return bool(lanes) and all(lane["state"] == "fetching" for lane in lanes)
