"""The text that COPY is given says exactly what the messages said. No server: the cursor only listens."""

from __future__ import annotations

import datetime
import decimal
import enum
import io
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.flights import flight, part
from fixtures.tables import column, read_copy, sink, table
from speedlayer.workers.decoding.exact import exact_float
from speedlayer.workers.decoding.json_records import decode_flight
from speedlayer.workers.decoding.records import Records, apply_transform
from speedlayer.workers.sinks.postgres.encode import ENCODERS_LIMIT
from speedlayer.workers.sinks.postgres.table import Table
from speedlayer.workers.sinks.postgres.write import TableWriter, UnwritableRows

ORDERS = table(
    column("id", "int8", not_null=True),
    column("note"),
    column("price", "numeric"),
    column("weight", "float8"),
    column("paid", "bool"),
    column("at", "timestamptz"),
    column("doc", "jsonb"),
    column("tags", "text[]"),
    primary_key=["id"],
)


class Copied(NamedTuple):
    columns: tuple[str, ...]
    rows: list[list[str | None]]


class Listener:
    """A cursor that keeps what it is told."""

    def __init__(self) -> None:
        self.statements: list[str] = []
        self.copies: list[Copied] = []

    def execute(self, statement: str) -> None:
        self.statements.append(statement)

    def copy_expert(self, statement: str, file: io.BytesIO, size: int) -> None:
        self.statements.append(statement)
        names = statement[
            statement.rindex("(", 0, statement.index(") FROM STDIN")) + 1 : statement.index(") FROM STDIN")
        ]
        self.copies.append(Copied(tuple(name.strip('"') for name in names.split(", ")), read_copy(file.read())))


def prepared(writer: TableWriter, values: Sequence[bytes | None], transform: Any = None) -> Records:
    records = decode_flight(flight(part(values)), writer.decoder(transformed=transform is not None))
    if transform is not None:
        records = apply_transform(records, transform)
    return writer.prepare(records)


def written(
    values: Sequence[bytes | None], plan: Table = ORDERS, *, transform: Any = None, **settings: Any
) -> Listener:
    writer = TableWriter(plan, sink(**settings))
    records = prepared(writer, values, transform)
    assert not records.dead
    listener = Listener()
    writer.write(listener, records.rows)  # type: ignore[arg-type]
    return listener


def fields(value: bytes, *, transform: Any = None, plan: Table = ORDERS, **settings: Any) -> dict[str, str | None]:
    """One message's columns as text."""
    (copied,) = written([value], plan, transform=transform, **settings).copies
    (row,) = copied.rows
    return dict(zip(copied.columns, row, strict=True))


def reason(value: bytes, *, transform: Any = None, plan: Table = ORDERS, **settings: Any) -> tuple[str, str | None]:
    """Why the message is dead, though its neighbours are not."""
    good = b'{"id": 1, "note": "x"}'
    records = prepared(TableWriter(plan, sink(**settings)), [good, value, good], transform)
    assert len(records.rows) == 2
    (dead,) = records.dead
    assert dead.ordinal == 1
    return dead.reason, dead.sqlstate


def same(record: Any) -> Any:
    return record


WAYS = pytest.mark.parametrize("transform", [None, same], ids=["straight", "transformed"])

# --- values ----------------------------------------------------------------------------------------------------------

DIGITS = [
    "0.1",
    "1.10",
    "-0.000000000000000000000000000000000001",
    "123456789012345678901234567890.123456789012345678901234567890",
    "98765432109876543210",
    "1e400",
    "1E-7",
    "9" * 3000 + "." + "1" * 3000,
]


@WAYS
@pytest.mark.parametrize("digits", DIGITS, ids=lambda digits: digits[:20])
@pytest.mark.parametrize("name", ["price", "weight", "note"])
def test_a_number_keeps_every_digit(digits: str, name: str, transform: Any) -> None:
    assert fields(b'{"id": 1, "%s": %s}' % (name.encode(), digits.encode()), transform=transform)[name] == digits


