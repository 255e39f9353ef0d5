"""The watchdog: what stands still without a reason is repaired, told, counted, and at last given up (supervisor, pure).

A lane that is ours stands still if it is where it should not stay (a claim or a question that nobody answers, messages
that can be read and are not, a batch that is not sent), nothing holds it on purpose, and nothing of it has moved for
`stall_seconds`. Then one remedy after the other is tried, the mildest first, each given as long again. The last one is
to stop the daemon with an exit code of its own, so that an init system starts it anew.

A worker is judged by what it says. It announces the phases of its flights and gives a sign of life each second, with
the number of orders that it took:

- too long in a phase that runs user code: the code hangs, the worker is killed, and quarantine looks for the message;
- nothing heard of it at all: the process hangs, or user code keeps the interpreter for itself;
- signs of life, and orders that it does not take: it is restarted;
- signs of life, and a flush that takes long: it waits for the database. That is told, and never repaired: the next
  flush would wait as long, and be killed as well. Slowness is the brake's business.

Waits that are known, and told elsewhere, are no stalls: a database that is away (its workers say so again and again), a
broker that does not answer (no watermarks are heard), an operator's pause, the brake.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Optional

from speedlayer.supervisor.core.actions import ERROR, WARNING, KillWorker, RenewScout
from speedlayer.supervisor.core.config import BOOT_PATIENCE, HANGS_TO_STOP, LOOKS_PER_STALL, TRIED_PATIENCE
from speedlayer.supervisor.core.events import Partition
from speedlayer.supervisor.core.ledger import Lane, LaneState
from speedlayer.supervisor.core.pipelines import Hold
from speedlayer.supervisor.core.quarantine import MESSAGE_PHASES
from speedlayer.supervisor.core.state import State
from speedlayer.supervisor.core.workforce import FlightRecord, Killed, Worker, WorkerState


class Remedy(enum.Enum):
    """What the watchdog does about a stall, the mildest first."""

    SEEK = "re-seek"  # read the partition again from the ledger's offset
    CLAIM = "re-claim"  # drop what is read and not written, and begin with the claim
    WORKER = "restart the worker"
    SCOUT = "renew the scout"
    CONSUMER = "rebuild the consumer"
    STOP = "stop the daemon"


class Place(enum.Enum):
    """Where a lane stands still, in words for the log."""

    READING = "messages can be read, and none comes"
    SENDING = "what was read is not sent to a worker"
    CLAIMING = "the worker does not answer its claim"
    ASKING = "nobody answers the question for its range"
    POLLING = "the consumer fails whenever it is asked for messages"


# What is tried for each place, in turn. A worker has no part in reading, nor the consumer in writing. A scout that
# answers nobody is renewed for all.
LADDERS: dict[Place, tuple[Remedy, ...]] = {
    Place.READING: (Remedy.SEEK, Remedy.CLAIM, Remedy.CONSUMER, Remedy.STOP),
    Place.SENDING: (Remedy.CLAIM, Remedy.WORKER, Remedy.STOP),
    Place.CLAIMING: (Remedy.CLAIM, Remedy.WORKER, Remedy.STOP),
    Place.ASKING: (Remedy.CLAIM, Remedy.STOP),
    Place.POLLING: (Remedy.CONSUMER, Remedy.STOP),
}

# A pipeline that is held for one of these waits on purpose, and says so. A full memory is not among them: it is full
# because something else does not move.
ON_PURPOSE = frozenset(Hold) - {Hold.MEMORY}


@dataclass(frozen=True)
class Tried:
    """What was tried for a partition since it last got on. It outlives the lane: a consumer that is rebuilt gets its
    partitions anew.
    """

    remedies: frozenset[Remedy]
    at: float


class Watchdog:
    """Looks at everything a few times within `stall_seconds`."""

    def __init__(self, state: State, break_group: Callable[[str, str], None], give_up: Callable[[str], None]) -> None:
        self._state = state
        self._break_group = break_group
        self._give_up = give_up
        self._tried: dict[Partition, Tried] = {}
        self._renewals_in_a_row = 0
        self._renewed_at = 0.0
        self._looked_at = 0.0
        self._turned_at = 0.0
        # Nothing is judged by what was not heard before this time: we were not there to hear it.
        self._there_since = 0.0

    def look(self) -> None:
        """Judge everything, if it is time to."""
        state, patience = self._state, self._state.config.stall_seconds
        if state.now - self._turned_at >= patience / 2:
            self._there_since = state.now  # this process was stopped, or slept with the machine
        self._turned_at = state.now
        if not state.running or state.now - self._looked_at < patience / LOOKS_PER_STALL:
            return
        self._looked_at = state.now
        self._judge_scout()
        for worker in state.workforce:
            self._judge(worker)
        for lane in list(state.ledger):
            if state.running:
                self._watch(lane)

    def _is_over(self, since: float, patience: float) -> bool:
        return self._state.now - max(since, self._there_since) >= patience

    def _count(self, remedy: Remedy) -> None:
        self._state.repairs[remedy.value] = self._state.repairs.get(remedy.value, 0) + 1

    # --- the scout ----------------------------------------------------------------------------------------------

    def _judge_scout(self) -> None:
        """The scout is asked every few seconds as long as there are lanes, and answers even if Kafka does not. Without
        its watermarks nobody would know that there is something to read.
        """
        state = self._state
        if not len(state.ledger):
            state.scout_heard_at = state.now  # it is asked nothing
        if state.scout_heard_at > self._renewed_at:
            self._renewals_in_a_row = 0
        if not self._is_over(state.scout_heard_at, state.config.scout_seconds):
            return
        text = f"the thread that asks Kafka has not answered for {state.config.scout_seconds:g} s"
        if self._renewals_in_a_row >= HANGS_TO_STOP:
            self._stop(f"{text}, and was renewed {HANGS_TO_STOP} times")
            return
        self._renewals_in_a_row += 1
        state.scout_heard_at = self._renewed_at = state.now
        self._count(Remedy.SCOUT)
        state.log(WARNING, f"{text}; another one is started, and asks again what was asked")
        state.act(RenewScout(text))
        for lane in state.ledger:
            if lane.state is LaneState.INSPECTING:
                state.reclaim(lane, "its question is asked again by another scout")

    # --- workers ------------------------------------------------------------------------------------------------

    def _judge(self, worker: Worker) -> None:
        patience = self._state.config.stall_seconds
        if worker.killed is not None:
            if self._is_over(worker.killed_at, patience):
                self._stop(f"{worker.name} was killed {patience:g} s ago, and is still there")
        elif worker.state is WorkerState.STARTING:
            if self._is_over(worker.started_at, patience * BOOT_PATIENCE):
                self._restart(worker, f"has not become ready for {patience * BOOT_PATIENCE:g} s")
        elif worker.state is WorkerState.READY:
            self._judge_ready(worker)

    def _judge_ready(self, worker: Worker) -> None:
        config = self._state.config
        in_user_code = [record for record in worker.flights.values() if record.phase in MESSAGE_PHASES]
        if in_user_code:
            # User code may keep the interpreter for itself so long: nothing else is heard meanwhile.
            longest = min(in_user_code, key=lambda record: record.phase_since)
            if self._is_over(longest.phase_since, config.user_code_seconds):
                reason = f"it hung in user code for {config.user_code_seconds:g} s"
                self._kill(worker, Killed(reason, longest.flight_id), f"pipeline {longest.pipeline}: {reason}")
        elif self._is_over(worker.heard_at, config.stall_seconds):
            self._restart(worker, f"has not given a sign of life for {config.stall_seconds:g} s")
        elif worker.orders_sent > worker.orders_taken and self._is_over(worker.orders_at, config.stall_seconds):
            self._restart(worker, f"has not taken its orders for {config.stall_seconds:g} s")
        else:
            self._tell_of_long_flushes(worker)

    def _tell_of_long_flushes(self, worker: Worker) -> None:
        heads: dict[str, FlightRecord] = {}
        for record in worker.flights.values():
            heads.setdefault(record.pipeline, record)
        patience = self._state.config.stall_seconds
        for record in heads.values():
            since = max(record.dispatched_at, worker.flushes_heard.get(record.pipeline, 0.0))
            if record.blocked or record.told_long or not self._is_over(since, patience):
                continue
            worker.flights[record.flight_id] = replace(record, told_long=True)
            self._state.log(
                WARNING,
                f"a flush of pipeline {record.pipeline} has waited for the database for {patience:g} s, and is left to"
                f" it: {worker.name} is well. Look for locks (pg_stat_activity, pg_locks), or a server that hangs",
                pipeline=record.pipeline,
                worker=worker.name,
            )

    def _restart(self, worker: Worker, how: str) -> None:
        """Restart a worker for which no message is to blame; not for ever."""
        worker.hangs_in_a_row += 1
        if worker.hangs_in_a_row > HANGS_TO_STOP:
            self._stop(f"{worker.name} {how}, and was restarted {HANGS_TO_STOP} times for the like")
        else:
            self._kill(worker, Killed(how), f"it {how}")

    def _kill(self, worker: Worker, killed: Killed, why: str) -> None:
        state = self._state
        worker.killed, worker.killed_at = killed, state.now
        self._count(Remedy.WORKER)
        state.log(
            WARNING,
            f"{worker.name} is killed and started again: {why}; its partitions are claimed again, and go on from what"
            " is committed",
            worker=worker.name,
        )
        state.act(KillWorker(worker.name))

    def _stop(self, reason: str) -> None:
        if self._state.running:
            self._count(Remedy.STOP)
            self._give_up(reason)

    # --- lanes --------------------------------------------------------------------------------------------------

    def _watch(self, lane: Lane) -> None:
        state, patience = self._state, self._state.config.stall_seconds
        if lane.seen[:1] and lane.seen[0] != lane.flushed:
            self._tried.pop(lane.partition, None)  # rows were written: it got on
        seen = (lane.flushed, lane.dispatched, lane.expected, lane.state, lane.claim_id, lane.inspect_request)
        place = self._place_of(lane)
        if place is None or seen != lane.seen:
            lane.moved_at = state.now
        if place is None:
            lane.stall = ""
        lane.seen = seen
        if place is not None and self._is_over(max(lane.moved_at, self._heard_at(lane, place)), patience):
            lane.moved_at = state.now
            self._repair(lane, place)

    def _place_of(self, lane: Lane) -> Optional[Place]:
        """Where the lane stands, if it should not stand there for long."""
        pipeline = self._state.pipeline_of(lane)
        if lane.in_flight or ON_PURPOSE.intersection(pipeline.holds):
            return None  # the worker is judged by itself; what holds a pipeline is told
        if lane.state is LaneState.PENDING:
            return None if lane.polled_since_fenced else Place.POLLING
        if lane.state in (LaneState.CLAIMING, LaneState.SEEDING):
            return Place.CLAIMING if self._is_answerable(lane) else None
        if lane.state is LaneState.INSPECTING:
            return Place.ASKING if self._scout_answers() else None
        if lane.batch.slices:
            return Place.SENDING if self._is_answerable(lane, idle=True) else None
        return Place.READING if lane.state is LaneState.FETCHING and self._is_behind(lane) else None

    def _scout_answers(self) -> bool:
        """Whether the scout is well, and owes the lane alone an answer; one that says nothing is judged by itself."""
        return self._state.now - self._state.scout_heard_at < self._state.config.stall_seconds / 2

    def _is_answerable(self, lane: Lane, idle: bool = False) -> bool:
        """Whether the lane's worker could do something for it: it is there, and (``idle``) has nothing else to do."""
        assert lane.worker is not None
        worker = self._state.workforce[lane.worker]
        busy = idle and bool(worker.flights)
        return worker.state is WorkerState.READY and worker.killed is None and not busy

    def _is_behind(self, lane: Lane) -> bool:
        """Whether there is something to read, by what the broker has said just now."""
        heard = self._state.now - lane.watermarks_at < self._state.config.stall_seconds / 2
        return heard and lane.high_watermark is not None and lane.expected < lane.high_watermark

    def _heard_at(self, lane: Lane, place: Place) -> float:
        """When whoever owes the lane an answer was last heard of: it answers in turn."""
        if place is Place.CLAIMING:
            assert lane.worker is not None
            return self._state.workforce[lane.worker].claims_heard.get(lane.key.pipeline, 0.0)
        if place is Place.SENDING:
            return (lane.batch.opened_at or 0.0) + self._state.pipeline_of(lane).config.batch_seconds
        return 0.0

    def _repair(self, lane: Lane, place: Place) -> None:
        state, partition = self._state, lane.partition
        before = self._tried.get(partition)
        if before is None or self._state.now - before.at >= TRIED_PATIENCE * state.config.stall_seconds:
            before = Tried(frozenset(), state.now)
        remedy = next((x for x in LADDERS[place] if x not in before.remedies), None)
        if remedy is None:
            return  # told, and left alone for a while
        self._tried[partition] = Tried(before.remedies | {remedy}, state.now)
        trouble = state.trouble.of(partition.group)
        text = f"{partition} stands still: {place.value} (for {state.config.stall_seconds:g} s)"
        lane.stall = f"{place.value}; tried: {remedy.value}"
        if remedy is Remedy.STOP and trouble is not None:
            # What Kafka complains of would be the same in a new process.
            state.log(ERROR, f"{text}; every remedy was tried. Kafka says: {trouble}", **state.fields_of(lane))
            return
        if remedy not in (Remedy.WORKER, Remedy.STOP):  # which are counted where they are done
            self._count(remedy)
        state.log(WARNING, f"{text}; the remedy: {remedy.value}", remedy=remedy.value, **state.fields_of(lane))
        self._apply(remedy, lane, text)

    def _apply(self, remedy: Remedy, lane: Lane, text: str) -> None:
        state = self._state
        if remedy is Remedy.SEEK:
            state.hold(lane, "to be read again from the ledger's offset")
        elif remedy is Remedy.CLAIM:
            state.reclaim(lane, "the watchdog claims it again")
        elif remedy is Remedy.WORKER:
            assert lane.worker is not None
            self._restart(state.workforce[lane.worker], f"did nothing for {lane.partition}")
        elif remedy is Remedy.CONSUMER:
            self._break_group(lane.partition.group, text)
        else:
            self._stop(f"{text}, whatever was tried")
