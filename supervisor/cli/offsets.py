"""`speedlayer offsets show` and `speedlayer offsets seek`: where the rows end in PostgreSQL, and how to move that."""

from __future__ import annotations

import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Optional, Union

import click

from speedlayer.supervisor.cli.daemon import ask, daemon_options, example, json_option
from speedlayer.supervisor.cli.output import NOTHING, amount, print_json, table
from speedlayer.supervisor.cli.status import lanes_of

# A seek waits for the flights of its partitions, and for a claim and a question to the broker each.
SEEK_TIMEOUT_SECONDS = 60.0


@click.group()
def offsets() -> None:
    """Show the offsets in PostgreSQL, or move them."""


@offsets.command(epilog=example("speedlayer offsets show", "speedlayer offsets show orders --json"))
@click.argument("pipeline", required=False)
@daemon_options
@json_option
def show(
    pipeline: Optional[str],
    socket: Optional[Path],
    group_id: Optional[str],
    timeout_seconds: Optional[float],
    as_json: bool,
) -> None:
    """Show up to which offset each partition is in PostgreSQL, and up to which it is read."""
    lanes = lanes_of(ask("status", socket, group_id, timeout_seconds), pipeline)
    if as_json:
        print_json({"lanes": lanes})
        return
    headings = ("PIPELINE", "TOPIC", "PARTITION", "WRITTEN", "READ", "END", "EPOCH", "WORKER", "STATE")
    rows = [
        (
            lane["pipeline"],
            lane["topic"],
            str(lane["partition"]),
            amount(lane["next_offset"]),
            amount(lane["fetched_offset"]),
            amount(lane["high_watermark"]),
            amount(lane["epoch"]),
            lane["worker"] or NOTHING,
            lane["state"],
        )
        for lane in lanes
    ]
    click.echo(table(headings, rows, ("PARTITION", "WRITTEN", "READ", "END", "EPOCH")))


class Target(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic in newer versions only
    """Where to seek: an offset, an end of the log, or a time."""

    name = "offset|earliest|latest|time"

    def convert(
        self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]
    ) -> Union[int, str, dict[str, int]]:
        """Read the target; a time is ISO 8601, UTC unless it says otherwise."""
        text = str(value)
        if text.isascii() and text.isdigit():
            return int(text)
        if text in ("earliest", "latest"):
            return text
        try:
            at = datetime.fromisoformat(text.replace("Z", "+00:00"))
        except ValueError:
            self.fail(f"{text!r} is no offset, earliest, latest or time such as 2026-11-27T00:00:00Z", param, ctx)
        if at.tzinfo is None:
            at = at.replace(tzinfo=timezone.utc)
        return {"timestamp_ms": round(at.timestamp() * 1000)}


@offsets.command(
    epilog=example(
        "speedlayer offsets seek orders --topic orders --partition 3 --to 120000",
        "speedlayer offsets seek orders --to 2026-11-27T00:00:00Z --yes",
    )
)
@click.argument("pipeline")
@click.option("--topic", help="Only this topic.")
@click.option("--partition", type=click.IntRange(min=0), help="Only this partition.")
@click.option("--to", type=Target(), required=True, help="An offset, earliest, latest, or a time in ISO 8601 (UTC).")
@click.option("--yes", is_flag=True, help="Do not ask.")
@daemon_options
@json_option
def seek(
    pipeline: str,
    topic: Optional[str],
    partition: Optional[int],
    to: Union[int, str, dict[str, int]],
    yes: bool,
    socket: Optional[Path],
    group_id: Optional[str],
    timeout_seconds: Optional[float],
    as_json: bool,
) -> None:
    """Move the offsets of a pipeline, in PostgreSQL, while it runs.

    Backwards, messages are written a second time; forwards, messages are skipped. It is the one command that can do
    either, and it asks first.
    """
    _confirm(pipeline, topic, partition, to, yes)
    answer = ask(
        "seek",
        socket,
        group_id,
        timeout_seconds or SEEK_TIMEOUT_SECONDS,
        pipeline=pipeline,
        topic=topic,
        partition=partition,
        to=to,
    )
    if as_json:
        print_json(answer)
        return
    for moved in answer.get("offsets", ()):
        but = f", the nearest to {to} that there is" if isinstance(to, int) and moved["offset"] != to else ""
        click.echo(f"{moved['topic']} [{moved['partition']}] goes on at offset {moved['offset']}{but}")


def _confirm(
    pipeline: str, topic: Optional[str], partition: Optional[int], to: Union[int, str, dict[str, int]], yes: bool
) -> None:
    if yes:
        return
    what = f"{topic or 'every topic'}, {'every partition' if partition is None else f'partition {partition}'}"
    question = f"Move pipeline {pipeline} ({what}) to {to}? Rows may be written twice or messages skipped."
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Add --yes to say so.")
    click.confirm(question, abort=True)
