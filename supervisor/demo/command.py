"""The command `speedlayer demo` (demo process). Everything heavy is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import click

from speedlayer.supervisor.demo.scenario import MINIMUM_SECONDS, SPIKE_FACTOR, black_friday

EPILOG = """\b
Examples:
  speedlayer demo
  speedlayer demo --seconds 60 --rate 200
  speedlayer demo --broker localhost:9092 --dsn postgresql://me@localhost/mine
"""


def parse_properties(values: tuple[str, ...]) -> dict[str, str]:
    """Read ``KEY=VALUE`` options; raises `click.BadParameter`."""
    properties = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{value!r} is not KEY=VALUE")
        properties[key] = text
    return properties


@click.command(epilog=EPILOG)
@click.option(
    "--seconds",
    type=click.FloatRange(min=MINIMUM_SECONDS),
    default=90.0,
    show_default=True,
    help="How long messages are produced.",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=10),
    default=100.0,
    show_default=True,
    help=f"Messages a second in normal times; {SPIKE_FACTOR:g} times as many on Black Friday.",
)
@click.option("--broker", metavar="HOST:PORT", help="A Kafka to use; without it an embedded one.")
@click.option(
    "--kafka", multiple=True, metavar="KEY=VALUE", help="A librdkafka property for --broker (may be repeated)."
)
@click.option("--dsn", metavar="DSN", help="A PostgreSQL to use; without it an embedded one.")
@click.option(
    "--report-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo-report"),
    show_default=True,
    help="Where the report, the plot and the daemon's log go.",
)
@click.option("--workers", type=click.IntRange(1, 16), default=2, show_default=True, help="Worker processes.")
def demo(
    seconds: float,
    rate: float,
    broker: Optional[str],
    kafka: tuple[str, ...],
    dsn: Optional[str],
    report_dir: Path,
    workers: int,
) -> None:
    """Play Black Friday: the messages triple while the database falls to half of the normal rate.

    Nothing is needed: without --broker and --dsn an embedded Kafka (a mock in memory) and an embedded PostgreSQL (a
    real one) are started, and removed at the end. The database is slowed by a session that competes for the table's
    lock. The exit code is 0 only if nothing was lost or written twice, and the brake tripped and let go again.
    """
    from speedlayer.supervisor.demo.stage import Show, perform

    show = Show(
        kind="demo",
        title="speedlayer demo: Black Friday",
        scenario=black_friday(seconds, rate),
        needs_brake=True,
        report_folder=report_dir,
        broker=broker,
        kafka_properties=parse_properties(kafka),
        dsn=dsn,
        workers=workers,
    )
    raise SystemExit(perform(show))
