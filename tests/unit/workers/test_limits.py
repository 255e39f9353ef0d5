"""A message beyond a limit is a dead letter that names the limit, unseen, and its neighbours are rows."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.flights import flight, part
from speedlayer.workers.decoding.json_records import DictDecoder, decode_flight
from speedlayer.workers.decoding.limits import Limits, is_nested_beyond
from speedlayer.workers.decoding.records import Records
from speedlayer.workers.sinks.postgres.dead_letters import write_dead_letters

GOOD = b'{"id": 1}'
SMALL = Limits(max_message_bytes=100, max_nesting_depth=3, max_headers=2)


def decoded(*values: bytes | None, limits: Limits = SMALL, **of_part: Any) -> Records:
    return decode_flight(flight(part(values, **of_part)), DictDecoder(), limits)


def nested(depth: int) -> bytes:
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def of_size(size: int) -> bytes:
    return b'{"a":"' + b"x" * (size - 8) + b'"}'


def test_a_message_at_its_limits_is_a_row() -> None:
    two = {1: [("a", b""), ("b", None)]}
    assert decoded(GOOD, of_size(98), nested(3), headers=two).dead == ()


def test_a_message_of_more_bytes_is_dead_and_its_neighbours_live() -> None:
    records = decoded(GOOD, of_size(101), GOOD)
    (dead,) = records.dead
    assert (dead.ordinal, dead.reason) == (1, "a message of 101 bytes, over max_message_bytes = 100")
    assert list(records.ordinals) == [0, 2]


def test_the_key_and_the_headers_count() -> None:
    assert [dead.ordinal for dead in decoded(GOOD, GOOD, keys=[b"k" * 92, b"k" * 91]).dead] == [0]
    records = decoded(GOOD, GOOD, None, headers={0: [("é", b"x" * 90)], 1: [("e", b"x" * 90)]})
    assert [(dead.ordinal, dead.reason[:9]) for dead in records.dead] == [(0, "a message"), (2, "null valu")]


def test_more_headers_are_dead() -> None:
    records = decoded(GOOD, GOOD, headers={1: [("h", None)] * 3})
    (dead,) = records.dead
    assert (dead.ordinal, dead.reason) == (1, "3 headers, over max_headers = 2")


def test_deeper_nesting_is_dead_in_any_chunk_of_any_part() -> None:
    first = part([GOOD, nested(4)])
    first.chunks.extend(part([nested(3), None, nested(5)], start=2).chunks)
    records = decode_flight(flight(first, part([nested(4), GOOD], partition=1)), DictDecoder(), SMALL)
    assert [(dead.ordinal, dead.reason.partition(":")[0]) for dead in records.dead] == [
        (1, "nested too deeply"),
        (3, "null value"),
        (4, "nested too deeply"),
        (5, "nested too deeply"),
    ]
    assert records.rows == [{"id": 1}, {"a": [[]]}, {"id": 1}]


@pytest.mark.parametrize("depth", [501, 1000, 100_000])
def test_by_default_the_limit_decides_and_not_the_python_at_hand(depth: int) -> None:
    records = decoded(GOOD, nested(500), nested(depth), limits=Limits())
    assert [(dead.ordinal, dead.reason) for dead in records.dead] == [
        (2, "nested too deeply: over max_nesting_depth = 500")
    ]


TREES = st.recursive(
    st.text('[]{}"\\ a') | st.integers(0, 9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('[]{}"\\a', max_size=3), inner, max_size=4),
    max_leaves=30,
)


def depth_of(tree: Any) -> int:
    if isinstance(tree, dict):
        return 1 + max(map(depth_of, tree.values()), default=0)
    return 1 + max(map(depth_of, tree), default=0) if isinstance(tree, list) else 0


@settings(max_examples=2000, deadline=None)
@given(TREES, st.integers(1, 6))
def test_brackets_in_strings_neither_hide_nor_feign_a_level(tree: Any, limit: int) -> None:
    for text in (json.dumps(tree), json.dumps(tree, indent=1)):
        assert is_nested_beyond(text.encode(), Limits(max_nesting_depth=limit)) is (depth_of(tree) > limit)


@pytest.mark.parametrize(
    "message",
    [
        b"[" * 2_000_000 + b"]" * 2_000_000,
        (b"[" * 400 + b"]" * 400) * 5000,
        b"[" + b'"\\\\",' * 800_000 + b"]",
        b'{"a":"' + b'\\"[' * 1_300_000 + b'"}',
    ],
    ids=["one pyramid", "many pyramids", "escapes", "quotes"],
)
def test_no_message_takes_long_to_be_looked_at(message: bytes) -> None:
    began = time.process_time()
    is_nested_beyond(message, Limits())
    assert time.process_time() - began < 5, "4 MB take well under a second"


class Copied:
    """Stands in for a cursor: keeps what is copied."""

    def __init__(self) -> None:
        self.lines: list[list[str]] = []

    def copy_expert(self, statement: str, data: Any) -> None:
        self.lines += [line.split("\t") for line in data.read().decode().splitlines()]


def test_a_dead_letter_keeps_the_beginning_of_what_is_too_large_and_its_true_size_and_hash() -> None:
    value = of_size(5000)
    sent = flight(part([value, b"?"], keys=[None, b"k"], headers={0: [("h", b"v")]}))
    cursor: Any = Copied()
    records = decode_flight(sent, DictDecoder(), SMALL)
    write_dead_letters(cursor, sent, records, worker="w", encoding="UTF8", details={1: "line 2"}, limit_bytes=1000)
    large, small = cursor.lines
    assert large[9] == "\\\\x" + value[:1000].hex()
    digest = hashlib.sha256(value).hexdigest()
    assert large[13] == f"the first 1,000 bytes of the value are kept, of 5,000; sha256 {digest}"
    assert (small[8], small[9], small[13]) == ("\\\\x6b", "\\\\x3f", "line 2")
