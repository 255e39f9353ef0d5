"""A simulated supervisor process: the real core in a shell that mirrors `speedlayer.supervisor.supervisor`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Optional

from simulation.invariants import Violation, check_step
from simulation.kafka import Broker, Consumer
from simulation.postgres import Server
from simulation.worker import Protocols, SimulatedWorker
from simulation.world import Process, World
from speedlayer.supervisor.core import actions as a
from speedlayer.supervisor.core import events as e
from speedlayer.supervisor.core.config import CoreConfig
from speedlayer.supervisor.core.core import Core
from speedlayer.supervisor.core.pipelines import STOPS_DISPATCH
from speedlayer.workers import protocol as p

# A turn of the shell's loop: at most 20 ms when it waits for messages; more where the machine is busy.
TURN_SECONDS = (0.02, 0.12)
CALLBACK_INTERVAL_SECONDS = 0.2
SURVEY_INTERVAL_SECONDS = 0.5

# What a stop may take on top of its deadline: workers that are killed, a turn or two.
SHUTDOWN_SLACK_SECONDS = 1.0

# While a full buffer is waited out, calls for the callbacks alone bring a message each.
STRAY_MESSAGES = 8

Coverage = set[tuple[str, str]]


class RecordingCore(Core):
    """The core, noting which event came in which state."""

    coverage: Optional[Coverage] = None

    def _handle(self, event: e.AnyEvent) -> None:
        if self.coverage is not None:
            self._note(event, self.coverage)
        super()._handle(event)

    def _note(self, event: e.AnyEvent, coverage: Coverage) -> None:
        name, lanes = type(event).__name__, list[Any]()
        if isinstance(event, e.Reported):
            name = type(event.report).__name__
            if isinstance(event.report, (p.Claimed, p.Fenced, p.ClaimDelayed)):
                key = event.report.lane
                lanes.append(self.state.ledger.get(e.Partition(key.group, key.topic, key.partition)))
            elif isinstance(event.report, (p.FlushReport, p.FlushFailed, p.FlushBlocked, p.PhaseEntered)):
                record = self.state.workforce[event.worker].flights.get(event.report.flight_id)
                lanes += [self.state.ledger.get(part.partition) for part in record.parts] if record else [None]
        elif isinstance(event, (e.Inspected, e.PositionMoved, e.FetchFailed)):
            lanes.append(self.state.ledger.get(event.partition))
        elif isinstance(event, (e.Assigned, e.Revoked)):
            lanes += [self.state.ledger.get(partition) for partition in event.partitions]
        elif isinstance(event, e.Polled):
            lanes += [self.state.ledger.get(piece.partition) for piece in event.slices]
        elif isinstance(event, e.WorkerExited):
            coverage.add((f"worker {self.state.workforce[event.worker].state.value}", name))
        elif isinstance(event, (e.TopicIds, e.PositionsUnknown, e.ConsumerTrouble)):
            lanes += list(self.state.ledger)
        elif isinstance(event, e.Command):
            name = f"Command {event.name}"
            for pipeline in self.state.pipelines.values():
                coverage.add((f"pipeline {pipeline.state()[0]}", name))
        coverage.add((f"daemon {self.lifecycle.value}", name))
        for lane in lanes:
            coverage.add(("no lane" if lane is None else f"lane {lane.state.value}", name))


class SimulatedSupervisor(Process):
    """One supervisor process, from its start to its end."""

    def __init__(
        self,
        world: World,
        broker: Broker,
        server: Server,
        name: str,
        config: CoreConfig,
        credit: tuple[int, int],
        largest_message_bytes: int,
        on_exit: Callable[[SimulatedSupervisor], None],
        core_type: type[Core],
        protocols: Protocols,
        late_polls: bool,
    ) -> None:
        super().__init__(world, name)
        self.late_polls = late_polls
        self.broker, self.server = broker, server
        self.random = world.stream(f"supervisor {name}")
        self.config = config
        self.credit = credit
        self.limit_bytes = config.share_bytes + (1 + STRAY_MESSAGES) * largest_message_bytes
        self.core = core_type(config, seed=self.random.getrandbits(32))
        self.workers: dict[str, SimulatedWorker] = {}
        self.consumers: dict[str, Consumer] = {}
        self.exit_code: Optional[int] = None
        self.scout_delay = 0.0
        self.scout_deaf = False  # its thread hangs: no question is answered any more
        self.strikes: dict[p.Phase, int] = {}  # how many workers are still to be killed in a phase
        self.transform_seconds = 0.003
        self.boot_trouble = False  # workers die while they boot
        self.replies: dict[int, Any] = {}
        self.asked: dict[int, str] = {}
        self.turns = 0
        self._on_exit = on_exit
        self._protocols = protocols
        self._inbox: list[e.AnyEvent] = []
        self._turn_due = False
        self._callbacks_at = 0.0
        self._turned_at = world.now
        self._stop_by: Optional[float] = None
        self._rebuilt = 0
        self._dispatched: dict[tuple[p.LaneKey, int], int] = {}  # by lane and claim: where the last flight ended
        for group in sorted({pipeline.group for pipeline in config.pipelines}):
            self.consumers[group] = self._new_consumer(group)
        self._inbox.append(e.Started(world.now))
        self.later(0.0, self._turn)
        self.later(SURVEY_INTERVAL_SECONDS, self._survey)

    def _new_consumer(self, group: str) -> Consumer:
        self._rebuilt += 1
        name = f"{self.name} {group} {self._rebuilt}"
        return Consumer(self, self.broker, self.broker.groups[group], name, self.late_polls)

    # --- the loop ---------------------------------------------------------------------------------------------------

    def deliver(self, event: e.AnyEvent) -> None:
        """Something comes into the inbox; the loop is woken soon."""
        self._inbox.append(event)
        if not self._turn_due:
            self._turn_due = True
            self.later(self.random.uniform(0.0, 0.02), self._extra_turn)

    def _extra_turn(self) -> None:
        self._turn_due = False
        self._take_turn()

    def _turn(self) -> None:
        self.later(self.random.uniform(*TURN_SECONDS), self._turn)
        self._take_turn()

    def _take_turn(self) -> None:
        if not self.alive:
            return
        self.turns += 1
        events, self._inbox = self._inbox, []
        now = self.world.now
        self._watch_the_stop(events, now)
        idle = now - self._callbacks_at >= CALLBACK_INTERVAL_SECONDS
        for group, consumer in self.consumers.items():
            allowance = self.core.allowance(group)
            if allowance > 0 or idle:
                events.extend(consumer.poll(allowance))
        if idle:
            self._callbacks_at = now
        events.append(e.Tick(now))
        actions = self.core.step(events)
        for action in actions:
            self._do[type(action)](self, action)
        check_step(self)

    def _watch_the_stop(self, events: list[e.AnyEvent], now: float) -> None:
        """A stop is over in time, however the world is; time in which the process was stopped does not count."""
        gap, self._turned_at = now - self._turned_at, now
        if self._stop_by is None:
            if any(isinstance(event, e.StopRequested) for event in events):
                self._stop_by = now + self.config.shutdown_deadline_seconds + SHUTDOWN_SLACK_SECONDS
        elif gap > 2 * TURN_SECONDS[1]:
            self._stop_by += gap
        elif now > self._stop_by:
            raise Violation(f"{self.name} was told to stop, and its deadline is over by {SHUTDOWN_SLACK_SECONDS:g} s")

    def _survey(self) -> None:
        self.later(SURVEY_INTERVAL_SECONDS, self._survey)
        if self.scout_deaf:
            return
        if not self.broker.up:
            self.deliver(e.SurveyFailed(self.world.now, "no answer in 5 s"))
            return
        marks, ids = {}, {}
        for lane in self.core.lanes():
            log = self.broker.logs.get(lane.partition)
            if log is not None:
                marks[lane.partition] = (log.low, log.stable)
                ids[lane.partition.topic] = log.topic_id if self.broker.tells_ids else None
        for group in self.consumers:
            self.later(self.random.uniform(0.005, 0.3), self._surveyed, group, marks, ids)

    def _surveyed(self, group: str, marks: Any, ids: Any) -> None:
        self.deliver(e.Watermarks(self.world.now, marks))
        self.deliver(e.TopicIds(self.world.now, group, ids))

    # --- actions ----------------------------------------------------------------------------------------------------

    def _dispatch(self, action: a.Dispatch) -> None:
        flight = action.flight
        pipeline = self.core.state.pipelines[flight.pipeline]
        if STOPS_DISPATCH.intersection(pipeline.holds):
            raise Violation(f"a flight of {flight.pipeline} is sent, although it is {pipeline.state()[0]}")
        for part in flight.parts:
            lane = self.core.state.ledger.get(e.Partition(part.lane.group, part.lane.topic, part.lane.partition))
            if lane is None or lane.epoch != part.epoch:
                raise Violation(f"{part.lane}: a flight under epoch {part.epoch}, which is not the lane's")
            # A fail-over that loses a claim gives the same epoch twice, so it is the claim that tells flights apart.
            start = self._dispatched.setdefault((part.lane, lane.claim_id), part.start)
            if part.start != start:
                raise Violation(f"{part.lane}: a flight begins at {part.start}, the one before it ended at {start}")
            if part.end < part.start:
                raise Violation(f"{part.lane}: a flight from {part.start} to {part.end}")
            self._dispatched[part.lane, lane.claim_id] = part.end
        self._check_credit(action.worker, flight.pipeline)
        self._put(action.worker, flight)

    def _check_credit(self, name: str, pipeline: str) -> None:
        flights = [flight for flight in self.core.state.workforce[name].flights.values() if flight.pipeline == pipeline]
        count, size_bytes = len(flights), sum(flight.size_bytes for flight in flights)
        if count > self.credit[0]:
            raise Violation(f"{name} has {count} flights of {pipeline}, its credit is {self.credit[0]}")
        if size_bytes > self.credit[1] and count > 1:
            raise Violation(f"{name} holds {size_bytes} bytes of {pipeline}, its credit is {self.credit[1]}")

    def _put(self, name: str, order: p.Order) -> None:
        worker = self.workers.get(name)
        if worker is not None:
            worker.put(order)

    def _start_worker(self, action: a.StartWorker) -> None:
        worker = SimulatedWorker(
            self.world,
            self.server,
            f"{self.name}/{action.worker}",
            action.worker,
            action.incarnation,
            [pipeline.name for pipeline in self.config.pipelines],
            self.credit,
            self._reported,
            self._protocols,
        )
        worker.strikes, worker.transform_seconds = self.strikes, self.transform_seconds
        worker.on_exit = lambda code: self.wake(self._worker_exited, worker, code)
        self.workers[action.worker] = worker
        if self.boot_trouble:
            worker.later(self.random.uniform(0.0, 0.05), worker.fail_to_boot, self.random.random() < 0.1)

    def _reported(self, worker: SimulatedWorker, report: p.Report) -> None:
        self.wake(self._received, worker, report)

    def _received(self, worker: SimulatedWorker, report: p.Report) -> None:
        self.deliver(e.Reported(self.world.now, worker.worker, worker.incarnation, report))

    def _worker_exited(self, worker: SimulatedWorker, code: int) -> None:
        if self.workers.get(worker.worker) is worker:
            del self.workers[worker.worker]
        self.deliver(e.WorkerExited(self.world.now, worker.worker, worker.incarnation, code))

    def _inspect(self, action: a.Inspect) -> None:
        self.later(self.random.uniform(0.005, 0.1) + self.scout_delay / 2, self._ask, action)

    def _ask(self, action: a.Inspect) -> None:
        if self.scout_deaf:
            return
        partition, now = action.partition, self.world.now
        consumer = self.consumers.get(partition.group)
        log = self.broker.logs.get(partition)
        if log is None or consumer is None or not consumer.connected or self.random.random() < 0.02:
            answer = e.Inspected(now, partition, action.request, error="no answer in 5 s")
        else:
            committed, by_us = self.broker.groups[partition.group].committed.get(partition, (None, False))
            target = None
            if action.timestamp_ms is not None:
                target = min(action.timestamp_ms, log.stable) if action.timestamp_ms < log.stable else None
            if not action.want_committed:
                committed, by_us = None, False
            topic_id = log.topic_id if self.broker.tells_ids else None
            answer = e.Inspected(
                now, partition, action.request, topic_id, log.low, log.stable, committed, by_us, target
            )
        self.later(self.random.uniform(0.001, 0.05) + self.scout_delay / 2, self.deliver, answer)

    def _resume(self, action: a.Resume) -> None:
        consumer = self.consumers[action.partition.group]
        if action.partition not in consumer.assigned:
            raise Violation(f"{action.partition} is to be read, and it is not assigned")
        consumer.resume(action)

    def _pause(self, action: a.Pause) -> None:
        self.consumers[action.partition.group].pause(action.partition)

    def _commit_offsets(self, action: a.CommitOffsets) -> None:
        for partition, offset in action.offsets.items():
            lane = self.core.state.ledger.get(partition)
            row = self.server.checkpoints.get(lane.key) if lane is not None else None
            if lane is None or lane.key in self.server.lowered:
                continue
            if row is None or row.next_offset is None or row.next_offset < offset:
                raise Violation(f"the group is told {offset} for {partition}, the database says {row}")
        self.consumers[action.group].commit(action.offsets)

    def _rebuild(self, action: a.RebuildConsumer) -> None:
        self.consumers[action.group].close()
        self.consumers[action.group] = self._new_consumer(action.group)

    def _renew_scout(self, action: a.RenewScout) -> None:
        self.scout_deaf = False

    def _leave_groups(self, action: a.LeaveGroups) -> None:
        for consumer in self.consumers.values():
            consumer.close()

    def _finish_worker(self, action: a.FinishWorker) -> None:
        self._put(action.worker, p.Finish())

    def _kill_worker(self, action: a.KillWorker) -> None:
        worker = self.workers.get(action.worker)
        if worker is not None:
            worker.exit(-9)

    def _reply(self, action: a.Reply) -> None:
        if action.token in self.replies:
            raise Violation(f"the command {self.asked[action.token]!r} is answered twice")
        self.replies[action.token] = action.answer
        if action.answer.get("ok") and self.asked.get(action.token) == "drain":
            self._check_drained(action.answer["pipelines"])
        self.world.say(self.name, f"answers {self.asked.get(action.token)!r}: {_short(action.answer)}")

    def _check_drained(self, pipelines: list[str]) -> None:
        for lane in self.core.lanes():
            if lane.key.pipeline in pipelines and lane.epoch is not None and lane.flushed != lane.expected:
                raise Violation(f"{lane.partition} is said to be drained, at {lane.flushed} of {lane.expected}")

    def _log(self, action: a.Log) -> None:
        if self.world.listening:
            self.world.say(self.name, action.message)

    def _stop(self, action: a.Stop) -> None:
        self.exit_code = action.exit_code
        self.world.say(self.name, f"exits with {action.exit_code}: {action.reason}")
        self.die()

    _do: ClassVar[dict[type, Callable[[SimulatedSupervisor, Any], None]]] = {
        a.Dispatch: _dispatch,
        a.SendClaim: lambda self, action: self._put(action.worker, action.claim),
        a.SendSeed: lambda self, action: self._put(action.worker, action.seed),
        a.Resume: _resume,
        a.Pause: _pause,
        a.Inspect: _inspect,
        a.CommitOffsets: _commit_offsets,
        a.StartWorker: _start_worker,
        a.FinishWorker: _finish_worker,
        a.KillWorker: _kill_worker,
        a.RebuildConsumer: _rebuild,
        a.RenewScout: _renew_scout,
        a.LeaveGroups: _leave_groups,
        a.Reply: _reply,
        a.Log: _log,
        a.Stop: _stop,
    }

    # --- the end ----------------------------------------------------------------------------------------------------

    def die(self) -> None:
        """The process is gone; its workers see the life-line close."""
        if not self.alive:
            return
        super().die()
        for consumer in self.consumers.values():
            consumer.closed = True
        for worker in self.workers.values():
            worker.later(self.random.uniform(0.0, 0.05), worker.exit, -9)
        self._on_exit(self)

    def command(self, token: int, name: str, arguments: dict[str, Any]) -> None:
        """An operator asks for something."""
        self.asked[token] = name
        self.deliver(e.Command(self.world.now, token, name, arguments))

    def stop(self) -> None:
        """SIGTERM."""
        self.deliver(e.StopRequested(self.world.now, "SIGTERM"))


def _short(answer: Any) -> str:
    text = str({name: value for name, value in answer.items() if name not in ("pipelines", "workers", "memory")})
    return text if len(text) < 200 else text[:200] + "…"
