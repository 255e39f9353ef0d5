"""Faults put into the core and the protocol on purpose: each must be caught, or the simulator proves nothing.

A mutant is a context manager that patches the code while it is open. What it breaks is one rule of DESIGN, said in its
docstring. Rules that others make up for are not here: without the compare-and-set on the offset nearly all would be.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Optional
from unittest.mock import patch

from simulation.kafka import chunk_of
from simulation.postgres import Server
from simulation.worker import Protocols
from speedlayer.supervisor.core import events as e
from speedlayer.supervisor.core import flow, quarantine
from speedlayer.supervisor.core.brake import ThreeStrikes
from speedlayer.supervisor.core.claims import Claims
from speedlayer.supervisor.core.commands import Commands
from speedlayer.supervisor.core.core import Core
from speedlayer.supervisor.core.flow import Flow
from speedlayer.supervisor.core.ledger import Lane, LaneState, OpenBatch
from speedlayer.supervisor.core.pipelines import Hold, Pipeline
from speedlayer.supervisor.core.quarantine import Quarantine, Suspicion
from speedlayer.supervisor.core.state import State
from speedlayer.supervisor.core.workforce import Worker, WorkerState
from speedlayer.workers import checkpoint as cp
from speedlayer.workers import protocol as p

Mutant = Callable[[], AbstractContextManager[Protocols]]
MUTANTS: dict[str, Mutant] = {}


def mutant(change: Callable[[], Iterator[Optional[Protocols]]]) -> Mutant:
    """Register a mutant under its function's name."""

    @contextmanager
    def opened() -> Iterator[Protocols]:
        for protocols in change():
            yield protocols or Protocols()

    MUTANTS[change.__name__] = opened
    return opened


def _patched(target: Any, name: str, replacement: Any) -> Iterator[None]:
    with patch.object(target, name, replacement):
        yield None


# --- the database's side of the protocol ----------------------------------------------------------------------------


@mutant
def the_epoch_is_not_checked() -> Iterator[None]:
    """A flush moves the checkpoint of whoever owns it."""
    return _patched(Server, "_may_move", staticmethod(lambda row, step: row.next_offset == step.start))


@mutant
def the_start_is_not_checked() -> Iterator[None]:
    """A flush moves the checkpoint wherever it stands."""
    same = staticmethod(lambda row, step: (row.epoch, row.owner) == (step.epoch, step.owner))
    return _patched(Server, "_may_move", same)


@mutant
def locks_end_before_the_transaction() -> Iterator[None]:
    """A claim does not wait for a flush that is about to commit."""
    original = Server._advance

    def advance(self: Server, backend: Any, operation: Any, payload: Any, reply: Any) -> None:
        original(self, backend, operation, payload, reply)
        self._release(backend)

    return _patched(Server, "_advance", advance)


# --- the workers' side ----------------------------------------------------------------------------------------------


@mutant
def a_flush_is_acknowledged_before_it_is_committed() -> Iterator[Protocols]:
    """The report goes out first."""
    yield Protocols(acknowledge_early=True)


def _flush_like(
    parts: Any, *, commit_anyway: bool = False, dead_letters: bool = True, keep_fenced: bool = False
) -> Generator[cp.Operation, Any, cp.FlushResult]:
    remaining, fenced = tuple(range(len(parts))), set[int]()
    while remaining:
        written = tuple(range(len(parts))) if keep_fenced else remaining
        try:
            yield cp.Begin(cp.Purpose.FLUSH)
            counts = yield cp.WriteRows(written)
            counts = tuple(counts[written.index(index)] for index in remaining)
            if dead_letters and any(count.dead_lettered for count in counts):
                yield cp.WriteDeadLetters(written)
            moved = yield cp.Advance(cp._moves(parts, remaining, counts))
        except Exception:
            yield cp.Rollback()
            raise
        lost = {index for index in remaining if parts[index].lane not in moved}
        if not lost or commit_anyway:
            yield from cp._commit()
            return cp.FlushResult(remaining, counts, tuple(sorted(fenced)))
        yield cp.Rollback()
        fenced |= lost
        remaining = tuple(index for index in remaining if index not in lost)
    return cp.FlushResult((), (), tuple(sorted(fenced)))


