"""What the core counts of the flow; which histories are possible is the simulator's business."""

from __future__ import annotations

import pytest

from speedlayer.supervisor.core import events as e
from speedlayer.supervisor.core.config import CONTENDED_TOLD_ATTEMPTS, CoreConfig, PipelineConfig
from speedlayer.supervisor.core.core import Core
from speedlayer.supervisor.core.workforce import FlightRecord
from speedlayer.workers.protocol import BlockKind, FlushBlocked, FlushReport


@pytest.mark.parametrize("kind", list(BlockKind))
def test_a_flush_that_is_tried_again_is_counted_once_for_each_time(kind: BlockKind) -> None:
    pipeline = PipelineConfig("orders", "group", ("orders",))
    core = Core(CoreConfig((pipeline,), workers=1, buffer_bytes=1 << 20, owner="us", separator=b",", pid=1))
    core.step([e.Started(0.0)])
    worker = core.state.workforce["worker-0"]
    worker.flights[7] = FlightRecord(7, "orders", worker.name, (), rows=3, size_bytes=0, dispatched_at=0.0)
    blocked = [FlushBlocked(7, "orders", kind, "why", "remedy", None, 0.1, attempt) for attempt in (1, 2)]
    flushed = FlushReport(7, "orders", 0.1, 0.5, rows=3, filtered=0, dead_lettered=0, retries=2, fenced=[])
    core.step([e.Reported(1.0, worker.name, worker.incarnation, report) for report in (*blocked, flushed)])
    assert core.snapshot()["pipelines"][0]["retries"] == 2


def test_contention_that_lasts_is_told_with_its_reason_and_ends_with_the_flush() -> None:
    pipeline = PipelineConfig("orders", "group", ("orders",))
    core = Core(CoreConfig((pipeline,), workers=1, buffer_bytes=1 << 20, owner="us", separator=b",", pid=1))
    core.step([e.Started(0.0)])
    worker = core.state.workforce["worker-0"]
    worker.flights[7] = FlightRecord(7, "orders", worker.name, (), rows=3, size_bytes=0, dispatched_at=0.0)

    def reason_after(attempt: int) -> str:
        blocked = FlushBlocked(7, "orders", BlockKind.CONTENDED, "deadlock", "", "40P01", 0.1, attempt)
        core.step([e.Reported(1.0, worker.name, worker.incarnation, blocked)])
        shown = core.snapshot()["pipelines"][0]
        assert shown["state"] == "running"
        return str(shown["reason"])

    assert reason_after(CONTENDED_TOLD_ATTEMPTS - 1) == ""
    assert "deadlock" in reason_after(CONTENDED_TOLD_ATTEMPTS)
    flushed = FlushReport(7, "orders", 0.1, 0.5, rows=3, filtered=0, dead_lettered=0, retries=5, fenced=[])
    core.step([e.Reported(2.0, worker.name, worker.incarnation, flushed)])
    assert core.snapshot()["pipelines"][0]["reason"] == ""
