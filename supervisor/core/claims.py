"""From assignment to the first fetch: claim, inspect, seed (supervisor process, pure).

The claim raises the lane's epoch in the database, which fences every flight of an earlier owner, and returns where its
rows end. The broker is then asked whether that offset still means what it meant: the same topic, still in the log.
Where there is no checkpoint the start is written before the first fetch, since otherwise a crash before the first flush
would move "latest".
"""

from __future__ import annotations

from typing import Optional

from speedlayer.supervisor.core.actions import ERROR, INFO, WARNING, Inspect, SendClaim, SendSeed
from speedlayer.supervisor.core.balance import Balance
from speedlayer.supervisor.core.config import (
    FENCED_ALARM_COUNT,
    FENCED_ALARM_WINDOW_SECONDS,
    FENCED_BACKOFF_LIMIT_SECONDS,
    FENCED_BACKOFF_SECONDS,
    INSPECT_RETRY_SECONDS,
    QUIET_SECONDS,
)
from speedlayer.supervisor.core.events import Assigned, Inspected, Partition
from speedlayer.supervisor.core.ledger import Lane, LaneState
from speedlayer.supervisor.core.pipelines import Pipeline
from speedlayer.supervisor.core.quarantine import Quarantine
from speedlayer.supervisor.core.state import State
from speedlayer.supervisor.core.workforce import Worker
from speedlayer.workers.protocol import Claim, Claimed, Fenced, LaneKey, Seed


