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


# What stands for headers that confluent_kafka can not give us.
UNREADABLE_HEADERS = [("headers with a name that is not UTF-8, which were not read", None)]


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
        headers = _headers_of(group)
        header_sizes = list(map(_size_of_headers, headers)) if any(headers) else [0] * len(group)
        for begin, end in _cuts(group, header_sizes, limit_bytes):
            yield _pack(group[begin:end], headers[begin:end], header_sizes[begin:end], separator)


def _cuts(messages: list[Message], header_sizes: list[int], limit_bytes: int) -> Iterator[tuple[int, int]]:
    sizes = [
        len(message.value() or b"") + len(message.key() or b"") + headers
        for message, headers in zip(messages, header_sizes, strict=True)
    ]
    begin = total = 0
    if sum(sizes) > limit_bytes:
        for index, size in enumerate(sizes):
            if total and total + size > limit_bytes:
                yield begin, index
                begin, total = index, 0
            total += size
    yield begin, len(messages)


def _headers_of(messages: list[Message]) -> list[Any]:
    """The headers of each message. One whose headers can not be read is never asked for them again: confluent_kafka
    would answer with a broken list, which crashes the process.
    """
    found: list[Any] = []
    asked = map(type(messages[0]).headers, messages)
    while len(found) < len(messages):
        try:
            found.extend(asked)
        except (SystemError, UnicodeDecodeError):  # Kafka says UTF-8, and not every client keeps to it
            found.append(UNREADABLE_HEADERS)
    return found


def _pack(messages: list[Message], headers: list[Any], header_sizes: list[int], separator: bytes) -> Run:
    kind = type(messages[0])
    first, last = messages[0], messages[-1]
    offsets = array("q", map(kind.offset, messages))  # type: ignore[type-var]  # none without an offset
    timestamps = array("q", [stamp[1] for stamp in map(kind.timestamp, messages)])
    keys, key_lengths = _column(list(map(kind.key, messages)))
    values, value_lengths = _column(list(map(kind.value, messages)))
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
        chunk.size_bytes,
        max(value_lengths) + max(key_lengths) + max(header_sizes),
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


def _size_of_headers(found: Any) -> int:
    return sum(len(name) + len(value or b"") for name, value in found) if found else 0
