"""Runs a plan: builds the world, lets the load and the faults come, ends all faults, and waits until all is written."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Optional

from simulation.invariants import Auditor, Violation
from simulation.kafka import CLUSTER, Broker, Consumer, Group, Log
from simulation.plan import Fault, Plan, Wave
from simulation.postgres import Link, Server
from simulation.supervisor import SHUTDOWN_SLACK_SECONDS, Coverage, RecordingCore, SimulatedSupervisor
from simulation.worker import Protocols, SimulatedWorker
from simulation.world import World
from speedlayer.supervisor.core import events as e
from speedlayer.supervisor.core.config import CoreConfig, PipelineConfig
from speedlayer.supervisor.core.core import Core
from speedlayer.supervisor.core.ledger import IllegalTransition, LaneState
from speedlayer.workers.protocol import LaneKey

# After the last fault everything must be written within this time. The longest waits in it: 15 s until a quiet lane is
# checked, 10 s for a worker that died often or a database that was away, and the operator's own rounds. Some faults are
# mended by the watchdog alone, which takes up to four remedies of 2 s, and longer where two of them hide each other.
LIVENESS_SECONDS = 40.0

# Every history has so many faults that struck something; these nearly always do.
FEWEST_FAULTS = 5
SURE_FAULTS = ("terminate backends", "lock table", "rebalance", "kill worker", "restart postgres")
ATTEMPTS_TO_MAKE_UP = 50

# The watchdog's patience: short, since a history is.
STALL_SECONDS = 2.0
USER_CODE_SECONDS = 1.0

EXPIRE_INTERVAL_SECONDS = 0.25
RESTART_SECONDS = (0.1, 1.5)


@dataclass
class Outcome:
    """How a history went."""

    plan: Plan
    fault: Optional[str] = None
    events: int = 0
    faults: int = 0
    seconds: float = 0.0
    messages: int = 0
    coverage: Coverage = field(default_factory=set)


class History:
    """One history."""

    def __init__(
        self,
        plan: Plan,
        tell: Optional[Callable[[str], None]] = None,
        core_type: type[Core] = RecordingCore,
        protocols: Optional[Protocols] = None,
    ) -> None:
        self.plan = plan
        self.world = World(plan.seed, tell)
        self.broker = Broker(self.world)
        self.auditor = Auditor(self.broker, self.world.say)
        self.server = Server(self.world, self.auditor.commit, plan.keyed)
        self.server.flush_lock_timeout_seconds = 2.0
        self.random = self.world.stream("history")
        self.core_type, self.protocols = core_type, protocols or Protocols()
        self.supervisors: dict[str, SimulatedSupervisor] = {}
        self.lanes: dict[e.Partition, LaneKey] = {}
        self.calm = False
        self.restarts = True
        self.injected = 0
        self.coverage: Coverage = set()
        self._recording = False
        self._incarnations = 0
        self._tokens = 0
        self._turns = 0
        self._build()

    def _group_of(self, pipeline: int) -> str:
        return f"g{pipeline}" if self.plan.groups_apart else "g"

    def _build(self) -> None:
        plan = self.plan
        for index in range(plan.pipelines):
            group = self._group_of(index)
            if group not in self.broker.groups:
                Group(self.world, self.broker, group, plan.classic)
            self.broker.create_topic(group, f"t{index}", plan.partitions)
        for partition in list(self.broker.logs):
            self._know(partition)
            if plan.foreign_commits and self.random.random() < 0.7:
                self._foreign_past(partition)
        if plan.ids_from_seconds:
            self.broker.tells_ids = False
            self.world.after(plan.ids_from_seconds, self._tell_ids)
        for index in range(plan.supervisors):
            self.world.after(self.random.uniform(0.0, 0.5), self._start, "ABC"[index])
        self.world.after(EXPIRE_INTERVAL_SECONDS, self._expire)
        for wave in plan.waves:
            self.world.after(wave.at, self._produce, wave)
        for fault in plan.faults:
            self.world.after(fault.at, self._inject, fault)

    def _tell_ids(self) -> None:
        self.broker.tells_ids = True

    def _know(self, partition: e.Partition) -> None:
        pipeline = f"p{partition.topic[1:]}"
        self.lanes[partition] = LaneKey(CLUSTER, partition.group, pipeline, partition.topic, partition.partition)
        if self.plan.start == "earliest" and not self.plan.foreign_commits:
            self.auditor.first_starts[partition] = {0}

    def _foreign_past(self, partition: e.Partition) -> None:
        """Somebody else has read this partition in our group's name before us."""
        log = self.broker.logs[partition]
        for _ in range(10):
            log.append(0, 50, "row")
        log.settle()
        self.broker.groups[partition.group].committed[partition] = (7, False)
        self.auditor.first_starts[partition] = {7}

    def config(self, owner: str) -> CoreConfig:
        """A supervisor's settings."""
        plan = self.plan
        return CoreConfig(
            pipelines=tuple(
                PipelineConfig(
                    name=f"p{index}",
                    group=self._group_of(index),
                    topics=(f"t{index}",),
                    batch_rows=plan.batch_rows,
                    batch_bytes=plan.batch_bytes,
                    slow_flush_threshold_seconds=plan.slow_flush_threshold_seconds,
                    max_slow_flushes=plan.max_slow_flushes,
                    pause_seconds=plan.pause_seconds,
                    start=plan.start,
                    on_out_of_range=plan.on_out_of_range,
                    dead_letter_minimum=plan.dead_letter_minimum,
                )
                for index in range(plan.pipelines)
            ),
            workers=plan.workers,
            buffer_bytes=plan.buffer_bytes,
            owner=owner,
            separator=b",",
            shutdown_deadline_seconds=plan.shutdown_deadline_seconds,
            stall_seconds=STALL_SECONDS,
            user_code_seconds=USER_CODE_SECONDS,
            scout_seconds=STALL_SECONDS,
        )

    # --- processes --------------------------------------------------------------------------------------------------

    def _start(self, slot: str) -> None:
        self._incarnations += 1
        name = f"{slot}{self._incarnations}"
        self.world.say("init", f"starts {name}")
        self.supervisors[slot] = SimulatedSupervisor(
            self.world,
            self.broker,
            self.server,
            name,
            self.config(name),
            (self.plan.credit_flights, self.plan.credit_bytes),
            self.plan.largest_bytes,
            lambda supervisor: self._ended(slot, supervisor),
            self.core_type,
            self.protocols,
            self.plan.late_polls,
        )
        self.supervisors[slot].transform_seconds = self.plan.transform_seconds
        if self._recording:
            self.supervisors[slot].core.coverage = self.coverage  # type: ignore[attr-defined]

    def _ended(self, slot: str, supervisor: SimulatedSupervisor) -> None:
        self._turns += supervisor.turns
        if supervisor.exit_code is not None:
            self._check_replies(supervisor)
        if self.restarts:
            self.world.after(self.random.uniform(*RESTART_SECONDS), self._start, slot)

    def _check_replies(self, supervisor: SimulatedSupervisor) -> None:
        unanswered = [name for token, name in supervisor.asked.items() if token not in supervisor.replies]
        inbox = [event.name for event in supervisor._inbox if isinstance(event, e.Command)]
        if len(unanswered) > len(inbox):
            raise Violation(f"{supervisor.name} has ended and never answered {unanswered}")

    def _expire(self) -> None:
        self.world.after(EXPIRE_INTERVAL_SECONDS, self._expire)
        if self.broker.up:
            for group in self.broker.groups.values():
                group.expire()

    def _alive(self) -> list[SimulatedSupervisor]:
        return [supervisor for supervisor in self.supervisors.values() if supervisor.alive]

    def _workers(self) -> list[SimulatedWorker]:
        return [worker for supervisor in self.supervisors.values() for worker in supervisor.workers.values()]

    # --- load -------------------------------------------------------------------------------------------------------

    def _produce(self, wave: Wave) -> None:
        log = self._log(wave.topic, wave.partition)
        log.leader_epoch += wave.new_leader
        random, start = self.random, log.end
        deadly = set(random.sample(range(wave.count), min(wave.count, wave.deadly))) if wave.deadly else set()
        for index in range(wave.count):
            luck = random.random()
            fate = "dead" if luck < wave.dead_ratio else "filtered" if luck < wave.dead_ratio + 0.1 else "row"
            if index in deadly:
                fate = "accomplice" if wave.accomplices else "poison"
            log.append(random.randrange(12), random.randrange(20, wave.largest_bytes), fate)
        if not wave.transaction_seconds:
            if log.stable == start:
                log.settle()
        elif log.stable == start:
            self.world.after(wave.transaction_seconds, self._end_transaction, log, start, wave.aborted)
        if self.world.listening:
            self.world.say("producer", f"{wave.count} messages into {log.partition}: [{start}, {log.end})")

    def _end_transaction(self, log: Log, start: int, aborted: bool) -> None:
        if self.calm:
            return  # they have all ended
        if aborted:
            log.abort_from(start)
        log.control()
        log.settle()

    def _log(self, topic: str, number: int) -> Log:
        return self.broker.logs[e.Partition(self._group_of(int(topic[1:])), topic, number)]

    # --- faults -----------------------------------------------------------------------------------------------------

    def _inject(self, fault: Fault) -> None:
        from simulation.nemesis import FAULTS

        if self.calm:
            return
        dice = random.Random(fault.dice)
        what = FAULTS[fault.kind](self, fault.seconds, dice)
        if what is None:  # there was nothing to do it to; soon there may be
            self.world.after(0.2, self._inject, fault)
            return
        self.injected += 1
        self.world.say("NEMESIS", f"{fault.kind}: {what}")

    def command(self, supervisor: SimulatedSupervisor, name: str, **arguments: Any) -> None:
        """An operator's command."""
        self._tokens += 1
        self.world.say("operator", f"{name} {arguments} to {supervisor.name}")
        if name == "seek":
            topic, number = arguments.get("topic"), arguments.get("partition")
            for partition, lane in self.lanes.items():
                if topic in (None, partition.topic) and number in (None, partition.partition):
                    self.auditor.sought.add(lane)
        supervisor.command(self._tokens, name, arguments)

    def links(self) -> list[Link]:
        """All open connections to the database."""
        return [link for worker in self._workers() for desk in worker.desks.values() for link in desk.links]

    def consumers(self) -> list[Consumer]:
        """All consumers."""
        return [consumer for supervisor in self._alive() for consumer in supervisor.consumers.values()]

    def broker_up(self) -> None:
        """The broker is back; sessions begin anew."""
        self.broker.up = True
        for group in self.broker.groups.values():
            for member in group.members:
                member.heard_at = self.world.now

    def record_coverage(self) -> None:
        """Note which event meets which state."""
        self._recording = True

    # --- the course -------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Let it happen; a broken promise is told in the outcome, never raised."""
        outcome = Outcome(self.plan)
        try:
            self.world.run_until(self.plan.seconds)
            self._make_up_for_faults()
            self._end_faults()
            self._until_written()
            self._stop_all()
            self.auditor.verdict(self.server, self.lanes)
        except (Violation, IllegalTransition) as violation:
            outcome.fault = str(violation)
        except Exception as error:
            outcome.fault = f"{type(error).__name__}: {error}"
            self.world.say("python", traceback.format_exc())
        outcome.events = self.world.happened + self._turns
        outcome.faults = self.injected
        outcome.seconds = self.world.now
        outcome.messages = self.auditor.written
        outcome.coverage = self.coverage
        return outcome

    def _make_up_for_faults(self) -> None:
        """Faults of the plan that found nothing to strike are replaced. A plan that was shrunk has few on purpose."""
        if len(self.plan.faults) < FEWEST_FAULTS:
            return
        dice = random.Random(self.plan.seed)
        for attempt in range(ATTEMPTS_TO_MAKE_UP):
            if self.injected >= FEWEST_FAULTS:
                return
            kind = SURE_FAULTS[attempt % len(SURE_FAULTS)]
            self._inject(Fault(self.world.now, kind, 0.3, dice.getrandbits(30)))
            self.world.run_until(self.world.now + 0.2)

    def _end_faults(self) -> None:
        self.world.say("NEMESIS", "all faults end")
        self.calm = True
        server = self.server
        server.up, server.slowness, server.loss, server.deadlock, server.full = True, 1.0, 0.0, 0.0, False
        server.missing.clear()
        for pipeline in list(server.locked):
            server.unlock_table(pipeline)
        self.broker_up()
        self.broker.tells_ids = True
        for log in self.broker.logs.values():
            log.settle()
        for supervisor in self._alive():
            for worker in supervisor.workers.values():
                worker.delay, worker.overload = 0.0, False
                worker.thaw()
            supervisor.scout_delay, supervisor.boot_trouble = 0.0, False
            supervisor.strikes.clear()
            supervisor.thaw()
            for consumer in supervisor.consumers.values():
                consumer.reachable = consumer.coordinated = True

    def _until_written(self) -> None:
        world = self.world
        end = world.now + LIVENESS_SECONDS
        while True:
            world.run_until(world.now + 0.5)
            left = self.auditor.unfinished(self.server, self.lanes) or self._unsettled()
            if left is None:
                return
            if world.now > end:
                raise Violation(f"not everything is written {LIVENESS_SECONDS:g} s after the last fault: {left}")
            self._operate()

    def _unsettled(self) -> Optional[str]:
        """What still keeps a lane from being read, although all is written."""
        for supervisor in self._alive():
            for lane in supervisor.core.lanes():
                # A lane that is still on its way to a topic that was made again does not know of it yet.
                unaware = lane.partition in self.auditor.made_again and lane.state not in (
                    LaneState.HELD,
                    LaneState.FETCHING,
                )
                if lane.seek is not None or lane.state is LaneState.STOPPED or unaware:
                    return f"{lane.partition} of {supervisor.name} is {lane.state.value}: {lane.reason}"
        return None

    def _operate(self) -> None:
        """What an operator does who reads the reasons: resume what waits for it, decide where stopped lanes go on."""
        for supervisor in self._alive():
            for lane in supervisor.core.lanes():
                if lane.state is LaneState.STOPPED and lane.seek is None:
                    where = {"topic": lane.partition.topic, "partition": lane.partition.partition}
                    self.command(supervisor, "seek", pipeline=lane.key.pipeline, to="earliest", **where)
            for pipeline in supervisor.core.state.pipelines.values():
                if {"paused", "draining", "dead-letter limit"} & {why.value for why in pipeline.holds}:
                    self.command(supervisor, "resume", pipeline=pipeline.name)

    def _stop_all(self) -> None:
        """Stop every supervisor in order: they exit with 0 within the deadline."""
        self.restarts = False
        world = self.world
        stopping = self._alive()
        for supervisor in stopping:
            supervisor.stop()
        world.run_until(world.now + self.plan.shutdown_deadline_seconds + 2 * SHUTDOWN_SLACK_SECONDS)
        for supervisor in stopping:
            if supervisor.exit_code != 0:
                raise Violation(f"{supervisor.name} was told to stop and has exit code {supervisor.exit_code}")
