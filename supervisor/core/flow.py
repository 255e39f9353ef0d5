"""The flow: what is read when, how batches become flights, where brake and budget stop it (supervisor process, pure).

A lane's open batch is ready when it holds enough rows or bytes, or is old enough. A flight takes the ready lanes of one
pipeline that are bound to one worker, and fills up with their neighbours that are not ready yet: with 500 partitions
and little traffic, one transaction each would be 500 commits.
"""

from __future__ import annotations

from typing import Optional

from speedlayer.supervisor.core.actions import ERROR, INFO, WARNING, Dispatch
from speedlayer.supervisor.core.config import CONTENDED_TOLD_ATTEMPTS, FULL_PATIENCE_SECONDS, LOW_MARK, QUIET_SECONDS
from speedlayer.supervisor.core.events import Polled, PositionMoved, Slice
from speedlayer.supervisor.core.ledger import Lane, LaneState, OpenBatch
from speedlayer.supervisor.core.pipelines import Hold, Pipeline
from speedlayer.supervisor.core.quarantine import Quarantine, probe_size
from speedlayer.supervisor.core.state import State
from speedlayer.supervisor.core.workforce import FlightPart, FlightRecord, Worker
from speedlayer.workers.errors import StreamingOverloadException
from speedlayer.workers.protocol import BlockKind, Flight, FlushBlocked, FlushFailed, FlushReport, Part


