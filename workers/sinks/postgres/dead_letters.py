"""Messages that can not become rows: kept byte for byte in ``speedlayer.dead_letters`` (worker processes).

A dead letter can always be written: keys and values are ``bytea``, and texts are made harmless first. So no message can
block its partition for ever.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Optional, Union

from speedlayer.workers.decoding.limits import MAX_MESSAGE_BYTES
from speedlayer.workers.decoding.records import DeadRecord, Message, Records
from speedlayer.workers.protocol import Flight, LaneKey

if TYPE_CHECKING:
    from psycopg2.extensions import cursor as Cursor

# Long enough for any server message, short enough for a table one looks at; a traceback gets more.
REASON_LIMIT = 2_000
DETAIL_LIMIT = 10_000

# A jsonb array has at most 256 MB, and base64 and escapes make up to six times as much of a header.
HEADERS_LIMIT_BYTES = 16 * 1024 * 1024

# One COPY takes dead letters until their text is about this large, since values as large as a batch are doubled by hex.
CHUNK_BYTES = 4 * 1024 * 1024

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

_COPY = """
COPY speedlayer.dead_letters (cluster_id, consumer_group, pipeline, topic, partition, lane, "offset",
    message_timestamp, key, value, headers, reason, sqlstate, detail, worker) FROM STDIN
"""

_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def write_dead_letters(
    cursor: Cursor,
    flight: Flight,
    records: Records,
    *,
    worker: str,
    encoding: str,
    details: Mapping[int, str],
    limit_bytes: int = MAX_MESSAGE_BYTES,
) -> None:
    """COPY the flight's dead records, in the caller's transaction. ``details`` maps an ordinal to where it happened.

    Of a key or value beyond ``limit_bytes``, this much is kept, and its size and hash.
    """
    for text in _in_chunks(_lines(flight, records, worker, encoding, details, limit_bytes)):
        cursor.copy_expert(_COPY, io.BytesIO(text))


def _lines(
    flight: Flight, records: Records, worker: str, encoding: str, details: Mapping[int, str], limit_bytes: int
) -> Iterator[bytes]:
    for dead in sorted(records.dead, key=lambda dead: dead.ordinal):
        message = records.index.message(dead.ordinal)
        lane = flight.parts[message.part].lane
        message, cuts = _kept(message, limit_bytes)
        detail = "\n".join([*cuts, *([details[dead.ordinal]] if dead.ordinal in details else [])])
        yield _line(lane, message, dead, detail, worker, encoding).encode()


def _kept(message: Message, limit_bytes: int) -> tuple[Message, list[str]]:
    """The message as it is kept, and what was cut off of it: one that may not be decoded may be too large to store."""
    cuts: list[str] = []

    def cut(whole: Optional[bytes], name: str) -> Optional[bytes]:
        if whole is None or len(whole) <= limit_bytes:
            return whole
        digest = hashlib.sha256(whole).hexdigest()
        cuts.append(f"the first {limit_bytes:,} bytes of the {name} are kept, of {len(whole):,}; sha256 {digest}")
        return whole[:limit_bytes]

    message = message._replace(key=cut(message.key, "key"), value=cut(message.value, "value"))
    size = 0
    for count, (name, value) in enumerate(message.headers):
        size += len(name) + len(value or b"")
        if size > HEADERS_LIMIT_BYTES:
            cuts.append(f"the first {count:,} headers are kept, of {len(message.headers):,}")
            message = message._replace(headers=message.headers[:count])
            break
    return message, cuts


def _in_chunks(lines: Iterable[bytes]) -> Iterator[bytes]:
    chunk: list[bytes] = []
    size = 0
    for line in lines:
        chunk.append(line)
        size += len(line)
        if size >= CHUNK_BYTES:
            yield b"".join(chunk)
            chunk, size = [], 0
    if chunk:
        yield b"".join(chunk)


def _line(lane: LaneKey, message: Message, dead: DeadRecord, detail: Optional[str], worker: str, encoding: str) -> str:
    fields: list[Optional[str]] = [
        lane.cluster,
        lane.group,
        lane.pipeline,
        message.topic,
        str(message.partition),
        str(lane.lane),
        str(message.offset),
        timestamp_text(message.timestamp_ms),
        _bytea(message.key),
        _bytea(message.value),
        headers_json(message.headers, encoding),
        harmless(dead.reason, encoding, REASON_LIMIT) or "unknown",
        dead.sqlstate,
        harmless(detail, encoding, DETAIL_LIMIT) if detail else None,
        harmless(worker, encoding, REASON_LIMIT),
    ]
    return "\t".join("\\N" if field is None else field.translate(_ESCAPES) for field in fields) + "\n"


def _bytea(value: Optional[bytes]) -> Optional[str]:
    return None if value is None else "\\x" + value.hex()


def timestamp_text(timestamp_ms: int) -> Optional[str]:
    """The message's time for ``timestamptz``; None if it is unknown or no such date exists (producers choose it)."""
    if timestamp_ms < 0:
        return None
    try:
        return (_EPOCH + timedelta(milliseconds=timestamp_ms)).isoformat()
    except OverflowError:
        return None


def headers_json(headers: Iterable[tuple[str, Optional[bytes]]], encoding: str = "UTF8") -> str:
    """Headers as a JSON array of ``[name, value]``: text as text, anything else as ``{"base64": …}``.

    A NUL is valid JSON and no valid ``jsonb``, and so is a character that the database's encoding does not have.
    """
    return json.dumps([[_jsonable(name, encoding), _jsonable(value, encoding)] for name, value in headers])


def _jsonable(value: Union[str, bytes, None], encoding: str) -> Any:
    if value is None:
        return None
    raw = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    try:
        text = raw.decode("utf-8" if _is_utf8(encoding) else "ascii")
    except UnicodeDecodeError:
        text = "\0"
    return text if "\0" not in text else {"base64": base64.b64encode(raw).decode("ascii")}


def harmless(text: str, encoding: str, limit: int) -> str:
    """A text that the database surely takes: no NUL, no lone surrogate, ASCII alone where it is not UTF-8."""
    text = text[:limit].replace("\0", "\\0")
    if _is_utf8(encoding):
        return text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text.encode("ascii", "backslashreplace").decode("ascii")


def _is_utf8(encoding: str) -> bool:
    return encoding.upper() == "UTF8"
