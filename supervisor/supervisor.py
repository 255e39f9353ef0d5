"""The shell: what happens becomes events, and what the core answers gets done (supervisor process, main thread).

One thread changes all state. Signal handlers, the control socket and the scout only put something into a queue; the
loop takes it out. Nothing in the loop waits for the broker, the database or a worker.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import wait
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Optional, Union

import dill
import multiprocess

from speedlayer.supervisor.consumer import PREFETCHED_MESSAGE_BYTES, FetchLimits, GroupConsumer
from speedlayer.supervisor.control import ControlCommand
from speedlayer.supervisor.core import actions as a
from speedlayer.supervisor.core import events as e
from speedlayer.supervisor.core.config import CoreConfig, PipelineConfig
from speedlayer.supervisor.core.core import Core
from speedlayer.supervisor.exit_codes import ExitCode
from speedlayer.supervisor.scout import (
    QUESTION_TIMEOUT_SECONDS,
    SURVEY_INTERVAL_SECONDS,
    Answer,
    ClusterFound,
    Scout,
    Survey,
)
from speedlayer.supervisor.worker_handle import WorkerHandle
from speedlayer.workers.protocol import Finish
from speedlayer.workers.settings import BootSpec
from speedlayer.workers.transform import pack

if TYPE_CHECKING:
    from speedlayer.supervisor.settings import DaemonSettings

logger = logging.getLogger("speedlayer")

# The longest that one turn of the loop waits for messages. It is waited out whenever fewer come than may be read, and
# reports wait meanwhile.
POLL_TIMEOUT_SECONDS = 0.02

# While nothing may be read, reports are waited for this long, and consume() is called this often for its callbacks
# alone. It may bring one message each time.
IDLE_WAIT_SECONDS = 0.02
CALLBACK_INTERVAL_SECONDS = 0.2

# This part of the budget is librdkafka's to prefetch; the rest is for what is assembled, queued and being flushed.
PREFETCH_SHARE = 0.25

# How long leaving a group may take; with the broker gone, librdkafka alone would take minutes.
CLOSE_TIMEOUT_SECONDS = 5.0

# A host name may stand for several addresses, each of which is waited for: the watchdog's patience is at least so many
# connect timeouts.
CONNECT_ATTEMPTS = 2

# A scout that is well says something at least once in so many questions, also when the broker answers none of them.
SCOUT_QUESTIONS = 6

# How often the picture that metrics and health show is renewed.
SNAPSHOT_INTERVAL_SECONDS = 1.0

Inbox = Union[e.AnyEvent, ControlCommand, Answer]


class Supervisor:
    """Runs the pipelines of ``settings`` until it is told to stop.

    Whoever runs it serves the control socket and the metrics: `inbox` takes control commands, and `snapshot` gives the
    latest picture, from any thread.
    """

    def __init__(self, settings: DaemonSettings) -> None:
        self.settings = settings
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self._separator = f',"{secrets.token_urlsafe(9)}",'.encode()
        self._core = Core(
            self._core_config(),
            random.SystemRandom().getrandbits(32),
            ExitCode.WORKER_BOOT_FAILED,
            ExitCode.STALLED,
        )
        self._consumers: dict[str, GroupConsumer] = {}
        self._workers: dict[str, WorkerHandle] = {}
        self._replies: dict[int, Callable[[dict[str, Any]], None]] = {}
        self._tokens = 0
        self._cluster: Optional[str] = None
        self._scout = Scout(settings.kafka, self.inbox)
        self._context = multiprocess.get_context(settings.workers.start_method)
        self._exit: Optional[a.Stop] = None
        self._callbacks_at = self._surveyed_at = self._snapshot_at = 0.0
        self._snapshot: dict[str, Any] = {}
        self._pending: list[e.AnyEvent] = []
        self._stuck = False

    # --- settings -> what the parts need ----------------------------------------------------------------------------

    def _core_config(self) -> CoreConfig:
        settings = self.settings
        return CoreConfig(
            pipelines=tuple(
                PipelineConfig(
                    name=pipeline.name,
                    group=pipeline.group_id,
                    topics=pipeline.topics,
                    batch_rows=pipeline.sink.batch_size,
                    batch_bytes=settings.batch_bytes_of(pipeline),
                    batch_seconds=pipeline.sink.flush_interval_seconds,
                    slow_flush_threshold_seconds=pipeline.brake.slow_flush_threshold,
                    max_slow_flushes=pipeline.brake.max_slow_flushes,
                    pause_seconds=pipeline.brake.pause_seconds,
                    start=pipeline.start,
                    on_out_of_range=pipeline.on_out_of_range,
                    dead_letter_ratio=pipeline.dead_letter_ratio,
                    dead_letter_minimum=pipeline.dead_letter_minimum,
                    dead_letter_window_seconds=pipeline.dead_letter_window_seconds,
                )
                for pipeline in settings.pipelines
            ),
            workers=settings.workers.count,
            buffer_bytes=int(settings.memory.budget_bytes * (1 - PREFETCH_SHARE)),
            owner=secrets.token_hex(8),
            separator=self._separator,
            shutdown_deadline_seconds=settings.shutdown.deadline_seconds,
            stall_seconds=self._stall_seconds(),
            user_code_seconds=settings.watchdog.user_code_seconds,
            scout_seconds=max(SCOUT_QUESTIONS * QUESTION_TIMEOUT_SECONDS, self._stall_seconds()),
            pid=os.getpid(),
        )

    def _stall_seconds(self) -> float:
        """A claim that waits for a connection is heard of once for each attempt: the watchdog waits for some."""
        attempts = [
            CONNECT_ATTEMPTS * getattr(pipeline.sink, "connect_timeout_seconds", 0.0)
            for pipeline in self.settings.pipelines
        ]
        return max(self.settings.watchdog.stall_seconds, *attempts)

    def _boot_spec(self, worker: str) -> bytes:
        settings = self.settings
        largest = max(settings.batch_bytes_of(pipeline) for pipeline in settings.pipelines)
        spec = BootSpec(
            worker=worker,
            sinks={pipeline.name: dill.dumps(pipeline.sink, recurse=True) for pipeline in settings.pipelines},
            transforms={pipeline.name: pack(pipeline.steps) for pipeline in settings.pipelines if pipeline.steps},
            python_path=list(settings.python_path),
            credit_flights=settings.workers.credit_flights,
            credit_bytes=largest * settings.workers.credit_flights,
            log_level=logger.getEffectiveLevel(),
        )
        return bytes(dill.dumps(spec))

    def _fetch_limits(self, group: str) -> FetchLimits:
        settings = self.settings
        pipelines = settings.pipelines_of(group)
        prefetch = int(settings.memory.budget_bytes * PREFETCH_SHARE / len(settings.group_ids))
        return FetchLimits(
            prefetch_bytes=prefetch,
            batch_rows=min(pipeline.sink.batch_size for pipeline in pipelines),
            batch_bytes=min(settings.batch_bytes_of(pipeline) for pipeline in pipelines),
        )

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run until the end; returns the exit code. Installs handlers for SIGTERM and SIGINT meanwhile."""
        with self._signals():
            self._scout.start()
            self._do(self._core.step([e.Started(time.monotonic())]))
            while self._exit is None:
                self._turn()
        self._scout.stop()
        for handle in self._workers.values():
            handle.discard()
        logger.info("stopped: %s", self._exit.reason)
        return self._exit.exit_code

    def _turn(self) -> None:
        events = self._take_pending()
        events.extend(self._from_inbox())
        events.extend(self._from_workers())
        events.extend(self._from_consumers())
        self._look_around()
        events.append(e.Tick(time.monotonic()))
        self._do(self._core.step(events))

    def _take_pending(self) -> list[e.AnyEvent]:
        events, self._pending = self._pending, []
        return events

    def _from_inbox(self) -> Iterator[e.AnyEvent]:
        """Take out what signals, the control socket and the scout have put in."""
        while True:
            try:
                item: Inbox = self.inbox.get_nowait()
            except Empty:
                return
            if isinstance(item, ControlCommand):
                self._tokens += 1
                self._replies[self._tokens] = item.reply
                yield e.Command(time.monotonic(), self._tokens, item.command, item.args)
            elif isinstance(item, ClusterFound):
                self._subscribe(item.cluster)
            else:
                yield item

    def _from_workers(self) -> Iterator[e.AnyEvent]:
        for handle in list(self._workers.values()):
            gone = handle.exited  # asked first: what it said before it went is in the pipe by now
            for report in handle.reports():
                yield e.Reported(time.monotonic(), handle.name, handle.incarnation, report)
            if gone:
                del self._workers[handle.name]
                handle.discard()
                yield e.WorkerExited(time.monotonic(), handle.name, handle.incarnation, handle.exit_code)

    def _from_consumers(self) -> Iterator[e.AnyEvent]:
        allowances = {group: self._core.allowance(group) for group in self._consumers}
        reading = [group for group, allowance in allowances.items() if allowance > 0]
        for group in reading:
            yield from self._consumers[group].poll(allowances[group], POLL_TIMEOUT_SECONDS / len(reading))
        now = time.monotonic()
        if len(reading) < len(self._consumers) and now - self._callbacks_at >= CALLBACK_INTERVAL_SECONDS:
            self._callbacks_at = now
            for group in set(self._consumers).difference(reading):
                yield from self._consumers[group].poll(0, 0.0)
        if not reading:
            self._wait_for_reports()

    def _wait_for_reports(self) -> None:
        pipes = [handle.report_pipe for handle in self._workers.values()]
        if pipes:
            wait(pipes, IDLE_WAIT_SECONDS)
        else:
            time.sleep(IDLE_WAIT_SECONDS)

    def _look_around(self) -> None:
        """Ask now and then how far the log reaches and whether the topics are still the same; renew the snapshot."""
        now = time.monotonic()
        if self._cluster is not None and now - self._surveyed_at >= SURVEY_INTERVAL_SECONDS:
            self._surveyed_at = now
            self._scout.ask(Survey(tuple(lane.partition for lane in self._core.lanes())))
        if now - self._snapshot_at >= SNAPSHOT_INTERVAL_SECONDS:
            self._snapshot_at = now
            self._snapshot = {**self._core.snapshot(), "at": time.time()}

    def snapshot(self) -> dict[str, Any]:
        """The latest picture of the daemon, at most about a second old while the loop turns; from any thread.

        ``at`` is when it was made (s since the epoch): an old one means that the loop no longer turns.
        """
        return self._snapshot

    def _subscribe(self, cluster: str) -> None:
        if self._cluster is not None:
            return  # told by a scout that has replaced another
        self._cluster = cluster
        for group in self.settings.group_ids:
            self._consumers[group] = self._new_consumer(group)

    def _new_consumer(self, group: str, message_bytes: int = PREFETCHED_MESSAGE_BYTES) -> GroupConsumer:
        assert self._cluster is not None
        topics = tuple(topic for pipeline in self.settings.pipelines_of(group) for topic in pipeline.topics)
        limits = replace(self._fetch_limits(group), message_bytes=message_bytes)
        return GroupConsumer(self.settings.kafka, group, topics, limits, self._separator, self._cluster)

    # --- actions ----------------------------------------------------------------------------------------------------

    def _do(self, actions: list[a.Action]) -> None:
        for action in actions:
            if isinstance(action, a.Dispatch):
                self._put(action.worker, action.flight)
            elif isinstance(action, a.SendClaim):
                self._put(action.worker, action.claim)
            elif isinstance(action, a.SendSeed):
                self._put(action.worker, action.seed)
            elif isinstance(action, a.Log):
                logger.log(action.level, action.message, extra={"fields": dict(action.fields)})
            elif isinstance(action, a.Reply):
                self._reply(action)
            elif isinstance(action, a.Stop):
                self._exit = action
            elif not self._do_in_kafka(action):
                self._do_with_workers(action)

    def _do_in_kafka(self, action: a.Action) -> bool:
        if isinstance(action, a.Resume):
            self._consumers[action.partition.group].resume(action)
        elif isinstance(action, a.Pause):
            self._consumers[action.partition.group].pause(action.partition)
        elif isinstance(action, a.Inspect):
            self._scout.ask(action)
        elif isinstance(action, a.CommitOffsets):
            self._consumers[action.group].commit(action.offsets)
        elif isinstance(action, a.RebuildConsumer):
            logger.warning("the consumer of group %s is made anew: %s", action.group, action.reason)
            old = self._consumers.pop(action.group)
            old.close(CLOSE_TIMEOUT_SECONDS)
            self._consumers[action.group] = self._new_consumer(action.group, old.message_bytes)
        elif isinstance(action, a.RenewScout):
            self._scout.stop()
            self._scout = Scout(self.settings.kafka, self.inbox)
            self._scout.start()
        elif isinstance(action, a.LeaveGroups):
            self._leave_groups()
        else:
            return False
        return True

    def _do_with_workers(self, action: a.Action) -> None:
        if isinstance(action, a.StartWorker):
            self._start_worker(action)
        elif isinstance(action, a.FinishWorker):
            self._put(action.worker, Finish())
        elif isinstance(action, a.KillWorker):
            handle = self._workers.get(action.worker)
            if handle is not None:
                handle.kill()
        else:
            raise AssertionError(f"no way to do {action!r}")

    def _put(self, worker: str, order: Any) -> None:
        handle = self._workers.get(worker)
        # An order for a worker that has just gone is void; its exit is on the way to the core.
        if handle is not None:
            handle.put(order)

    def _start_worker(self, action: a.StartWorker) -> None:
        try:
            handle = WorkerHandle(self._context, action.worker, action.incarnation, self._boot_spec(action.worker))
        except OSError as error:  # no memory, no process ids: the next try may do
            logger.error("%s can not be started: %s", action.worker, error)
            self._pending.append(e.WorkerExited(time.monotonic(), action.worker, action.incarnation, None))
            return
        self._workers[action.worker] = handle

    def _reply(self, action: a.Reply) -> None:
        reply = self._replies.pop(action.token, None)
        if reply is not None:
            reply(dict(action.answer))

    def _leave_groups(self) -> None:
        deadline = time.monotonic() + CLOSE_TIMEOUT_SECONDS
        for group, consumer in self._consumers.items():
            if not consumer.close(max(0.1, deadline - time.monotonic())):
                self._stuck = True
                logger.warning("group %s could not be left in time: the broker notices by the session timeout", group)

    @property
    def stuck(self) -> bool:
        """Whether librdkafka still hangs in a close: the process must not wait for its threads when it exits."""
        return self._stuck

    # --- signals ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT ask for a stop; a second one hurries it. Handlers only enqueue."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may handle signals; whoever runs us in another one sends commands
            return

        def on_signal(number: int, frame: object) -> None:
            self.inbox.put(e.StopRequested(time.monotonic(), signal.Signals(number).name))

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
