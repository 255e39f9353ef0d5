"""`speedlayer pause`, `resume` and `drain`: the operator's hand on the flow."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import click

from speedlayer.supervisor.cli.daemon import ask, daemon_options, example, json_option
from speedlayer.supervisor.cli.output import print_json

# A drain waits for the slowest flush that is under way; the shutdown deadline's default is 30 s.
DRAIN_TIMEOUT_SECONDS = 60.0


@click.command(epilog=example("speedlayer pause", "speedlayer pause orders"))
@click.argument("pipeline", required=False)
@daemon_options
@json_option
def pause(
    pipeline: Optional[str],
    socket: Optional[Path],
    group_id: Optional[str],
    timeout_seconds: Optional[float],
    as_json: bool,
) -> None:
    """Stop reading and writing one pipeline, or all; `resume` goes on. Nothing is lost, only late."""
    answer = ask("pause", socket, group_id, timeout_seconds, pipeline=pipeline)
    if as_json:
        print_json(answer)
    else:
        click.echo(f"paused: {', '.join(answer['pipelines'])}")


@click.command(epilog=example("speedlayer resume", "speedlayer resume orders"))
@click.argument("pipeline", required=False)
@daemon_options
@json_option
def resume(
    pipeline: Optional[str],
    socket: Optional[Path],
    group_id: Optional[str],
    timeout_seconds: Optional[float],
    as_json: bool,
) -> None:
    """Go on after a pause, a drain or a stop over dead letters."""
    answer = ask("resume", socket, group_id, timeout_seconds, pipeline=pipeline)
    if as_json:
        print_json(answer)
        return
    click.echo(f"resumed: {', '.join(answer['pipelines'])}")
    for name, reason in answer.get("still_held", {}).items():
        click.echo(f"{name} does not read yet: {reason}")


@click.command(epilog=example("speedlayer drain", "speedlayer drain orders --timeout 300"))
@click.argument("pipeline", required=False)
@daemon_options
@json_option
def drain(
    pipeline: Optional[str],
    socket: Optional[Path],
    group_id: Optional[str],
    timeout_seconds: Optional[float],
    as_json: bool,
) -> None:
    """Stop reading and write everything that is read already; returns when that is done. `resume` goes on."""
    answer = ask("drain", socket, group_id, timeout_seconds or DRAIN_TIMEOUT_SECONDS, pipeline=pipeline)
    if as_json:
        print_json(answer)
    else:
        click.echo(f"drained: {', '.join(answer['pipelines'])}; `speedlayer resume` goes on")
