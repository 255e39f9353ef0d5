"""The text of values that are made of others: arrays, composite types, hstore. Runs in the worker.

Each takes the natural JSON form (an array, an object) or a text, which is PostgreSQL's own literal. The parts are
written by their own kinds, so whatever holds for a column of a type holds for a part of that type.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from speedlayer.workers.sinks.postgres.kinds import (
    Kind,
    Text,
    scalar_from_token,
    scalar_from_value,
)
from speedlayer.workers.sinks.postgres.ruled_kinds import without_nul
from speedlayer.workers.sinks.postgres.rules import ValueRules
from speedlayer.workers.sinks.postgres.unwritable import Unwritable

UNDEFINED_COLUMN = "42703"
INVALID_TEXT_REPRESENTATION = "22P02"

_decode_array = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

# Kinds whose own values may be JSON arrays: in an array of them, such a value is an element and no dimension.
_OF_ARRAYS = frozenset({"json", "vector", "array"})


def _token(raw: msgspec.Raw) -> str:
    return str(raw, "utf-8")


# --- Arrays ----------------------------------------------------------------------------------------------------------


@functools.cache  # so that two plans of one table are equal
def array_of(element: Kind, delimiter: str = ",") -> Kind:
    """The kind of arrays: a JSON array becomes the array's literal, a text is taken for a literal."""
    return Kind("array", None, _array_from_token(element, delimiter), _array_from_value(element, delimiter))


def _array_from_token(element: Kind, delimiter: str) -> Callable[[str], Text]:
    nests = element.name not in _OF_ARRAYS

    def literal(token: str) -> str:
        parts = []
        for raw in _decode_array(token):
            item = str(raw, "utf-8")
            if nests and item[0] == "[":
                parts.append(literal(item))
            else:
                parts.append(_array_element(element.from_token(item)))
        return "{" + delimiter.join(parts) + "}"

    def from_token(token: str) -> Text:
        return literal(token) if token[0] == "[" else scalar_from_token(token)

    return from_token


def _array_from_value(element: Kind, delimiter: str) -> Callable[[Any], Text]:
    nests = element.name not in _OF_ARRAYS

    def literal(value: Any) -> str:
        parts = [
            literal(item) if nests and isinstance(item, (list, tuple)) else _array_element(element.from_value(item))
            for item in value
        ]
        return "{" + delimiter.join(parts) + "}"

    def from_value(value: Any) -> Text:
        return literal(value) if isinstance(value, (list, tuple)) else scalar_from_value(value)

    return from_value


def _array_element(text: Text) -> str:
    return "NULL" if text is None else _quoted(text)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


# --- Composite types -------------------------------------------------------------------------------------------------


@functools.cache
def composite_of(type_sql: str, attributes: tuple[tuple[str, Kind], ...], *, ignore_unknown: bool = False) -> Kind:
    """The kind of a composite type: an object is taken by its names, a text for a literal."""
    kinds = dict(attributes)

    def literal(texts: Mapping[str, Callable[[], Text]]) -> str:
        unknown = [name for name in texts if name not in kinds]
        if unknown and not ignore_unknown:
            raise Unwritable(f'{type_sql} has no attribute "{unknown[0]}"', UNDEFINED_COLUMN)
        parts = (texts[name]() if name in texts else None for name in kinds)
        # A null is nothing between two commas, and a row's literal doubles its quotes.
        return "(" + ",".join("" if text is None else _quoted(text) for text in parts) + ")"

    def from_token(token: str) -> Text:
        if token[0] != "{":
            return scalar_from_token(token)
        return literal(
            {
                name: functools.partial(kinds[name].from_token, _token(raw)) if name in kinds else _nothing
                for name, raw in _decode_object(token).items()
            }
        )

    def from_value(value: Any) -> Text:
        if not isinstance(value, Mapping):
            return scalar_from_value(value)
        return literal(
            {
                name: functools.partial(kinds[name].from_value, part) if name in kinds else _nothing
                for name, part in value.items()
            }
        )

    return Kind("composite", None, from_token, from_value)


def _nothing() -> Text:
    return None


# --- hstore ----------------------------------------------------------------------------------------------------------


# A literal that hstore surely reads. Of a wrong one, some servers (15) say XX000, which means a fault of their own.
_WORD = r'(?:"(?:[^"\\]|\\.)*"|[^\s"\\,=>]+)'
_PAIR = rf"\s*{_WORD}\s*=>\s*{_WORD}\s*"
_is_hstore = re.compile(rf"\s*|{_PAIR}(?:,{_PAIR})*", re.DOTALL).fullmatch


def _hstore_text(text: Text) -> Text:
    if text is None or _is_hstore(text):
        return text
    raise Unwritable('no hstore, which takes an object or a text such as "a"=>"1"', INVALID_TEXT_REPRESENTATION)


def _hstore_literal(pairs: Iterable[tuple[Any, Text]]) -> str:
    parts = []
    for name, text in pairs:
        if not isinstance(name, str):
            raise Unwritable(f"a key of hstore must be a text, not {name!r}")
        parts.append(f"{_quoted(name)}=>{'NULL' if text is None else _quoted(text)}")
    return ",".join(parts)


def _hstore_from_token(token: str) -> Text:
    if token[0] != "{":
        return _hstore_text(scalar_from_token(token))
    return _hstore_literal((name, scalar_from_token(_token(raw))) for name, raw in _decode_object(token).items())


def _hstore_from_value(value: Any) -> Text:
    if not isinstance(value, Mapping):
        return _hstore_text(scalar_from_value(value))
    return _hstore_literal((name, scalar_from_value(part)) for name, part in value.items())


@functools.cache
def hstore_of(rules: ValueRules) -> Kind:
    """The kind of hstore: an object's names and values, or a text for a literal."""
    return without_nul(Kind("hstore", None, _hstore_from_token, _hstore_from_value), rules)
