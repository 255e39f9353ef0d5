"""Messages that can not become rows: each is a dead letter with its reason, and its neighbours are rows."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from fixtures.flights import flight, part
from fixtures.operations import BeforeOperation
from fixtures.postgres import PostgresServer, execute, query
from fixtures.sessions import counters, next_offset, order, order_ids, orders, session_of
from speedlayer.workers.checkpoint import WriteRows
from speedlayer.workers.errors import SinkMisconfigured
from speedlayer.workers.sinks.postgres import isolate

TABLE = """
CREATE TABLE customers (name text PRIMARY KEY);
INSERT INTO customers VALUES ('alice');
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF NEW.note = 'refused' THEN RAISE EXCEPTION 'notes like this are refused' USING HINT = 'write better ones'; END IF;
    RETURN NEW;
END $$;
CREATE TABLE orders (
    order_id  bigint PRIMARY KEY,
    note      text,
    code      varchar(3),
    quantity  smallint CHECK (quantity > 0),
    amount    numeric(6, 2),
    must      text NOT NULL DEFAULT 'here',
    customer  text REFERENCES customers DEFERRABLE INITIALLY DEFERRED,
    day       date,
    token     uuid,
    twin      bigint,
    document  jsonb,
    CONSTRAINT twins UNIQUE (twin) DEFERRABLE INITIALLY DEFERRED
);
CREATE TRIGGER refuse BEFORE INSERT ON orders FOR EACH ROW EXECUTE FUNCTION refuse();
INSERT INTO orders (order_id, twin) VALUES (1000, 77);
"""

# What is wrong with the message, and the SQLSTATE of its dead letter: the server's, or ours where we know its rule.
BAD_VALUES: dict[str, tuple[bytes, str]] = {
    "a NUL in a string": (b'{"order_id": 2, "note": "a\\u0000b"}', "22021"),
    "a number too large": (b'{"order_id": 2, "quantity": 40000}', "22003"),
    "a number with too many digits": (b'{"order_id": 2, "amount": 123456.78}', "22003"),
    "a null where none may be": (b'{"order_id": 2, "must": null}', "23502"),
    "a failed check": (b'{"order_id": 2, "quantity": -1}', "23514"),
    "a reference to nowhere, deferred": (b'{"order_id": 2, "customer": "bob"}', "23503"),
    "a deferred unique constraint": (b'{"order_id": 2, "twin": 77}', "23505"),
    "a text too long": (b'{"order_id": 2, "code": "toolong"}', "22001"),
    "a date that does not exist": (b'{"order_id": 2, "day": "2026-02-30"}', "22008"),
    "no uuid": (b'{"order_id": 2, "token": "nope"}', "22P02"),
    "what a trigger refuses": (b'{"order_id": 2, "note": "refused"}', "P0001"),
    "a NUL in jsonb": (b'{"order_id": 2, "document": {"a": "\\u0000"}}', "22P05"),
}

MODES = pytest.mark.parametrize(
    "settings", [{}, {"mode": "upsert", "key": "order_id"}], ids=lambda settings: settings.get("mode", "append")
)


@pytest.fixture
def dsn(postgres_dsn: str) -> str:
    execute(postgres_dsn, TABLE)
    return postgres_dsn


def letters(dsn: str, columns: str = '"offset", sqlstate') -> list[tuple[Any, ...]]:
    return query(dsn, f'SELECT {columns} FROM speedlayer.dead_letters ORDER BY partition, "offset"')


@MODES
@pytest.mark.parametrize("what", list(BAD_VALUES))
def test_a_bad_value_is_a_dead_letter_and_its_neighbours_are_rows(
    dsn: str, settings: dict[str, Any], what: str
) -> None:
    bad, sqlstate = BAD_VALUES[what]
    with session_of(dsn, **settings) as opened:
        values = [order(1), bad, order(3)]
        outcome = opened.session.write(flight(part(values, epoch=opened.take(0, start=500), start=500)))
    assert (outcome.rows, outcome.dead_lettered) == (2, 1)
    assert order_ids(dsn) == [1, 3, 1000]
    ((offset, found, reason, value),) = letters(dsn, '"offset", sqlstate, reason, value')
    assert (offset, found) == (501, sqlstate)
    assert reason
    assert bytes(value) == bad
    assert next_offset(dsn) == 503
    assert counters(dsn) == (2, 0, 1)


@MODES
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"{", "not JSON"),
        (b"", "empty value"),
        (None, "null value"),
        (b"[1, 2]", "an array"),
        (b"7", "a number"),
        (b'{"order_id": 2, "note": "\xff"}', "not UTF-8"),
        (b'{"order_id": 2, "nobody": 1}', "nobody"),
        (b"[" * 100_000, "nested"),
    ],
    ids=repr,
)
def test_what_is_no_record_is_a_dead_letter(dsn: str, settings: dict[str, Any], bad: bytes | None, reason: str) -> None:
    with session_of(dsn, **settings) as opened:
        opened.session.write(flight(part([order(1), bad, order(3)], epoch=opened.take(0))))
    assert order_ids(dsn) == [1, 3, 1000]
    ((offset, found, value),) = letters(dsn, '"offset", reason, value')
    assert offset == 1
    assert reason in found
    assert (None if value is None else bytes(value)) == bad


@MODES
def test_every_bad_value_at_once_among_good_rows(each_postgres_dsn: str, settings: dict[str, Any]) -> None:
    dsn = each_postgres_dsn
    execute(dsn, TABLE)
    values: list[bytes | None] = []
    for number, (bad, _) in enumerate(BAD_VALUES.values()):
        values += [order(10 * number + 3), bad, order(10 * number + 4)]
    values[1:1] = orders(5000, 5001)
    with session_of(dsn, **settings) as opened:
        outcome = opened.session.write(flight(part(values, epoch=opened.take(0))))
    assert (outcome.rows, outcome.dead_lettered) == (2 * len(BAD_VALUES) + 2, len(BAD_VALUES))
    assert [sqlstate for _, sqlstate in letters(dsn)] == [sqlstate for _, sqlstate in BAD_VALUES.values()]
    assert len(order_ids(dsn)) == 2 * len(BAD_VALUES) + 3


def test_a_transform_that_raises_makes_a_dead_letter(dsn: str) -> None:
    def transform(record: Any) -> Any:
        return {"order_id": record["order_id"], "amount": 10 / record["divisor"]}

    with session_of(dsn, transform=transform) as opened:
        values = [order(1, divisor=2), order(2, divisor=0), order(3, divisor=5), order(4)]
        outcome = opened.session.write(flight(part(values, epoch=opened.take(0))))
    assert (outcome.rows, outcome.dead_lettered) == (2, 2)
    reasons = [reason for (reason,) in letters(dsn, "reason")]
    assert "ZeroDivisionError" in reasons[0]
    assert "divisor" in reasons[1]


def test_an_exit_in_a_transform_is_the_records_fault_alone(dsn: str) -> None:
    def transform(record: Any) -> Any:
        if record["order_id"] == 2:
            raise SystemExit("no such order")
        return record

    with session_of(dsn, transform=transform) as opened:
        outcome = opened.session.write(flight(part(orders(1, 2, 3), epoch=opened.take(0))))
    assert (outcome.rows, outcome.dead_lettered) == (2, 1)


def test_a_dead_letter_keeps_the_message_byte_for_byte(dsn: str) -> None:
    key, value = bytes(range(256)), b'{"order_id": \0\\x\t\n\r\xff\xfe' + os.urandom(1000)
    headers = {0: [("trace", b"abc"), ("trace", b"again"), ("raw", b"\0\xff"), ("nothing", None), ("n\0me", b"x")]}
    with session_of(dsn, worker="worker-3") as opened:
        messages = part([value], epoch=opened.take(7, start=41), partition=7, start=41, keys=[key], headers=headers)
        opened.session.write(flight(messages))
    columns = (
        'cluster_id, consumer_group, pipeline, topic, partition, lane, "offset", key, value, headers, worker,'
        " extract(epoch FROM message_timestamp)::bigint, at > now() - interval '1 minute'"
    )
    ((*identity, found_key, found_value, found_headers, worker, timestamp, recent),) = letters(dsn, columns)
    assert identity == ["cluster", "group", "orders", "orders", 7, 0, 41]
    assert (bytes(found_key), bytes(found_value)) == (key, value)
    assert found_headers == [
        ["trace", "abc"],
        ["trace", "again"],
        ["raw", {"base64": "AP8="}],
        ["nothing", None],
        [{"base64": "bgBtZQ=="}, "x"],
    ]
    assert (worker, timestamp, recent) == ("worker-3", 1_700_000_000, True)


def test_the_servers_own_words_are_kept(dsn: str) -> None:
    with session_of(dsn) as opened:
        values = [order(1), order(2, note="refused"), order(3, customer="bob")]
        opened.session.write(flight(part(values, epoch=opened.take(0))))
    (refused, reference) = letters(dsn, "reason, detail")
    assert refused[0] == "notes like this are refused"
    assert "write better ones" in refused[1]
    assert "refuse()" in refused[1]
    assert "(bob)" in reference[0]


def test_a_batch_in_which_nothing_is_good_is_all_dead_letters(dsn: str) -> None:
    with session_of(dsn) as opened:
        values = [order(number, quantity=-1) for number in range(200)]
        outcome = opened.session.write(flight(part(values, epoch=opened.take(0))))
    assert (outcome.rows, outcome.dead_lettered) == (0, 200)
    assert next_offset(dsn) == 200


def test_a_few_guilty_rows_cost_few_statements(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = 0
    try_rows = isolate._try

    def counting(*arguments: Any) -> Any:
        nonlocal tries
        tries += 1
        return try_rows(*arguments)

    monkeypatch.setattr(isolate, "_try", counting)
    with session_of(dsn) as opened:
        values = [order(5000 + number, quantity=-1 if number in (17, 500, 1023) else 1) for number in range(1024)]
        outcome = opened.session.write(flight(part(values, epoch=opened.take(0))))
    assert (outcome.rows, outcome.dead_lettered) == (1021, 3)
    assert tries <= 3 * 2 * 10
    assert [offset for (offset,) in letters(dsn, '"offset"')] == [17, 500, 1023]


def test_an_upsert_with_guilty_rows_ends_with_the_last_good_record_of_each_key(dsn: str) -> None:
    """The search writes halves of halves: each must come after those before it."""
    with session_of(dsn, mode="upsert", key="order_id") as opened:
        epoch = opened.take(0)
        values = [
            order(1, note="first"),
            order(2, quantity=-1),
            order(1, note="second"),
            order(3, quantity=-1),
            order(4, note="first"),
            order(5, quantity=-1),
            order(4, note="second"),
            order(1, quantity=-1),
        ]
        assert opened.session.write(flight(part(values, epoch=epoch))).dead_lettered == 4
    assert query(dsn, "SELECT order_id, note FROM orders WHERE order_id < 9 ORDER BY order_id") == [
        (1, "second"),
        (4, "second"),
    ]
    assert letters(dsn, '"offset"') == [(1,), (3,), (5,), (7,)]


def test_dead_letters_of_several_partitions_name_theirs(dsn: str) -> None:
    with session_of(dsn) as opened:
        epoch = opened.take(0, 1)
        opened.session.write(
            flight(
                part([order(1), b"x", order(2, quantity=-1)], epoch=epoch),
                part([order(3, quantity=-1), order(4)], partition=1, epoch=epoch),
            )
        )
    assert letters(dsn, 'partition, "offset"') == [(0, 1), (0, 2), (1, 0)]
    assert (counters(dsn, 0), counters(dsn, 1)) == ((1, 0, 2), (1, 0, 1))


# --- is it the rows, or is it the sink? -------------------------------------------------------------------------------


@pytest.fixture
def guarded(postgres: PostgresServer, postgres_dsn: str) -> Any:
    """A table under a row-level policy, and the DSN of a role to which it applies."""
    name = postgres_dsn.rsplit("/", 1)[1]
    role = f"app_{name}"
    execute(postgres_dsn, "CREATE TABLE orders (order_id bigint, quantity int)")
    execute(postgres_dsn, f"CREATE ROLE {role} LOGIN PASSWORD 'secret'; GRANT CREATE ON DATABASE {name} TO {role}")
    execute(postgres_dsn, f"GRANT INSERT, SELECT ON orders TO {role}; ALTER TABLE orders ENABLE ROW LEVEL SECURITY")
    execute(postgres_dsn, "CREATE POLICY good ON orders USING (true) WITH CHECK (quantity > 0)")
    yield postgres_dsn, postgres.dsn(name, user=role, password="secret")
    execute(postgres_dsn, f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


def test_a_row_that_a_policy_refuses_is_a_dead_letter(guarded: tuple[str, str]) -> None:
    owner, dsn = guarded
    with session_of(dsn) as opened:
        epoch = opened.take(0)
        values = [order(1, quantity=1), order(2, quantity=-1), order(3, quantity=1)]
        outcome = opened.session.write(flight(part(values, epoch=epoch)))
        assert (outcome.rows, outcome.dead_lettered) == (2, 1)
        alone = flight(part([order(4, quantity=-1)], epoch=epoch, start=3))
        assert opened.session.write(alone).dead_lettered == 1
    assert order_ids(owner) == [1, 3]
    assert letters(owner) == [(1, "42501"), (3, "42501")]


def test_a_policy_that_refuses_every_row_is_the_sinks(guarded: tuple[str, str]) -> None:
    owner, dsn = guarded
    with session_of(dsn) as opened:
        epoch = opened.take(0)
        execute(owner, "DROP POLICY good ON orders")
        flying = flight(part([order(1, quantity=1), order(2, quantity=1)], epoch=epoch))
        with pytest.raises(SinkMisconfigured) as caught:
            opened.session.write(flying)
        assert caught.value.sqlstate == "42501"
        execute(owner, "CREATE POLICY good ON orders USING (true)")
        assert opened.session.write(flying).rows == 2


# --- a table that is altered while the daemon runs --------------------------------------------------------------------


@pytest.mark.parametrize("transform", [None, lambda record: record], ids=["plain", "transformed"])
def test_a_column_that_was_added_just_now_costs_no_row(dsn: str, transform: Callable[[Any], Any] | None) -> None:
    with session_of(dsn, transform=transform) as opened:
        epoch = opened.take(0)
        opened.session.write(flight(part(orders(1), epoch=epoch)))
        execute(dsn, "ALTER TABLE orders ADD COLUMN colour text")
        outcome = opened.session.write(flight(part([order(2, colour="red")], epoch=epoch, start=1)))
    assert (outcome.rows, outcome.dead_lettered) == (1, 0)
    assert query(dsn, "SELECT colour FROM orders WHERE order_id = 2") == [("red",)]


def test_a_column_that_was_widened_just_now_costs_no_row(dsn: str) -> None:
    with session_of(dsn) as opened:
        epoch = opened.take(0)
        opened.session.write(flight(part(orders(1), epoch=epoch)))
        execute(dsn, "ALTER TABLE orders ALTER COLUMN code TYPE varchar(10), ALTER COLUMN quantity TYPE bigint")
        values = [order(2, code="toolong"), order(3, quantity=40_000)]
        outcome = opened.session.write(flight(part(values, epoch=epoch, start=1)))
    assert (outcome.rows, outcome.dead_lettered) == (2, 0)


def test_a_type_that_changes_between_encoding_and_writing_costs_no_row(
    dsn: str, before_operation: BeforeOperation
) -> None:
    """A text of the old plan is no JSON for the new column: the rows are encoded again before any is blamed."""
    with session_of(dsn) as opened:
        epoch = opened.take(0)
        alter = "ALTER TABLE orders ALTER COLUMN code TYPE jsonb USING null"
        before_operation[WriteRows] = lambda _: execute(dsn, alter)
        outcome = opened.session.write(flight(part([order(1, code="abc")], epoch=epoch)))
    assert (outcome.rows, outcome.dead_lettered) == (1, 0)
    assert query(dsn, "SELECT code FROM orders WHERE order_id = 1") == [("abc",)]


# --- a database that is not UTF-8 -------------------------------------------------------------------------------------


def test_a_character_that_the_database_does_not_have_is_a_dead_letter(postgres: PostgresServer) -> None:
    name = f"latin_{os.urandom(4).hex()}"
    postgres.execute(f"CREATE DATABASE {name} ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    try:
        dsn = postgres.dsn(name)
        execute(dsn, "CREATE TABLE orders (order_id bigint, note text)")
        with session_of(dsn) as opened:
            epoch = opened.take(0)
            values = [order(1, note="Zoë"), order(2, note="漢字"), order(3, **{"漢": 1})]
            headers = {1: [("name", "漢".encode())]}
            outcome = opened.session.write(flight(part(values, epoch=epoch, headers=headers)))
        assert (outcome.rows, outcome.dead_lettered) == (1, 2)
        assert query(dsn, "SELECT note FROM orders") == [("Zoë",)]
        assert letters(dsn)[0] == (1, "22P05")
    finally:
        postgres.drop_database(name)
