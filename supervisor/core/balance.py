"""Which worker gets which lane, and evening it out again after a restart (supervisor process, pure).

A lane stays with the worker that claimed it: its flights must be written in order, and its checkpoint names that
worker's backend. So when a worker died, its lanes went to the others; once it is back, some return to it. A lane moves
at rest: it is held until everything that was read of it is written, and then claimed by the other worker.
"""

from __future__ import annotations

from speedlayer.supervisor.core.config import BALANCE_INTERVAL_SECONDS
from speedlayer.supervisor.core.ledger import Lane, LaneState
from speedlayer.supervisor.core.pipelines import Pipeline
from speedlayer.supervisor.core.quarantine import Quarantine
from speedlayer.supervisor.core.state import State
from speedlayer.supervisor.core.workforce import Worker, WorkerState


class Balance:
    """Spreads each pipeline's lanes over the workers."""

    def __init__(self, state: State, quarantine: Quarantine) -> None:
        self._state = state
        self._quarantine = quarantine
        self._evened_at = 0.0

    def worker_for(self, lane: Lane) -> Worker | None:
        """Choose the worker that claims a lane: the one with the fewest lanes of its pipeline, then of all.

        A quarantined lane waits for its ward, and the others avoid it: it is going to die.
        """
        workforce = self._state.workforce
        # At the very first start claims go into the queues of workers that still boot, too: otherwise the one that is
        # ready first would get them all. A worker that starts again is not waited for.
        able = [
            worker
            for worker in workforce
            if worker.state is WorkerState.READY or (worker.state is WorkerState.STARTING and worker.incarnation == 1)
        ]
        if lane.suspicion is not None and lane.suspicion.quarantined:
            ward = lane.suspicion.ward
            able = [worker for worker in able if worker.name == ward]
        else:
            able = [worker for worker in able if not self._quarantine.is_dangerous(worker)] or able
        pipeline = lane.key.pipeline
        return min(able, key=lambda worker: (self._count(worker, pipeline), self._count(worker)), default=None)

    def _count(self, worker: Worker, pipeline: str | None = None) -> int:
        return sum(pipeline in (None, lane.key.pipeline) for lane in self._state.ledger.of_worker(worker.name))

    def even_out(self) -> None:
        """Let lanes that have come to rest go, and choose further ones to move."""
        state = self._state
        for lane in state.ledger:
            if lane.moving and lane.state is LaneState.HELD and not lane.in_flight and not lane.batch.slices:
                state.reclaim(lane, "moves to a worker with fewer partitions")
        if state.now - self._evened_at < BALANCE_INTERVAL_SECONDS:
            return
        self._evened_at = state.now
        for pipeline in state.pipelines.values():
            if pipeline.may_fetch:
                self._choose(pipeline)

    def _choose(self, pipeline: Pipeline) -> None:
        state = self._state
        ready = [worker for worker in state.workforce.ready() if not self._quarantine.is_dangerous(worker)]
        if len(ready) < 2 or any(lane.moving for lane in state.ledger.of_pipeline(pipeline.name)):
            return
        most = max(ready, key=lambda worker: self._count(worker, pipeline.name))
        fewest = min(ready, key=lambda worker: self._count(worker, pipeline.name))
        surplus = (self._count(most, pipeline.name) - self._count(fewest, pipeline.name)) // 2
        settled = [
            lane
            for lane in state.ledger.of_worker(most.name)
            if lane.key.pipeline == pipeline.name and lane.state in (LaneState.FETCHING, LaneState.HELD)
        ]
        for lane in settled[:surplus]:
            lane.moving = True
            state.hold(lane, f"to be moved to {fewest.name}, which has fewer partitions")
