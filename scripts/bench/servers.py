"""The servers and the orders that the benchmarks share: the tests' own broker, PostgreSQL and daemon."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from fixtures.daemon import Daemon, pipeline_toml
from fixtures.kafka import Broker, Message
from fixtures.postgres import PostgresServer, find_installations
from fixtures.processes import unprivileged_account
from fixtures.workspace import private_folder

TABLE_SQL = """
CREATE TABLE {table} (
    order_id bigint PRIMARY KEY,
    customer text NOT NULL,
    status text NOT NULL,
    amount numeric(12, 2) NOT NULL,
    quantity integer NOT NULL,
    note text,
    created_at timestamptz NOT NULL
)
"""
COLUMNS = ("order_id", "customer", "status", "amount", "quantity", "note", "created_at")
STATUSES = ("NEW", "PAID", "SHIPPED", "RETURNED")


@dataclass(frozen=True)
class Bench:
    """What a benchmark works with."""

    broker: Broker
    postgres: PostgresServer
    dsn: str
    folder: Path

    @contextlib.contextmanager
    def daemon(
        self, topic: str, table: str, group: str, workers: int, pipeline: dict[str, object], budget_mb: int = 256
    ) -> Iterator[Daemon]:
        """A daemon on this topic and table, ended when the block ends."""
        source = pipeline_toml(
            bootstrap_servers=self.broker.bootstrap_servers,
            group_id=group,
            dsn=self.dsn,
            topic=topic,
            table=table,
            pipeline=pipeline,
            workers={"count": workers},
            memory={"budget_mb": budget_mb},
        )
        with private_folder("bench-daemon") as folder:
            daemon = Daemon(folder, source)
            try:
                daemon.start(wait=False)
                daemon.wait_until_listening()
                yield daemon
            finally:
                daemon.close()


@contextlib.contextmanager
def broker() -> Iterator[Broker]:
    """A broker alone, ended when the block ends."""
    with private_folder("kafka") as folder:
        print("starting Kafka", file=sys.stderr)
        started = Broker(folder)
        try:
            started.start()
            yield started
        finally:
            started.close()


@contextlib.contextmanager
def servers(**postgres_settings: object) -> Iterator[Bench]:
    """A broker and a PostgreSQL with the settings of an ordinary server, ended when the block ends."""
    with ExitStack() as cleanup:
        folder = cleanup.enter_context(private_folder("bench"))
        kafka = cleanup.enter_context(broker())
        print("starting PostgreSQL", file=sys.stderr)
        account = unprivileged_account()
        settings = {"fsync": "on", "synchronous_commit": "on", "max_wal_size": "4GB", "shared_buffers": "512MB"}
        postgres = PostgresServer(
            find_installations()[0],
            cleanup.enter_context(private_folder("postgres", account)),
            {**settings, **postgres_settings},
        )
        cleanup.callback(postgres.close)
        postgres.start()
        yield Bench(kafka, postgres, postgres.dsn(postgres.create_database("bench")), folder)


def order(number: int) -> tuple[int, str, str, str, int, str, str]:
    """One order's values as texts and numbers, in the order of the columns; about 180 bytes as JSON."""
    return (
        number,
        f"customer-{number * 7919 % 1_000_003:07d}",
        STATUSES[number % len(STATUSES)],
        f"{number * 31 % 100_000 / 100:.2f}",
        number % 9 + 1,
        f"order number {number % 1000} of the day",
        f"2026-01-{number % 28 + 1:02d}T{number % 24:02d}:{number % 60:02d}:00+00:00",
    )


def as_json(values: Sequence[object]) -> bytes:
    """An order as the JSON object that is produced."""
    order_id, customer, status, amount, quantity, note, created_at = values
    return (
        f'{{"order_id": {order_id}, "customer": "{customer}", "status": "{status}", "amount": {amount}, '
        f'"quantity": {quantity}, "note": "{note}", "created_at": "{created_at}"}}'
    ).encode()


def messages(count: int, partitions: int) -> Iterator[Message]:
    """The orders as messages, spread evenly."""
    for number in range(count):
        yield Message(as_json(order(number)), key=str(number).encode(), partition=number % partitions)
