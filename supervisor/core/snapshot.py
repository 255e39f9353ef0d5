"""The daemon's state as one JSON-able mapping: what `status`, the metrics and the health endpoints show (pure)."""

from __future__ import annotations

from typing import Any, Optional

from speedlayer.supervisor.core.ledger import Lane
from speedlayer.supervisor.core.pipelines import Hold, Pipeline
from speedlayer.supervisor.core.quarantine import Suspicion
from speedlayer.supervisor.core.state import State
from speedlayer.supervisor.core.watchdog import Remedy
from speedlayer.supervisor.core.workforce import Worker


def snapshot(state: State) -> dict[str, Any]:
    """Describe everything an operator may want to know. Times are seconds, sizes bytes, lags offsets."""
    return {
        "pid": state.config.pid,
        "state": state.lifecycle.value,
        "since_seconds": round(state.now - state.lifecycle_since, 3),
        "stop_reason": state.stop_reason,
        "uptime_seconds": round(state.now - state.started_at, 3),
        "group_ids": sorted({pipeline.config.group for pipeline in state.pipelines.values()}),
        "memory": {"buffer_bytes": state.config.buffer_bytes, "buffered_bytes": state.buffered_bytes},
        "consumer_trouble": state.trouble.texts(),
        "repairs": {remedy.value: state.repairs.get(remedy.value, 0) for remedy in Remedy},
        "workers": [_worker(worker, state.now) for worker in state.workforce],
        "pipelines": [_pipeline(state, pipeline) for pipeline in state.pipelines.values()],
    }


def _worker(worker: Worker, now: float) -> dict[str, Any]:
    oldest = min((flight.dispatched_at for flight in worker.flights.values()), default=None)
    return {
        "name": worker.name,
        "pid": worker.pid,
        "state": worker.state.value,
        "flights": len(worker.flights),
        "bytes": worker.size_bytes,
        "restarts": worker.restarts,
        "long_flushes": sum(flight.told_long for flight in worker.flights.values()),
        "oldest_flight_seconds": None if oldest is None else round(now - oldest, 3),
    }


def _pipeline(state: State, pipeline: Pipeline) -> dict[str, Any]:
    lanes = sorted(state.ledger.of_pipeline(pipeline.name), key=lambda lane: lane.partition)
    name, reason = _state(pipeline, lanes)
    counters, brake = pipeline.counters, pipeline.brake
    flights = state.workforce.flights_of(pipeline.name)
    lags = [lane.lag for lane in lanes]
    return {
        "name": pipeline.name,
        "group": pipeline.config.group,
        "topics": list(pipeline.config.topics),
        "state": name,
        "reason": reason,
        "holds": {why.value: text for why, text in pipeline.holds.items()},
        "slow_count": brake.slow_count,
        "max_slow_flushes": brake.max_slow_flushes,
        "overload_count": brake.overload_count,
        "paused_until_seconds": None
        if brake.pause_until is None
        else round(max(0.0, brake.pause_until - state.now), 3),
        "rows": counters.rows,
        "filtered": counters.filtered,
        "dead_lettered": counters.dead_lettered,
        "flushes": counters.flushes,
        "retries": counters.retries,
        "fenced": counters.fenced,
        "fenced_alarm": pipeline.fenced_alarm,
        "reclaims": counters.reclaims,
        "suspicious_deaths": counters.suspicious_deaths,
        "condemned": counters.condemned,
        "quarantined_lanes": sum(lane.quarantined for lane in lanes),
        "stalled_lanes": sum(bool(lane.stall) for lane in lanes),
        "last_flush_seconds": counters.last_flush_seconds,
        "buffered_bytes": pipeline.buffered_bytes,
        "assembled_rows": sum(lane.batch.rows for lane in lanes),
        "flights": len(flights),
        "in_flight_rows": sum(flight.rows for flight in flights),
        "rows_per_second": round(pipeline.written.per_second(state.now), 1),
        "consumed_per_second": round(pipeline.consumed.per_second(state.now), 1),
        "lag": sum(lag for lag in lags if lag is not None) if any(lag is not None for lag in lags) else None,
        "lanes": [_lane(lane) for lane in lanes],
    }


def _state(pipeline: Pipeline, lanes: list[Lane]) -> tuple[str, str]:
    """What holds the pipeline; where nothing does, what its claims wait for, or its flushes are tried again for."""
    name, reason = pipeline.state()
    delayed = [lane for lane in lanes if lane.claim_delay]
    if pipeline.holds:
        return name, reason
    if delayed:
        return Hold.BLOCKED.value, f"the claim of {delayed[0].partition} waits: {delayed[0].claim_delay}"
    return name, next(iter(pipeline.contended_flights.values()), reason)


def _lane(lane: Lane) -> dict[str, Any]:
    written: Optional[int] = lane.flushed if lane.has_checkpoint else None
    return {
        "topic": lane.partition.topic,
        "partition": lane.partition.partition,
        "state": lane.state.value,
        "reason": lane.reason,
        "worker": lane.worker,
        "epoch": lane.epoch,
        "next_offset": written,
        "fetched_offset": lane.expected if lane.has_checkpoint else None,
        "high_watermark": lane.high_watermark,
        "lag": lane.lag,
        "in_flight": lane.in_flight,
        "quarantine": _quarantine(lane.suspicion),
        "stall": lane.stall,
    }


def _quarantine(suspicion: Optional[Suspicion]) -> Optional[dict[str, Any]]:
    """Which messages of a lane are searched for the one that kills workers; ``last_offset`` is the last of them."""
    if suspicion is None or not suspicion.quarantined:
        return None
    return {
        "first_offset": suspicion.start,
        "last_offset": suspicion.end - 1,
        "deaths": suspicion.deaths,
        "how": suspicion.how,
    }