class Claims:
    """Takes lanes from `PENDING` to `HELD`, from where they are fetched."""

    def __init__(self, state: State, balance: Balance, quarantine: Quarantine) -> None:
        self._state = state
        self._balance = balance
        self._quarantine = quarantine
        self._routes = {
            (pipeline.config.group, topic): pipeline
            for pipeline in state.pipelines.values()
            for topic in pipeline.config.topics
        }

    # --- assignment ---------------------------------------------------------------------------------------------

    def assigned(self, event: Assigned) -> None:
        """Own the partitions, as pending."""
        state = self._state
        for partition in event.partitions:
            pipeline = self._routes[(partition.group, partition.topic)]
            key = LaneKey(event.cluster, partition.group, pipeline.name, partition.topic, partition.partition)
            if state.ledger.get(partition) is None:
                state.ledger.add(Lane(partition, key, since=state.now, reason="assigned"))
        state.log(INFO, f"assigned {len(event.partitions)} partitions", partitions=_names(event.partitions))

    def revoked(self, partitions: tuple[Partition, ...], lost: bool) -> None:
        """Disown partitions. What is in flight either commits before the next owner's claim, or is fenced by it."""
        state = self._state
        for partition in partitions:
            lane = state.ledger.remove(partition)
            if lane is not None:
                state.drop(lane)
        how = "lost" if lost else "revoked"
        state.log(WARNING if lost else INFO, f"{how} {len(partitions)} partitions", partitions=_names(partitions))

    # --- claim --------------------------------------------------------------------------------------------------

    def send_due(self) -> None:
        """Send the claims of pending lanes, and ask again what the broker did not answer."""
        state = self._state
        for lane in state.ledger:
            if lane.state is LaneState.PENDING and self._may_claim(lane):
                worker = self._balance.worker_for(lane)
                if worker is not None:
                    self._send(lane, worker)
            elif lane.inspect_not_before is not None and state.now >= lane.inspect_not_before:
                self._inspect(lane)

    def _may_claim(self, lane: Lane) -> bool:
        # A lane that was fenced is claimed again only after a successful poll: only that shows we are in the group.
        return self._state.now >= lane.claim_not_before and lane.polled_since_fenced

    def _send(self, lane: Lane, worker: Worker) -> None:
        state = self._state
        lane.move(LaneState.CLAIMING, state.now, f"claim sent to {worker.name}")
        lane.claim_id, lane.worker = state.number(), worker.name
        lane.owner = f"{state.config.owner}.{lane.claim_id}"
        state.act(SendClaim(worker.name, Claim(lane.claim_id, lane.key, lane.owner)))

    def claimed(self, report: Claimed) -> None:
        """A claim or a seed came back. One that is not the lane's latest is of no consequence."""
        lane = self._lane_of(report.lane, report.claim_id)
        if lane is None:
            return
        lane.epoch = report.epoch
        lane.leader_epoch = report.leader_epoch
        lane.has_checkpoint = report.next_offset is not None
        if report.next_offset is not None:
            lane.begin_at(report.next_offset)
            self._quarantine.written(lane)
            lane.check_at = self._state.now + QUIET_SECONDS
        if lane.state is LaneState.SEEDING:
            lane.topic_id, lane.seek = report.topic_id, None
            lane.move(LaneState.HELD, self._state.now, "about to be read")
            return
        lane.topic_id = report.topic_id
        lane.move(LaneState.INSPECTING, self._state.now, "the broker is asked for the topic's id and range")
        self._inspect(lane)

    def seed_fenced(self, report: Fenced) -> None:
        """A seed found another owner."""
        lane = self._lane_of(report.lane, report.claim_id)
        if lane is not None:
            self.fenced(lane)

    def fenced(self, lane: Lane) -> None:
        """Somebody else has claimed the lane: back off, and claim again only while it is still assigned to us."""
        state = self._state
        pipeline = state.pipeline_of(lane)
        pipeline.counters.fenced += 1
        delay = min(FENCED_BACKOFF_LIMIT_SECONDS, FENCED_BACKOFF_SECONDS * 2**lane.fenced_in_a_row)
        lane.fenced_in_a_row += 1
        lane.polled_since_fenced = False
        state.reclaim(lane, "fenced: another owner has claimed it", state.now + state.jitter(delay))
        state.log(
            WARNING, f"{lane.partition} was fenced by another owner; nothing was written", **state.fields_of(lane)
        )
        self._alarm_if_often(pipeline)

    def _alarm_if_often(self, pipeline: Pipeline) -> None:
        now = self._state.now
        pipeline.fenced_at.append(now)
        while pipeline.fenced_at[0] < now - FENCED_ALARM_WINDOW_SECONDS:
            pipeline.fenced_at.popleft()
        often = len(pipeline.fenced_at) >= FENCED_ALARM_COUNT
        if often and not pipeline.fenced_alarm:
            self._state.log(
                ERROR,
                f"pipeline {pipeline.name} is fenced again and again: do two daemons outside one consumer group"
                " write the same checkpoints?",
                pipeline=pipeline.name,
                fenced=len(pipeline.fenced_at),
            )
        pipeline.fenced_alarm = often

    # --- inspect ------------------------------------------------------------------------------------------------

    def _inspect(self, lane: Lane) -> None:
        state = self._state
        lane.inspect_request, lane.inspect_not_before = state.number(), None
        timestamp = lane.seek.timestamp_ms if lane.seek is not None else None
        state.act(Inspect(lane.partition, lane.inspect_request, not lane.has_checkpoint, timestamp))

    def inspected(self, event: Inspected) -> None:
        """The broker has answered; decide where to go on."""
        state = self._state
        lane = state.ledger.get(event.partition)
        if lane is None or lane.state is not LaneState.INSPECTING or lane.inspect_request != event.request:
            return
        if event.error is not None:
            lane.reason = f"the broker does not tell the topic's state: {event.error}"
            lane.inspect_not_before = state.now + state.jitter(INSPECT_RETRY_SECONDS)
            return
        lane.low_watermark, lane.high_watermark = event.low, event.high
        if lane.seek is not None:
            self._seed_seek(lane, event)
        elif not lane.has_checkpoint:
            self._seed_first(lane, event)
        elif lane.topic_id and event.topic_id and lane.topic_id != event.topic_id:
            self.stop_recreated(lane, event.topic_id)
        else:
            self._check_range(lane, event)

    def _seed_seek(self, lane: Lane, event: Inspected) -> None:
        seek = lane.seek
        assert seek is not None
        if seek.offset is not None:
            start = seek.offset
        elif seek.timestamp_ms is not None:
            start = event.target if event.target is not None else event.high
        else:
            start = event.low if seek.edge == "earliest" else event.high
        start = min(max(start, event.low), event.high)
        self._seed(lane, start, event.topic_id, f"operator sought {seek}")

    def _seed_first(self, lane: Lane, event: Inspected) -> None:
        state = self._state
        if event.committed_by_us:
            state.stop_lane(
                lane,
                f"the group's own commit says {event.committed}, and there is no checkpoint: was the schema dropped, or"
                " a backup restored, or the pipeline renamed? Say where to go on: speedlayer offsets seek",
                committed=event.committed,
            )
            return
        start, setting = event.committed, state.pipeline_of(lane).config.start
        if start is None and setting == "error":
            state.stop_lane(
                lane, 'there is no checkpoint, and start = "error". Say where to begin: speedlayer offsets seek'
            )
            return
        if start is None:
            start = event.low if setting == "earliest" else event.high
        if start < event.low or start > event.high:
            self._out_of_range(lane, start, event)
        else:
            self._seed(lane, start, event.topic_id)

    def _check_range(self, lane: Lane, event: Inspected) -> None:
        if lane.expected < event.low or lane.expected > event.high:
            self._out_of_range(lane, lane.expected, event)
        elif event.topic_id and not lane.topic_id:
            self._seed(lane, lane.expected, event.topic_id)  # the first broker to tell an id: remember it
        else:
            lane.topic_id = event.topic_id or lane.topic_id
            lane.move(LaneState.HELD, self._state.now, "about to be read")

    def _out_of_range(self, lane: Lane, start: int, event: Inspected) -> None:
        state = self._state
        if start > event.high:
            state.stop_lane(
                lane,
                f"offset {start} is beyond the end of the log ({event.high}): was the topic made again, or truncated?"
                " Say where to go on: speedlayer offsets seek",
            )
        elif state.pipeline_of(lane).config.on_out_of_range == "skip":
            self._seed(lane, event.low, event.topic_id, f"retention removed offsets {start} to {event.low - 1}")
        else:
            state.stop_lane(
                lane,
                f"offsets {start} to {event.low - 1} ({event.low - start} of them) are gone from the log, removed by"
                ' retention. Go on with speedlayer offsets seek, or set on_out_of_range = "skip"',
                gap_start=start,
                gap_end=event.low,
            )

    def stop_recreated(self, lane: Lane, topic_id: Optional[str]) -> None:
        """The topic is another one under the same name: its offsets mean nothing to our checkpoint."""
        self._state.stop_lane(
            lane,
            f"topic {lane.partition.topic} was deleted and made again (id {lane.topic_id}, now {topic_id}); offset"
            f" {lane.expected} of the old one means nothing in it. Say where to go on: speedlayer offsets seek",
        )

    # --- seed ---------------------------------------------------------------------------------------------------

    def _seed(self, lane: Lane, start: int, topic_id: Optional[str], gap_reason: Optional[str] = None) -> None:
        state = self._state
        assert lane.worker is not None and lane.epoch is not None
        lane.move(LaneState.SEEDING, state.now, f"offset {start} is being written as the start")
        lane.claim_id = state.number()
        expected = lane.flushed if lane.has_checkpoint else None
        if gap_reason is not None:
            state.log(WARNING, f"{lane.partition} goes on at offset {start}: {gap_reason}", **state.fields_of(lane))
        seed = Seed(lane.claim_id, lane.key, lane.owner, lane.epoch, expected, start, topic_id, gap_reason)
        state.act(SendSeed(lane.worker, seed))

    def _lane_of(self, key: LaneKey, claim_id: int) -> Optional[Lane]:
        lane = self._state.ledger.get(Partition(key.group, key.topic, key.partition))
        if lane is None or lane.claim_id != claim_id or lane.key != key:
            return None
        return lane


def _names(partitions: tuple[Partition, ...]) -> str:
    return ", ".join(str(partition) for partition in sorted(partitions)[:20]) + (" …" if len(partitions) > 20 else "")
