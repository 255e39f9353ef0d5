"""A chunk that is cut in two holds the same messages, whatever is in them."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures.flights import SEPARATOR, chunk
from speedlayer.workers.decoding.records import FlightIndex, Message
from speedlayer.workers.protocol import NUMBERS_BYTES, Chunk, Flight, LaneKey, Part

LANE = LaneKey("cluster", "group", "orders", "orders", 0)
PIECES = st.none() | st.binary(max_size=5) | st.just(SEPARATOR)
HEADERS = st.lists(st.tuples(st.text(max_size=3), PIECES), max_size=2)
MESSAGES = st.lists(st.tuples(PIECES, PIECES, HEADERS), min_size=2, max_size=8)


def messages_of(*chunks: Chunk) -> list[Message]:
    index = FlightIndex(Flight(1, "orders", SEPARATOR, [Part(LANE, 1, "me", 0, 100, -1, list(chunks))]))
    assert [index.message(ordinal).value for ordinal in range(len(index))] == list(index.values())
    return [index.message(ordinal) for ordinal in range(len(index))]


@given(MESSAGES, st.data())
def test_the_two_parts_hold_what_the_whole_did(
    messages: list[tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]], data: st.DataObject
) -> None:
    whole = chunk(
        [value for _, value, _ in messages],
        keys=[key for key, _, _ in messages],
        headers={index: pairs for index, (_, _, pairs) in enumerate(messages) if pairs},
        first_offset=7,
    )
    index = data.draw(st.integers(1, len(messages) - 1))
    first, rest = whole.split(index, SEPARATOR)
    assert (first.count, rest.count) == (index, len(messages) - index)
    assert messages_of(first) + messages_of(rest) == messages_of(first, rest) == messages_of(whole)
    assert first.size_bytes + rest.size_bytes + len(SEPARATOR) == whole.size_bytes


@pytest.mark.parametrize("index", [-1, 0, 3, 4])
def test_neither_part_is_empty(index: int) -> None:
    with pytest.raises(ValueError, match="can not be cut before the one at"):
        chunk([b"a", b"b", b"c"]).split(index, SEPARATOR)


def test_offsets_are_found_with_gaps_between_them() -> None:
    whole = chunk([b"{}"] * 4)
    sparse = Chunk(
        4, array("q", [3, 4, 10, 11]).tobytes(), *(getattr(whole, name) for name in whole.__struct_fields__[2:])
    )
    assert [sparse.count_below(offset) for offset in (0, 3, 4, 5, 10, 11, 12)] == [0, 0, 1, 2, 2, 3, 4]
    assert [sparse.offset_of(index) for index in range(4)] == [3, 4, 10, 11]


def test_keys_values_headers_and_numbers_count() -> None:
    whole = chunk([b"ab", None], keys=[b"k", None], headers={1: [("name", b"xyz"), ("n", None)]})
    assert whole.size_bytes == 2 + len(SEPARATOR) + 1 + 4 + 3 + 1 + 2 * NUMBERS_BYTES
