"""The texts of a dead letter: whatever the message holds, PostgreSQL must take them."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speedlayer.workers.sinks.postgres.dead_letters import harmless, headers_json, timestamp_text


def test_text_headers_stay_readable() -> None:
    headers = [("trace", b"abc-1"), ("name", "Zoë".encode()), ("none", None)]
    assert json.loads(headers_json(headers)) == [["trace", "abc-1"], ["name", "Zoë"], ["none", None]]


@pytest.mark.parametrize("value", [b"\xff\xfe", b"a\0b", b"\xed\xa0\x80"])
def test_other_headers_become_base64(value: bytes) -> None:
    encoded = {"base64": base64.b64encode(value).decode()}
    assert json.loads(headers_json([("h", value)])) == [["h", encoded]]


def test_outside_of_utf8_only_ascii_stays_text() -> None:
    encoded = {"base64": base64.b64encode("Zoë".encode()).decode()}
    assert json.loads(headers_json([("h", "Zoë".encode())], "LATIN1")) == [["h", encoded]]


@given(st.text(), st.sampled_from(["UTF8", "LATIN1"]), st.integers(1, 50))
def test_any_text_becomes_harmless(text: str, encoding: str, limit: int) -> None:
    result = harmless(text, encoding, limit)
    assert "\0" not in result
    result.encode("utf-8" if encoding == "UTF8" else "ascii")


@given(st.text().filter(lambda text: "\0" not in text and text.encode("utf-8", "ignore").decode() == text))
def test_a_harmless_text_is_not_changed(text: str) -> None:
    assert harmless(text, "UTF8", 10_000) == text


@pytest.mark.parametrize(
    ("timestamp_ms", "text"),
    [
        (-1, None),
        (0, "1970-01-01T00:00:00+00:00"),
        (1_700_000_000_123, "2023-11-14T22:13:20.123000+00:00"),
        (2**62, None),
    ],
)
def test_a_time_that_is_unknown_or_impossible_is_null(timestamp_ms: int, text: str | None) -> None:
    assert timestamp_text(timestamp_ms) == text