@mutant
def a_flush_commits_although_it_is_fenced() -> Iterator[Protocols]:
    """COMMIT goes out whether the checkpoints moved or not."""
    yield Protocols(flush=lambda parts: _flush_like(parts, commit_anyway=True))


@mutant
def dead_letters_are_forgotten() -> Iterator[Protocols]:
    """The offset advances past a dead letter that was never written."""
    yield Protocols(flush=lambda parts: _flush_like(parts, dead_letters=False))


@mutant
def rows_of_fenced_parts_are_written() -> Iterator[Protocols]:
    """The second try without the fenced parts writes their rows all the same."""
    yield Protocols(flush=lambda parts: _flush_like(parts, keep_fenced=True))


@mutant
def a_seed_sets_whatever_is_there() -> Iterator[Protocols]:
    """A seed that comes late moves a lane that has another owner."""

    def seed(order: p.Seed) -> Generator[cp.Operation, Any, Optional[cp.Checkpoint]]:
        try:
            yield cp.Begin(cp.Purpose.CLAIM)
            before = yield cp.LockCheckpoint(order.lane)
            if before is None:
                yield cp.Rollback()
                return None
            yield cp.SetStart(order.lane, before.epoch, before.owner, before.next_offset, order.start, order.topic_id)
            if order.gap_reason is not None:
                yield cp.RecordGap(order.lane, order.expected, order.start, order.gap_reason)
            yield cp.Commit()
        except Exception:
            yield cp.Rollback()
            raise
        return cp.Checkpoint(before.epoch, before.owner, order.start, order.topic_id, -1, None)

    yield Protocols(seed=seed)


# --- the core: what is read -----------------------------------------------------------------------------------------


@mutant
def an_interrupted_read_is_taken_for_complete() -> Iterator[None]:
    """`consume()` raised, and reading goes on from where librdkafka stands."""
    return _patched(Core, "_positions_unknown", lambda self, event: None)


@mutant
def the_generation_is_ignored() -> Iterator[None]:
    """Messages of a fetch that was given up are taken for those of the one that is under way."""
    return _patched(Flow, "_is_current", staticmethod(lambda lane, generation: lane.state is LaneState.FETCHING))


@mutant
def moved_positions_are_ignored() -> Iterator[None]:
    """The checkpoint stays before control records and what compaction took."""
    return _patched(Flow, "position_moved", lambda self, event: None)


@mutant
def a_flight_ends_where_reading_stands() -> Iterator[None]:
    """A part says that it reaches to the position, although messages before it are left behind."""
    original = Flow._pack

    def pack(self: Flow, *arguments: Any) -> Any:
        return [(lane, slices, lane.expected) for lane, slices, _ in original(self, *arguments)]

    return _patched(Flow, "_pack", pack)


@mutant
def a_topic_made_again_is_read_on() -> Iterator[None]:
    """The topic's id is not looked at."""

    def read_on(self: Claims, lane: Lane, topic_id: Optional[str]) -> None:
        lane.topic_id = topic_id
        if lane.state is LaneState.INSPECTING:
            lane.move(LaneState.HELD, self._state.now, "read on")

    return _patched(Claims, "stop_recreated", read_on)


@mutant
def what_retention_took_is_passed_in_silence() -> Iterator[None]:
    """The gap is neither a reason to stop nor recorded."""
    original = Claims._seed

    def seed(self: Claims, lane: Lane, start: int, topic_id: Optional[str], gap_reason: Optional[str] = None) -> None:
        original(self, lane, start, topic_id, None)

    return _patched(Claims, "_seed", seed)


# --- the core: claims and revocations -------------------------------------------------------------------------------


@mutant
def batches_are_kept_on_revoke() -> Iterator[None]:
    """What was read of a partition that is gone stays in memory."""

    def revoked(self: Claims, partitions: tuple[e.Partition, ...], lost: bool) -> None:
        for partition in partitions:
            self._state.ledger.remove(partition)

    return _patched(Claims, "revoked", revoked)


