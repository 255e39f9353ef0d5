"""Rows/s of append and upsert as a ratio to psql's copy of the same rows in the same run, with CPU and memory.

Everything runs on one machine: broker, PostgreSQL and daemon. Its speed drifts, so the three take turns, and the ratios
are taken within each round; the table gives their median, minimum and maximum.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from servers import COLUMNS, TABLE_SQL, Bench, messages, order, servers

TOPIC = "orders"
DEADLINE_SECONDS = 300.0


@dataclass(frozen=True)
class Run:
    """One way of writing all rows, once."""

    rows_per_second: float
    supervisor_us: float = 0.0
    workers_us: float = 0.0
    peak_rss_mb: float = 0.0


def fresh_table(bench: Bench, table: str) -> None:
    """Make the table anew, and leave the server nothing to do from before."""
    bench_execute(bench, f"DROP TABLE IF EXISTS {table}")
    bench_execute(bench, TABLE_SQL.format(table=table))
    bench_execute(bench, "CHECKPOINT")


def bench_execute(bench: Bench, statement: str) -> None:
    """Run one statement in the benchmark's database."""
    from fixtures.postgres import execute

    execute(bench.dsn, statement)


def bench_scalar(bench: Bench, statement: str) -> int:
    """Run one query for one number."""
    from fixtures.postgres import scalar

    return int(scalar(bench.dsn, statement) or 0)


def write_csv(path: Path, rows: int) -> None:
    """The same rows for psql."""
    with path.open("w") as file:
        file.writelines(",".join(map(str, order(number))) + "\n" for number in range(rows))


def copy_with_psql(bench: Bench, rows: int, path: Path) -> Run:
    """What there is to reach: one COPY of all rows."""
    fresh_table(bench, "copied")
    command = f"\\copy copied ({', '.join(COLUMNS)}) from '{path}' with (format csv)"
    began = time.monotonic()
    subprocess.run([bench.postgres.psql, bench.dsn, "-qc", command], check=True)
    elapsed = time.monotonic() - began
    assert bench_scalar(bench, "SELECT count(*) FROM copied") == rows
    return Run(rows / elapsed)


def run_daemon(bench: Bench, rows: int, mode: str, workers: int, batch_rows: int | None, group: str) -> Run:
    """All rows through the daemon: from the moment its lanes are read until the last row is committed."""
    fresh_table(bench, "orders")
    pipeline: dict[str, object] = {"mode": mode}
    if mode == "upsert":
        pipeline["key"] = ["order_id"]
    if batch_rows:
        pipeline["batch_rows"] = batch_rows
    with bench.daemon(TOPIC, "orders", group, workers, pipeline) as daemon:
        began = wait_for_start(daemon)
        supervisor = psutil.Process(daemon.pid)
        family = [child for child in supervisor.children() if child.pid in daemon.worker_pids()]
        before = [cpu_seconds(process) for process in (supervisor, *family)]
        ended = wait_for_rows(bench, group, rows)
        after = [cpu_seconds(process) for process in (supervisor, *family)]
        peak = sum(peak_rss_mb(process.pid) for process in (supervisor, *family))
        assert bench_scalar(bench, "SELECT count(*) FROM orders") == rows
        used = [(b - a) / rows * 1e6 for a, b in zip(before, after, strict=True)]
    return Run(rows / (ended - began), used[0], sum(used[1:]), peak)


def wait_for_start(daemon: object) -> float:
    """The moment at which every lane is being read."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        lanes = daemon.lanes()  # type: ignore[attr-defined]
        if lanes and all(lane["state"] == "fetching" for lane in lanes):
            return time.monotonic()
        time.sleep(0.005)
    raise TimeoutError("the daemon does not read")


def wait_for_rows(bench: Bench, group: str, rows: int) -> float:
    """The moment at which the checkpoints say that every row is written."""
    from fixtures.postgres import connect

    deadline = time.monotonic() + DEADLINE_SECONDS
    with connect(bench.dsn) as connection, connection.cursor() as cursor:
        while time.monotonic() < deadline:
            cursor.execute("SELECT sum(rows) FROM speedlayer.checkpoints WHERE consumer_group = %s", (group,))
            if (cursor.fetchone()[0] or 0) >= rows:
                return time.monotonic()
            time.sleep(0.02)
    raise TimeoutError("the rows do not arrive")


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def peak_rss_mb(pid: int) -> float:
    """The largest resident set of a process so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def spread(values: list[float], form: str) -> str:
    """Median, minimum and maximum."""
    middle = form.format(statistics.median(values))
    return f"{middle} ({form.format(min(values))}–{form.format(max(values))})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-rows", type=int, default=None, help="default: the daemon's own")
    parser.add_argument("--modes", nargs="+", default=["append", "upsert"])
    options = parser.parse_args()
    with servers() as bench:
        print(f"producing {options.rows:,} orders", file=sys.stderr)
        bench.broker.create_topic(TOPIC, partitions=options.partitions)
        bench.broker.produce(TOPIC, messages(options.rows, options.partitions))
        csv = bench.folder / "orders.csv"
        write_csv(csv, options.rows)
        results: dict[str, list[Run]] = {name: [] for name in ("copy", *options.modes)}
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            results["copy"].append(copy_with_psql(bench, options.rows, csv))
            for mode in options.modes:
                group = f"bench-{mode}-{number}"
                results[mode].append(run_daemon(bench, options.rows, mode, options.workers, options.batch_rows, group))
                print(f"  {mode}: {results[mode][-1]}", file=sys.stderr)
        report(results, options)


def report(results: dict[str, list[Run]], options: argparse.Namespace) -> None:
    """Print the results as a Markdown table."""
    size = len(messages_sample())
    print(
        f"\n{options.rows:,} JSON orders of {size} bytes, {options.partitions} partitions, {options.workers} workers,"
    )
    print(f"{options.rounds} rounds; median (minimum–maximum)\n")
    print("| | rows/s | of psql \\copy | supervisor, CPU µs a row | workers, CPU µs a row | peak RSS, MB |")
    print("|---|---|---|---|---|---|")
    copies = [run.rows_per_second for run in results["copy"]]
    print(f"| psql \\copy | {spread(copies, '{:,.0f}')} | 1 | | | |")
    for mode in options.modes:
        runs = results[mode]
        ratios = [run.rows_per_second / copy for run, copy in zip(runs, copies, strict=True)]
        print(
            f"| {mode} | {spread([run.rows_per_second for run in runs], '{:,.0f}')} | {spread(ratios, '{:.2f}')}"
            f" | {spread([run.supervisor_us for run in runs], '{:.1f}')}"
            f" | {spread([run.workers_us for run in runs], '{:.1f}')}"
            f" | {spread([run.peak_rss_mb for run in runs], '{:.0f}')} |"
        )


def messages_sample() -> bytes:
    """A message, for its size."""
    value = next(messages(1, 1)).value
    assert value is not None
    return value


if __name__ == "__main__":
    main()
