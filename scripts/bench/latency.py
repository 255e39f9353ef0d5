"""From produce to visible row at a steady pace: the time of the row's COMMIT less the time of its production."""

from __future__ import annotations

import argparse
import json
import time

from servers import servers  # first: it puts the tests' fixtures on the path

from fixtures.kafka import PacedProducer  # isort: skip
from fixtures.postgres import execute, query  # isort: skip

TOPIC = "events"


def event(number: int) -> bytes:
    """A message that carries the moment of its production."""
    return json.dumps({"number": number, "produced_at": time.time(), "text": "x" * 120}).encode()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=1000.0, help="messages/s")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--batch-seconds", type=float, nargs="+", default=[0.2, 0.05])
    options = parser.parse_args()
    print_header = True
    for batch_seconds in options.batch_seconds:
        with servers(track_commit_timestamp="on") as bench:
            execute(bench.dsn, "CREATE TABLE events (number bigint PRIMARY KEY, produced_at float8, text text)")
            bench.broker.create_topic(TOPIC, partitions=options.partitions)
            with bench.daemon(TOPIC, "events", "latency", 2, {"batch_seconds": batch_seconds}) as daemon:
                daemon.wait_until_reading()
                with PacedProducer(bench.broker, TOPIC, event, per_second=options.rate) as producer:
                    deadline = time.monotonic() + options.seconds
                    while time.monotonic() < deadline:
                        time.sleep(0.1)
                    sent = producer.stop()
                daemon.wait_until_caught_up(bench.broker.end_offsets(TOPIC), TOPIC)
            rows = query(
                bench.dsn,
                "WITH waits AS (SELECT extract(epoch FROM pg_xact_commit_timestamp(xmin)) - produced_at AS seconds"
                " FROM events WHERE number > %s)"
                " SELECT count(*), percentile_cont(ARRAY[0.5, 0.99]) WITHIN GROUP (ORDER BY seconds), max(seconds)"
                " FROM waits",
                (int(options.rate),),  # the first second warms up
            )
            count, (p50, p99), longest = rows[0]
            if print_header:
                print(f"\nproduce to visible row at {options.rate:,.0f} messages/s, {options.partitions} partitions\n")
                print("| batch_seconds | rows | p50, ms | p99, ms | longest, ms |\n|---|---|---|---|---|")
                print_header = False
            assert count >= sent - options.rate - 1
            cells = (f"{value * 1000:.0f}" for value in (p50, p99, float(longest)))
            print(f"| {batch_seconds:g} | {count:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
