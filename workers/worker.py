"""The worker process: boots, takes orders off its queue, and hands them to the threads of their pipelines.

Threads: the main thread reads the queue; each pipeline has a flush thread and a claim thread; one more watches the
life-line and ends the process when the supervisor is gone, whatever the others are doing. Signals from the terminal are
the supervisor's business: a worker ignores SIGINT and SIGTERM, and stops by order.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Optional

import dill

from speedlayer.workers.claiming import ClaimDesk
from speedlayer.workers.flushing import FlushDesk
from speedlayer.workers.protocol import (
    BootFailed,
    Claim,
    FailureKind,
    Finish,
    Flight,
    FlushFailed,
    Order,
    Ready,
    Seed,
    Stopped,
    decode_order,
)
from speedlayer.workers.reporter import EXIT_ORPHANED, Reporter, ReportHandler, cut
from speedlayer.workers.retry import summary_of
from speedlayer.workers.settings import BootSpec, application_name
from speedlayer.workers.sinks.base import Sink, SinkContext, SinkSession

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.queues import Queue

# What the process ends with, for the supervisor's log. (EXIT_ORPHANED, 4: nobody reads our reports any more.)
EXIT_BOOT_FAILED = 3
EXIT_CRASHED = 5

# Between two signs of life; the supervisor's patience is several times as long (at least 10 s, `[watchdog]`
# `stall_seconds`).
ALIVE_INTERVAL_SECONDS = 1.0

# How long a stopping worker waits for a claim that is under way, before the process ends around it.
CLAIM_THREAD_JOIN_SECONDS = 1.0


class Pipeline:
    """One pipeline in this worker: its session and its two threads."""

    def __init__(self, name: str, spec: BootSpec, reporter: Reporter) -> None:
        self._name, self._spec, self._reporter = name, spec, reporter
        self._opened: Future[SinkSession] = Future()
        self._flush_thread = self._thread("flush", self._open_and_flush)
        self._flush_thread.start()
        self._session = self._opened.result()
        self._claim_thread = self._thread("claim", self.claims.serve)
        self._claim_thread.start()

    def _open_and_flush(self) -> None:
        # The transform is loaded by the thread that will run it: what user code binds to a thread (an SQLite
        # connection made on import, say) is then bound to the right one.
        try:
            session = self._open()
            self.claims = ClaimDesk(session, self._reporter)
            self.flights = FlushDesk(session, self._reporter, self.claims.epoch_of, pipeline=self._name)
        except BaseException as error:
            self._opened.set_exception(error)
            return
        self._opened.set_result(session)
        self.flights.serve()

    def _open(self) -> SinkSession:
        # Pickled by the supervisor of this very worker, and passed on by inheritance.
        sink = dill.loads(self._spec.sinks[self._name])
        if not isinstance(sink, Sink):
            raise TypeError(f"the sink of {self._name} is a {type(sink).__name__}, no Sink")
        return sink.open(
            SinkContext(
                pipeline=self._name,
                worker=self._spec.worker,
                transform=self._load_transform(),
                log=self._reporter.log,
                application_name=application_name(self._name, self._spec.worker),
                announce=self._reporter.announce,
            )
        )

    def _load_transform(self) -> Optional[Callable[[Any], Any]]:
        packed = self._spec.transforms.get(self._name)
        if packed is None:
            return None
        from speedlayer.workers.transform import unpack

        transform = unpack(packed)
        self._reporter.count_records(self._name, lambda: transform.begun)
        return transform

    def _thread(self, role: str, target: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                target()
            except BaseException as error:
                crash(self._reporter, f"the {role} thread of {self._name}", error)

        return threading.Thread(target=guarded, name=f"{role}-{self._name}", daemon=True)

    def finish(self) -> None:
        """Let the flush thread run out of work."""
        self.flights.finish()

    def join(self) -> None:
        """Wait until everything is written or reported, then close the session."""
        self._flush_thread.join()
        self.claims.stop()
        self._claim_thread.join(CLAIM_THREAD_JOIN_SECONDS)
        if not self._claim_thread.is_alive():
            self._session.close()


def main(boot: bytes, orders: Queue[bytes], reports: Connection, lifeline: Connection) -> None:
    """Be a worker; the target of the process. ``boot`` is a dilled `BootSpec`."""
    ignore_signals()
    reporter = Reporter(reports)
    watch_lifeline(lifeline, reporter)
    try:
        spec: BootSpec = dill.loads(boot)
        reporter.log_level = spec.log_level
        pass_logs_on(reporter)
        sys.path[:0] = [folder for folder in spec.python_path if folder not in sys.path]
        pipelines = {name: Pipeline(name, spec, reporter) for name in spec.sinks}
    except BaseException as error:
        reporter.send(BootFailed(cut(f"{type(error).__name__}: {error}")))
        traceback.print_exc()
        sys.exit(EXIT_BOOT_FAILED)
    reporter.send(Ready(os.getpid(), spec.credit_flights, spec.credit_bytes))
    try:
        serve(orders, pipelines, reporter)
    except BaseException as error:
        crash(reporter, "the order thread", error)
    reporter.send(Stopped())


def ignore_signals() -> None:
    """Ctrl-C goes to the whole process group, and a service manager may do the same; only the supervisor answers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # They were blocked while the process started, so that none could strike before this line.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))


