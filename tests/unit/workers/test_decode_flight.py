"""Every message of a flight is one record or one dead letter, however the messages look next to each other."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fixtures.flights import SEPARATOR, flight, part
from fixtures.tables import column, sink, table
from speedlayer.workers.decoding.exact import ExactFloat
from speedlayer.workers.decoding.json_records import BLOCK_MESSAGES, DictDecoder, decode_flight
from speedlayer.workers.decoding.records import DeadRecord
from speedlayer.workers.sinks.postgres.write import TableWriter

GOOD = b'{"id": 1}'


def reasons(*values: bytes | None, decoder: Any = None) -> list[str]:
    records = decode_flight(flight(part(values)), decoder or DictDecoder())
    assert len(records.rows) + len(records.dead) + len(records.filtered) == len(values)
    return [record.reason for record in records.dead]


def table_decoder(**settings: Any) -> Any:
    plan = table(column("id", "int8"), column("note"), column("doc", "jsonb"))
    return TableWriter(plan, sink(**settings)).decoder(transformed=False)


# --- what is no record -----------------------------------------------------------------------------------------------

BAD = {
    b"": "empty value",
    b" \r\n\t ": "empty value",
    b"[1]": "not a JSON object but an array",
    b'"text"': "not a JSON object but a string",
    b"1.5": "not a JSON object but a number",
    b"-3": "not a JSON object but a number",
    b"true": "not a JSON object but true",
    b" false": "not a JSON object but false",
    b"null": "not a JSON object but null",
    b'{"id": 1': "not JSON: ",
    b'{"id": 1}}': "not JSON: ",
    b'{"id": 1} {"id": 2}': "not JSON: ",
    b'{"id": NaN}': "not JSON: ",
    b'{"id": 01}': "not JSON: ",
    b"{'id': 1}": "not JSON: ",
    b'{"note": "a\nb"}': "not JSON: ",
    b"\xef\xbb\xbf{}": "not JSON: ",
    b"\x00": "not JSON: ",
    b'{"note": "\xff"}': "not UTF-8: invalid start byte at byte 10",
    b'{"note\xc3": 1}': "not UTF-8: invalid continuation byte at byte 6",
    b'{"note": "\xed\xa0\x80"}': "not UTF-8: invalid continuation byte at byte 10",
    b'{"doc": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "nested too deeply",
    b"[" * 100_000 + b"]" * 100_000: "nested too deeply",
}


@pytest.mark.parametrize("make", [DictDecoder, table_decoder], ids=["dict", "table"])
@pytest.mark.parametrize("value", BAD, ids=lambda value: repr(value[:20]))
def test_a_message_that_is_no_object_dies_with_its_reason_and_its_neighbours_live(value: bytes, make: Any) -> None:
    records = decode_flight(flight(part([GOOD, value, GOOD])), make())
    (dead,) = records.dead
    assert dead.ordinal == 1
    assert dead.reason.startswith(BAD[value])
    assert list(records.ordinals) == [0, 2]
    assert len(records.rows) == 2


def test_text_that_is_not_utf8_has_the_servers_sqlstate() -> None:
    (dead,) = decode_flight(flight(part([b'{"note": "\xff"}'])), DictDecoder()).dead
    assert dead.sqlstate == "22021"


@pytest.mark.parametrize("unknown_fields", ["error", "ignore"])
def test_bytes_that_are_not_utf8_are_refused_in_fields_that_nobody_reads_too(unknown_fields: str) -> None:
    decoder = table_decoder(unknown_fields=unknown_fields)
    assert reasons(GOOD, b'{"id": 1, "zz": "\xff"}', decoder=decoder) == ["not UTF-8: invalid start byte at byte 17"]


@pytest.mark.parametrize("make", [DictDecoder, table_decoder], ids=["dict", "table"])
def test_a_null_value_is_dead_or_filtered_as_the_sink_says(make: Any) -> None:
    assert reasons(GOOD, None, GOOD, decoder=make()) == ["null value"]
    decoder = make(**{"skip_null_values": True} if make is DictDecoder else {"null_values": "skip"})
    records = decode_flight(flight(part([GOOD, None, GOOD])), decoder)
    assert (len(records.rows), records.filtered, records.dead) == (2, (1,), ())


def test_a_null_value_is_told_from_an_empty_one() -> None:
    assert reasons(b"", None) == ["empty value", "null value"]


def test_only_null_values() -> None:
    assert reasons(*[None] * 300) == ["null value"] * 300


def test_of_several_fields_with_one_name_the_last_counts_as_in_jsonb() -> None:
    value = b'{"note": {"not": "a text"}, "id": true, "note": "last", "id": 7}'
    (row,) = decode_flight(flight(part([value])), DictDecoder()).rows
    assert row == {"note": "last", "id": 7}
    records = decode_flight(flight(part([GOOD, value])), table_decoder())
    assert records.dead == ()
    assert (records.rows[1].c0, records.rows[1].c1) == (7, "last")


def test_one_bad_message_costs_none_of_its_thousands_of_neighbours_their_row() -> None:
    values = [b'{"id": %d}' % number for number in range(3 * BLOCK_MESSAGES)]
    values[BLOCK_MESSAGES + 5] = b"{"
    records = decode_flight(flight(part(values)), DictDecoder())
    assert [row["id"] for row in records.rows] == list(records.ordinals)
    assert [record.ordinal for record in records.dead] == [BLOCK_MESSAGES + 5]


def test_a_flight_may_hold_no_message_at_all() -> None:
    records = decode_flight(flight(part([], end=9), part([], partition=1, end=3)), DictDecoder())
    assert (list(records.rows), records.dead, records.counts()) == ([], (), [(0, 0, 0), (0, 0, 0)])


def test_parts_and_chunks_are_decoded_together_in_their_order() -> None:
    first = part([b'{"id": 1}', b'{"id": 2}'])
    second = part([b'{"id": 3}'], partition=1)
    second.chunks.extend(part([b'{"id": 4}', b"?"], partition=1, start=1).chunks)
    records = decode_flight(flight(first, part([], partition=7, end=1), second), DictDecoder())
    assert [row["id"] for row in records.rows] == [1, 2, 3, 4]
    assert records.counts() == [(2, 0, 0), (0, 0, 0), (2, 0, 1)]


# --- messages that would make sense together --------------------------------------------------------------------------

TRICKS = [
    [b"1],[2"],
    [b'{"id": 1}],[{"id": 2}'],
    [b'{"id": 1}, "x", {"id": 2}'],
    [b'{"id": [1', b"2]}"],
    [b'{"id": [1', b"2]}", b'{"id": 1}, "x", {"id": 2}'],
    [b'{"id": "', b'"}'],
    [b'{"id": "\\', b'"}'],
    [b'{"id": 1', b'"id": 2}'],
    [b"[", b"]"],
    [b"", b'{"id": 1}, {"id": 2}'],
    [b'{"id": 1} ,', b'{"id": 2}'],
    [b'{"id": 1}' + SEPARATOR.replace(b"d", b"e") + b'{"id": 2}'],
]


@pytest.mark.parametrize("values", TRICKS, ids=repr)
@pytest.mark.parametrize("make", [DictDecoder, table_decoder], ids=["dict", "table"])
def test_messages_that_only_make_sense_together_are_dead_each_for_itself(values: list[bytes], make: Any) -> None:
    records = decode_flight(flight(part([GOOD, *values, GOOD])), make())
    bad = bad_ordinals([GOOD, *values, GOOD])
    assert bad
    assert [record.ordinal for record in records.dead] == bad
    assert len(records.rows) == len(values) + 2 - len(bad)


def bad_ordinals(values: list[bytes]) -> list[int]:
    """By Python's own parser, message by message."""
    bad = []
    for ordinal, value in enumerate(values):
        try:
            good = isinstance(json.loads(value, parse_constant=_refuse), dict)
        except ValueError:
            good = False
        if not good:
            bad.append(ordinal)
    return bad


