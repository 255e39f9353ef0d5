"""Every message of a flight can be found again, and is counted once."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures.flights import SEPARATOR, flight, part
from fixtures.tables import sink, table
from speedlayer.workers.decoding.json_records import DictDecoder, decode_flight
from speedlayer.workers.decoding.records import (
    REASON_LIMIT_CHARACTERS,
    DamagedFlight,
    DeadRecord,
    FlightIndex,
    Records,
    apply_transform,
    shorten_reason,
)
from speedlayer.workers.protocol import Flight
from speedlayer.workers.sinks.postgres.write import TableWriter

BYTES = st.one_of(st.none(), st.binary(max_size=4))


def two_parts() -> Flight:
    first = part(
        [b'{"a": 1}', b"?", b'{"a": 3}'], start=10, keys=[b"k", None, b""], headers={1: [("h", b"x"), ("i", None)]}
    )
    second = part([b'{"a": 4}'], partition=1, start=70)
    second.chunks.extend(part([None, b'{"a": 6}'], partition=1, start=71, timestamp_ms=5).chunks)
    return flight(first, second)


def test_a_message_is_found_with_all_that_kafka_said_about_it() -> None:
    index = FlightIndex(two_parts())
    assert index.message(1) == (0, "orders", 0, 11, 1_700_000_000_000, None, b"?", [("h", b"x"), ("i", None)])
    assert index.message(2)[5:] == (b"", b'{"a": 3}', [])
    assert index.message(4) == (1, "orders", 1, 71, 5, None, None, [])
    assert [index.part_of(ordinal) for ordinal in range(len(index))] == [0, 0, 0, 1, 1, 1]
    for outside in (-1, 6):
        with pytest.raises(IndexError):
            index.message(outside)


@given(st.lists(st.lists(st.tuples(BYTES, BYTES), max_size=4), min_size=1, max_size=4))
def test_keys_and_values_come_back_byte_by_byte(parts: list[list[tuple[bytes | None, bytes | None]]]) -> None:
    made = [
        part([value for _, value in pairs], partition=number, keys=[key for key, _ in pairs])
        for number, pairs in enumerate(parts)
    ]
    index = FlightIndex(flight(*made))
    pairs = [pair for pairs in parts for pair in pairs]
    assert [(index.message(n).key, index.message(n).value) for n in range(len(index))] == pairs
    assert list(index.values()) == [value for _, value in pairs]
    assert index.has_null_values() == any(value is None for _, value in pairs)


def test_a_chunk_whose_lengths_do_not_fit_its_bytes_is_our_fault_not_a_dead_letter() -> None:
    damaged = part([b"{}", b"?"])
    damaged.chunks[0] = type(damaged.chunks[0])(*[*_fields(damaged.chunks[0])[:6], b"{}" + SEPARATOR + b"??", {}])
    with pytest.raises(DamagedFlight):
        decode_flight(flight(damaged), DictDecoder())


def _fields(chunk: object) -> list[object]:
    return [getattr(chunk, name) for name in chunk.__struct_fields__]  # type: ignore[attr-defined]


# --- counting --------------------------------------------------------------------------------------------------------


def records() -> Records:
    return decode_flight(two_parts(), DictDecoder())


def test_rows_filtered_and_dead_add_up_to_the_messages_of_each_part() -> None:
    filtered = apply_transform(records(), lambda record: record if record["a"] != 3 else None)
    assert filtered.counts() == [(1, 1, 1), (2, 0, 1)]


def test_the_records_of_fenced_parts_are_left_out() -> None:
    rest = apply_transform(records(), lambda record: record if record["a"] != 3 else None).without_parts({0})
    assert [row["a"] for row in rest.rows] == [4, 6]
    assert list(rest.ordinals) == [3, 5]
    assert (rest.filtered, [record.ordinal for record in rest.dead]) == ((), [4])
    assert rest.counts() == [(0, 0, 0), (2, 0, 1)]
    assert records().without_parts([0, 1]).counts() == [(0, 0, 0), (0, 0, 0)]


def test_a_row_that_turns_out_guilty_moves_to_the_dead() -> None:
    buried = records().bury([DeadRecord(5, "too large", "22003")])
    assert [row["a"] for row in buried.rows] == [1, 3, 4]
    assert [(record.ordinal, record.sqlstate) for record in buried.dead] == [(1, None), (4, None), (5, "22003")]
    assert buried.counts() == [(2, 0, 1), (1, 0, 2)]


def test_unknown_fields_are_named_for_whoever_may_look_at_the_table_again() -> None:
    plan = table(*[])
    decoder = TableWriter(plan, sink()).decoder(transformed=False)
    found = decode_flight(flight(part([b'{"new": 1}', b'{"newer": 1, "new": 2}'])), decoder)
    assert found.unknown_fields == {"new", "newer"}


# --- transforms ------------------------------------------------------------------------------------------------------


def test_what_a_transform_raises_is_the_reason_of_that_record_alone() -> None:
    def divide(record: dict[str, int]) -> dict[str, float]:
        return {"a": 12 / (record["a"] - 4)}

    result = apply_transform(records(), divide)
    assert [row["a"] for row in result.rows] == [-4, -12, 6]
    assert [record.reason for record in result.dead][1] == "the transform failed: ZeroDivisionError: division by zero"
    assert result.counts() == [(2, 0, 1), (1, 0, 2)]


@pytest.mark.parametrize("result", [[1], "text", 1, True, ("a", 1)])
def test_a_transform_that_returns_no_dict_makes_dead_letters(result: object) -> None:
    changed = apply_transform(records(), lambda record: result)
    assert not changed.rows
    assert changed.dead[0].reason == f"the transform returned no dict but a {type(result).__name__}"


def test_a_cancellation_is_the_fault_of_its_record() -> None:
    def cancel(record: dict[str, int]) -> dict[str, int]:
        if record["a"] == 3:
            raise asyncio.CancelledError
        return record

    result = apply_transform(records(), cancel)
    assert "CancelledError" in [record.reason for record in result.dead][1]
    assert 3 not in [row["a"] for row in result.rows]


def test_a_map_that_fills_one_dict_again_and_again_makes_a_row_of_each_record() -> None:
    state: dict[str, int] = {}

    def remember(record: dict[str, int]) -> dict[str, int]:
        state.update(record)
        return state

    assert apply_transform(records(), remember).rows == records().rows


def test_a_transform_may_not_stop_the_worker_by_an_exception_but_may_be_interrupted() -> None:
    def stop(record: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_transform(records(), stop)


def test_a_reason_is_cut_and_holds_nothing_that_postgresql_refuses() -> None:
    assert shorten_reason("a\0b\ud800") == "a\\0b\\ud800"
    assert len(shorten_reason("x" * 5000)) == REASON_LIMIT_CHARACTERS
