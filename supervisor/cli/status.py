"""`speedlayer status` and `speedlayer lag`: what the running daemon does, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import click

from speedlayer.supervisor.cli.daemon import ask, daemon_options, example, json_option
from speedlayer.supervisor.cli.output import NOTHING, amount, duration, print_json, size, table
from speedlayer.supervisor.errors import Refused

_RIGHT = ("SLOW", "READ/S", "ROWS/S", "LAG", "ROWS", "FILTERED", "DEAD", "LAST FLUSH", "PID", "FLIGHTS", "HOLDS",
          "RESTARTS", "OLDEST", "PARTITION", "NEXT", "END")  # fmt: skip


@click.command(epilog=example("speedlayer status", "speedlayer status --json | jq .pipelines[].lag"))
@daemon_options
@json_option
def status(socket: Optional[Path], group_id: Optional[str], timeout_seconds: Optional[float], as_json: bool) -> None:
    """Show what the running daemon does, and why."""
    answer = ask("status", socket, group_id, timeout_seconds)
    if as_json:
        print_json(answer)
    else:
        click.echo(status_text(answer))


@click.command(epilog=example("speedlayer lag", "speedlayer lag orders --json"))
@click.argument("pipeline", required=False)
@daemon_options
@json_option
def lag(
    pipeline: Optional[str],
    socket: Optional[Path],
    group_id: Optional[str],
    timeout_seconds: Optional[float],
    as_json: bool,
) -> None:
    """Show how far each partition is behind."""
    answer = ask("lag", socket, group_id, timeout_seconds)
    lanes = lanes_of(answer, pipeline)
    if as_json:
        print_json({"lag": answer_lag(lanes), "lanes": lanes})
    else:
        click.echo(lag_text(lanes))


def status_text(answer: Mapping[str, Any]) -> str:
    """Lay out the answer to ``status``."""
    memory = answer["memory"]
    groups = ", ".join(answer["group_ids"])
    head = f"{answer['state']} for {duration(answer['since_seconds'])}, group {groups}, "
    head += f"{size(memory['buffered_bytes'])} of {size(memory['buffer_bytes'])} buffered"
    if answer.get("stop_reason"):
        head += f" ({answer['stop_reason']})"
    trouble = [f"! group {group}: {text}" for group, text in answer.get("consumer_trouble", {}).items()]
    return "\n".join([head, *trouble, "", _pipelines(answer), "", _workers(answer)])


def _pipelines(answer: Mapping[str, Any]) -> str:
    headings = ("PIPELINE", "STATE", "SLOW", "READ/S", "ROWS/S", "LAG", "ROWS", "FILTERED", "DEAD", "LAST FLUSH",
                "REASON")  # fmt: skip
    rows = [
        (
            pipeline["name"],
            pipeline["state"],
            f"{pipeline['slow_count']}/{pipeline['max_slow_flushes']}",
            amount(pipeline["consumed_per_second"]),
            amount(pipeline["rows_per_second"]),
            amount(pipeline["lag"]),
            amount(pipeline["rows"]),
            amount(pipeline["filtered"]),
            amount(pipeline["dead_lettered"]),
            duration(pipeline["last_flush_seconds"]),
            _reason(pipeline),
        )
        for pipeline in answer["pipelines"]
    ]
    return table(headings, rows, _RIGHT)


def _reason(pipeline: Mapping[str, Any]) -> str:
    reasons = []
    if pipeline.get("reason"):
        remaining = pipeline.get("paused_until_seconds")
        reasons.append(f"{pipeline['reason']} (resumes in {duration(remaining)})" if remaining else pipeline["reason"])
    stopped = _stopped(pipeline["lanes"])
    if stopped:
        reasons.append(f"{stopped} of {len(pipeline['lanes'])} partitions are stopped: see `speedlayer lag`")
    reasons += [
        f"{lane['topic']}/{lane['partition']} is {_quarantine(lane)}"
        for lane in pipeline["lanes"]
        if lane.get("quarantine")
    ]
    return "; ".join(reasons) or NOTHING


def _stopped(lanes: Sequence[Mapping[str, Any]]) -> int:
    return sum(lane["state"] == "stopped" for lane in lanes)


def _quarantine(lane: Mapping[str, Any]) -> str:
    found = lane.get("quarantine")
    if not found:
        return ""
    offsets = f"offsets {found['first_offset']} to {found['last_offset']}"
    return f"in quarantine: {offsets} are searched for what has killed {found['deaths']} workers ({found['how']})"


def _workers(answer: Mapping[str, Any]) -> str:
    headings = ("WORKER", "PID", "STATE", "FLIGHTS", "HOLDS", "OLDEST", "RESTARTS")
    rows = [
        (
            worker["name"],
            str(worker["pid"] or NOTHING),
            worker["state"],
            amount(worker["flights"]),
            size(worker["bytes"]),
            duration(worker.get("oldest_flight_seconds")),
            amount(worker["restarts"]),
        )
        for worker in answer["workers"]
    ]
    return table(headings, rows, _RIGHT)


def lanes_of(answer: Mapping[str, Any], pipeline: Optional[str] = None) -> list[dict[str, Any]]:
    """Return the partitions of the pipelines, each with the name of its pipeline."""
    names = [item["name"] for item in answer["pipelines"]]
    if pipeline is not None and pipeline not in names:
        raise Refused(f"there is no pipeline {pipeline!r}; there are {', '.join(names)}")
    return [
        {"pipeline": item["name"], **lane}
        for item in answer["pipelines"]
        if pipeline in (None, item["name"])
        for lane in item["lanes"]
    ]


def answer_lag(lanes: list[dict[str, Any]]) -> Optional[int]:
    """Add up what is known of the lag; None if nothing is."""
    known = [lane["lag"] for lane in lanes if lane["lag"] is not None]
    return sum(known) if known else None


def lag_text(lanes: list[dict[str, Any]]) -> str:
    """Lay out the partitions with their lag, and the sum."""
    headings = ("PIPELINE", "TOPIC", "PARTITION", "NEXT", "END", "LAG", "STATE", "REASON")
    rows = [
        (
            lane["pipeline"],
            lane["topic"],
            str(lane["partition"]),
            amount(lane["next_offset"]),
            amount(lane["high_watermark"]),
            amount(lane["lag"]),
            lane["state"],
            lane["reason"] or _quarantine(lane) or NOTHING,
        )
        for lane in lanes
    ]
    if not rows:
        return "no partition is assigned to this daemon"
    stopped = _stopped(lanes)
    but = f", and {stopped} of {len(lanes)} partitions stopped" if stopped else ""
    return f"{table(headings, rows, _RIGHT)}\n\n{amount(answer_lag(lanes))} behind in all{but}"
