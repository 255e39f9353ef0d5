"""From librdkafka's messages to chunks: a few large byte strings for what one ``consume()`` call returned.

Runs in the supervisor process, once for each message, so it stays with C-level loops (`map`, `join`, `array`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

from speedlayer.workers.protocol import Chunk

if TYPE_CHECKING:
    from confluent_kafka import Message


class Run(NamedTuple):
    """Messages of one partition, in order, as one chunk. ``size_bytes`` is what the memory budget counts,
    ``largest_bytes`` the largest message in it.
    """

    topic: str
    partition: int
    first: int
    last: int
    leader_epoch: int
    size_bytes: int
    largest_bytes: int
    chunk: Chunk


def runs(messages: Sequence[Message], separator: bytes, limit_bytes: int) -> Iterator[Run]:
    """Group messages by partition and pack each group; a group over ``limit_bytes`` is cut into several runs."""
    by_partition: dict[tuple[Optional[str], Optional[int]], list[Message]] = {}
    for number, run in groupby(messages, key=type(messages[0]).partition):
        for topic, piece in groupby(run, key=type(messages[0]).topic):
            by_partition.setdefault((topic, number), []).extend(piece)
    for group in by_partition.values():
        for cut in _cut(group, limit_bytes):
            yield _pack(cut, separator)


def _cut(messages: list[Message], limit_bytes: int) -> Iterator[list[Message]]:
    sizes = [len(message.value() or b"") + len(message.key() or b"") for message in messages]
    if sum(sizes) <= limit_bytes:
        yield messages
        return
    begin = total = 0
    for index, size in enumerate(sizes):
        if total and total + size > limit_bytes:
            yield messages[begin:index]
            begin, total = index, 0
        total += size
    yield messages[begin:]


def _pack(messages: list[Message], separator: bytes) -> Run:
    kind = type(messages[0])
    first, last = messages[0], messages[-1]
    offsets = array("q", map(kind.offset, messages))  # type: ignore[type-var]  # none without an offset
    timestamps = array("q", [stamp[1] for stamp in map(kind.timestamp, messages)])
    keys, key_lengths = _column(list(map(kind.key, messages)))
    values, value_lengths = _column(list(map(kind.value, messages)))
    headers = list(map(kind.headers, messages))
    joined_keys, joined_values = b"".join(keys), separator.join(values)
    epoch = last.leader_epoch()
    chunk = Chunk(
        len(messages),
        offsets.tobytes(),
        timestamps.tobytes(),
        key_lengths.tobytes(),
        value_lengths.tobytes(),
        joined_keys,
        joined_values,
        {index: _headers(found) for index, found in enumerate(headers) if found} if any(headers) else {},
    )
    return Run(
        first.topic() or "",
        first.partition() or 0,
        first.offset() or 0,
        last.offset() or 0,
        -1 if epoch is None else epoch,
        _size(chunk),
        max(value_lengths) + max(key_lengths),
        chunk,
    )


def _column(values: list[Optional[Union[bytes, str]]]) -> tuple[list[bytes], array[int]]:
    """Return the values, null as empty, and their lengths, null as -1."""
    if None not in values:
        return values, array("i", map(len, values))  # type: ignore[arg-type, return-value]
    lengths = array("i", [-1 if value is None else len(value) for value in values])
    return [b"" if value is None else value for value in values], lengths  # type: ignore[misc]


def _headers(found: Any) -> list[tuple[str, Optional[bytes]]]:
    return [(name, value) for name, value in found]


def _size(chunk: Chunk) -> int:
    headers = sum(len(name) + len(value or b"") for found in chunk.headers.values() for name, value in found)
    return len(chunk.keys) + len(chunk.values) + headers + 24 * chunk.count  # 24: offsets, timestamps, two lengths