@mutant
def a_lane_is_kept_on_revoke() -> Iterator[None]:
    """The partition is gone, and goes on being read."""
    return _patched(Claims, "revoked", lambda self, partitions, lost: None)


@mutant
def a_batch_outlives_its_claim() -> Iterator[None]:
    """After a new claim the lane still holds what it had read before."""
    original = Lane.forget

    def forget(self: Lane) -> int:
        batch, expected = self.batch, self.expected
        original(self)
        self.batch, self.expected = batch, expected
        return 0

    return _patched(Lane, "forget", forget)


@mutant
def credit_is_lost_with_a_worker() -> Iterator[None]:
    """The flights of a dead worker count against the next one."""
    original = Worker.died

    def died(self: Worker, now: float, sought: bool = False) -> None:
        flights = dict(self.flights)
        original(self, now, sought)
        self.flights.update(flights)

    def lost_with(self: Flow, worker: Worker) -> None:
        for record in list(worker.flights.values()):
            self.give_up(record, f"{worker.name} died")
        for lane in self._state.ledger.of_worker(worker.name):
            self._state.reclaim(lane, f"{worker.name} died")

    with patch.object(Worker, "died", died), patch.object(Flow, "lost_with", lost_with):
        yield None


@mutant
def a_fenced_lane_is_given_up() -> Iterator[None]:
    """Whoever was fenced never claims again, although the partition is still assigned."""
    original = Claims.fenced

    def fenced(self: Claims, lane: Lane) -> None:
        original(self, lane)
        lane.claim_not_before = float("inf")

    return _patched(Claims, "fenced", fenced)


@mutant
def an_unanswered_question_is_not_asked_again() -> Iterator[None]:
    """The broker did not answer, and the lane waits for ever."""
    original = Claims.inspected

    def inspected(self: Claims, event: e.Inspected) -> None:
        if event.error is None:
            original(self, event)

    return _patched(Claims, "inspected", inspected)


@mutant
def a_quiet_lane_is_not_checked() -> Iterator[None]:
    """A fail-over that loses commits goes unnoticed where no message follows."""
    return _patched(Flow, "_check_if_quiet", lambda self, lane: None)


@mutant
def a_seek_is_applied_again_and_again() -> Iterator[None]:
    """A lane that was sought goes back to the same place after every claim."""
    original = Claims.claimed

    def claimed(self: Claims, report: p.Claimed) -> None:
        lane = self._lane_of(report.lane, report.claim_id)
        seek = lane.seek if lane is not None else None
        original(self, report)
        if lane is not None and lane.state is LaneState.HELD:
            lane.seek = seek

    return _patched(Claims, "claimed", claimed)


# --- faults that the simulator found, put back ----------------------------------------------------------------------


@mutant
def a_report_counts_for_its_epoch() -> Iterator[None]:
    """A flight of an earlier claim moves the lane of a later one, if a fail-over gave both the same epoch."""
    originals = Flow._send, Flow._advance, Quarantine.died

    @contextmanager
    def by_epoch(lanes: Iterable[Optional[Lane]]) -> Iterator[None]:
        claims = [(lane, lane.claim_id) for lane in lanes if lane is not None]
        for lane, _ in claims:
            lane.claim_id = -(lane.epoch or 0)
        yield
        for lane, claim_id in claims:
            lane.claim_id = claim_id

    def send(self: Flow, pipeline: Pipeline, worker: Worker, packed: Any, condemned: Optional[str] = None) -> None:
        with by_epoch(lane for lane, _, _ in packed):
            originals[0](self, pipeline, worker, packed, condemned)

    def advance(self: Flow, record: Any, fenced: Any) -> Any:
        with by_epoch(self._state.ledger.get(part.partition) for part in record.parts):
            return originals[1](self, record, fenced)

    def died(self: Quarantine, worker: Worker, exit_code: Optional[int]) -> bool:
        with by_epoch(self._state.ledger):
            return originals[2](self, worker, exit_code)

    with (
        patch.object(Flow, "_send", send),
        patch.object(Flow, "_advance", advance),
        patch.object(Quarantine, "died", died),
    ):
        yield None


