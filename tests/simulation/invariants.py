"""What must hold after every commit and after every step of a core, whatever has happened (the promises P1, P2, P4-P7).

The `Auditor` sits in the simulated database and looks at every transaction at the moment of its commit: that is where
rows become true. `check_step` looks at a core after each step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Optional

from simulation.kafka import COMPACTED, DONE, EXPIRED, PASSED, PENDING, Broker, Log, Message
from simulation.postgres import Server, Transaction, Undo
from speedlayer.supervisor.core import events as e
from speedlayer.supervisor.core.ledger import Lane, LaneState
from speedlayer.supervisor.core.quarantine import DEATHS_TO_CONDEMN, MESSAGE_PHASES
from speedlayer.supervisor.core.workforce import WorkerState
from speedlayer.workers.checkpoint import Move, SetStart
from speedlayer.workers.protocol import LaneKey

if TYPE_CHECKING:
    from simulation.supervisor import SimulatedSupervisor


# A batch that is due for so long, while its worker has nothing of its pipeline to do, waits for something it must not.
WAIT_LIMIT_SECONDS = 1.0


class Violation(AssertionError):
    """A promise is broken."""


class Auditor:
    """Knows what became of every message. ``sought`` holds the lanes that an operator has ever wanted moved."""

    def __init__(self, broker: Broker, say: Callable[[str, str], None]) -> None:
        self.broker = broker
        self.say = say
        self.sought: set[LaneKey] = set()
        self.first_starts: dict[e.Partition, set[int]] = {}  # where a lane without a checkpoint may begin
        self.made_again: set[e.Partition] = set()  # the topic is another one, and its lane may not know yet
        self.written = 0

    def log_of(self, lane: LaneKey) -> Log:
        """The log that a lane reads now."""
        return self.broker.logs[e.Partition(lane.group, lane.topic, lane.partition)]

    def commit(self, server: Server, transaction: Transaction, undo: Undo) -> None:
        """Judge a transaction that is about to become visible."""
        for start in transaction.starts:
            self._started(server, transaction, start, undo)
        settled = [*transaction.rows, *transaction.filtered, *transaction.dead]
        if settled or transaction.moves:
            self._flushed(server, transaction, settled, undo)

    # --- flushes --------------------------------------------------------------------------------------------------

    def _flushed(self, server: Server, transaction: Transaction, settled: list[Message], undo: Undo) -> None:
        moves = {e.Partition(move.lane.group, move.lane.topic, move.lane.partition): move for move in transaction.moves}
        for message in transaction.condemned:
            if message.fate != "poison" and message.bystander < DEATHS_TO_CONDEMN:
                raise Violation(f"{message} is condemned, and it has killed nobody")
        last: dict[e.Partition, int] = {}
        for message in transaction.rows:
            partition = message.log.partition
            if message.offset <= last.get(partition, -1):
                raise Violation(f"{message} is written after offset {last[partition]} in one transaction")
            last[partition] = message.offset
        counted = dict.fromkeys(moves, 0)
        for message in settled:
            move = moves.get(message.log.partition)
            if move is None:
                raise Violation(f"{message} is written, and its checkpoint does not move with it")
            if not move.start <= message.offset < move.end:
                raise Violation(f"{message} is written under a checkpoint that moves from {move.start} to {move.end}")
            if message.status == DONE:
                raise Violation(f"{message} is written twice")
            undo.statuses.append((message, message.status))
            message.status = DONE
            counted[message.log.partition] += 1
        self.written += len(settled)
        for partition, move in moves.items():
            counts = move.counts
            if counts.rows + counts.filtered + counts.dead_lettered != counted[partition]:
                raise Violation(f"{partition} counts {counts}, and {counted[partition]} messages are settled")
            self._moved(server, transaction, partition, move)

    def _moved(self, server: Server, transaction: Transaction, partition: e.Partition, move: Move) -> None:
        before = server.checkpoints.get(move.lane)
        if before is None or before.next_offset != move.start:
            at = None if before is None else before.next_offset
            raise Violation(f"the checkpoint of {partition} stands at {at} and moves from {move.start} to {move.end}")
        if (before.epoch, before.owner) != (move.epoch, move.owner):
            raise Violation(f"{partition} is written under epoch {move.epoch}, and {before.epoch} is in force")
        log = self.broker.logs[partition]
        if partition in self.made_again:
            return  # until its lane is stopped, offsets of the old topic meet those of the new one
        for message in log.entries[move.start : move.end]:
            if message is None or message.status != PENDING or message.gone == COMPACTED:
                continue
            how = "removed by retention and passed in silence" if message.gone == EXPIRED else "lost"
            raise Violation(f"{message} is {how}: the checkpoint moves from {move.start} to {move.end} without it")

    # --- starts ---------------------------------------------------------------------------------------------------

    def _started(self, server: Server, transaction: Transaction, start: SetStart, undo: Undo) -> None:
        partition = e.Partition(start.lane.group, start.lane.topic, start.lane.partition)
        log = self.broker.logs[partition]
        if start.topic_id == log.topic_id:
            self.made_again.discard(partition)
        old = start.expected
        recorded = any(gap.lane == start.lane and gap.end == start.start for gap in transaction.gaps)
        if old is None:
            self._check_first(partition, start)
        elif start.start != old and not recorded:
            raise Violation(f"{partition} goes from {old} to {start.start} in silence")
        for message in log.entries[: start.start]:
            if message is None or message.status != PENDING:
                continue
            if old is not None and start.lane not in self.sought and not message.gone:
                raise Violation(f"{message} is passed by a start at {start.start} that nobody wanted")
            undo.statuses.append((message, message.status))
            message.status = PASSED
        for message in log.entries[start.start :]:
            if message is not None and message.status != PENDING:
                if start.lane not in self.sought and message.status == DONE:
                    raise Violation(f"{partition} goes back to {start.start}, and nobody wanted that")
                undo.statuses.append((message, message.status))
                message.status = PENDING

    def _check_first(self, partition: e.Partition, start: SetStart) -> None:
        if start.lane in self.sought:
            return
        allowed = self.first_starts.get(partition)
        if allowed is None or start.start in allowed:
            return
        skipped = self.broker.logs[partition].entries[min(allowed) : start.start]
        if start.start < min(allowed) or any(message is not None and not message.gone for message in skipped):
            raise Violation(f"{partition} begins at {start.start}; it may begin at {sorted(allowed)}")

    # --- the end ----------------------------------------------------------------------------------------------------

    def unfinished(self, server: Server, lanes: dict[e.Partition, LaneKey]) -> Optional[str]:
        """What is still to be written, in words; None if everything is."""
        for partition, log in self.broker.logs.items():
            checkpoint = server.checkpoints.get(lanes[partition])
            at = None if checkpoint is None else checkpoint.next_offset
            if at is None or at != log.stable:
                return f"{partition} stands at {at} of {log.stable}"
            # The old offset of a topic that was made again may happen to be the new one's end.
            for message in log.entries[: log.stable]:
                if message is not None and message.status == PENDING and message.gone != COMPACTED:
                    return f"{message} is not written"
        return None

    def verdict(self, server: Server, lanes: dict[e.Partition, LaneKey]) -> None:
        """At the end: every message is a row, a filtered one, a dead letter, or passed for a recorded reason."""
        for partition, log in self.broker.logs.items():
            checkpoint = server.checkpoints[lanes[partition]]
            if checkpoint.next_offset != log.stable:
                raise Violation(f"{partition} ends at {checkpoint.next_offset}, its log at {log.stable}")
            for message in log.entries[: log.stable]:
                if message is not None and message.status == PENDING and message.gone != COMPACTED:
                    raise Violation(f"{message} is nowhere")


# --- the core, after each step --------------------------------------------------------------------------------------


def check_step(supervisor: SimulatedSupervisor) -> None:
    """Look at a core after a step."""
    state = supervisor.core.state
    fetching: dict[e.Partition, int] = {}
    held_bytes = dict.fromkeys(state.pipelines, 0)
    for lane in state.ledger:
        _check_lane(supervisor, lane)
        held_bytes[lane.key.pipeline] += lane.batch.size_bytes
        if lane.state is LaneState.FETCHING:
            fetching[lane.partition] = lane.generation
    _check_reading(supervisor, fetching)
    for worker in state.workforce:
        for flight in worker.flights.values():
            held_bytes[flight.pipeline] += flight.size_bytes
    for name, pipeline in state.pipelines.items():
        if pipeline.buffered_bytes != held_bytes[name]:
            raise Violation(f"{name} counts {pipeline.buffered_bytes} bytes and holds {held_bytes[name]}")
        if pipeline.buffered_bytes > supervisor.limit_bytes:
            raise Violation(f"{name} holds {pipeline.buffered_bytes} bytes, the limit is {supervisor.limit_bytes}")
        for why, reason in pipeline.holds.items():
            if not reason:
                raise Violation(f"{name} is {why.value} for no reason")


def _check_lane(supervisor: SimulatedSupervisor, lane: Lane) -> None:
    state = supervisor.core.state
    if not lane.flushed <= lane.dispatched <= lane.expected:
        raise Violation(
            f"{lane.partition}: flushed {lane.flushed} <= dispatched {lane.dispatched} <= expected"
            f" {lane.expected} does not hold"
        )
    if lane.state is not LaneState.FETCHING and not lane.reason:
        raise Violation(f"{lane.partition} is {lane.state.value} for no reason")
    if lane.batch.slices and lane.epoch is None:
        raise Violation(f"{lane.partition} holds messages and no epoch")
    if lane.batch.opened_at is not None and state.now - lane.batch.opened_at > WAIT_LIMIT_SECONDS:
        _check_waiting(supervisor, lane)
    if lane.state is LaneState.STOPPED and lane.since == state.now:
        _check_stopped(supervisor, lane)
    if lane.state is LaneState.HELD and state.running:
        may_fetch = state.pipelines[lane.key.pipeline].may_fetch
        if may_fetch and lane.seek is None and not lane.moving:
            raise Violation(f"{lane.partition} is held, and its pipeline is not")


def _check_stopped(supervisor: SimulatedSupervisor, lane: Lane) -> None:
    """Only what has really happened stops a lane."""
    made_again = lane.partition.topic in supervisor.broker.made_again
    row = supervisor.server.checkpoints.get(lane.key)
    causes = {
        "made again": made_again,
        "not the one that was read before": made_again,
        "gone from the log": made_again or supervisor.broker.logs[lane.partition].low > 0,
        # Another owner may have begun while we were stopped between our claim and the broker's answer.
        "own commit": supervisor.server.fell_back
        or (row is not None and not row.owner.startswith(supervisor.config.owner)),
        'start = "error"': supervisor.core.state.pipelines[lane.key.pipeline].config.start == "error",
    }
    if not any(cause in lane.reason and happened for cause, happened in causes.items()):
        raise Violation(f"{lane.partition} is stopped without a cause: {lane.reason}")


def _check_waiting(supervisor: SimulatedSupervisor, lane: Lane) -> None:
    """A batch that is due may wait for its own pipeline's flights, or for a hold, and for nothing else."""
    state = supervisor.core.state
    pipeline = state.pipelines[lane.key.pipeline]
    worker = state.workforce[lane.worker] if lane.worker is not None else None
    if worker is None or worker.state is not WorkerState.READY or not pipeline.may_dispatch:
        return
    looked_at = any(x.phase in MESSAGE_PHASES for x in worker.flights.values())
    if looked_at and supervisor.core._quarantine.wants_silence(worker):
        return  # a suspect of another pipeline is looked at alone; if it hangs, the watchdog ends that
    if lane.epoch is not None and not any(x.pipeline == pipeline.name for x in worker.flights.values()):
        raise Violation(f"{lane.partition}: a batch waits, and {worker.name} writes nothing of {pipeline.name}")


def _check_reading(supervisor: SimulatedSupervisor, fetching: dict[e.Partition, int]) -> None:
    reading: dict[e.Partition, int] = {}
    for consumer in supervisor.consumers.values():
        reading.update(consumer.fetching)
    if reading != fetching:
        raise Violation(f"the core reads {_named(fetching)}, the consumer {_named(reading)}")


def _named(generations: dict[e.Partition, int]) -> str:
    return ", ".join(f"{partition} in generation {n}" for partition, n in sorted(generations.items())) or "nothing"
