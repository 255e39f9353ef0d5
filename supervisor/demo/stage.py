"""Sets the stage for a run: servers, tables, folders, signals; and writes the report when it is over (demo process).

Whatever happens (success, an error, Ctrl-C, SIGTERM, a closed terminal), the servers, the daemon, the folder and
everything that the run made on given servers are gone when `perform` returns. Only a finished run leaves a report.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

from speedlayer.supervisor.demo import plot
from speedlayer.supervisor.demo.broker import open_broker
from speedlayer.supervisor.demo.daemon import LOCK_TIMEOUT_SECONDS, DaemonPlan
from speedlayer.supervisor.demo.database import Database
from speedlayer.supervisor.demo.embedded_kafka import backlog_problem
from speedlayer.supervisor.demo.embedded_postgres import embedded_postgres
from speedlayer.supervisor.demo.orders import RECORD_BYTES
from speedlayer.supervisor.demo.private_folder import private_folder, unprivileged_account
from speedlayer.supervisor.demo.run import Interrupted, Outcome, Parts, Run
from speedlayer.supervisor.demo.scenario import Scenario
from speedlayer.supervisor.demo.view import View, open_view
from speedlayer.supervisor.errors import ConfigurationError, MissingLibrary
from speedlayer.supervisor.exit_codes import ExitCode

# What asks a command to stop: Ctrl-C, a service manager, a closed terminal.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# A flush that waits longer for the competitor comes near the lock timeout, and proves nothing about slowness.
LONGEST_HOLD_SECONDS = 0.5 * LOCK_TIMEOUT_SECONDS


@dataclass(frozen=True)
class Show:
    """What is to be played, and on which servers (None: embedded ones)."""

    kind: str
    title: str
    scenario: Scenario
    needs_brake: bool
    report_folder: Path
    broker: Optional[str] = None
    kafka_properties: Mapping[str, str] = field(default_factory=dict)
    dsn: Optional[str] = None
    batch_seconds: float = 1.0  # a batch that is not full closes after this time
    workers: int = 2
    memory_budget_mb: int = 64


def perform(show: Show) -> ExitCode:
    """Play the show, write its report, and say how it went."""
    _check(show)
    # A name of the run's own, so that two runs on one server, or one after a crash, do not meet.
    name = f"speedlayer_demo_{secrets.token_hex(4)}"
    with _stop_signals() as interrupted:
        try:
            with open_view(show.title, show.scenario) as view:
                outcome = _play(show, name, view, interrupted)
        except Interrupted:
            print("stopped; everything that was started or made is gone", file=sys.stderr)
            return ExitCode.INTERRUPTED
        return _finish(show, outcome)


def _check(show: Show) -> None:
    """Find out before the first minute passes what would spoil the end."""
    if show.broker is None:
        problem = backlog_problem(show.scenario.largest_backlog * RECORD_BYTES)
        if problem is not None:
            raise ConfigurationError(problem)
        if show.kafka_properties:
            raise ConfigurationError("--kafka sets a property for the broker that --broker names, and there is none")
    for phase in show.scenario.phases:
        if phase.capacity is not None and _hold_seconds(show, phase.capacity) > LONGEST_HOLD_SECONDS:
            raise ConfigurationError(
                f"at {phase.capacity:g} rows/s, {show.workers} batches of {show.scenario.batch_rows:,} rows would wait"
                f" more than {LONGEST_HOLD_SECONDS:g} s for the table; use smaller batches"
            )
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingLibrary("the plot needs matplotlib: pip install 'speedlayer[demo]'")
    existing = next(
        folder for folder in (show.report_folder, *show.report_folder.absolute().parents) if folder.exists()
    )
    if not os.access(existing, os.W_OK | os.X_OK) or not existing.is_dir():
        raise ConfigurationError(f"the report can not be written to {show.report_folder}; name another --report-dir")


def _hold_seconds(show: Show, rows_per_second: float) -> float:
    """How long a competitor holds the table while every worker waits for it with a full batch."""
    return show.scenario.batch_rows * show.workers / rows_per_second


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Turn the signals into an event: the run looks at it, and cleans up in its own order, undisturbed by more."""
    interrupted = threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        interrupted.set()

    # Under nohup a closed terminal is no reason to stop.
    taken = [number for number in STOP_SIGNALS if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN)]
    before = {number: signal.signal(number, on_signal) for number in taken}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _play(show: Show, name: str, view: View, interrupted: threading.Event) -> Outcome:
    topic = group = name.replace("_", "-")
    account = unprivileged_account() if show.dsn is None else None
    with contextlib.ExitStack() as stage:
        folder = stage.enter_context(private_folder(account))
        dsn = show.dsn
        if dsn is None:
            view.say("starting an embedded PostgreSQL")
            dsn = stage.enter_context(embedded_postgres(folder)).dsn
        _stop_if(interrupted)
        database = Database(dsn, name, group)
        view.say(f"database: {database.description}")
        stage.enter_context(database.tables())
        broker = stage.enter_context(open_broker(show.broker, show.kafka_properties, topic, group))
        view.say(f"broker: {broker.description}")
        _stop_if(interrupted)
        plan = DaemonPlan(
            broker,
            dsn,
            database.table,
            show.scenario.batch_rows,
            show.batch_seconds,
            show.workers,
            show.memory_budget_mb,
        )
        parts = Parts(show.scenario, broker, database, plan, folder, view, interrupted)
        outcome = Run(parts, show.kind, show.needs_brake).play()
        _keep_log(folder / "daemon.log", show.report_folder)
    return outcome


def _stop_if(interrupted: threading.Event) -> None:
    """Look between two steps whether the user wants to stop."""
    if interrupted.is_set():
        raise Interrupted


def _keep_log(log: Path, report_folder: Path) -> None:
    report_folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(log, report_folder / "daemon.log")


def _finish(show: Show, outcome: Outcome) -> ExitCode:
    path = show.report_folder / "plot.png"
    verdict = "GOOD" if not outcome.report.problems else "NOT GOOD"
    plot.draw(plot.Picture(f"{show.title} – {verdict}", outcome.recorder, outcome.flushes, outcome.report.phases), path)
    report = replace(outcome.report, plot=str(path))
    (show.report_folder / "report.txt").write_text(report.as_text() + "\n", encoding="utf-8")
    (show.report_folder / "report.json").write_text(report.as_json(), encoding="utf-8")
    print(f"\n{report.as_text()}", flush=True)
    return ExitCode.OK if not report.problems else ExitCode.VERIFICATION_FAILED