def test_an_integer_longer_than_python_reads_keeps_its_digits() -> None:
    digits = "7" * 20_000
    assert fields(b'{"id": 1, "price": %s, "note": %s}' % ((digits.encode(),) * 2)) == {
        "id": "1",
        "price": digits,
        "note": digits,
    }


@WAYS
@pytest.mark.parametrize(
    ("json_value", "text"),
    [
        ('"plain"', "plain"),
        ('""', ""),
        ("null", None),
        ("7", "7"),
        ("1.50", "1.50"),
        ("true", "true"),
        ("false", "false"),
        ('"\\\\N"', "\\N"),
        ('"\\\\."', "\\."),
        ('"N"', "N"),
        ('"None"', "None"),
        ('"a\\tb\\nc\\rd\\\\e"', "a\tb\nc\rd\\e"),
        ('"\\u00fc\\ud83d\\ude00"', "ü😀"),
        ('"ü😀"', "ü😀"),
        ('"\\u0001\\u001f\\u007f"', "\x01\x1f\x7f"),
        ('"say \\"hi\\""', 'say "hi"'),
    ],
)
def test_a_text_column_takes_the_text_of_any_value(json_value: str, text: str | None, transform: Any) -> None:
    assert fields(f'{{"id": 1, "note": {json_value}}}'.encode(), transform=transform)["note"] == text


@WAYS
def test_objects_and_arrays_in_a_text_column_are_their_json(transform: Any) -> None:
    found = fields(b'{"id": 1, "note": {"a": [1.10, "x\\ty"]}}', transform=transform)["note"]
    assert found is not None
    assert json.loads(found) == {"a": [1.1, "x\ty"]}
    assert "1.10" in found


@WAYS
@pytest.mark.parametrize(
    "document", ['{"a": [1.10, "\\u00fc\\n", null]}', '"text"', "1.10", "true", "[]", '{"n": 1e400}']
)
def test_a_json_column_takes_the_value_itself(document: str, transform: Any) -> None:
    found = fields(f'{{"id": 1, "doc": {document}}}'.encode(), transform=transform)["doc"]
    assert found is not None
    assert json.loads(found, parse_float=str) == json.loads(document, parse_float=str)


@WAYS
@pytest.mark.parametrize("character", ["\\", "\t", "\n", "\r"])
def test_each_character_that_copy_wants_escaped_is_escaped_for_itself(character: str, transform: Any) -> None:
    text = f"a{character}b"
    value = json.dumps({"id": 1, "note": text, "at": text, "doc": text, "tags": [text]}).encode()
    found = fields(value, transform=transform)
    assert (found["note"], found["at"]) == (text, text)
    assert json.loads(found["doc"] or "") == text
    assert found["tags"] == '{"' + text.replace("\\", "\\\\") + '"}'


@WAYS
@pytest.mark.parametrize("document", ['{"a": ["x\\ty"]}', "[1, 1.10]"])
def test_an_object_where_numbers_were_is_left_to_the_server_as_json(document: str, transform: Any) -> None:
    values = [b'{"id": 1, "price": 1}', b'{"id": 2, "price": %s}' % document.encode()]
    (copied,) = written(values, transform=transform).copies
    prices = [row[copied.columns.index("price")] for row in copied.rows]
    assert prices[0] == "1"
    assert json.loads(prices[1] or "", parse_float=str) == json.loads(document, parse_float=str)


def test_a_json_column_keeps_the_message_as_it_stands() -> None:
    assert fields(b'{"id": 1, "doc": {"a" : 1,\n\t"b":"\\\\n"} }')["doc"] == '{"a" : 1,\n\t"b":"\\\\n"}'


@WAYS
def test_null_is_sql_null_in_a_json_column_too(transform: Any) -> None:
    assert fields(b'{"id": 1, "doc": null, "tags": null}', transform=transform) == {
        "id": "1",
        "doc": None,
        "tags": None,
    }


