"""One worker process as the supervisor holds it: its queue, its report pipe, its life-line (supervisor process).

Nothing is shared between workers: a process that is killed while it holds a shared lock, or half-way through a write,
would hang every other one. A dead worker's queue and pipes are thrown away with it.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Optional

import msgspec

from speedlayer.workers.protocol import Order, Report, decode_report, encode_order
from speedlayer.workers.worker import main as worker_main

if TYPE_CHECKING:
    from multiprocess.connection import Connection

logger = logging.getLogger("speedlayer.workers")

# A killed process is gone within milliseconds; the bound is there so that nothing is waited for without one.
KILL_TIMEOUT_SECONDS = 5.0


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Start children with SIGINT and SIGTERM blocked: a Ctrl-C while one boots would kill it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerHandle:
    """A running worker process. ``context`` is a `multiprocess` context, spawn or forkserver."""

    def __init__(self, context: Any, name: str, incarnation: int, boot: bytes) -> None:
        self.name = name
        self.incarnation = incarnation
        self._orders = context.Queue()
        # With the reader gone, the queue's feeder thread must end without a word: the worker's death is reported by
        # its exit, not by a traceback from a thread.
        self._orders._ignore_epipe = True
        self._reports, far_reports = context.Pipe(duplex=False)
        far_lifeline, self._lifeline = context.Pipe(duplex=False)
        self._process = context.Process(
            target=worker_main, args=(boot, self._orders, far_reports, far_lifeline), name=name, daemon=False
        )
        with signals_blocked():
            self._process.start()
        # The far ends live in the worker alone, so that a pipe closes when it dies.
        far_reports.close()
        far_lifeline.close()
        self._orders._reader.close()

    # --- to the worker ----------------------------------------------------------------------------------------------

    def put(self, order: Order) -> None:
        """Put an order on the worker's queue. Returns at once: the queue's feeder thread does the writing."""
        self._orders.put(encode_order(order))

    # --- from the worker --------------------------------------------------------------------------------------------

    @property
    def pid(self) -> Optional[int]:
        """The process id."""
        pid: Optional[int] = self._process.pid
        return pid

    @property
    def report_pipe(self) -> Connection:
        """What becomes readable when the worker reports, or dies."""
        return self._reports

    def reports(self) -> Iterator[Report]:
        """Yield what the worker has reported, without waiting. A report is written atomically, so none is partial."""
        while True:
            try:
                if not self._reports.poll(0):
                    return
                frame = self._reports.recv_bytes()
            except (EOFError, OSError):
                return  # the worker is gone; its exit says so
            try:
                yield decode_report(frame)
            except msgspec.DecodeError as error:
                logger.error("%s sent a report that can not be read (%s); it is restarted", self.name, error)
                self.kill()
                return

    @property
    def exited(self) -> bool:
        """Whether the process has ended; what it reported before is still to be read."""
        return self._process.exitcode is not None

    @property
    def exit_code(self) -> Optional[int]:
        """Its exit code, negative for a signal; None while it runs."""
        code: Optional[int] = self._process.exitcode
        return code

    # --- the end ----------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        """End the process now."""
        if not self.exited:
            self._process.kill()

    def discard(self) -> None:
        """Throw the queue and the pipes away, and collect the process."""
        self.kill()
        self._process.join(KILL_TIMEOUT_SECONDS)
        self._lifeline.close()
        self._reports.close()
        self._orders.cancel_join_thread()
        self._orders.close()
