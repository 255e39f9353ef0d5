"""Limits that a message must keep to be looked at: its size, its nesting, its headers. Runs in the worker.

A message beyond one is a dead letter before it is decoded, so that nobody who may write to a topic decides how deep
anything recurses: Python, PostgreSQL's jsonb and a user's map all have limits of their own, which lie elsewhere on each
version and machine. The sizes are looked at for a whole chunk at a time, so honest messages cost next to nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from speedlayer.workers.decoding.records import FlightIndex
    from speedlayer.workers.protocol import Chunk

# Far above what people write, and below what any Python that speedlayer runs on decodes.
MAX_NESTING_DEPTH = 500
# The broker's own limit is 1 MiB by default; a message is held several times while it is decoded and written.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
# Tracing and routing take some ten.
MAX_HEADERS = 1000


class Limits(NamedTuple):
    """What a message may be. Its size is that of its key, its value and its headers."""

    max_message_bytes: int = MAX_MESSAGE_BYTES
    max_nesting_depth: int = MAX_NESTING_DEPTH
    max_headers: int = MAX_HEADERS


def breaches(index: FlightIndex, limits: Limits) -> dict[int, str]:
    """The messages that break a limit, by ordinal, and which one."""
    found: dict[int, str] = {}
    base = 0
    for chunk in index.chunks:
        for at, reason in _breaches_of(chunk, len(index.flight.separator), limits):
            found.setdefault(base + at, reason)
        base += chunk.count
    return found


def _breaches_of(chunk: Chunk, between: int, limits: Limits) -> Iterator[tuple[int, str]]:
    values, keys = array("i", chunk.value_lengths), array("i", chunk.key_lengths)
    longest = _longest(values)
    headers = {at: _size_of(pairs) for at, pairs in chunk.headers.items()}
    if longest + _longest(keys) + max(headers.values(), default=0) > limits.max_message_bytes:
        for at, (value, key) in enumerate(zip(values, keys, strict=True)):
            size = max(value, 0) + max(key, 0) + headers.get(at, 0)
            if size > limits.max_message_bytes:
                yield at, f"a message of {size:,} bytes, over max_message_bytes = {limits.max_message_bytes:,}"
    for at, pairs in chunk.headers.items():
        if len(pairs) > limits.max_headers:
            yield at, f"{len(pairs):,} headers, over max_headers = {limits.max_headers:,}"
    # What is nested so deeply has as many brackets, opened and closed.
    shortest = 2 * limits.max_nesting_depth
    if longest > shortest:
        position = 0
        for at, length in enumerate(values):
            if length > shortest and is_nested_beyond(chunk.values[position : position + length], limits):
                yield at, f"nested too deeply: over max_nesting_depth = {limits.max_nesting_depth:,}"
            position += max(length, 0) + between


def _longest(lengths: array[int]) -> int:
    longest = max(lengths)
    return longest if longest > 0 else 0  # all are null


def _size_of(pairs: list[tuple[str, bytes | None]]) -> int:
    return sum(len(name.encode("utf-8", "surrogatepass")) + len(value or b"") for name, value in pairs)


# A bracket as one step down or up, as a signed byte; all else is left out.
_STEPS = bytes.maketrans(b"{[}]", b"\x01\x01\xff\xff")
_NO_BRACKET = bytes(byte for byte in range(256) if byte not in b"[]{}")


def is_nested_beyond(message: bytes, limits: Limits) -> bool:
    """Whether JSON is nested deeper than it may. Of what is no JSON, anything may be said: it is dead in any case.

    The brackets outside of strings are counted, in C loops and in linear time; few messages have enough to be looked
    at so closely.
    """
    depth = limits.max_nesting_depth
    if len(message) > limits.max_message_bytes or message.count(b"[") + message.count(b"{") <= depth:
        return False
    if b"\\" in message:
        message = message.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = b"".join(message.split(b'"')[::2]).translate(_STEPS, _NO_BRACKET)
    return max(accumulate(memoryview(brackets).cast("b")), default=0) > depth