@WAYS
@pytest.mark.parametrize(
    ("json_value", "literal"),
    [
        ("[]", "{}"),
        ('["a", "b c", null, "NULL", ""]', '{"a","b c",NULL,"NULL",""}'),
        ('["q\\"uote", "back\\\\slash", "{,}"]', '{"q\\"uote","back\\\\slash","{,}"}'),
        ("[1, 2.50, true]", '{"1","2.50","true"}'),
        ('[["a"], ["b"]]', '{{"a"},{"b"}}'),
        ('"{x,y}"', "{x,y}"),
    ],
)
def test_an_array_column_takes_a_json_array_or_a_literal(json_value: str, literal: str, transform: Any) -> None:
    assert fields(f'{{"id": 1, "tags": {json_value}}}'.encode(), transform=transform)["tags"] == literal


@WAYS
def test_the_elements_of_a_json_array_column_are_values_of_their_own(transform: Any) -> None:
    plan = table(column("docs", "jsonb[]"))
    assert fields(b'{"docs": [{"a": 1}, [1], "x", null]}', plan=plan, transform=transform)["docs"] in (
        '{"{\\"a\\": 1}","[1]","\\"x\\"",NULL}',
        '{"{\\"a\\":1}","[1]","\\"x\\"",NULL}',
    )


@WAYS
def test_numbers_in_quotes_and_booleans_are_left_to_the_server(transform: Any) -> None:
    value = b'{"id": "12", "price": "NaN", "weight": true, "paid": "yes", "at": "1700000000"}'
    found = fields(value, transform=transform)
    assert {name: text and text.lower() for name, text in found.items()} == {
        "id": "12",
        "price": "nan",
        "weight": "true",
        "paid": "yes",
        "at": "1700000000",
    }


class Colour(str, enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("at", datetime.datetime(2026, 1, 2, 3, 4, 5, 678, datetime.timezone.utc), "2026-01-02T03:04:05.000678+00:00"),
        ("at", datetime.date(2026, 1, 2), "2026-01-02"),
        ("note", datetime.time(3, 4), "03:04:00"),
        ("note", datetime.timedelta(days=-1, seconds=3), "-1 days 3 seconds 0 microseconds"),
        ("price", decimal.Decimal("1.10"), "1.10"),
        ("price", decimal.Decimal("NaN"), "NaN"),
        ("price", 2.5, "2.5"),
        ("price", float("inf"), "inf"),
        ("price", exact_float("7.70"), "7.70"),
        ("note", float("-inf"), "-Infinity"),
        ("note", decimal.Decimal("1.10"), "1.10"),
        ("note", uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        ("note", b"\x00\xff", "\\x00ff"),
        ("note", bytearray(b"a"), "\\x61"),
        ("note", Colour.RED, "red"),
        ("note", Level.HIGH, "3"),
        ("id", Level.HIGH, "3"),
        ("note", {"a": decimal.Decimal("1.10")}, '{"a":1.10}'),
        ("note", ("a", 1), '["a",1]'),
        ("doc", "text", '"text"'),
        ("doc", {"x": exact_float("1.50")}, '{"x":1.50}'),
        ("tags", ("a", Colour.RED), '{"a","red"}'),
        ("paid", True, "True"),
    ],
)
def test_a_transform_may_make_python_values(name: str, value: Any, text: str) -> None:
    assert fields(b'{"id": 1}', transform=lambda record: {**record, name: value})[name] == text


# --- what can not be written -----------------------------------------------------------------------------------------

NUL = "a NUL character, which PostgreSQL's text can not hold"


