"""Rows appended to a real table are what the messages said, and the server's errors are each row's own."""

from __future__ import annotations

import decimal
import json
from typing import Any

import psycopg2
import pytest

from fixtures.postgres import execute, query, scalar
from fixtures.tables import Pipeline

WAYS = pytest.mark.parametrize("transform", [None, dict], ids=["straight", "transformed"])


def messages(*records: Any) -> list[bytes]:
    return [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]


# --- types -----------------------------------------------------------------------------------------------------------

# type: (JSON value, its value in the table as text)
TYPES = {
    "boolean": [("true", "true"), ("false", "false"), ('"yes"', "true"), ("1", "true"), ("null", None)],
    "smallint": [("-32768", "-32768"), ('"12"', "12")],
    "integer": [("2147483647", "2147483647")],
    "bigint": [("9223372036854775807", "9223372036854775807"), ("-0", "0")],
    "real": [("1.5", "1.5"), ('"Infinity"', "Infinity"), ("16777217", "1.6777216e+07")],
    "double precision": [("0.1", "0.1"), ('"NaN"', "NaN"), ("9007199254740993", "9.007199254740992e+15")],
    "numeric": [
        ("0.10", "0.10"),
        ("123456789012345678901234567890.123456789012345678901234567890",) * 2,
        ("1e30", "1" + "0" * 30),
        ("-1E-20", "-0.00000000000000000001"),
        ('"NaN"', "NaN"),
        ("9" * 6000, "9" * 6000),
    ],
    "numeric(12,2)": [("1.005", "1.01"), ("7", "7.00")],
    "text": [('"a\\tb\\nc\\\\N\\r"', "a\tb\nc\\N\r"), ('""', ""), ("1.50", "1.50"), ("true", "true"), ('"ü😀"', "ü😀")],
    "varchar(3)": [('"abc"', "abc"), ('"abc  "', "abc")],
    "char(3)": [('"a"', "a  ")],
    "json": [('{"a":1.10}', '{"a":1.10}'), ('"x"', '"x"'), ("[]", "[]")],
    "jsonb": [('{"b":1.10,"a":[null]}', '{"a": [null], "b": 1.10}'), ('"x"', '"x"'), ("7.0", "7.0"), ("null", None)],
    "uuid": [('"A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"', "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11")],
    "bytea": [('"\\\\x00ff"', "\\x00ff"), ('"AbC0"', "\\xabc0")],
    "date": [('"2026-02-28"', "2026-02-28"), ('"infinity"', "infinity")],
    "time": [('"12:34:56.789"', "12:34:56.789")],
    "timestamp": [('"2026-01-02T03:04:05.678"', "2026-01-02 03:04:05.678")],
    "timestamptz": [
        ('"2026-01-02T03:04:05+02:00"', "2026-01-02 01:04:05+00"),
        ('"2026-01-02T03:04:05Z"', "2026-01-02 03:04:05+00"),
    ],
    "interval": [('"1 day 2 hours"', "1 day 02:00:00"), ('"P1DT2H"', "1 day 02:00:00")],
    "integer[]": [("[1, null, 3]", "{1,NULL,3}"), ("[[1],[2]]", "{{1},{2}}"), ('"{4,5}"', "{4,5}"), ("[]", "{}")],
    "numeric[]": [("[1.10, 2]", "{1.10,2}")],
    "text[]": [('["a,b", "\\"q\\\\", "NULL", null, ""]', '{"a,b","\\"q\\\\","NULL",NULL,""}')],
    "jsonb[]": [('[{"a": "x,y"}, [1]]', '{"{\\"a\\": \\"x,y\\"}",[1]}')],
    "inet": [('"10.0.0.1"', "10.0.0.1/32")],
    "int4range": [('"[1,5)"', "[1,5)")],
    "point": [('"(1,2)"', "(1,2)")],
    "money": [('"$12.34"', "$12.34")],
}  # fmt: skip


