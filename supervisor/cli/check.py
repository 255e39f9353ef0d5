"""`speedlayer check`: a line for everything that could keep the pipelines from running, with the remedy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import click

from speedlayer.supervisor.cli.daemon import example, json_option
from speedlayer.supervisor.cli.output import print_json
from speedlayer.supervisor.exit_codes import ExitCode

if TYPE_CHECKING:
    from speedlayer.supervisor.check.findings import Finding

_MARKS = {"ok": "✓", "warning": "!", "failed": "✗"}
_PLAIN_MARKS = {"ok": "ok     ", "warning": "warning", "failed": "FAILED "}


@click.command(
    epilog=example("speedlayer check speedlayer.toml", "speedlayer check pipelines.py --engine orders --json")
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--engine", help="The variable that holds the engine, if a .py file has several.")
@click.option(
    "--timeout",
    "timeout_seconds",
    type=click.FloatRange(min=0.1),
    default=10.0,
    show_default=True,
    help="How many seconds the broker and the database have for each answer.",
)
@json_option
def check(file: Path, engine: Optional[str], timeout_seconds: float, as_json: bool) -> None:
    """Look for what would keep the pipelines of FILE from running. Changes nothing, in Kafka or in PostgreSQL."""
    from speedlayer.supervisor.check import examine

    findings = []
    for finding in examine(file, engine, timeout_seconds):
        findings.append(finding)
        if not as_json:
            marks = _MARKS if (sys.stdout.encoding or "").lower().startswith("utf") else _PLAIN_MARKS
            click.echo(f"{marks[finding.outcome.value]} {finding.what}: {finding.detail}")
            if finding.remedy:
                click.echo(f"    → {finding.remedy}" if marks is _MARKS else f"        {finding.remedy}")
    failed = _count(findings, "failed")
    if as_json:
        print_json({"ok": not failed, "findings": [finding.as_data() for finding in findings]})
    else:
        click.echo(f"\n{_summary(findings)}")
    sys.exit(ExitCode.CHECK_FAILED if failed else ExitCode.OK)


def _count(findings: Sequence[Finding], outcome: str) -> int:
    return sum(finding.outcome.value == outcome for finding in findings)


def _summary(findings: Sequence[Finding]) -> str:
    counts = {"passed": "ok", "to know of": "warning", "failed": "failed"}
    said = [f"{count} {word}" for word, outcome in counts.items() if (count := _count(findings, outcome))]
    return ", ".join(said)
