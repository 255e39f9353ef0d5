"""The load test: a rate, a spike and a duration of one's own, played and judged by the code of the demo."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional

import click

from speedlayer.supervisor.demo.command import parse_properties
from speedlayer.supervisor.demo.scenario import load_test
from speedlayer.supervisor.demo.stage import Show, perform
from speedlayer.supervisor.errors import SpeedlayerError, exit_code_of

# Shorter runs say more of the start than of the load.
MINIMUM_SECONDS = 6.0

EPILOG = """\b
Examples:
  scripts/loadtest/run --rate 2000 --duration 60
  scripts/loadtest/run --rate 500 --spike 2000 --capacity 250 --duration 90
  scripts/loadtest/run --rate 5000 --spike 20000 --broker localhost:9092 --dsn postgresql://me@localhost/mine
"""


@click.command(epilog=EPILOG)
@click.option("--rate", type=click.FloatRange(min=1), default=1000.0, show_default=True, help="Messages a second.")
@click.option("--spike", type=click.FloatRange(min=1), help="Messages a second in the middle third of the time.")
@click.option(
    "--duration",
    type=click.FloatRange(min=MINIMUM_SECONDS),
    default=60.0,
    show_default=True,
    help="How many seconds messages are produced.",
)
@click.option(
    "--capacity",
    type=click.FloatRange(min=1),
    help="Rows a second that a competitor for the table's lock lets through during the spike (without a spike: during "
    "the whole test).",
)
@click.option("--batch-rows", type=click.IntRange(min=1), default=1000, show_default=True, help="Rows in a batch.")
@click.option(
    "--batch-seconds",
    type=click.FloatRange(min=0.001),
    default=0.2,
    show_default=True,
    help="A batch that is not full closes at this age.",
)
@click.option("--workers", type=click.IntRange(1, 64), default=2, show_default=True, help="Worker processes.")
@click.option("--memory", type=click.IntRange(min=16), default=64, show_default=True, help="Memory budget in MB.")
@click.option("--broker", metavar="HOST:PORT", help="A Kafka to use; without it an embedded one.")
@click.option(
    "--kafka", multiple=True, metavar="KEY=VALUE", help="A librdkafka property for --broker (may be repeated)."
)
@click.option("--dsn", metavar="DSN", help="A PostgreSQL to use; without it an embedded one.")
@click.option(
    "--report-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("loadtest-report"),
    show_default=True,
    help="Where the report, the plot and the daemon's log go.",
)
def main(
    rate: float,
    spike: Optional[float],
    duration: float,
    capacity: Optional[float],
    batch_rows: int,
    batch_seconds: float,
    workers: int,
    memory: int,
    broker: Optional[str],
    kafka: tuple[str, ...],
    dsn: Optional[str],
    report_dir: Path,
) -> None:
    """Produce messages at a rate of your own, and see what speedlayer makes of them.

    The exit code is 0 only if nothing was lost or written twice.
    """
    show = Show(
        kind="load test",
        title="speedlayer load test",
        scenario=load_test(duration, rate, spike, capacity, batch_rows),
        needs_brake=False,
        report_folder=report_dir,
        broker=broker,
        kafka_properties=parse_properties(kafka),
        dsn=dsn,
        batch_seconds=batch_seconds,
        workers=workers,
        memory_budget_mb=memory,
    )
    try:
        code = perform(show)
    except SpeedlayerError as error:
        print(f"error: {error}", file=sys.stderr)
        code = exit_code_of(error)
    sys.exit(code)


if __name__ == "__main__":
    main(prog_name="scripts/loadtest/run")
