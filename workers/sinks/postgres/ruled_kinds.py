"""The kinds that a rule of the pipeline's author changes (rules.py), and which kind each type has (worker)."""

from __future__ import annotations

import base64
import datetime
import decimal
import enum
import functools
import numbers
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional

from speedlayer.workers.sinks.postgres import instants
from speedlayer.workers.sinks.postgres.kinds import (
    BOOLEAN,
    FLOAT,
    INTEGER,
    JSON,
    NUMERIC,
    OTHER,
    TEXT,
    UUID,
    Kind,
    Text,
    decode_string,
    scalar_from_token,
    scalar_from_value,
)
from speedlayer.workers.sinks.postgres.rules import DEFAULT_RULES, EpochUnit, ValueRules
from speedlayer.workers.sinks.postgres.unwritable import Unwritable

# --- NUL -------------------------------------------------------------------------------------------------------------


def through(kind: Kind, change: Callable[[Text], Text]) -> Kind:
    """The same kind, each of whose texts is changed before the server gets it."""
    from_token, from_value = kind.from_token, kind.from_value
    return replace(
        kind,
        from_token=lambda token: change(from_token(token)),
        from_value=lambda value: change(from_value(value)),
    )


_REPLACEMENTS = {"strip": "", "replace": "\N{REPLACEMENT CHARACTER}"}
# The escape of a NUL, behind an even number of backslashes.
_ESCAPED_NUL = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")


def without_nul(kind: Kind, rules: ValueRules) -> Kind:
    """The kind of a text in which a NUL is dropped or replaced."""
    replacement = _REPLACEMENTS.get(rules.nul_characters)
    if replacement is None:
        return kind

    def change(text: Text) -> Text:
        return None if text is None else text.replace("\0", replacement)

    return replace(
        through(kind, change),
        suspects=lambda values: "\0" in "".join([value for value in values if value.__class__ is str]),
        mend=lambda value: change(value) if value.__class__ is str else value,
    )


def _json_without_nul(rules: ValueRules) -> Kind:
    """The kind of jsonb, which can not hold a NUL although JSON can."""
    replacement = _REPLACEMENTS.get(rules.nul_characters)
    if replacement is None:
        return JSON
    written = rf"\1{replacement}"

    def change(text: Text) -> Text:
        return text if text is None or "u0000" not in text else _ESCAPED_NUL.sub(written, text)

    return through(JSON, change)


# --- NaN and infinities -----------------------------------------------------------------------------------------------

_NON_FINITE = frozenset({"nan", "inf", "infinity"})
NON_FINITE_SQLSTATE = "22003"  # numeric_value_out_of_range


def _finite(kind: Kind, rules: ValueRules) -> Kind:
    """The kind of numbers among which NaN and the infinities are not welcome."""
    if rules.non_finite_numbers == "keep":
        return kind
    becomes_null = rules.non_finite_numbers == "null"

    def change(text: Text) -> Text:
        if text is None or text.strip().lstrip("+-").lower() not in _NON_FINITE:
            return text
        if becomes_null:
            return None
        raise Unwritable(f'{text.strip()[:20]}, with non_finite_numbers = "dead_letter"', NON_FINITE_SQLSTATE)

    def suspects(values: Sequence[Any]) -> bool:
        texts = "".join([f"{value}" for value in values if value.__class__ not in _FINITE_TYPES])
        return "n" in texts or "N" in texts

    def mend(value: Any) -> Any:
        if value.__class__ in _FINITE_TYPES:
            return value
        text = f"{value}"
        return value if change(text) is text else None

    return replace(through(kind, change), suspects=suspects, mend=mend)


_FINITE_TYPES = frozenset({int, bool, type(None)})


# --- bytea -----------------------------------------------------------------------------------------------------------