@WAYS
def test_every_type_takes_its_json_values(each_postgres_dsn: str, transform: Any) -> None:
    execute(each_postgres_dsn, f"ALTER DATABASE {each_postgres_dsn.rsplit('/', 1)[1]} SET timezone = 'UTC'")
    for name, all_cases in TYPES.items():
        # Python reads no integers as long as PostgreSQL's.
        cases = [case for case in all_cases if transform is None or len(case[0]) < 4000]
        execute(each_postgres_dsn, f"DROP TABLE IF EXISTS orders; CREATE TABLE orders (n serial, v {name})")
        values = [b'{"n": %d, "v": %s}' % (n, value.encode()) for n, (value, _) in enumerate(cases)]
        with Pipeline(each_postgres_dsn, transform=transform) as pipeline:
            assert pipeline.write(*values) == []
        found = [text for (text,) in query(each_postgres_dsn, "SELECT v::text FROM orders ORDER BY n")]
        expected = [text.rstrip() if name == "char(3)" and text else text for _, text in cases]
        assert (name, found) == (name, expected)


def test_json_arrays_become_arrays_with_their_values(postgres_dsn: str) -> None:
    execute(postgres_dsn, "CREATE TABLE orders (v text[])")
    nasty = ["", "NULL", "null", "{", "}", '"', "\\", ",", " x ", "a\nb\tc\r", "\\N", "ü", None]
    with Pipeline(postgres_dsn) as pipeline:
        assert pipeline.write(*messages({"v": nasty})) == []
    assert scalar(postgres_dsn, "SELECT v FROM orders") == nasty


def test_an_enum_a_domain_and_a_composite_take_their_text(postgres_dsn: str) -> None:
    execute(
        postgres_dsn,
        """
        CREATE TYPE colour AS ENUM ('red', 'blue'); CREATE DOMAIN percent AS numeric CHECK (VALUE <= 100);
        CREATE TYPE pair AS (a int, b text); CREATE TABLE orders (colour colour, share percent, pair pair)
        """,
    )
    with Pipeline(postgres_dsn) as pipeline:
        pipeline.write(*messages({"colour": "blue", "share": 99.5, "pair": '(1,"x y")'}))
    assert query(postgres_dsn, "SELECT colour::text, share, (pair).b FROM orders") == [
        ("blue", decimal.Decimal("99.5"), "x y")
    ]


# --- the server's errors ---------------------------------------------------------------------------------------------

ERRORS = [
    ('"v": 99999999999999999999', "bigint", "22003"),
    ('"v": 40000', "smallint", "22003"),
    ('"v": 12.0', "bigint", "22P02"),
    ('"v": {"a": "1"}', "bigint", "22P02"),
    ('"v": true', "numeric", "22P02"),
    ('"v": 12345678901.5', "numeric(12,2)", "22003"),
    ('"v": 1e400', "double precision", "22003"),
    ('"v": "yesterday-ish"', "timestamptz", "22007"),
    ('"v": "2026-02-30"', "date", "22008"),
    ('"v": "abcd"', "varchar(3)", "22001"),
    ('"v": "\\\\xzz"', "bytea", "22023"),
    ('"v": {"a": "\\u0000"}', "jsonb", "22P05"),
    ('"v": null', "text NOT NULL", "23502"),
    ('"w": 1', "text NOT NULL", "23502"),
    ('"v": 0', "int CHECK (v > 0)", "23514"),
    ('"v": [1, [2]]', "int[]", "22P02"),
]


@WAYS
def test_what_the_table_can_not_take_is_the_servers_error_for_that_row(postgres_dsn: str, transform: Any) -> None:
    found = []
    for fields, type_sql, _ in ERRORS:
        execute(postgres_dsn, f"DROP TABLE IF EXISTS orders; CREATE TABLE orders (n int, v {type_sql}, w int)")
        with Pipeline(postgres_dsn, transform=transform) as pipeline:
            records = pipeline.prepare(b'{"n": 1, %s}' % fields.encode())
            with pytest.raises(psycopg2.Error) as caught, pipeline.connection, pipeline.connection.cursor() as cursor:
                pipeline.writer.write(cursor, records.rows)
            found.append((fields, type_sql, caught.value.pgcode))
    assert found == ERRORS


