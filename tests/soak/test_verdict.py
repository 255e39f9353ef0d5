"""The soak's comparison of the tables with the topics: each kind of broken promise is found, and nothing else."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

import pytest

from fixtures.kafka import LogRecord, Message
from fixtures.orders import ORDER_COLUMNS, OrderUpdates
from fixtures.postgres import connect, execute
from soak import load
from speedlayer.workers.sinks.postgres.schema import ensure_schema

MESSAGES = 400
# Few enough that each order is updated several times.
ORDER_COUNT = 40

_UPSERT = """
INSERT INTO orders VALUES (%(shop)s, %(order_id)s, %(version)s, %(status)s, %(amount)s)
ON CONFLICT (shop, order_id) DO UPDATE
SET version = EXCLUDED.version, status = EXCLUDED.status, amount = EXCLUDED.amount
"""

# An order is written as it was one version ago, and then as it must be: the table is right, its past is not.
_BACK_AND_FORTH = """
UPDATE orders SET version = version - 1 WHERE order_id = 0;
UPDATE orders SET version = version + 1 WHERE order_id = 0;
"""

# The rows of two neighbours of one partition change places.
_SWAP = """
UPDATE events SET arrival = (SELECT sum(arrival) FROM events WHERE number IN (100, 104)) - arrival
WHERE number IN (100, 104)
"""


class Topics:
    """The two topics as a broker would read them back."""

    def __init__(self) -> None:
        updates = OrderUpdates(ORDER_COUNT, seed=1)
        self._logs = {
            load.EVENTS: _log([load.event(number) for number in range(MESSAGES)]),
            load.ORDERS: _log([updates(number) for number in range(MESSAGES)]),
        }

    def read(self, topic: str) -> list[LogRecord]:
        return self._logs[topic]


def _log(messages: Sequence[Message]) -> list[LogRecord]:
    """Messages without a partition of their own are those of keys, and share one."""
    return [
        LogRecord(message.partition or 0, offset, message.key, message.value) for offset, message in enumerate(messages)
    ]


def _documents(log: Sequence[LogRecord]) -> list[dict[str, Any]]:
    return [json.loads(record.value) for record in log if record.value is not None]


@pytest.fixture
def topics() -> Topics:
    return Topics()


@pytest.fixture
def written(topics: Topics, postgres_dsn: str) -> str:
    """A database into which everything was written as it must be."""
    load.make_tables(postgres_dsn)
    with contextlib.closing(connect(postgres_dsn)) as connection, connection.cursor() as cursor:
        ensure_schema(connection)
        cursor.executemany(
            "INSERT INTO events (part, number, text, price) VALUES (%(part)s, %(number)s, %(text)s, %(price)s)",
            _documents(topics.read(load.EVENTS)),
        )
        cursor.executemany(_UPSERT, _documents(topics.read(load.ORDERS)))
        for topic in (load.EVENTS, load.ORDERS):
            cursor.execute(
                "INSERT INTO speedlayer.checkpoints "
                "(cluster_id, consumer_group, pipeline, topic, partition, lane, next_offset, epoch, owner, rows) "
                "VALUES ('c', 'g', %s, %s, 0, 0, %s, 1, 'o', %s)",
                (topic, topic, MESSAGES, MESSAGES),
            )
    return postgres_dsn


def broken(topics: Topics, dsn: str) -> dict[str, int]:
    """The figures that are not as they must be."""
    return {name: figure for name, figure, fine in load.verdict(topics, dsn) if not fine}  # type: ignore[arg-type]


def test_what_was_written_as_it_must_be_is_found_so(topics: Topics, written: str) -> None:
    assert set(ORDER_COLUMNS) == set(_documents(topics.read(load.ORDERS))[0])
    assert {name: figure for name, figure, _ in load.verdict(topics, written)}["messages"] == 2 * MESSAGES  # type: ignore[arg-type]
    assert broken(topics, written) == {}


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        pytest.param("DELETE FROM events WHERE number = 77", {"events: rows lost": 1}, id="an event is lost"),
        pytest.param("DELETE FROM orders WHERE order_id = 0", {"orders: rows lost": 1}, id="an order is lost"),
        pytest.param(
            "INSERT INTO events (part, number, text, price) SELECT part, number, text, price FROM events "
            "WHERE number = 399",
            {"events: rows too many": 1, "out of order": 1},
            id="an event is there twice",
        ),
        pytest.param(
            "INSERT INTO orders VALUES ('no shop', -1, 1, 'NEW', 0)",
            {"orders: rows too many": 1},
            id="an order that nobody made",
        ),
        pytest.param(
            "UPDATE events SET text = text || '!' WHERE number = 77",
            {"events: rows lost": 1, "events: rows too many": 1},
            id="an event is altered",
        ),
        pytest.param(
            "UPDATE events SET price = NULL WHERE number = 77",
            {"events: rows lost": 1, "events: rows too many": 1},
            id="a field of an event is gone",
        ),
        pytest.param(
            "ALTER TABLE orders DISABLE TRIGGER note_setback; UPDATE orders SET version = version - 1 "
            "WHERE order_id = 0",
            {"orders: rows lost": 1, "orders: rows too many": 1},
            id="the last update of an order is lost",
        ),
        pytest.param(_SWAP, {"out of order": 1}, id="two events of one partition change places"),
        pytest.param(_BACK_AND_FORTH, {"out of order": 1}, id="an older update came after a newer one"),
        pytest.param(
            "UPDATE speedlayer.checkpoints SET rows = rows + 1 WHERE topic = 'events'",
            {"messages counted once as rows": 2 * MESSAGES + 1},
            id="a message is counted twice",
        ),
        pytest.param(
            "UPDATE speedlayer.checkpoints SET dead_lettered = 1 WHERE topic = 'orders'",
            {"filtered or dead": 1},
            id="a good message became a dead letter",
        ),
    ],
)
def test_each_damage_is_found_and_called_by_its_name(
    topics: Topics, written: str, damage: str, found: dict[str, int]
) -> None:
    execute(written, damage)
    assert broken(topics, written) == found


def test_empty_topics_are_no_proof(topics: Topics, written: str) -> None:
    topics._logs[load.ORDERS] = []
    execute(written, "TRUNCATE orders; UPDATE speedlayer.checkpoints SET rows = 0 WHERE topic = 'orders'")
    assert broken(topics, written) == {"messages": MESSAGES}