def _bytea(rules: ValueRules) -> Kind:
    as_base64 = rules.bytea_encoding == "base64"

    def text_of(text: str) -> str:
        if not as_base64:
            return text if text.startswith("\\x") else "\\x" + text
        try:
            return "\\x" + base64.b64decode(text, validate=True).hex()
        except ValueError as error:
            raise Unwritable(f"not base64: {error}", BYTEA_SQLSTATE) from None

    def from_token(token: str) -> Text:
        if token == "null":
            return None
        if token[0] != '"':
            raise Unwritable(f"bytea takes a text in {rules.bytea_encoding}", BYTEA_SQLSTATE)
        return text_of(decode_string(token))

    def from_value(value: Any) -> Text:
        if value is None or isinstance(value, (bytes, bytearray, memoryview)):
            return scalar_from_value(value)
        if not isinstance(value, str):
            raise Unwritable(f"bytea takes bytes, or a text in {rules.bytea_encoding}", BYTEA_SQLSTATE)
        return text_of(str.__str__(value))

    return Kind("bytea", None, from_token, from_value)


BYTEA_SQLSTATE = "22023"  # invalid_parameter_value, as the server says of wrong hexadecimal digits


# --- Dates and times -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Temporal:
    """Writes the values of one type of date or time.

    Not ``zoned``: the offset of a text is taken into account, where the server would drop it.
    """

    name: str
    of_number: Callable[[str, EpochUnit], str]
    unit: Optional[EpochUnit]
    zoned: bool = True

    @property
    def kind(self) -> Kind:
        kind = Kind(self.name, "string", self.from_token, self.from_value)
        return kind if self.zoned else replace(kind, suspects=instants.may_be_zoned, mend=self.mend)

    def from_text(self, text: str) -> str:
        return text if self.zoned else instants.without_zone(text)

    def from_number(self, text: str) -> str:
        if self.unit is None:
            reason = f"a number for {self.name}, and the sink has no epoch_unit"
            raise Unwritable(reason, instants.INVALID_DATETIME_FORMAT)
        return self.of_number(text, self.unit)

    def from_token(self, token: str) -> Text:
        if token[0] == '"':
            return self.from_text(decode_string(token))
        return self.from_number(token) if token[0] in "-0123456789" else scalar_from_token(token)

    def from_value(self, value: Any) -> Text:
        if isinstance(value, enum.Enum):
            return self.from_value(value.value)
        if isinstance(value, bool):
            return scalar_from_value(value)
        if isinstance(value, (numbers.Real, decimal.Decimal)):
            return self.from_number(scalar_from_value(value) or "")
        if isinstance(value, str):
            return self.from_text(str.__str__(value))
        if not self.zoned and isinstance(value, datetime.datetime) and value.tzinfo is not None:
            value = value.astimezone(datetime.timezone.utc).replace(tzinfo=None)
        return scalar_from_value(value)

    def mend(self, value: Any) -> Any:
        return self.from_text(value) if value.__class__ is str else value


# --- The types they serve ---------------------------------------------------------------------------------------------


@functools.cache  # so that two plans of one table are equal
def kinds_for(rules: ValueRules) -> dict[str, Kind]:
    """The kinds of PostgreSQL's own types by their catalog names; "" is any other type, which takes text."""
    text, other = without_nul(TEXT, rules), without_nul(OTHER, rules)
    unit = rules.epoch_unit
    real, numeric = _finite(FLOAT, rules), _finite(NUMERIC, rules)
    return {
        "": other,
        "bool": BOOLEAN,
        "int2": INTEGER,
        "int4": INTEGER,
        "int8": INTEGER,
        "oid": INTEGER,
        "float4": real,
        "float8": real,
        "numeric": numeric,
        "text": text,
        "varchar": text,
        "name": text,
        "bpchar": other,  # blanks at the end do not count when keys are compared
        "uuid": UUID,
        "json": JSON,
        "jsonb": _json_without_nul(rules),
        "bytea": _bytea(rules),
        "date": _Temporal("date", instants.date_text, unit).kind,
        "time": _Temporal("time", instants.time_text, unit).kind,
        "timetz": _Temporal("timetz", instants.timetz_text, unit).kind,
        "timestamp": _Temporal("timestamp", instants.timestamp_text, unit, zoned=False).kind,
        "timestamptz": _Temporal("timestamptz", instants.timestamptz_text, unit).kind,
        "interval": _Temporal("interval", instants.interval_text, unit).kind,
    }


def kind_of(type_name: str, rules: ValueRules = DEFAULT_RULES) -> Kind:
    """The kind of one of PostgreSQL's own types by its catalog name; any other type takes text."""
    kinds = kinds_for(rules)
    return kinds.get(type_name, kinds[""])