def _refuse(name: str) -> None:
    raise ValueError(name)


# Pieces of JSON in which no number, escape or nesting is beyond what both parsers agree about.
PIECES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"1",
    b'"id"',
    b'"zz"',
    b'"x"',
    b"\\",
    b"\\n",
    b" ",
    b"null",
    b"true",
]
PIECES += [b'{"id":1}', b'"id":1', b'{"zz":', b',"x",', SEPARATOR[:3], SEPARATOR[-3:]]
MESSAGES = st.lists(st.lists(st.sampled_from(PIECES), max_size=7).map(b"".join), min_size=1, max_size=6)


@settings(max_examples=3000, deadline=None)
@given(MESSAGES)
@example([b'{"zz":[', b"]}"])
@example([b'{"zz":"', b'"}'])
@example([b'{"zz":[}', b'{"zz":]}'])
def test_what_is_decoded_together_is_what_each_message_says_alone(values: list[bytes]) -> None:
    records = decode_flight(flight(part(values)), DictDecoder())
    bad = bad_ordinals(values)
    assert [record.ordinal for record in records.dead] == bad
    assert records.rows == [json.loads(value) for ordinal, value in enumerate(values) if ordinal not in bad]


IGNORING = TableWriter(table(column("id", "jsonb")), sink(unknown_fields="ignore")).decoder(transformed=False)


@settings(max_examples=3000, deadline=None)
@given(MESSAGES)
@example([b'{"zz":[', b"]}"])
@example([b'{"zz":[}', b'{"zz":]}'])
@example([b'{"zz":"', b'"}'])
def test_fields_that_are_skipped_hide_no_border_between_messages(values: list[bytes]) -> None:
    records = decode_flight(flight(part(values)), IGNORING)
    assert [record.ordinal for record in records.dead] == bad_ordinals(values)


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_a_float_is_one_for_arithmetic_and_keeps_its_digits() -> None:
    (row,) = decode_flight(flight(part([b'{"price": 12.30, "huge": 1e400}'])), DictDecoder()).rows
    price = row["price"]
    assert (price + 1, price > 12, str(price), f"{price}") == (13.3, True, "12.30", "12.30")
    assert type(price) is ExactFloat
    assert type(price * 2) is float
    assert str(row["huge"]) == "1e400"


def test_without_exact_numbers_a_float_is_pythons_own() -> None:
    (row,) = decode_flight(flight(part([b'{"price": 12.30}'])), DictDecoder(exact=False)).rows
    assert type(row["price"]) is float


def test_the_messages_of_a_condemned_flight_are_dead_unseen() -> None:
    condemned = msgspec.structs.replace(flight(part([b"{}", b"[", None])), condemned="killed its worker twice")
    records = decode_flight(condemned, Untouchable())
    assert not records.rows
    assert records.dead == tuple(DeadRecord(ordinal, "killed its worker twice") for ordinal in range(3))
    assert records.counts() == [(0, 0, 3)]


class Untouchable(DictDecoder):
    def decode_many(self, array: bytes) -> list[Any]:
        raise AssertionError("somebody looks at it")

    def decode_one(self, message: bytes) -> Any:
        raise AssertionError("somebody looks at it")