class Flow:
    """Moves messages from the lanes' open batches into flights, and judges what comes back."""

    def __init__(self, state: State, quarantine: Quarantine) -> None:
        self._state = state
        self._quarantine = quarantine

    # --- in: what was read --------------------------------------------------------------------------------------

    def polled(self, event: Polled) -> None:
        """Take in what a ``consume()`` call returned; drop what an older generation left behind."""
        state = self._state
        for lane in state.ledger.of_group(event.group):
            lane.polled_since_fenced = True
        for piece in event.slices:
            lane_or_none = state.ledger.get(piece.partition)
            if lane_or_none is not None and self._is_current(lane_or_none, piece.generation):
                self._take_in(lane_or_none, piece)

    @staticmethod
    def _is_current(lane: Lane, generation: int) -> bool:
        return lane.state is LaneState.FETCHING and lane.generation == generation

    def _take_in(self, lane: Lane, piece: Slice) -> None:
        state = self._state
        if piece.first < lane.expected or 0 <= piece.leader_epoch < lane.leader_epoch:
            state.stop_lane(
                lane,
                f"offset {piece.first} (leader epoch {piece.leader_epoch}) came where {lane.expected} or later (leader"
                f" epoch {lane.leader_epoch}) was due: the log is not the one that was read before",
            )
            return
        lane.expected = max(piece.end, piece.last + 1)
        lane.leader_epoch = max(lane.leader_epoch, piece.leader_epoch)
        lane.batch.add(piece, state.now)
        state.pipeline_of(lane).buffered_bytes += piece.size_bytes
        state.last_message_at, state.silence_told = state.now, False
        state.pipeline_of(lane).consumed.add(state.now, piece.count)

    def position_moved(self, event: PositionMoved) -> None:
        """Note that the position passed offsets without a message for us; the checkpoint follows it."""
        lane = self._state.ledger.get(event.partition)
        if lane is None or not self._is_current(lane, event.generation) or event.end <= lane.expected:
            return
        lane.expected = event.end
        if lane.batch.opened_at is None:
            lane.batch.opened_at = self._state.now

    # --- out: flights -------------------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Send flights while there is credit and something ready."""
        for pipeline in self._state.pipelines.values():
            if pipeline.may_dispatch:
                for worker in self._state.workforce.ready():
                    while self._dispatch_one(pipeline, worker):
                        pass

    def _dispatch_one(self, pipeline: Pipeline, worker: Worker) -> bool:
        room = worker.room(pipeline.name)
        if not room:
            return False
        lanes = [
            lane
            for lane in self._state.ledger.of_worker(worker.name)
            if lane.key.pipeline == pipeline.name and lane.epoch is not None and lane.batch.opened_at is not None
        ]
        for lane in lanes:
            if lane.quarantined and self._may_travel_alone(lane, pipeline, worker):
                if lane.batch.size_bytes > room and worker.flights_of(pipeline.name):
                    return False  # it goes as soon as the worker is idle
                self._send_alone(lane, pipeline, worker)
                return True
        if self._quarantine.wants_silence(worker):
            return False
        lanes = [lane for lane in lanes if not lane.quarantined]
        ready = [lane for lane in lanes if self._is_ready(lane, pipeline)]
        if not ready:
            return False
        ready.sort(key=lambda lane: lane.batch.opened_at or 0.0)
        parts = self._pack(ready + [lane for lane in lanes if lane not in ready], pipeline, worker, room)
        if parts:
            self._send(pipeline, worker, parts)
        return bool(parts)

    def _is_ready(self, lane: Lane, pipeline: Pipeline) -> bool:
        batch, config = lane.batch, pipeline.config
        if batch.rows >= config.batch_rows or batch.size_bytes >= config.batch_bytes:
            return True
        if Hold.DRAINING in pipeline.holds or Hold.STOPPING in pipeline.holds:
            return True
        return batch.opened_at is not None and self._state.now - batch.opened_at >= config.batch_seconds

    def _pack(
        self, lanes: list[Lane], pipeline: Pipeline, worker: Worker, room: int
    ) -> list[tuple[Lane, list[Slice], int]]:
        """Fill a flight from the lanes in turn, the oldest first.

        Only an idle worker gets a message that is larger than its room; the flight waits until it is idle, since
        younger messages of other lanes would keep it busy for ever.
        """
        rows, size_bytes = pipeline.config.batch_rows, min(pipeline.config.batch_bytes, room)
        packed: list[tuple[Lane, list[Slice], int]] = []
        busy = bool(worker.flights_of(pipeline.name))
        for lane in lanes:
            head = lane.batch.slices[0] if lane.batch.slices else None
            too_large = head is not None and (head.size_bytes > size_bytes or head.count > rows)
            if head is not None and too_large and packed:
                continue
            if head is not None and head.size_bytes > room and busy:
                return []
            slices = lane.batch.take(rows, size_bytes, self._state.now)
            rows -= sum(piece.count for piece in slices)
            size_bytes -= sum(piece.size_bytes for piece in slices)
            packed.append((lane, slices, self._end_of(lane, slices)))
            if rows <= 0 or size_bytes <= 0:
                break
        return packed

    @staticmethod
    def _end_of(lane: Lane, slices: list[Slice]) -> int:
        """Where a part ends: without a message left behind at the position itself, past compaction and the like."""
        return lane.expected if not lane.batch.slices else max(slices[-1].end, slices[-1].last + 1)

    # --- out: quarantine ----------------------------------------------------------------------------------------

    def _may_travel_alone(self, lane: Lane, pipeline: Pipeline, worker: Worker) -> bool:
        """Whether the next suspects of a quarantined lane can go: one flight at a time, and what was read of them."""
        suspicion = lane.suspicion
        assert suspicion is not None
        if lane.in_flight or not (lane.expected >= suspicion.end or self._is_ready(lane, pipeline)):
            return False
        return not suspicion.needs_silence or self._quarantine.is_silent(worker)

    def _send_alone(self, lane: Lane, pipeline: Pipeline, worker: Worker) -> None:
        """Send the next suspects, or the condemned message, and nothing else."""
        state, suspicion, config = self._state, lane.suspicion, pipeline.config
        assert suspicion is not None
        count = probe_size(lane.batch, suspicion)
        if count:
            slices = lane.batch.take_first(min(count, config.batch_rows), state.config.separator, state.now)
        else:
            slices = lane.batch.take(config.batch_rows, config.batch_bytes, state.now)
        found = suspicion.condemned and count and slices[0].first >= suspicion.start
        packed = [(lane, slices, self._end_of(lane, slices))]
        self._send(pipeline, worker, packed, suspicion.verdict if found else None)

    def _send(
        self,
        pipeline: Pipeline,
        worker: Worker,
        packed: list[tuple[Lane, list[Slice], int]],
        condemned: Optional[str] = None,
    ) -> None:
        state = self._state
        parts, notes = [], []
        rows = size_bytes = 0
        for lane, slices, end in packed:
            assert lane.epoch is not None
            chunks = [piece.chunk for piece in slices]
            # Of the last message in the part: what was read and left behind may be of a later one.
            leader_epoch = slices[-1].leader_epoch if slices else lane.leader_epoch
            parts.append(Part(lane.key, lane.epoch, lane.owner, lane.dispatched, end, leader_epoch, chunks))
            messages = sum(piece.count for piece in slices)
            first, last = (slices[0].first, slices[-1].last) if slices else (end, end)
            notes.append(FlightPart(lane.partition, lane.claim_id, lane.dispatched, end, messages, first, last))
            lane.dispatched = end
            lane.in_flight += 1
            rows += messages
            size_bytes += sum(piece.size_bytes for piece in slices)
        flight_id = state.number()
        worker.flights[flight_id] = FlightRecord(
            flight_id,
            pipeline.name,
            worker.name,
            tuple(notes),
            rows,
            size_bytes,
            state.now,
            condemned=condemned is not None,
        )
        flight = Flight(flight_id, pipeline.name, state.config.separator, parts, condemned)
        state.act(Dispatch(worker.name, flight))

    # --- back: reports ------------------------------------------------------------------------------------------

    def flushed(self, worker: Worker, report: FlushReport) -> list[Lane]:
        """Take note of a committed flight; returns the lanes that were fenced in it."""
        record = self._landed(worker, report.flight_id, "its sink takes rows again")
        if record is None:
            return []
        worker.showed_life()
        fenced = self._advance(record, frozenset(report.fenced))
        pipeline = self._state.pipelines[record.pipeline]
        self._count(pipeline, report)
        if record.condemned:
            pipeline.counters.condemned += report.dead_lettered
        self._judge(pipeline, report)
        return fenced

    def _landed(self, worker: Worker, flight_id: int, news: str) -> Optional[FlightRecord]:
        record = worker.flights.pop(flight_id, None)
        if record is None:
            return None
        pipeline = self._state.pipelines[record.pipeline]
        pipeline.buffered_bytes -= record.size_bytes
        self._unblock(pipeline, flight_id, news)
        return record

    def _advance(self, record: FlightRecord, fenced: frozenset[int]) -> list[Lane]:
        """Move the lanes on. A report of a flight before the last claim says nothing about the lane as it is now."""
        lost: list[Lane] = []
        for index, part in enumerate(record.parts):
            lane = self._state.ledger.get(part.partition)
            if lane is None or lane.claim_id != part.claim_id:
                continue
            lane.in_flight -= 1
            if index in fenced:
                lost.append(lane)
            else:
                lane.flushed, lane.fenced_in_a_row, lane.uncommitted = part.end, 0, True
                lane.check_at = self._state.now + QUIET_SECONDS if part.end > part.start else None
                self._quarantine.written(lane)
        return lost

    def _count(self, pipeline: Pipeline, report: FlushReport) -> None:
        now, counters = self._state.now, pipeline.counters
        counters.rows += report.rows
        counters.filtered += report.filtered
        counters.dead_lettered += report.dead_lettered
        messages = report.rows + report.filtered + report.dead_lettered
        if not messages:
            return  # nothing but positions moved, or everything was fenced: no flush that tells of the sink's speed
        counters.flushes += 1
        counters.last_flush_seconds = report.duration_seconds
        pipeline.written.add(now, report.rows)
        pipeline.dead_letters.add(now, messages, report.dead_lettered)

    def _judge(self, pipeline: Pipeline, report: FlushReport) -> None:
        if not report.rows + report.filtered + report.dead_lettered:
            return
        try:
            pipeline.brake.observe(report.duration_seconds)
        except StreamingOverloadException as error:
            self.handle_overload(pipeline, error)
        if pipeline.too_many_dead_letters():
            self._stop_for_dead_letters(pipeline)

    def handle_overload(self, pipeline: Pipeline, error: StreamingOverloadException) -> None:
        """Pull the brake: no new batch is read or sent until the pause is over and the worker queues have drained."""
        state = self._state
        if not pipeline.brake.handle_overload(error, state.now):
            return
        pipeline.hold(Hold.OVERLOAD, str(error))
        state.log(
            WARNING,
            f"pipeline {pipeline.name} is overloaded (no. {pipeline.brake.overload_count}): {error}; reading pauses for"
            f" {error.pause_seconds:g} s while the worker queues drain",
            pipeline=pipeline.name,
            overload_count=pipeline.brake.overload_count,
            pause_seconds=error.pause_seconds,
        )

    def _stop_for_dead_letters(self, pipeline: Pipeline) -> None:
        window = pipeline.dead_letters
        reason = (
            f"{window.dead} of {window.messages} messages in {window.seconds:g} s became dead letters (limit"
            f" {pipeline.config.dead_letter_ratio:.0%}); look at speedlayer.dead_letters, mend the cause, then"
            f" speedlayer resume"
        )
        if pipeline.hold(Hold.DEAD_LETTERS, reason):
            self._state.log(ERROR, f"pipeline {pipeline.name} is stopped: {reason}", pipeline=pipeline.name)

    def failed(self, worker: Worker, report: FlushFailed) -> None:
        """The worker no longer has the batch, and what became of it is not known: claim again."""
        record = self._landed(worker, report.flight_id, "the batch that waited is given up, and read again")
        if record is None:
            return
        self._state.log(
            WARNING,
            f"a flush of pipeline {record.pipeline} ended {report.kind.value}: {report.reason};"
            " its partitions are claimed again and go on from what is committed",
            pipeline=record.pipeline,
            sqlstate=report.sqlstate,
        )
        self.give_up(record, report.reason)

    def give_up(self, record: FlightRecord, reason: str) -> None:
        """Claim the lanes of a flight again."""
        for part in record.parts:
            lane = self._state.ledger.get(part.partition)
            if lane is not None and lane.claim_id == part.claim_id:
                self._state.pipeline_of(lane).counters.reclaims += 1
                self._state.reclaim(lane, reason)

    def blocked(self, worker: Worker, report: FlushBlocked) -> None:
        """A flight could not be written now; the worker keeps it and tries again."""
        record = worker.flights.get(report.flight_id)
        if record is None:
            return
        pipeline = self._state.pipelines[record.pipeline]
        pipeline.counters.retries += 1  # as they happen: the report of a flush names the same ones once more
        if report.kind is BlockKind.OVERLOADED:
            self.handle_overload(pipeline, StreamingOverloadException(report.reason, report.retry_seconds))
        elif report.kind is BlockKind.CONTENDED:
            self._note_contention(pipeline, report)
        else:
            self._block(pipeline, report)

    def _note_contention(self, pipeline: Pipeline, report: FlushBlocked) -> None:
        """Contention is counted, and told apart from slowness: no brake. When it lasts, the operator is told."""
        if report.attempt < CONTENDED_TOLD_ATTEMPTS:
            return
        if not pipeline.contended_flights:
            message = f"a flush of pipeline {pipeline.name} is tried again and again: {report.reason}"
            self._state.log(WARNING, message, pipeline=pipeline.name, attempt=report.attempt, sqlstate=report.sqlstate)
        pipeline.contended_flights[report.flight_id] = f"contended, attempt {report.attempt}: {report.reason}"

    def _block(self, pipeline: Pipeline, report: FlushBlocked) -> None:
        reason = f"{report.kind.value}: {report.reason}" + (f" — {report.remedy}" if report.remedy else "")
        pipeline.blocked_flights[report.flight_id] = reason
        if pipeline.hold(Hold.BLOCKED, reason):
            self._state.log(
                WARNING,
                f"pipeline {pipeline.name} waits, its batches are kept: {reason}",
                pipeline=pipeline.name,
                sqlstate=report.sqlstate,
            )

    def _unblock(self, pipeline: Pipeline, flight_id: int, news: str) -> None:
        pipeline.contended_flights.pop(flight_id, None)
        if pipeline.blocked_flights.pop(flight_id, None) is None or pipeline.blocked_flights:
            return
        pipeline.release(Hold.BLOCKED)
        self._state.log(INFO, f"pipeline {pipeline.name} goes on: {news}", pipeline=pipeline.name)

    def lost_with(self, worker: Worker) -> None:
        """A worker died: its flights' fate is not known, and its credit is void."""
        for record in list(worker.flights.values()):
            self._landed(worker, record.flight_id, f"{worker.name} died, and what it kept is read again")
            self.give_up(record, f"{worker.name} died")
        for lane in self._state.ledger.of_worker(worker.name):
            self._state.reclaim(lane, f"{worker.name} died")

    # --- reading or not -----------------------------------------------------------------------------------------

    def regulate(self) -> None:
        """Bring every lane to where it should be: read, or held, for the reasons that hold now."""
        state = self._state
        for pipeline in state.pipelines.values():
            self._end_overload(pipeline)
            self._regulate_memory(pipeline)
        for lane in state.ledger:
            pipeline = state.pipeline_of(lane)
            if lane.state is LaneState.HELD and pipeline.may_fetch and state.running and self._lane_may_fetch(lane):
                state.fetch(lane)
            elif lane.state is LaneState.FETCHING and not pipeline.may_fetch:
                state.hold(lane, pipeline.state()[1])
            self._check_if_quiet(lane)

    def _check_if_quiet(self, lane: Lane) -> None:
        """Open an empty batch for a lane that has been quiet since its last flush: the flight sees its checkpoint."""
        due = lane.check_at is not None and self._state.now >= lane.check_at
        if due and lane.in_flight == 0 and lane.batch.opened_at is None and self._state.running:
            lane.check_at, lane.batch.opened_at = None, self._state.now

    @staticmethod
    def _lane_may_fetch(lane: Lane) -> bool:
        return lane.seek is None and not lane.moving

    def _end_overload(self, pipeline: Pipeline) -> None:
        if Hold.OVERLOAD not in pipeline.holds:
            return
        drained = self._state.workforce.queues_drained(pipeline.name)
        if not pipeline.brake.should_pause(self._state.now, drained):
            pipeline.release(Hold.OVERLOAD)
            self._state.log(
                INFO,
                f"pipeline {pipeline.name} resumes: the pause is over, the queues are drained",
                pipeline=pipeline.name,
            )

    def _regulate_memory(self, pipeline: Pipeline) -> None:
        state, share = self._state, self._state.config.share_bytes
        held = pipeline.buffered_bytes
        if Hold.MEMORY in pipeline.holds:
            if held < share * LOW_MARK:
                pipeline.release(Hold.MEMORY)
                pipeline.full_since = None
        elif held < share:
            pipeline.full_since = None
        elif pipeline.full_since is None:
            pipeline.full_since = state.now
        if pipeline.full_since is not None and state.now - pipeline.full_since >= self._patience(pipeline):
            pipeline.hold(Hold.MEMORY, f"{held} bytes are read and not written; its share is {share}")

    def _patience(self, pipeline: Pipeline) -> float:
        """A group with one pipeline just does not poll for messages for a while; among several, only the full one must
        be let go.
        """
        alone = sum(other.config.group == pipeline.config.group for other in self._state.pipelines.values()) == 1
        return FULL_PATIENCE_SECONDS if alone else 0.0

    def allowance(self, group: str) -> int:
        """Bytes that may be read now for a group."""
        state = self._state
        share = state.config.share_bytes
        rooms = [
            share - pipeline.buffered_bytes
            for pipeline in state.pipelines.values()
            if pipeline.config.group == group and Hold.MEMORY not in pipeline.holds
        ]
        return max(0, min(rooms, default=share))

    def hold_all(self, why: Hold, reason: str) -> None:
        """Hold every pipeline, for a stop."""
        for pipeline in self._state.pipelines.values():
            pipeline.hold(why, reason)

    def is_drained(self, pipeline: Pipeline) -> bool:
        """Whether everything that was read is written."""
        if self._state.workforce.flights_of(pipeline.name):
            return False
        return not any(
            lane.batch.slices or lane.position_moved for lane in self._state.ledger.of_pipeline(pipeline.name)
        )

    def is_at_rest(self, pipeline: Pipeline) -> bool:
        """Whether nothing is in flight, and what was read is written or can not be written now."""
        if not pipeline.may_dispatch:
            return not self._state.workforce.flights_of(pipeline.name)
        return self.is_drained(pipeline)

    def drop_batches(self, pipeline: Pipeline) -> None:
        """Forget what was read and not sent: it will be read again."""
        for lane in self._state.ledger.of_pipeline(pipeline.name):
            pipeline.buffered_bytes -= lane.batch.size_bytes
            lane.batch = OpenBatch()
            lane.expected = lane.dispatched