def test_a_nul_is_found_before_the_server_is_asked_and_its_neighbours_are_rows(postgres_dsn: str) -> None:
    execute(postgres_dsn, "CREATE TABLE orders (id int, note text, doc json)")
    with Pipeline(postgres_dsn) as pipeline:
        reasons = pipeline.write(*messages({"id": 1}, {"id": 2, "note": "a\0"}, {"id": 3, "note": "b", "doc": ["\0"]}))
    assert reasons == ['column "note": a NUL character, which PostgreSQL\'s text can not hold']
    # json keeps the escape as it stands; jsonb would refuse it (above)
    assert query(postgres_dsn, "SELECT id, note, doc::text FROM orders") == [(1, None, None), (3, "b", '["\\u0000"]')]


# --- tables ----------------------------------------------------------------------------------------------------------


def test_missing_fields_take_defaults_and_generated_columns_their_own_value(each_postgres_dsn: str) -> None:
    execute(
        each_postgres_dsn,
        """
        CREATE TABLE orders (id int, state text DEFAULT 'new', at timestamptz DEFAULT now(), number serial,
                             twice int GENERATED ALWAYS AS (id * 2) STORED, row_id int GENERATED ALWAYS AS IDENTITY)
        """,
    )
    with Pipeline(each_postgres_dsn) as pipeline:
        assert (
            pipeline.write(
                *messages({"id": 1}, {"id": 2, "state": None}, {"id": 3, "state": "old", "number": 70}, {"row_id": 9})
            )
            == []
        )
    rows = query(each_postgres_dsn, "SELECT id, state, number, twice, at IS NOT NULL FROM orders ORDER BY id")
    assert [(id_, state, twice, made) for id_, state, _, twice, made in rows] == [
        (1, "new", 2, True),
        (2, None, 4, True),
        (3, "old", 6, True),
        (None, "new", None, True),
    ]
    assert scalar(each_postgres_dsn, "SELECT row_id FROM orders WHERE id IS NULL") == 9


def test_records_without_a_field_are_rows_of_defaults(each_postgres_dsn: str) -> None:
    execute(each_postgres_dsn, "CREATE TABLE orders (id serial, state text DEFAULT 'new')")
    with Pipeline(each_postgres_dsn) as pipeline:
        pipeline.write(b"{}", b'{"state": "x"}', b"{}")
    assert sorted(query(each_postgres_dsn, "SELECT state FROM orders")) == [("new",), ("new",), ("x",)]


def test_hostile_names_of_table_and_columns_are_only_names(each_postgres_dsn: str) -> None:
    execute(
        each_postgres_dsn,
        """
        CREATE SCHEMA "Mixed Schema"; CREATE TABLE keep (a int);
        CREATE TABLE "Mixed Schema"."o""; DROP TABLE keep; --" ("select" int, "a""); DROP TABLE keep; --" text,
                                                                "it's 100%" text, "back\\slash" text, "a.b" text)
        """,
    )
    record = {"select": 1, 'a"); DROP TABLE keep; --': "x", "it's 100%": "y", "back\\slash": "z", "a.b": "w"}
    name = '"Mixed Schema"."o""; DROP TABLE keep; --"'
    for transform in (None, dict):
        with Pipeline(each_postgres_dsn, table=name, transform=transform) as pipeline:
            assert pipeline.write(*messages(record)) == []
    assert query(each_postgres_dsn, f"SELECT * FROM {name}") == [(1, "x", "y", "z", "w")] * 2
    assert scalar(each_postgres_dsn, "SELECT count(*) FROM keep") == 0