@WAYS
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (b'{"id": 1, "note": "a\\u0000b"}', "note"),
        (b'{"id": 1, "price": "\\u0000"}', "price"),
        (b'{"id": 1, "tags": ["\\u0000"]}', "tags"),
    ],
)
def test_a_nul_kills_only_its_row(value: bytes, name: str, transform: Any) -> None:
    assert reason(value, transform=transform) == (f'column "{name}": {NUL}', "22021")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("\ud800", "not valid Unicode"),
        (object(), 'column "note": a object can not be written to a column'),
        ({1, 2}, 'column "note": a set can not be written to a column'),
        ({"a": object()}, 'column "note": a object can not be written as JSON'),
        (10**5000, "can not be written: Exceeds the limit"),
        (1 + 2j, 'column "note": a complex can not be written to a column'),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isprintable() else type(value).__name__,
)
def test_a_value_without_a_text_kills_only_its_row(value: Any, says: str) -> None:
    records = prepared(
        TableWriter(ORDERS, sink()),
        [b'{"id": 1}', b'{"id": 2}', b'{"id": 3}'],
        lambda record: {**record, "note": value if record["id"] == 2 else "fine"},
    )
    assert len(records.rows) == 2
    (dead,) = records.dead
    assert dead.reason.startswith(says)


def test_a_document_nested_too_deeply_by_a_transform_kills_only_its_row() -> None:
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    records = prepared(
        TableWriter(ORDERS, sink()), [b'{"id": 1}', b'{"id": 2}'], lambda r: {**r, "doc": nested if r["id"] == 2 else 1}
    )
    assert [dead.reason for dead in records.dead] == ['column "doc": nested too deeply']


@WAYS
def test_an_unknown_field_kills_only_its_row_and_names_the_field(transform: Any) -> None:
    assert (
        reason(b'{"id": 1, "nope": 1, "no\\"pe": 2}', transform=transform)[0] == 'no column for field "nope", "no"pe"'
    )


@WAYS
def test_unknown_fields_are_left_out_when_the_sink_says_so(transform: Any) -> None:
    assert fields(b'{"id": 1, "nope": {"a": 1}}', transform=transform, unknown_fields="ignore") == {"id": "1"}


@WAYS
@pytest.mark.parametrize("unknown_fields", ["error", "ignore"])
def test_a_generated_column_is_not_a_records_business(transform: Any, unknown_fields: Any) -> None:
    plan = table(column("id", "int8"), column("note"), column("double", "int8", generated=True))
    value = b'{"id": 1, "double": 2}'
    if unknown_fields == "error":
        assert reason(value, plan=plan, transform=transform)[0] == 'the table computes column "double" itself'
    else:
        assert fields(value, plan=plan, transform=transform, unknown_fields="ignore") == {"id": "1"}


@WAYS
@pytest.mark.parametrize(
    ("value", "says"),
    [
        (b'{"note": "x"}', ('key field "id" is missing', None)),
        (b'{"id": null, "note": "x"}', ('key field "id" is null', "23502")),
    ],
)
@pytest.mark.parametrize("type_name", ["int8", "text", "numeric", "jsonb"])
def test_an_upsert_needs_its_key(value: bytes, says: Any, type_name: str, transform: Any) -> None:
    plan = table(column("id", type_name), column("note"), primary_key=["id"])
    if type_name == "text":
        value = value.replace(b": 1", b': "1"')
    assert reason(value, plan=plan, transform=transform, mode="upsert") == says


def test_a_field_name_that_is_no_text_kills_only_its_row() -> None:
    found = reason(b'{"id": 2}', transform=lambda record: {1: 2} if record["id"] == 2 else record)
    assert found[0] == "a field's name must be a text, not 1"


def test_rows_that_were_never_prepared_are_refused_before_anything_is_sent() -> None:
    listener = Listener()
    with pytest.raises(UnwritableRows) as caught:
        TableWriter(ORDERS, sink()).write(listener, [{"id": 1}, {"nope": 1}, {"id": 2, "note": "\0"}])  # type: ignore[arg-type]
    assert caught.value.reasons == {1: ('no column for field "nope"', None)}
    with pytest.raises(UnwritableRows) as caught:
        TableWriter(ORDERS, sink()).write(listener, [{"id": 1}, {"id": 2, "note": "\0"}])  # type: ignore[arg-type]
    assert caught.value.reasons == {1: (f'column "note": {NUL}', "22021")}
    assert listener.statements == []


