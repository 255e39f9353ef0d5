"""Why no message comes: the sentence that a daemon owes its operator after ten quiet seconds (supervisor, pure)."""

from __future__ import annotations

from speedlayer.supervisor.core.ledger import LaneState
from speedlayer.supervisor.core.pipelines import Pipeline
from speedlayer.supervisor.core.state import State


def why_silent(state: State, pipeline: Pipeline) -> str:
    """Explain the silence of one pipeline, the nearest cause first."""
    lanes = state.ledger.of_pipeline(pipeline.name)
    name, reason = pipeline.state()
    trouble = state.trouble.of(pipeline.config.group)
    if pipeline.holds:
        return f"it is held ({name}): {reason}"
    if not lanes:
        known = f"; Kafka says: {trouble}" if trouble else ""
        return f"no partition of {', '.join(pipeline.config.topics)} is assigned to this daemon{known}"
    stopped = [lane for lane in lanes if lane.state is LaneState.STOPPED]
    if len(stopped) == len(lanes):
        return f"every partition is stopped, the first because {stopped[0].reason}"
    waiting = [lane for lane in lanes if lane.state not in (LaneState.FETCHING, LaneState.STOPPED)]
    if waiting:
        return f"{waiting[0].partition} is {waiting[0].state.value}: {waiting[0].reason}"
    if trouble:
        return f"Kafka says: {trouble}"
    if all(lane.high_watermark is not None and lane.high_watermark == lane.low_watermark for lane in lanes):
        return "the topic is empty"
    if all(lane.high_watermark is not None and lane.expected >= lane.high_watermark for lane in lanes):
        return f"the end of the topic is reached; {_what_is_written(state, pipeline)}"
    return "the broker sends nothing, although there is something to read"


def _what_is_written(state: State, pipeline: Pipeline) -> str:
    if all(lane.flushed >= lane.expected for lane in state.ledger.of_pipeline(pipeline.name)):
        return "everything is written"
    flights = state.workforce.flights_of(pipeline.name)
    longest = max((state.now - flight.dispatched_at for flight in flights), default=0.0)
    return f"what was read is still being written, for {longest:.0f} s now"