@mutant
def a_part_carries_the_leader_epoch_of_what_was_read() -> Iterator[None]:
    """Not that of its own last message."""
    original = Flow._send

    def send(self: Flow, pipeline: Pipeline, worker: Worker, packed: Any, condemned: Optional[str] = None) -> None:
        read = [
            (lane, [replace(piece, leader_epoch=lane.leader_epoch) for piece in slices], end)
            for lane, slices, end in packed
        ]
        original(self, pipeline, worker, read, condemned)

    return _patched(Flow, "_send", send)


@mutant
def credit_is_shared_by_the_pipelines() -> Iterator[None]:
    """A pipeline whose table is locked holds the credit of the others."""

    def room(self: Worker, pipeline: str) -> int:
        if self.state is not WorkerState.READY or len(self.flights) >= self.credit_flights:
            return 0
        return max(self.credit_bytes - self.size_bytes, 0 if self.flights else 1)

    return _patched(Worker, "room", room)


@mutant
def a_seed_keeps_the_leader_epoch() -> Iterator[None]:
    """A topic that was made again, or an older offset, is read as if it went on where the lane was."""
    original = Server._set_start

    def set_start(self: Server, backend: Any, operation: Any, payload: Any, reply: Any) -> None:
        def keep(result: Any, error: Any) -> None:
            transaction, row = backend.transaction, self.checkpoints.get(operation.lane)
            if result and row is not None:
                new = transaction.checkpoints[operation.lane]
                transaction.checkpoints[operation.lane] = replace(new, leader_epoch=row.leader_epoch)
            reply(result, error)

        original(self, backend, operation, payload, keep)

    return _patched(Server, "_set_start", set_start)


@mutant
def commands_are_taken_while_the_daemon_stops() -> Iterator[None]:
    """A drain or a seek that nobody will ever answer."""
    return _patched(State, "stopping", property(lambda self: False))


@mutant
def a_broken_consumer_is_replaced_at_once() -> Iterator[None]:
    """What it was assigned in the same turn goes to its successor."""
    original = Core._consumer_trouble

    def consumer_trouble(self: Core, event: e.ConsumerTrouble) -> None:
        original(self, event)
        self._rebuild_consumers()

    return _patched(Core, "_consumer_trouble", consumer_trouble)


# --- the core: brake, memory, holds ---------------------------------------------------------------------------------


@mutant
def the_brake_is_never_released() -> Iterator[None]:
    """The pause after three strikes has no end."""
    return _patched(ThreeStrikes, "should_pause", lambda self, now, drained: self.pause_until is not None)


@mutant
def a_full_memory_stays_full() -> Iterator[None]:
    """Below the low mark nothing is resumed."""
    original = Pipeline.release

    def release(self: Pipeline, why: Hold) -> bool:
        return why is not Hold.MEMORY and original(self, why)

    return _patched(Pipeline, "release", release)


@mutant
def a_block_outlives_its_flight() -> Iterator[None]:
    """The worker that waited for the database died, and the pipeline stays blocked."""
    return _patched(Flow, "_unblock", lambda self, pipeline, flight_id, news: None)


@mutant
def the_budget_is_ignored() -> Iterator[None]:
    """More is read than memory may hold."""
    return _patched(Flow, "allowance", lambda self, group: 1_000_000)


@mutant
def credit_is_ignored() -> Iterator[None]:
    """A worker is sent more than it has granted."""
    return _patched(Worker, "room", lambda self, pipeline: 1_000_000)


@mutant
def a_paused_pipeline_goes_on_sending() -> Iterator[None]:
    """A hold stops reading, and not dispatching."""
    return _patched(Pipeline, "may_dispatch", property(lambda self: True))


@mutant
def bytes_are_not_given_back() -> Iterator[None]:
    """What a stopped or reclaimed lane held still counts."""

    def drop(self: State, lane: Lane) -> None:
        lane.forget()

    return _patched(State, "drop", drop)