# --- columns and defaults --------------------------------------------------------------------------------------------

DEFAULTS = table(
    column("id", "int8"), column("note"), column("state", default="constant"), column("at", default="computed")
)


@WAYS
def test_columns_that_no_record_has_are_not_written(transform: Any) -> None:
    (copied,) = written([b'{"note": "x", "id": 1}', b'{"id": 2}'], transform=transform).copies
    assert copied == (("note", "id"), [["x", "1"], [None, "2"]]) or copied == (
        ("id", "note"),
        [["1", "x"], ["2", None]],
    )


@WAYS
def test_a_missing_field_takes_the_columns_default_and_null_stays_null(transform: Any) -> None:
    values = [
        b'{"id": 1}',
        b'{"id": 2, "state": "new"}',
        b'{"id": 3, "state": null, "at": "now"}',
        b'{"id": 4}',
        b'{"id": 5, "at": "then", "note": "n"}',
    ]
    found = {
        row[0]: dict(zip(copied.columns, row, strict=True))
        for copied in written(values, DEFAULTS, transform=transform).copies
        for row in copied.rows
    }
    assert found == {
        "1": {"id": "1", "note": None},
        "2": {"id": "2", "note": None, "state": "new"},
        "3": {"id": "3", "note": None, "state": None, "at": "now"},
        "4": {"id": "4", "note": None},
        "5": {"id": "5", "note": "n", "at": "then"},
    }


@WAYS
def test_records_without_any_field_are_rows_of_defaults(transform: Any) -> None:
    assert written([b"{}", b"{}"], DEFAULTS, transform=transform).statements == [
        'INSERT INTO "public"."orders" SELECT FROM pg_catalog.generate_series(1, 2)'
    ]


@WAYS
def test_hostile_column_names_are_quoted_and_never_become_code(transform: Any) -> None:
    names = [
        '"; drop table x; --',
        "a'b",
        "back\\slash",
        "tab\there",
        "{r.c0}",
        "%s",
        "ü",
        "class",
        "speedlayer number",
    ]
    plan = table(*[column(name, "text") for name in names])
    record = {name: f"value of {name}" for name in names}
    listener = Listener()
    writer = TableWriter(plan, sink())
    writer.write(listener, prepared(writer, [json.dumps(record).encode()], transform).rows)  # type: ignore[arg-type]
    (statement,) = listener.statements
    assert sorted(listener.copies[0].rows[0]) == sorted(record.values())
    assert '"""; drop table x; --"' in statement
    assert reason(b'{"c0": 1}', plan=table(column("id"), column("note"), column('"')), transform=transform)[0] == (
        'no column for field "c0"'
    )


def test_a_slice_of_the_rows_can_be_written_by_itself() -> None:
    writer = TableWriter(ORDERS, sink())
    rows = prepared(writer, [b'{"id": %d, "note": "\\t"}' % number for number in range(10)]).rows
    for slice_of_rows in (rows[3:5], [rows[9]], rows, rows[:1]):
        listener = Listener()
        writer.write(listener, slice_of_rows)  # type: ignore[arg-type]
        (copied,) = listener.copies
        assert [row[copied.columns.index("id")] for row in copied.rows] == [
            str(rows.index(row)) for row in slice_of_rows
        ]
    writer.write(Listener(), [])  # type: ignore[arg-type]


def test_rows_stay_writable_when_later_flights_have_widened_the_shape() -> None:
    writer = TableWriter(ORDERS, sink())
    old = prepared(writer, [b'{"id": 1}']).rows
    assert fields_of(writer, prepared(writer, [b'{"id": 2, "note": {"a": 1}}']).rows) == [
        {"id": "2", "note": '{"a": 1}'}
    ]
    assert fields_of(writer, old) == [{"id": "1"}]


