"""Why no message comes, in words that are true."""

from __future__ import annotations

from speedlayer.supervisor.core import events as e
from speedlayer.supervisor.core.config import CoreConfig, PipelineConfig
from speedlayer.supervisor.core.ledger import Lane, LaneState
from speedlayer.supervisor.core.silence import why_silent
from speedlayer.supervisor.core.state import State
from speedlayer.supervisor.core.workforce import FlightRecord
from speedlayer.workers.protocol import LaneKey


def test_only_what_is_written_is_called_written() -> None:
    pipeline = PipelineConfig("orders", "group", ("orders",))
    state = State.new(CoreConfig((pipeline,), workers=1, buffer_bytes=1 << 20, owner="us", separator=b",", pid=1), 0)
    lane = Lane(e.Partition("group", "orders", 0), LaneKey("cluster", "group", "orders", "orders", 0))
    lane.begin_at(0)
    lane.state = LaneState.FETCHING
    lane.low_watermark, lane.high_watermark, lane.expected, lane.dispatched = 0, 100, 100, 100
    state.ledger.add(lane)
    worker = state.workforce["worker-0"]
    worker.flights[1] = FlightRecord(1, "orders", "worker-0", (), rows=100, size_bytes=10, dispatched_at=3.0)
    state.now = 15.0
    told = why_silent(state, state.pipelines["orders"])
    assert "everything is written" not in told
    assert "still being written, for 12 s" in told

    worker.flights.clear()
    lane.flushed = 100
    assert "everything is written" in why_silent(state, state.pipelines["orders"])
