"""What the soak writes to its two topics, and what must have become of it in the tables. Runs in the soak's process."""

from __future__ import annotations

import json
from collections.abc import Iterator

from fixtures.compare import compare, last_of_each_key, values_of
from fixtures.kafka import Broker, LogRecord, Message
from fixtures.orders import ORDER_COLUMNS, ORDER_KEY, ORDERS_TABLE, SETBACKS, OrderUpdates
from fixtures.postgres import execute, query, scalar

PARTITIONS = 4
EVENTS, ORDERS = "events", "orders"

# ``arrival`` is the order in which rows were written; nothing in the messages has its name.
EVENTS_TABLE = """
CREATE TABLE events (arrival bigserial, part int, number bigint, text text, price numeric(12, 2))
"""
EVENT_COLUMNS = ("part", "number", "text", "price")

# How many orders are updated again and again.
ORDER_COUNT = 20_000

_OUT_OF_ORDER = """
SELECT count(*) FROM (SELECT number - lag(number) OVER (PARTITION BY part ORDER BY arrival) AS step FROM events) steps
WHERE step <= 0
"""


def event(number: int) -> Message:
    """The event of this number; the numbers go round the partitions."""
    part = number % PARTITIONS
    document = {"part": part, "number": number, "text": f'ä\t{"x" * (number % 97)}\\"', "price": number % 100_000 / 4}
    return Message(json.dumps(document).encode(), partition=part)


def order_updates(seed: int) -> OrderUpdates:
    """Makes updates of orders, the versions of each rising by one."""
    return OrderUpdates(ORDER_COUNT, seed)


def make_tables(dsn: str) -> None:
    """Make the tables, and the trigger that tells of an older order that overwrote a newer one."""
    execute(dsn, EVENTS_TABLE)
    execute(dsn, ORDERS_TABLE + ";" + SETBACKS)


def verdict(broker: Broker, dsn: str) -> Iterator[tuple[str, int, bool]]:
    """Compare the tables with the topics: name, figure, and whether it is as it must be."""
    events, orders = broker.read(EVENTS), broker.read(ORDERS)
    yield "messages", len(events) + len(orders), bool(events and orders)
    yield from _compared(dsn, EVENTS, values_of(events), EVENT_COLUMNS)
    yield from _compared(dsn, ORDERS, last_of_each_key(orders, ORDER_KEY), ORDER_COLUMNS)
    setbacks = int(scalar(dsn, _OUT_OF_ORDER)) + int(scalar(dsn, "SELECT count(*) FROM setbacks"))
    yield "out of order", setbacks, setbacks == 0
    yield from _counted(dsn, events + orders)


def _compared(
    dsn: str, table: str, expected: list[object], columns: tuple[str, ...]
) -> Iterator[tuple[str, int, bool]]:
    difference = compare(dsn, table, expected, columns)  # type: ignore[arg-type]
    yield f"{table}: rows lost", difference.missing, difference.missing == 0
    yield f"{table}: rows too many", difference.surplus, difference.surplus == 0


def _counted(dsn: str, log: list[LogRecord]) -> Iterator[tuple[str, int, bool]]:
    """The audit by the counters, which move with the checkpoints: every message is counted once."""
    ((rows, filtered, dead),) = query(
        dsn, "SELECT sum(rows), sum(filtered), sum(dead_lettered) FROM speedlayer.checkpoints"
    )
    yield "messages counted once as rows", int(rows), int(rows) == len(log)
    yield "filtered or dead", int(filtered + dead), not filtered and not dead