def fields_of(writer: TableWriter, rows: Sequence[Any]) -> list[dict[str, str | None]]:
    listener = Listener()
    writer.write(listener, rows)  # type: ignore[arg-type]
    return [dict(zip(copied.columns, row, strict=True)) for copied in listener.copies for row in copied.rows]


def test_the_generated_functions_do_not_pile_up_with_the_ways_in_which_records_differ() -> None:
    plan = table(column("id", "int8"), *[column(f"f{at}", default="constant") for at in range(9)])
    writer = TableWriter(plan, sink())
    values = [
        json.dumps({"id": mask, **{f"f{at}": "x" for at in range(9) if mask >> at & 1}}).encode() for mask in range(512)
    ]
    records = prepared(writer, values)
    listener = written_rows(writer, records)
    assert sorted(int(row[copied.columns.index("id")] or 0) for copied in listener.copies for row in copied.rows) == [
        *range(512)
    ]
    functions = len(writer._shape_of(records.rows).encoders)
    assert 0 < functions <= ENCODERS_LIMIT < len(listener.copies)


# --- any record at all -----------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**25), 10**25),
    st.decimals(allow_nan=False, allow_infinity=False, places=3),
    TEXTS,
    st.sampled_from(["\\N", "\\.", "\t", "\n", "\\", "", "None", "UNSET"]),
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))
RECORDS = st.dictionaries(st.sampled_from(["id", "note", "price", "doc", "paid", "nope"]), VALUES, max_size=6)


def message_of(record: Mapping[str, Any], ascii_only: bool) -> bytes:
    """The record as JSON, digit by digit, by hand (the standard library would make floats of decimals)."""
    return as_json(record, ascii_only).encode()


def as_json(value: Any, ascii_only: bool) -> str:
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, Mapping):
        pairs = [
            f"{json.dumps(key, ensure_ascii=ascii_only)}: {as_json(item, ascii_only)}" for key, item in value.items()
        ]
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(as_json(item, ascii_only) for item in value) + "]"
    return json.dumps(value, ensure_ascii=ascii_only)


def text_of(name: str, value: Any) -> Any:
    """What the column's input function must get; JSON as the value that it stands for."""
    if value is None:
        return None
    if name == "doc" or isinstance(value, (dict, list)):
        return ("json", json.loads(as_json(value, True), parse_float=str, parse_int=str))
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else str(value)


@settings(max_examples=800, deadline=None)
@given(st.lists(RECORDS, min_size=1, max_size=6), st.booleans(), st.sampled_from([None, same]))
def test_every_record_is_written_as_it_stands(records: list[dict[str, Any]], ascii_only: bool, transform: Any) -> None:
    writer = TableWriter(ORDERS, sink())
    found = prepared(writer, [message_of(record, ascii_only) for record in records], transform)
    alive = [record for record in records if "nope" not in record]
    assert len(found.rows) == len(alive)
    assert len(found.dead) == len(records) - len(alive)
    if not any(alive):
        return
    (copied,) = written_rows(writer, found).copies
    assert set(copied.columns) == {name for record in alive for name in record}
    for record, row in zip(alive, copied.rows, strict=True):
        for name, text in zip(copied.columns, row, strict=True):
            expected = text_of(name, record.get(name))
            if isinstance(expected, tuple):
                assert text is not None
                assert json.loads(text, parse_float=str, parse_int=str) == expected[1]
            elif name in ("id", "price", "paid"):  # the server reads True like true
                assert (text and text.lower()) == (expected and expected.lower())
            else:
                assert text == expected


def written_rows(writer: TableWriter, records: Records) -> Listener:
    listener = Listener()
    writer.write(listener, records.rows)  # type: ignore[arg-type]
    return listener
