"""JSON messages to records, a whole flight in one call where that is safe. Runs in the worker.

The flight's values come joined by a separator ``,"<nonce>",``, so ``[`` + joined + ``]`` is one JSON array in which
values and nonces alternate, and one msgspec call decodes it at a fraction of the cost of a call for each message. That
array is believed only if it has 2n - 1 elements, every second one is the nonce, and every other one is a record. As no
message knows the nonce, each of the n - 1 nonces is then a separator that stands between two elements of the outer
array, and what stands between two separators is one message and one value: a message like ``1],[2``, or two like
``{"a":[1`` and ``2]}`` that would make one value together, break the count or the syntax.

Where it is not believed, blocks of messages are tried the same way, then the messages of the blocks that fail, each
for itself: a message that is no record becomes a `DeadRecord` with its reason, and the others are rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple, Optional, Protocol

import msgspec

from speedlayer.workers.decoding.exact import exact_float
from speedlayer.workers.decoding.limits import Limits, breaches
from speedlayer.workers.decoding.records import DeadRecord, FlightIndex, Records, shorten_reason
from speedlayer.workers.protocol import Flight

# Messages in a block: with one bad message in 10,000, that many are decoded one by one and the others in few calls.
BLOCK_MESSAGES = 128


class Guilty(NamedTuple):
    """Why a message is no record."""

    reason: str
    sqlstate: Optional[str] = None
    unknown_fields: tuple[str, ...] = ()


class RecordDecoder(Protocol):
    """What `decode_flight` needs: `DictDecoder`, or the decoder of a table (`TableWriter.decoder()`)."""

    @property
    def row_type(self) -> type:
        """The exact type of every row; another one once the decoder has changed."""

    @property
    def skip_null_values(self) -> bool:
        """Whether a message without a value (a tombstone) is filtered out; otherwise it is dead."""

    def decode_many(self, array: bytes) -> list[Any]:
        """Decode a JSON array of rows and strings; raises on anything else."""

    def decode_one(self, message: bytes) -> Any:
        """Decode one row; raises if it is none."""

    def explain(self, message: bytes, error: Exception) -> Optional[Guilty]:
        """Say why `decode_one` raised ``error``; None if it would not any more, as the decoder has changed."""


DEFAULT_LIMITS = Limits()

_NULL_VALUE = object()

# What decoding raises when the message is at fault. UnicodeDecodeError is a ValueError, as msgspec's own errors are.
_FAULTS = (ValueError, RecursionError)


def decode_flight(flight: Flight, decoder: RecordDecoder, limits: Limits = DEFAULT_LIMITS) -> Records:
    """Decode every message of the flight; a message that is no JSON object becomes a `DeadRecord` with its reason.

    So does a message beyond one of the limits, unseen.

    Of a condemned flight no message is looked at: all of them are dead for the reason that it carries.
    """
    index = FlightIndex(flight)
    count = len(index)
    if flight.condemned is not None:
        return Records(index, [], range(0), dead=tuple(DeadRecord(each, flight.condemned) for each in range(count)))
    if not count:
        return Records(index, [], range(0))
    joined = index.joined()
    plain = b"\\" not in joined
    broken = breaches(index, limits)
    if not broken and not index.has_null_values():
        rows = _decode_joined(joined, count, flight.separator, decoder)
        if rows is not None:
            return Records(index, rows, range(count), plain=plain)
    del joined
    return _decode_apart(index, decoder, plain, broken)


def _decode_joined(joined: bytes, count: int, separator: bytes, decoder: RecordDecoder) -> Optional[list[Any]]:
    """The rows of ``count`` joined values, or None if they can not be trusted to be just that."""
    try:
        items = decoder.decode_many(b"[%b]" % joined)
    except _FAULTS:
        return None
    nonce = separator[2:-2].decode()
    if len(items) != 2 * count - 1 or items[1::2].count(nonce) != count - 1:
        return None
    rows = items[::2]
    return rows if set(map(type, rows)) == {decoder.row_type} else None


def _decode_apart(index: FlightIndex, decoder: RecordDecoder, plain: bool, broken: Mapping[int, str]) -> Records:
    """Decode in blocks, and message by message where a block fails. Starts over when the decoder has changed."""
    values: list[Optional[bytes]] = list(index.values())
    for ordinal in broken:
        values[ordinal] = None
    while True:
        rows: list[Any] = []
        ordinals: list[int] = []
        filtered: list[int] = []
        guilty: list[tuple[int, Guilty]] = []
        row_type = decoder.row_type
        for ordinal, outcome in _outcomes(values, index.flight.separator, decoder):
            if ordinal in broken:
                guilty.append((ordinal, Guilty(broken[ordinal])))
            elif isinstance(outcome, Guilty):
                guilty.append((ordinal, outcome))
            elif outcome is _NULL_VALUE and decoder.skip_null_values:
                filtered.append(ordinal)
            elif outcome is _NULL_VALUE:
                guilty.append((ordinal, Guilty("null value")))
            else:
                rows.append(outcome)
                ordinals.append(ordinal)
        if decoder.row_type is row_type:
            break
    return Records(
        index,
        rows,
        ordinals,
        filtered=tuple(filtered),
        dead=tuple(DeadRecord(ordinal, shorten_reason(why.reason), why.sqlstate) for ordinal, why in guilty),
        unknown_fields=frozenset(name for _, why in guilty for name in why.unknown_fields),
        plain=plain,
    )


def _outcomes(values: Sequence[Optional[bytes]], separator: bytes, decoder: RecordDecoder) -> Iterator[tuple[int, Any]]:
    """Each message's row, guilt or `_NULL_VALUE`, in order; ends early when the decoder changes."""
    row_type = decoder.row_type
    for start in range(0, len(values), BLOCK_MESSAGES):
        block = values[start : start + BLOCK_MESSAGES]
        whole = [value for value in block if value is not None]
        rows = _decode_joined(separator.join(whole), len(whole), separator, decoder) if whole else []
        if rows is not None and len(whole) == len(block):
            yield from zip(range(start, start + len(block)), rows, strict=True)
            continue
        remaining: Iterator[Any] = iter(rows) if rows is not None else repeat(None)
        for ordinal, value in enumerate(block, start):
            if value is None:
                yield ordinal, _NULL_VALUE
                continue
            row = next(remaining)
            yield ordinal, _decode_alone(value, decoder) if row is None else row
            if decoder.row_type is not row_type:
                return