def watch_lifeline(lifeline: Connection, reporter: Reporter) -> None:
    """End the process when the other end of the life-line closes: its supervisor is gone, killed perhaps. Give a sign
    of life meanwhile.
    """

    def watch() -> None:
        try:
            while not lifeline.poll(ALIVE_INTERVAL_SECONDS):
                reporter.give_sign_of_life()
            lifeline.recv_bytes()  # nothing is ever sent: this is the end
        except (EOFError, OSError):
            # At once and without clean-up: a flush under way is rolled back by the server, and a claim of whoever
            # comes next settles the rest.
            os._exit(EXIT_ORPHANED)

    threading.Thread(target=watch, name="life-line", daemon=True).start()


def pass_logs_on(reporter: Reporter) -> None:
    """Send what user code and libraries log to the supervisor."""
    root = logging.getLogger()
    root.handlers[:] = [ReportHandler(reporter)]
    root.setLevel(reporter.log_level)


def serve(orders: Queue[bytes], pipelines: dict[str, Pipeline], reporter: Reporter) -> None:
    """Hand out orders until `Finish`, then wait for the pipelines to run out of work."""
    while True:
        order = decode_order(orders.get())
        reporter.orders_taken += 1
        if isinstance(order, Finish):
            break
        route(order, pipelines, reporter)
        del order  # a flight's bytes belong to its thread now
    for pipeline in pipelines.values():
        pipeline.finish()
    for pipeline in pipelines.values():
        pipeline.join()


def route(order: Order, pipelines: dict[str, Pipeline], reporter: Reporter) -> None:
    """Hand one order to its pipeline."""
    if isinstance(order, Flight):
        if order.pipeline in pipelines:
            pipelines[order.pipeline].flights.put(order)
        else:
            reason = f"{order.pipeline} is no pipeline of this worker"
            reporter.send(FlushFailed(order.flight_id, order.pipeline, FailureKind.ABANDONED, reason, None))
    elif isinstance(order, (Claim, Seed)):
        pipelines[order.lane.pipeline].claims.put(order)


def crash(reporter: Reporter, who: str, error: BaseException) -> None:
    """End the process over a fault that nobody handles: the supervisor claims what it held, and starts another."""
    try:
        reporter.log(logging.CRITICAL, f"{who} failed, the worker ends: {summary_of(error)}", {})
        traceback.print_exception(error)
    finally:  # whatever became of standard error: a worker that lives on without this thread would do nothing
        os._exit(EXIT_CRASHED)
