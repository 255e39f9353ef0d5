"""The orders of a run: what is sent and what is logged are the same."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from speedlayer.supervisor.demo.orders import (
    BROKEN_EVERY,
    COLUMNS,
    FIRST_BROKEN,
    RECORD_BYTES,
    escape_copy,
    make_order,
)

AT = "2026-11-27T00:00:00.000001+00:00"


def read_copy_line(line: str) -> list[str]:
    """Read a line as COPY does."""
    assert line.endswith("\n")
    escapes = {"\\\\": "\\", "\\t": "\t", "\\n": "\n", "\\r": "\r"}
    fields = []
    for field in line[:-1].split("\t"):
        text, at = "", 0
        while at < len(field):
            width = 2 if field[at] == "\\" else 1
            text += escapes[field[at : at + 2]] if width == 2 else field[at]
            at += width
        fields.append(text)
    return fields


@given(st.integers(0, 10**9))
def test_the_log_says_what_the_message_says(number: int) -> None:
    order = make_order(number, AT)
    if order.log_line is None:
        assert number % BROKEN_EVERY == FIRST_BROKEN
        return
    sent = json.loads(order.value, parse_float=str)
    assert list(sent) == list(COLUMNS)
    logged = dict(zip(COLUMNS, read_copy_line(order.log_line), strict=True))
    assert {name: str(value) for name, value in sent.items()} == logged
    assert order.key.decode() == sent["customer"]
    assert len(order.key) + len(order.value) <= RECORD_BYTES


def test_each_broken_order_is_of_no_use_to_the_table() -> None:
    cut, array, word = (make_order(FIRST_BROKEN + n * BROKEN_EVERY, AT) for n in range(3))
    assert cut.log_line is array.log_line is word.log_line is None
    assert not cut.value.endswith(b"}")
    assert isinstance(json.loads(array.value), list)
    assert json.loads(word.value)["amount"] == "twelve"
    assert list(json.loads(word.value)) == list(COLUMNS)


@given(st.text())
def test_escaping_for_copy_can_be_undone(text: str) -> None:
    assert read_copy_line(escape_copy(text) + "\n") == [text]
