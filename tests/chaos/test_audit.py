"""The audit finds whatever is wrong: one that overlooks a row would make every promise look kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg2
import pytest

from chaos.audit import Audit, audit, make_tables
from chaos.stage import Stream
from chaos.traffic import Acknowledged, Lane, document, is_bad, key_of, value
from fixtures.postgres import connect, execute
from speedlayer.workers.sinks.postgres.schema import ensure_schema

EVENTS = Stream("events", "events", partitions=2)
ORDERS = Stream("orders", "orders", partitions=2, upserts=True)
MESSAGES = 500


class Sent:
    """What `Traffic` would have sent: so many messages to each topic, and an offset each."""

    def __init__(self) -> None:
        self.lanes: dict[Lane, Acknowledged] = {}
        for stream in (EVENTS, ORDERS):
            for number in range(MESSAGES):
                partition = (key_of(number) if stream.upserts else number) % stream.partitions
                one = self.lanes.setdefault((stream.topic, partition), Acknowledged())
                one.offsets.append(len(one.numbers))
                one.numbers.append(number)

    def acknowledged(self) -> dict[Lane, Acknowledged]:
        return self.lanes


@pytest.fixture
def checked(postgres_dsn: str) -> Callable[..., Audit]:
    """``checked(*statements)``: what the audit finds where everything was written and then these were executed."""
    connection = connect(postgres_dsn)
    ensure_schema(connection)
    connection.close()
    make_tables(postgres_dsn, (EVENTS, ORDERS))
    sent = Sent()
    with psycopg2.connect(postgres_dsn) as written, written.cursor() as cursor:
        for (topic, partition), one in sent.lanes.items():
            for number, offset in zip(one.numbers, one.offsets, strict=True):
                if is_bad(number):
                    _bury(cursor, topic, partition, offset, value(number, EVENTS if topic == "events" else ORDERS))
                else:
                    _write(cursor, topic, number)

    def check(*statements: str, forgotten: dict[Lane, int] | None = None) -> Audit:
        for statement in statements:
            execute(postgres_dsn, statement)
        return audit(postgres_dsn, (EVENTS, ORDERS), sent, forgotten or {})  # type: ignore[arg-type]

    return check


def _write(cursor: Any, topic: str, number: int) -> None:
    record = document(number)
    end = "ON CONFLICT (key) DO UPDATE SET number = EXCLUDED.number, text = EXCLUDED.text, price = EXCLUDED.price"
    cursor.execute(
        f"INSERT INTO {topic} (number, key, text, price) VALUES (%(number)s, %(key)s, %(text)s, %(price)s)"
        + (end if topic == "orders" else ""),
        record,
    )


def _bury(cursor: Any, topic: str, partition: int, offset: int, content: bytes) -> None:
    cursor.execute(
        'INSERT INTO speedlayer.dead_letters (cluster_id, consumer_group, pipeline, topic, partition, lane, "offset", '
        "value, reason) VALUES ('', '', %s, %s, %s, 0, %s, %s, 'bad')",
        (topic, topic, partition, offset, content),
    )


def counts(found: Audit) -> dict[str, int]:
    names = ("lost", "duplicated", "altered", "disordered", "unexplained")
    return {name: getattr(found, name) for name in names if getattr(found, name)}


def test_what_is_right_is_clean(checked: Callable[..., Audit]) -> None:
    found = checked()
    assert found.clean and counts(found) == {}, found.examples
    bad = sum(map(is_bad, range(MESSAGES)))
    assert (found.messages, found.dead, found.skipped) == (2 * MESSAGES, 2 * bad, 0)
    assert bad > 0


GONE = "DELETE FROM events WHERE number = 7"
KEY = key_of(MESSAGES - 3)  # the key of a message near the end, which is the last of its key
GAP = (
    "INSERT INTO speedlayer.gaps (cluster_id, consumer_group, pipeline, topic, partition, lane, from_offset, to_offset,"
    " reason) VALUES ('', '', 'events', 'events', 1, 0, 3, 4, 'retention')"
)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (GONE, {"lost": 1}),
        ("INSERT INTO events SELECT * FROM events WHERE number = 7", {"duplicated": 1}),
        ("UPDATE events SET text = text || ' ' WHERE number = 7", {"altered": 1}),
        ("UPDATE events SET price = price + 0.01 WHERE number = 8", {"altered": 1}),
        ("UPDATE events SET mapped = true WHERE number = 8", {"altered": 1}),
        ("UPDATE events SET written = 1000000 WHERE number = 7", {"disordered": 1}),
        ("INSERT INTO events (number, key) VALUES (1000000, 1)", {"unexplained": 1}),
        (f"DELETE FROM orders WHERE key = {KEY}", {"lost": 1}),
        (f"UPDATE orders SET number = 0 WHERE key = {KEY}", {"lost": 1, "disordered": 1}),
        (f"UPDATE orders SET text = '' WHERE key = {KEY}", {"altered": 1, "disordered": 1}),
        ("INSERT INTO orders (number, key) VALUES (1, 100000)", {"unexplained": 1}),
        ("DELETE FROM speedlayer.dead_letters WHERE topic = 'events' AND id = (SELECT min(id) FROM "
         "speedlayer.dead_letters WHERE topic = 'events')", {"lost": 1}),
        ("UPDATE speedlayer.dead_letters SET value = value || '!' WHERE topic = 'orders'", {"altered": 2}),
        ('UPDATE speedlayer.dead_letters SET "offset" = 0', {"altered": 4, "lost": 4}),
        (GAP, {"unexplained": 1}),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(checked: Callable[..., Audit], statement: str, expected: dict[str, int]) -> None:
    found = checked(statement)
    assert not found.clean
    for name, count in expected.items():
        assert counts(found).get(name, 0) >= count, (counts(found), found.examples)
    assert found.examples


def test_a_gap_that_retention_left_is_no_loss(checked: Callable[..., Audit]) -> None:
    """Offset 3 of partition 1 is the message of number 7."""
    found = checked(GAP, GONE, forgotten={("events", 1): 4})
    assert found.clean and found.skipped == 1, found.examples


def test_a_gap_explains_no_more_than_it_says(checked: Callable[..., Audit]) -> None:
    found = checked(GAP, GONE, "DELETE FROM events WHERE number = 9", forgotten={("events", 1): 100})
    assert counts(found) == {"lost": 1}, found.examples


def test_what_a_gap_says_was_skipped_must_not_be_there(checked: Callable[..., Audit]) -> None:
    found = checked(GAP, forgotten={("events", 1): 4})
    assert counts(found) == {"unexplained": 1}, found.examples