def _decode_alone(value: bytes, decoder: RecordDecoder) -> Any:
    """One message's row, or its `Guilty`."""
    try:
        row = decoder.decode_one(value)
    except _FAULTS as error:
        # With None the decoder has changed, and everything is decoded again.
        return decoder.explain(value, error)
    return row


# --- Why a message is no record --------------------------------------------------------------------------------------

_KINDS = {b"[": "an array", b'"': "a string", b"t": "true", b"f": "false", b"n": "null"}
_JSON_SPACE = b" \t\r\n"


def explain_json(message: bytes, error: Exception) -> Guilty:
    """What is wrong with a message that is not one JSON object in UTF-8. ``error`` is what decoding raised."""
    stripped = message.strip(_JSON_SPACE)
    if not stripped:
        return Guilty("empty value")
    try:
        message.decode()
    except UnicodeDecodeError as fault:
        return Guilty(f"not UTF-8: {fault.reason} at byte {fault.start}", "22021")
    if isinstance(error, RecursionError):
        return Guilty("nested too deeply")
    try:
        msgspec.json.decode(message, type=msgspec.Raw)
    except RecursionError:
        return Guilty("nested too deeply")
    except ValueError as fault:
        return Guilty(f"not JSON: {fault}")
    if not stripped.startswith(b"{"):
        kind = _KINDS.get(stripped[:1], "a number")
        return Guilty(f"not a JSON object but {kind}")
    return Guilty(f"not usable: {error}")


class DictDecoder:
    """Records as plain dicts, for transforms and for sinks of one's own.

    With ``exact``, a number with a fraction or an exponent is an `ExactFloat`, which keeps its digits for the table.
    The last of several fields with the same name counts, as in PostgreSQL's jsonb.
    """

    row_type: type = dict

    def __init__(self, *, exact: bool = True, skip_null_values: bool = False) -> None:
        self.skip_null_values = skip_null_values
        self._decoder = msgspec.json.Decoder(float_hook=exact_float if exact else None)

    def decode_many(self, array: bytes) -> list[Any]:
        """Decode a JSON array; what is no object is told by its type."""
        items: list[Any] = self._decoder.decode(array)
        return items

    def decode_one(self, message: bytes) -> Any:
        """Decode one object."""
        row = self._decoder.decode(message)
        if type(row) is not dict:
            raise ValueError(f"a {type(row).__name__}")
        return row

    def explain(self, message: bytes, error: Exception) -> Optional[Guilty]:
        """Say why it is no object."""
        return explain_json(message, error)