def test_rows_reach_partitions_and_triggers(postgres_dsn: str) -> None:
    execute(
        postgres_dsn,
        """
        CREATE TABLE orders (id int, note text) PARTITION BY RANGE (id);
        CREATE TABLE low PARTITION OF orders FOR VALUES FROM (0) TO (10);
        CREATE TABLE high PARTITION OF orders FOR VALUES FROM (10) TO (20);
        CREATE FUNCTION shout() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN NEW.note := upper(NEW.note); RETURN NEW; END $$;
        CREATE TRIGGER shout BEFORE INSERT ON orders FOR EACH ROW EXECUTE FUNCTION shout();
        """,
    )
    with Pipeline(postgres_dsn) as pipeline:
        pipeline.write(*messages({"id": 1, "note": "a"}, {"id": 15, "note": "b"}))
    assert query(postgres_dsn, "SELECT * FROM low UNION ALL SELECT * FROM high") == [(1, "A"), (15, "B")]


def test_under_row_level_security_rows_are_inserted_as_the_policy_lets_them(postgres_dsn: str) -> None:
    execute(
        postgres_dsn,
        """
        CREATE TABLE orders (id int DEFAULT 3, state text DEFAULT 'new'); ALTER TABLE orders ENABLE ROW LEVEL SECURITY;
        ALTER TABLE orders FORCE ROW LEVEL SECURITY; CREATE POLICY p ON orders USING (true) WITH CHECK (id < 10);
        CREATE ROLE under_policy; GRANT INSERT ON orders TO under_policy;
        """,
    )
    try:
        role = postgres_dsn + "?options=-crole%3Dunder_policy"
        with Pipeline(role) as pipeline:
            assert pipeline.table.row_security
            pipeline.write(*messages({"id": 1}, {"id": 2, "state": None}, {}))
            with pytest.raises(psycopg2.Error) as caught:
                pipeline.write(*messages({"id": 11}))
            assert caught.value.pgcode == "42501"
        assert query(postgres_dsn, "SELECT id, state FROM orders ORDER BY id") == [(1, "new"), (2, None), (3, "new")]
    finally:
        execute(postgres_dsn, "DROP OWNED BY under_policy; DROP ROLE under_policy")


def test_the_sessions_encoding_and_settings_do_not_matter(postgres_dsn: str) -> None:
    execute(postgres_dsn, "CREATE TABLE orders (note text)")
    options = "?options=-cclient_encoding%3DLATIN1%20-cstandard_conforming_strings%3Doff"
    with Pipeline(postgres_dsn + options) as pipeline:
        pipeline.write(*messages({"note": "ü😀\\"}))
    assert query(postgres_dsn, "SELECT note FROM orders") == [("ü😀\\",)]


def test_a_table_of_a_thousand_columns(postgres_dsn: str) -> None:
    names = [f"c{number}" for number in range(1000)]
    execute(postgres_dsn, f"CREATE TABLE orders ({', '.join(f'{name} int' for name in names)})")
    with Pipeline(postgres_dsn) as pipeline:
        pipeline.write(*messages({name: at for at, name in enumerate(names)}, {"c999": 7}))
    assert query(postgres_dsn, "SELECT c0, c998, c999 FROM orders") == [(0, 998, 999), (None, None, 7)]


def test_ten_thousand_messages_are_ten_thousand_rows(each_postgres_dsn: str) -> None:
    execute(each_postgres_dsn, "CREATE TABLE orders (id int PRIMARY KEY, note text, price numeric)")
    values = [b'{"id": %d, "note": "note \\u00fc %d", "price": %d.%02d}' % (n, n, n, n % 100) for n in range(10_000)]
    values[1234] = b"?"
    with Pipeline(each_postgres_dsn) as pipeline:
        assert len(pipeline.write(*values)) == 1
    found = query(each_postgres_dsn, "SELECT count(*), sum(id), sum(price), count(DISTINCT note) FROM orders")
    prices = sum((decimal.Decimal(f"{n}.{n % 100:02}") for n in range(10_000) if n != 1234), decimal.Decimal())
    assert found == [(9_999, 49_995_000 - 1234, prices, 9_999)]
