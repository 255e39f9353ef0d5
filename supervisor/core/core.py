"""The supervisor's core: it takes events and answers with actions (supervisor process, pure).

One thread drives it; it does no I/O, reads no clock, and works on batches, not messages. So the whole supervisor can be
run against a simulated world, from a seed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Union

from speedlayer.supervisor.core import events as e
from speedlayer.supervisor.core.actions import (
    ERROR,
    INFO,
    WARNING,
    Action,
    CommitOffsets,
    FinishWorker,
    KillWorker,
    LeaveGroups,
    RebuildConsumer,
    StartWorker,
    Stop,
)
from speedlayer.supervisor.core.balance import Balance
from speedlayer.supervisor.core.claims import Claims
from speedlayer.supervisor.core.commands import Commands
from speedlayer.supervisor.core.config import BOOT_ATTEMPTS, COMMIT_INTERVAL_SECONDS, SILENCE_SECONDS, CoreConfig
from speedlayer.supervisor.core.flow import Flow
from speedlayer.supervisor.core.ledger import Lane, LaneState
from speedlayer.supervisor.core.pipelines import Hold
from speedlayer.supervisor.core.quarantine import Quarantine
from speedlayer.supervisor.core.silence import why_silent
from speedlayer.supervisor.core.snapshot import snapshot
from speedlayer.supervisor.core.state import Lifecycle, State
from speedlayer.supervisor.core.watchdog import Watchdog
from speedlayer.supervisor.core.workforce import Worker, WorkerState
from speedlayer.workers import protocol as p


class Core:
    """The supervisor as a state machine. ``seed`` decides jitter, and nothing else.

    ``worker_boot_exit_code`` is what `Stop` carries when workers can not boot, ``stalled_exit_code`` when the watchdog
    has tried everything else.
    """

    def __init__(
        self, config: CoreConfig, seed: int = 0, worker_boot_exit_code: int = 1, stalled_exit_code: int = 1
    ) -> None:
        self._state = State.new(config, seed)
        self._quarantine = Quarantine(self._state)
        self._flow = Flow(self._state, self._quarantine)
        self._balance = Balance(self._state, self._quarantine)
        self._claims = Claims(self._state, self._balance, self._quarantine)
        self._commands = Commands(self._state, self._flow)
        self._watchdog = Watchdog(self._state, self._break_group, self._give_up)
        self._worker_boot_exit_code = worker_boot_exit_code
        self._stalled_exit_code = stalled_exit_code
        self._committed_at = 0.0
        self._broken_groups: dict[str, str] = {}

    # --- the outside --------------------------------------------------------------------------------------------

    def step(self, events: Iterable[e.AnyEvent]) -> list[Action]:
        """Take in what happened, in order, and say what to do about it, in order."""
        for event in events:
            self._state.now = max(self._state.now, event.at)
            self._handle(event)
        self._watchdog.look()
        self._rebuild_consumers()
        self._settle()
        actions, self._state.actions = self._state.actions, []
        return actions

    def allowance(self, group: str) -> int:
        """Bytes of messages that may be read for the group now; 0: do not poll for any."""
        return self._flow.allowance(group) if self._state.running else 0

    def snapshot(self) -> dict[str, Any]:
        """The state for people and monitors; see `speedlayer.supervisor.core.snapshot`."""
        return snapshot(self._state)

    @property
    def lifecycle(self) -> Lifecycle:
        """Where the daemon is in its life."""
        return self._state.lifecycle

    def lanes(self) -> Iterable[Lane]:
        """The lanes that are owned, for the shell's questions to the broker and for the simulator's checks."""
        return iter(self._state.ledger)

    @property
    def state(self) -> State:
        """The memory, for checks; nobody else may change it."""
        return self._state

    # --- events -------------------------------------------------------------------------------------------------

    def _handle(self, event: e.AnyEvent) -> None:
        state = self._state
        if isinstance(event, e.Polled):
            self._flow.polled(event)
            if event.slices:
                self._heard_of_kafka(event.group)
        elif isinstance(event, e.Reported):
            self._reported(event)
        elif isinstance(event, e.PositionMoved):
            self._flow.position_moved(event)
        elif isinstance(event, e.Started):
            state.started_at = state.lifecycle_since = state.last_message_at = state.now
            state.enter(Lifecycle.RUNNING)
        elif isinstance(event, e.Assigned):
            self._claims.assigned(event)
        elif isinstance(event, e.Revoked):
            self._claims.revoked(event.partitions, event.lost)
        elif isinstance(event, e.Inspected):
            self._state.scout_heard_at = self._state.now
            self._claims.inspected(event)
        elif isinstance(event, e.WorkerExited):
            self._worker_exited(event)
        elif isinstance(event, e.Command):
            self._commands.handle(event)
        elif isinstance(event, e.StopRequested):
            self._stop_requested(event)
        else:
            self._handle_broker_news(event)

    def _handle_broker_news(self, event: e.AnyEvent) -> None:
        if isinstance(event, (e.Watermarks, e.SurveyFailed)):
            self._state.scout_heard_at = self._state.now
        if isinstance(event, e.Watermarks):
            for partition, (low, high) in event.marks.items():
                lane = self._state.ledger.get(partition)
                if lane is not None:
                    lane.low_watermark, lane.high_watermark = low, high
                    lane.watermarks_at = self._state.now
            for group in sorted({"", *(partition.group for partition in event.marks)}):
                self._heard_of_kafka(group)
        elif isinstance(event, e.TopicIds):
            self._topic_ids(event)
        elif isinstance(event, e.FetchFailed):
            self._fetch_failed(event)
        elif isinstance(event, e.PositionsUnknown):
            self._positions_unknown(event)
        elif isinstance(event, e.ConsumerTrouble):
            self._consumer_trouble(event)

    def _reported(self, event: e.Reported) -> None:
        worker = self._state.workforce[event.worker]
        if worker.incarnation != event.incarnation:
            return  # a last word of a process that was replaced: its lanes are claimed again anyway
        report: Union[p.Report, Any] = event.report
        worker.said(report, self._state.now)
        if isinstance(report, p.FlushReport):
            for lane in self._flow.flushed(worker, report):
                self._claims.fenced(lane)
        elif isinstance(report, p.Claimed):
            self._claims.claimed(report)
        elif isinstance(report, p.Fenced):
            self._claims.seed_fenced(report)
        elif isinstance(report, p.FlushFailed):
            self._flow.failed(worker, report)
        elif isinstance(report, p.FlushBlocked):
            worker.entered(report.flight_id, None, self._state.now)
            self._flow.blocked(worker, report)
        elif isinstance(report, p.PhaseEntered):
            worker.entered(report.flight_id, report.phase, self._state.now)
        elif isinstance(report, p.Ready):
            self._worker_ready(worker, report)
        elif isinstance(report, p.BootFailed):
            self._fail(f"{worker.name} cannot start: {report.reason}")
        elif isinstance(report, p.ClaimDelayed):
            self._claim_delayed(report)
        elif isinstance(report, p.WorkerLog):
            self._state.log(report.level, report.message, worker=worker.name, **report.fields)

    def _claim_delayed(self, report: p.ClaimDelayed) -> None:
        lane = self._state.ledger.get(e.Partition(report.lane.group, report.lane.topic, report.lane.partition))
        if lane is not None and lane.claim_id == report.claim_id:
            # One line for all partitions that wait for the same thing: a database that is away, say.
            others = self._state.ledger.of_pipeline(lane.key.pipeline)
            if not any(other.claim_delay == report.reason for other in others):
                self._state.log(
                    WARNING, f"the claim of {lane.partition} waits: {report.reason}", **self._state.fields_of(lane)
                )
            lane.reason = lane.claim_delay = report.reason

    # --- workers ------------------------------------------------------------------------------------------------

    def _worker_ready(self, worker: Worker, report: p.Ready) -> None:
        worker.state, worker.pid, worker.boot_failures = WorkerState.READY, report.pid, 0
        worker.credit_flights, worker.credit_bytes = report.credit_flights, report.credit_bytes
        self._state.log(INFO, f"{worker.name} is ready", worker=worker.name, worker_pid=report.pid)

    def _worker_exited(self, event: e.WorkerExited) -> None:
        state = self._state
        worker = state.workforce[event.worker]
        if worker.incarnation != event.incarnation or worker.state in (WorkerState.WAITING, WorkerState.EXITED):
            return
        sought = self._quarantine.died(worker, event.exit_code)
        self._flow.lost_with(worker)
        if worker.state is WorkerState.FINISHING or not state.running:
            worker.state = WorkerState.EXITED
            return
        worker.died(state.now, sought)
        state.log(
            WARNING,
            f"{worker.name} died (exit code {event.exit_code}); its partitions are claimed again, and it is started"
            f" again in {worker.start_at - state.now:.1f} s",
            worker=worker.name,
            exit_code=event.exit_code,
        )
        if worker.boot_failures >= BOOT_ATTEMPTS:
            self._fail(f"{worker.name} died {worker.boot_failures} times in a row before it was ready")

    def _start_workers(self) -> None:
        state = self._state
        for worker in state.workforce:
            if worker.state is WorkerState.WAITING and state.now >= worker.start_at:
                worker.start(state.now)
                state.act(StartWorker(worker.name, worker.incarnation))

    # --- news from the broker -----------------------------------------------------------------------------------

    def _topic_ids(self, event: e.TopicIds) -> None:
        for lane in self._state.ledger.of_group(event.group):
            now_id = event.ids.get(lane.partition.topic)
            if now_id is None or lane.state not in (LaneState.HELD, LaneState.FETCHING):
                continue
            if lane.topic_id is None:
                lane.topic_id = now_id  # brokers tell ids since they were upgraded; the next claim writes it down
            elif now_id != lane.topic_id:
                self._claims.stop_recreated(lane, now_id)

    def _fetch_failed(self, event: e.FetchFailed) -> None:
        """The broker does not serve the offset: stop, or claim and inspect again, which finds and handles the gap."""
        state = self._state
        lane = state.ledger.get(event.partition)
        if lane is None or lane.generation != event.generation or lane.state is not LaneState.FETCHING:
            return
        if event.problem is e.FetchProblem.LOG_TRUNCATED:
            state.stop_lane(
                lane,
                f"the log was truncated below offset {lane.expected} ({event.message}); rows that were written may no"
                " longer be in Kafka. Say where to go on: speedlayer offsets seek",
            )
        else:
            state.reclaim(lane, f"{event.problem.value}: {event.message}")

    def _positions_unknown(self, event: e.PositionsUnknown) -> None:
        """Messages may have vanished inside librdkafka: read every lane again from where the ledger stands."""
        state = self._state
        state.log(WARNING, f"reading was interrupted ({event.reason}); every partition is read again from the ledger")
        for lane in state.ledger.of_group(event.group):
            if lane.state is LaneState.FETCHING:
                state.hold(lane, "to be read again from the ledger's offset")

    def _consumer_trouble(self, event: e.ConsumerTrouble) -> None:
        state = self._state
        if state.trouble.note(event.group, event.code, event.message, state.now):
            state.log(WARNING, f"Kafka: {event.message}; reading goes on when it is over", code=event.code)
        if event.fatal:
            self._break_group(event.group, event.message)

    def _break_group(self, group: str, reason: str) -> None:
        self._broken_groups[group] = reason

    def _heard_of_kafka(self, group: str) -> None:
        over = self._state.trouble.heard_of(group, self._state.now)
        if over is not None:
            self._state.log(INFO, f"Kafka answers again; it is over: {over}", group=group)

    def _rebuild_consumers(self) -> None:
        """Replace consumers that will never work again, after the last event that still comes from them: partitions
        that one of them was just assigned are none of its successor's.
        """
        for group, reason in self._broken_groups.items():
            lanes = self._state.ledger.of_group(group)
            self._claims.revoked(tuple(lane.partition for lane in lanes), lost=True)
            self._state.trouble.forget(group)
            self._state.act(RebuildConsumer(group, reason))
        self._broken_groups.clear()

    # --- stopping -----------------------------------------------------------------------------------------------

    def _fail(self, reason: str) -> None:
        """A fault that starting again would not mend: stop, with the named exit code."""
        self._state.log(ERROR, f"speedlayer stops: {reason}")
        self._state.exit_code = self._worker_boot_exit_code
        self._stop_requested(e.StopRequested(self._state.now, reason, hurry=True))

    def _give_up(self, reason: str) -> None:
        """The watchdog has tried everything: what can be written is, and whoever started us starts us again."""
        self._state.log(
            ERROR,
            f"speedlayer stops, to be started again by its init system: {reason}; nothing is lost, what is not written"
            " is read again",
        )
        self._state.exit_code = self._stalled_exit_code
        self._stop_requested(e.StopRequested(self._state.now, reason))

    def _stop_requested(self, event: e.StopRequested) -> None:
        state = self._state
        if state.lifecycle in (Lifecycle.STARTING, Lifecycle.RUNNING):
            state.enter(Lifecycle.DRAINING)
            state.stop_reason = event.reason
            state.stop_deadline = state.now + (0.0 if event.hurry else state.config.shutdown_deadline_seconds)
            self._flow.hold_all(Hold.STOPPING, f"the daemon stops: {event.reason}")
            self._commands.refuse_waiting("the daemon stops")
            state.log(INFO, f"stopping ({event.reason}): nothing more is read, what was read is being written")
        elif state.lifecycle in (Lifecycle.DRAINING, Lifecycle.LEAVING):
            state.stop_deadline = state.now
            state.log(WARNING, "stopping at once: what is not written yet is read again after the next start")

    def _wind_down(self) -> None:
        state = self._state
        overdue = state.now >= state.stop_deadline
        if state.lifecycle is Lifecycle.DRAINING:
            at_rest = all(self._flow.is_at_rest(pipeline) for pipeline in state.pipelines.values())
            if at_rest or overdue:
                self._leave(at_rest)
        if state.lifecycle is Lifecycle.LEAVING:
            alive = [w for w in state.workforce if w.state not in (WorkerState.EXITED, WorkerState.WAITING)]
            if alive and overdue:
                for worker in alive:
                    state.act(KillWorker(worker.name))
                    worker.state = WorkerState.EXITED
                alive = []
            if not alive:
                self._commit_offsets()
                state.act(LeaveGroups())
                state.enter(Lifecycle.STOPPED)
                state.act(Stop(state.exit_code, state.stop_reason))

    def _leave(self, at_rest: bool) -> None:
        state = self._state
        if not at_rest:
            state.log(WARNING, "the deadline is over: what is not written yet is read again after the next start")
        for pipeline in state.pipelines.values():
            self._flow.drop_batches(pipeline)
        for worker in state.workforce:
            if worker.state in (WorkerState.STARTING, WorkerState.READY):
                worker.state = WorkerState.FINISHING
                state.act(FinishWorker(worker.name))
        state.enter(Lifecycle.LEAVING)

    # --- after the events ---------------------------------------------------------------------------------------

    def _settle(self) -> None:
        state = self._state
        if state.running:
            self._start_workers()
            self._balance.even_out()
            self._claims.send_due()
            self._explain_silence()
        self._flow.regulate()
        if state.lifecycle in (Lifecycle.RUNNING, Lifecycle.DRAINING):
            self._flow.dispatch()
        if state.now - self._committed_at >= COMMIT_INTERVAL_SECONDS and state.lifecycle is not Lifecycle.STOPPED:
            self._commit_offsets()
        self._commands.answer_waiting()
        self._wind_down()

    def _commit_offsets(self) -> None:
        state = self._state
        self._committed_at = state.now
        for group in sorted({pipeline.config.group for pipeline in state.pipelines.values()}):
            dirty = [lane for lane in state.ledger.of_group(group) if lane.uncommitted]
            if dirty:
                state.act(CommitOffsets(group, {lane.partition: lane.flushed for lane in dirty}))
                for lane in dirty:
                    lane.uncommitted = False

    def _explain_silence(self) -> None:
        state = self._state
        if state.silence_told or state.now - state.last_message_at < SILENCE_SECONDS:
            return
        state.silence_told = True
        for pipeline in state.pipelines.values():
            state.log(
                INFO, f"pipeline {pipeline.name}: no message for {SILENCE_SECONDS:g} s: {why_silent(state, pipeline)}"
            )
