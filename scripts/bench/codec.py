"""What it costs to decode a flight and to write it as COPY text, as a ratio between two source trees. No server.

    scripts/bench/run codec.py --against FOLDER_OF_ANOTHER_TREE

Each tree runs in a process of its own; the two take turns, so that a machine whose speed drifts does not decide. The
tables are the benchmark's orders, and one for each kind of column that costs more than its text.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]

# Runs in the tree that is measured, of which it uses only what both have. Prints µs a row for each table.
MEASURE = r"""
import sys, time
sys.path[:0] = [f"{sys.argv[1]}/scripts/typing", f"{sys.argv[1]}/tests"]
from fixtures.flights import flight, part
from fixtures.tables import column, sink, table
from speedlayer.workers.decoding.json_records import decode_flight
from speedlayer.workers.sinks.postgres.write import TableWriter
ROWS = 20_000
PLAN = table(column("order_id", "int8"), column("customer", "text"), column("amount", "numeric"),
             column("status", "text"), column("created_at", "timestamptz"), primary_key=["order_id"])
ORDER = b'{"order_id":%d,"customer":"customer-%d","amount":"%d.25","status":"paid","created_at":"2026-01-02T03:04:05Z"}'
CASES = {
    "orders, append": (PLAN, {}, [ORDER % (n, n % 977, n % 500) for n in range(ROWS)]),
    "orders, upsert": (PLAN, {"mode": "upsert"}, [ORDER % (n, n % 977, n % 500) for n in range(ROWS)]),
    "orders with backslashes": (PLAN, {}, [ORDER.replace(b"paid", b"pa\\\\id\\n") % (n, n, n) for n in range(ROWS)]),
    "timestamp": (table(column("v", "timestamp")), {},
                  [b'{"v":"2026-01-02T03:%02d:05"}' % (n % 60) for n in range(ROWS)]),
    "text[]": (table(column("v", "text[]")), {}, [b'{"v":["a","b%d"]}' % n for n in range(ROWS)]),
}
for name, (plan, settings, values) in CASES.items():
    batch, best = flight(part(values)), 1e9
    writer = TableWriter(plan, sink(**settings))
    for _ in range(7):
        began = time.process_time()
        records = writer.prepare(decode_flight(batch, writer.decoder(transformed=False)))
        best = min(best, time.process_time() - began)
    assert len(records.rows) == ROWS and not records.dead, records.dead[:1]
    print(f"{name}\t{best / ROWS * 1e6:.4f}")
"""


def measure(tree: Path) -> dict[str, float]:
    """Return µs of CPU a row by table, the best of several."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tree)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
        cwd="/",
    )
    return {name: float(cost) for name, cost in (line.split("\t") for line in done.stdout.splitlines())}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, required=True, help="the folder of the tree to compare with")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    pairs: list[tuple[dict[str, float], dict[str, float]]] = []
    for _ in range(options.rounds):
        pairs.append((measure(options.against.resolve()), measure(HERE)))
    print("| | the other, CPU µs a row | this, CPU µs a row | ratio, median (minimum–maximum) |")
    print("|---|---|---|---|")
    for name in pairs[0][1]:
        ratios = [new[name] / old[name] for old, new in pairs]
        old_us, new_us = (statistics.median([pair[side][name] for pair in pairs]) for side in (0, 1))
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        print(f"| {name} | {old_us:.2f} | {new_us:.2f} | {spread} |")


if __name__ == "__main__":
    main()
