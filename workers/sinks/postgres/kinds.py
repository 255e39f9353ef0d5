"""How values of each PostgreSQL type are written as text: one `Kind` for each family of types. Runs in the worker.

The rule: a column's input function gets the text of the JSON value, as PostgreSQL's own ``json_populate_record`` does
it. A string gives its characters, a number its digits as they stand in the message, ``true`` and ``false`` themselves,
an object or array its JSON text; ``null`` is NULL. What the type makes of that text is the server's to say, and its
error is the reason of a dead letter. json columns take the value itself, and array columns take a JSON array.

There are two sources. A *token* is the piece of the message that holds a value (no transform ran). A *value* is a
Python object (a transform made it), for which the same rule holds, with a few natural additions (dates, `Decimal`,
`bytes`, `UUID`).

Here are the kinds that no setting changes. Those that one does change, and the table of all types, are in
ruled_kinds.py; those of parts (arrays, composite types, hstore) in literals.py. To teach the sink a type, add its name
to `kinds_for` and, where text is not enough, a `Kind` of its own; docs/types.md is what the tests say of each.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import math
import numbers
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Optional

import msgspec

from speedlayer.workers.decoding.exact import ExactFloat
from speedlayer.workers.sinks.postgres.unwritable import Unwritable

Text = Optional[str]  # what the input function gets; None is NULL


@dataclass(frozen=True)
class Kind:
    """A family of types.

    ``direct`` says that most values can be put into the line as ``f"{value}"``: a "number" may be any scalar, since
    the server refuses what is none, while a "text" must be a string or an integer, and a "string" a string. ``direct``
    None means that each value goes through `from_token` or `from_value`.
    """

    name: str
    direct: Optional[Literal["number", "text", "string"]]
    from_token: Callable[[str], Text]
    from_value: Callable[[Any], Text]
    # How equal keys are recognised before the server sees them: as integers, as characters, as UUIDs. None: only the
    # server can tell (1.0 = 1.00, one instant in two time zones), so it folds.
    key: Optional[Literal["integer", "text", "uuid"]] = None
    # Direct values that are not their own text after all, such as a text with a NUL: `suspects` looks at a
    # batch's values of the column, and only where it finds one are they all `mend`ed (more than once does no harm).
    suspects: Optional[Callable[[Sequence[Any]], bool]] = None
    mend: Optional[Callable[[Any], Any]] = None


# --- From the message ------------------------------------------------------------------------------------------------

decode_string = msgspec.json.Decoder(str).decode


def scalar_from_token(token: str) -> Text:
    """The text of any JSON value."""
    if token[0] == '"':
        return decode_string(token)
    if token == "null":
        return None
    return "0" if token == "-0" else token  # -0 is the integer 0 (as in the quick path, which reads an int)


def json_from_token(token: str) -> Text:
    """The value itself; JSON's null is SQL's NULL, as in every other column."""
    return None if token == "null" else token


# --- From a transform ------------------------------------------------------------------------------------------------


def _encode_exact(value: Any) -> Any:
    if isinstance(value, ExactFloat):
        return msgspec.Raw(value.text.encode())
    if isinstance(value, Mapping):
        return dict(value)
    raise Unwritable(f"a {type(value).__name__} can not be written as JSON")


_encode_json = msgspec.json.Encoder(enc_hook=_encode_exact, decimal_format="number").encode


def json_from_value(value: Any) -> Text:
    """A Python value as JSON; numbers that a transform left alone keep their digits."""
    if value is None:
        return None
    try:
        return _encode_json(value).decode()
    except Unwritable:
        raise
    except RecursionError:
        raise Unwritable("nested too deeply", "54001") from None
    except (TypeError, ValueError, UnicodeEncodeError) as error:
        raise Unwritable(f"can not be written as JSON: {error}") from None


def scalar_from_value(value: Any) -> Text:
    """The text of a Python value, the same that its JSON value would have."""
    writer = _WRITERS.get(type(value))
    if writer is not None:
        return writer(value)
    for base, writer in _BASES:
        if isinstance(value, base):
            return writer(value)
    raise Unwritable(f"a {type(value).__name__} can not be written to a column")


def _text_of_float(value: float) -> str:
    if math.isfinite(value):
        return repr(float(value))
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def _text_of_integer(value: Any) -> str:
    try:
        return str(int(value))
    except ValueError as error:  # more digits than sys.get_int_max_str_digits()
        raise Unwritable(f"an integer of too many digits: {error}") from None


def _text_of_interval(value: datetime.timedelta) -> str:
    return f"{value.days} days {value.seconds} seconds {value.microseconds} microseconds"


_WRITERS: dict[type, Callable[[Any], Text]] = {
    type(None): lambda value: None,
    str: lambda value: value,
    bool: lambda value: "true" if value else "false",
    int: _text_of_integer,
    float: _text_of_float,
    ExactFloat: lambda value: value.text,
    decimal.Decimal: str,
    datetime.datetime: lambda value: value.isoformat(),
    datetime.date: lambda value: value.isoformat(),
    datetime.time: lambda value: value.isoformat(),
    datetime.timedelta: _text_of_interval,
    uuid.UUID: str,
    bytes: lambda value: "\\x" + value.hex(),
    bytearray: lambda value: "\\x" + value.hex(),
    memoryview: lambda value: "\\x" + value.hex(),
    dict: json_from_value,
    list: json_from_value,
    tuple: json_from_value,
}
# Subclasses, and numbers of other libraries. An enum stands for its value, so it comes before int and str.
_BASES: tuple[tuple[type, Callable[[Any], Text]], ...] = (
    (enum.Enum, lambda value: scalar_from_value(value.value)),
    (str, str.__str__),
    (datetime.datetime, lambda value: value.isoformat()),
    (datetime.date, lambda value: value.isoformat()),
    (datetime.time, lambda value: value.isoformat()),
    (datetime.timedelta, _text_of_interval),
    (decimal.Decimal, str),
    (numbers.Integral, _text_of_integer),
    (numbers.Real, _text_of_float),
    (Mapping, json_from_value),
    (list, json_from_value),
    (tuple, json_from_value),
    (msgspec.Struct, json_from_value),
)


# --- The kinds that no setting changes --------------------------------------------------------------------------------

TEXT = Kind("text", "text", scalar_from_token, scalar_from_value, key="text")
OTHER = Kind("other", "text", scalar_from_token, scalar_from_value)
UUID = Kind("uuid", "text", scalar_from_token, scalar_from_value, key="uuid")
INTEGER = Kind("integer", "number", scalar_from_token, scalar_from_value, key="integer")
FLOAT = Kind("float", "number", scalar_from_token, scalar_from_value)
NUMERIC = Kind("numeric", "number", scalar_from_token, scalar_from_value)
BOOLEAN = Kind("boolean", "number", scalar_from_token, scalar_from_value)
JSON = Kind("json", None, json_from_token, json_from_value)
# pgvector's vector and halfvec read a JSON array of numbers as it is.
VECTOR = Kind("vector", "text", scalar_from_token, scalar_from_value)


def without_key(kind: Kind) -> Kind:
    """For a collation that calls different characters equal, so that only the server can tell equal keys."""
    return replace(kind, key=None)