# --- the core: quarantine -------------------------------------------------------------------------------------------


@mutant
def a_death_in_the_database_phase_counts() -> Iterator[None]:
    """Whoever kills a worker while it writes puts the messages under suspicion."""
    return _patched(quarantine, "MESSAGE_PHASES", frozenset(p.Phase))


@mutant
def one_lonely_death_condemns() -> Iterator[None]:
    """A message that was alone when somebody killed its worker becomes a dead letter."""
    return _patched(quarantine, "DEATHS_TO_CONDEMN", 1)


@mutant
def a_death_in_company_condemns() -> Iterator[None]:
    """Two deaths over several messages make a dead letter of the first."""
    return _patched(Suspicion, "condemned", property(lambda self: self.deaths >= 2))


@mutant
def nobody_is_ever_condemned() -> Iterator[None]:
    """The guilty message is found, and sent again and again."""
    return _patched(Suspicion, "condemned", property(lambda self: False))


@mutant
def the_search_begins_anew_with_every_death() -> Iterator[None]:
    """What was suspected before is forgotten."""
    original = quarantine.suspect
    return _patched(quarantine, "suspect", lambda before, death: original(None, death))


@mutant
def the_search_never_halves() -> Iterator[None]:
    """All suspects travel together each time."""
    return _patched(flow, "probe_size", lambda batch, suspicion: batch.count_below(suspicion.end))


@mutant
def a_condemned_message_takes_its_neighbours_along() -> Iterator[None]:
    """The flight to the dead letters carries all that was read."""
    original = flow.probe_size

    def probe_size(batch: OpenBatch, suspicion: Suspicion) -> int:
        return batch.rows if suspicion.condemned else original(batch, suspicion)

    return _patched(flow, "probe_size", probe_size)


@mutant
def a_condemned_message_is_skipped() -> Iterator[None]:
    """The message that kills is left out, and its offset is passed without a dead letter."""
    original = OpenBatch.take_first

    def take_first(self: OpenBatch, count: int, separator: bytes, now: float) -> Any:
        taken = original(self, count, separator, now)
        guilty = count == 1 and taken[0].chunk.offsets[0].fate == "poison"  # type: ignore[attr-defined]
        return [replace(taken[0], chunk=chunk_of([]), count=0)] if guilty else taken

    return _patched(OpenBatch, "take_first", take_first)


@mutant
def a_slice_that_is_cut_loses_a_message() -> Iterator[None]:
    """Half of the suspects begins one message late."""
    original = e.Slice.split

    def split(self: e.Slice, index: int, separator: bytes) -> Any:
        first, rest = original(self, index, separator)
        return first, replace(rest, chunk=chunk_of(rest.chunk.offsets[1:]))

    return _patched(e.Slice, "split", split)


# --- the core: commands and the end ---------------------------------------------------------------------------------


@mutant
def a_drain_is_answered_at_once() -> Iterator[None]:
    """`drain` says that all is written before it is."""
    return _patched(Flow, "is_drained", lambda self, pipeline: True)


@mutant
def waiting_commands_are_forgotten_at_a_stop() -> Iterator[None]:
    """Whoever waits for a drain when the daemon stops waits for ever."""
    return _patched(Commands, "refuse_waiting", lambda self, reason: None)


@mutant
def a_stop_waits_for_what_can_not_be_written() -> Iterator[None]:
    """The deadline of a stop is not kept."""
    original = Core._wind_down

    def wind_down(self: Core) -> None:
        self._state.stop_deadline = float("inf")
        original(self)

    return _patched(Core, "_wind_down", wind_down)


@mutant
def a_stop_forgets_the_position_of_open_batches() -> Iterator[None]:
    """A pipeline's batch is cut, and the rest of it is forgotten."""
    original = OpenBatch.take

    def take(self: OpenBatch, rows: int, size_bytes: int, now: float) -> Any:
        taken = original(self, rows, size_bytes, now)
        return taken[:-1] if len(taken) > 2 else taken

    return _patched(OpenBatch, "take", take)
