"""The shape of a table's records, learned from them: which columns they fill, and how directly.

Runs in the worker. Rows are instances of a generated msgspec struct whose fields are the table's columns, so that one
C call decodes a flight and checks it: unknown fields, missing key fields, values of a surprising type. The struct is as
strict as the records seen so far allow, and the stricter it is, the less is left to check for each value:

- a column that no record had is not written at all (its field accepts nothing);
- a column whose values fit its `Kind`'s ``direct`` form is put into the line as it is;
- any other goes through a function of its kind (an object for a text column, say).

A record that does not fit is looked at by itself: either it is guilty, or the shape widens and everything is decoded
again. A shape only ever widens, so this ends after a few steps for each column.
"""

from __future__ import annotations

import decimal
import enum
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Optional, Union

import msgspec
from msgspec import UNSET, Raw, UnsetType

from speedlayer.workers.decoding.exact import ExactFloat
from speedlayer.workers.decoding.json_records import Guilty, explain_json
from speedlayer.workers.sinks.postgres.kinds import Kind, Text
from speedlayer.workers.sinks.postgres.table import Column

# Python refuses to read or write integers of more digits (sys.get_int_max_str_digits() is 4,300 by default).
INTEGER_LIMIT_DIGITS = 4000

# Exact types whose f-string is the text that `scalar_from_value` would give, or one that the server reads alike.
_DIRECT_TYPES: Mapping[str, frozenset[type]] = {
    "number": frozenset({int, str, bool, ExactFloat, decimal.Decimal, float, type(None)}),
    "text": frozenset({int, str, type(None)}),
    "string": frozenset({str, type(None)}),
}

_DIRECT_ANNOTATIONS: Mapping[str, Any] = {"number": Any, "text": Union[int, str, None], "string": Optional[str]}

# msgspec puts field names into JSON as they are, so it refuses these in a name.
_UNFIT_FOR_FIELDS = frozenset('"\\') | {chr(code) for code in range(0x20)}


class Mode(enum.Enum):
    """How a column of the records is written."""

    ABSENT = "absent"  # no record has the field
    DIRECT = "direct"  # the value is its own text
    INDIRECT = "indirect"  # through the kind's function


@dataclass(frozen=True)
class Slot:
    """One column in a shape. ``attribute`` is its field in the struct: ours, never a name from outside.

    ``optional``: records may lack the field, and that is not the same as null (the column has a default).
    """

    column: Column
    attribute: str
    mode: Mode = Mode.ABSENT
    optional: bool = False
    key: bool = False

    @property
    def kind(self) -> Kind:
        """How the column's values are written."""
        return self.column.kind


@dataclass(frozen=True, eq=False)
class Shape:
    """A generated row type, and the slots that its rows fill, in the order of the records' fields."""

    row_type: type
    slots: tuple[Slot, ...]
    text_of: Callable[[Kind], Callable[[Any], Text]]
    encoders: dict[Any, Any] = field(default_factory=dict)  # encode.py's generated functions

    @property
    def optional(self) -> tuple[Slot, ...]:
        """The slots that divide rows into groups with different sets of columns."""
        return tuple(slot for slot in self.slots if slot.optional)

    @functools.cached_property
    def mended(self) -> tuple[Slot, ...]:
        """The slots in which `encode.mend` must look for values that are not their own text."""
        return tuple(slot for slot in self.slots if slot.mode is Mode.DIRECT and slot.kind.mend is not None)

    @property
    def folds_exactly(self) -> bool:
        """Whether equal keys can be told from here; otherwise the server must fold."""
        return all(slot.mode is Mode.DIRECT and slot.kind.key for slot in self.slots if slot.key)


class Shaper:
    """Keeps the shape of one table's records and widens it. The two subclasses are the two sources of rows."""

    def __init__(
        self, columns: Sequence[Column], key: Sequence[str], *, forbid_unknown: bool, keep_missing: bool
    ) -> None:
        self._forbid_unknown = forbid_unknown
        # Where a missing field must be told from null: the default is not NULL, or the row keeps what it has.
        self._minded = {column.name for column in columns if keep_missing or column.default}
        self._key = tuple(key)
        self._columns = {column.name: column for column in columns}
        self._generated = frozenset(column.name for column in columns if column.generated)
        self._slots: dict[str, Slot] = {}
        for number, column in enumerate(columns):
            if not column.generated:
                self._slots[column.name] = Slot(column, f"c{number}", key=column.name in self._key)
        # Columns with such a name get by under their attribute's name; the records are renamed to it.
        self.renames = any(_UNFIT_FOR_FIELDS.intersection(name) for name in self._slots)
        self.shapes: dict[type, Shape] = {}
        for name in self._key:
            self._slots[name] = self._slot(name, self._key_mode(self._slots[name]))
        self._build()

    # --- widening ---

    def _key_mode(self, slot: Slot) -> Mode:
        return Mode.DIRECT if slot.kind.key else Mode.INDIRECT

    def _slot(self, name: str, mode: Mode, *, optional: Optional[bool] = None) -> Slot:
        slot = self._slots[name]
        return Slot(
            slot.column, slot.attribute, mode, slot.optional if optional is None else optional, key=name in self._key
        )

    def _widen(self, name: str, mode: Mode, *, optional: bool = False) -> bool:
        """Let the slot take more; False if it does already."""
        slot = self._slots[name]
        order = list(Mode)
        wider = self._slot(name, max(slot.mode, mode, key=order.index), optional=slot.optional or optional)
        if wider == slot:
            return False
        if slot.mode is Mode.ABSENT:  # the order of the struct's fields is that of the records': it decodes faster
            del self._slots[name]
        self._slots[name] = wider
        return True

    def _learn(self, record: Mapping[str, Any], fits: Callable[[Slot, Any], bool]) -> bool:
        """Widen the shape for a record; False if that changed nothing."""
        changed = False
        for name, value in record.items():
            slot = self._slots.get(name)
            if slot is not None:
                changed |= self._widen(name, Mode.DIRECT if fits(slot, value) else Mode.INDIRECT)
        for name, slot in list(self._slots.items()):
            if slot.mode is not Mode.ABSENT and name in self._minded and name not in self._key and name not in record:
                changed |= self._widen(name, slot.mode, optional=True)
        if changed:
            self._build()
        return changed

    def _judge(self, record: Mapping[Any, Any], is_null: Callable[[Any], bool]) -> Optional[Guilty]:
        """What makes a record impossible, whatever the shape."""
        for name in record:
            if not isinstance(name, str):
                return Guilty(f"a field's name must be a text, not {name!r}")
        if self._forbid_unknown:
            unknown = tuple(name for name in record if name not in self._columns)
            if unknown:
                listed = ", ".join(map(_quoted, unknown[:10]))
                return Guilty(f"no column for field {listed}", unknown_fields=unknown[:10])
            for name in record:
                if name in self._generated:
                    return Guilty(f"the table computes column {_quoted(name)} itself")
        for name in self._key:
            if name not in record:
                return Guilty(f"key field {_quoted(name)} is missing")
            if is_null(record[name]):
                return Guilty(f"key field {_quoted(name)} is null", "23502")
        return None

    # --- the struct ---

    def _build(self) -> None:
        fields: list[tuple[str, Any, Any]] = []
        for slot in self._slots.values():
            annotation, default = self._field(slot)
            fields.append((slot.attribute, annotation, default))
        rename = None if self.renames else {slot.attribute: name for name, slot in self._slots.items()}
        row_type = msgspec.defstruct(
            "Row",
            fields,
            rename=rename,
            kw_only=True,
            forbid_unknown_fields=self._forbid_unknown or self.renames,
            gc=False,
        )
        used = tuple(slot for slot in self._slots.values() if slot.mode is not Mode.ABSENT)
        self.shape = Shape(row_type, used, self._text_of)
        self.shapes[row_type] = self.shape
        self._built(row_type)

    def _field(self, slot: Slot) -> tuple[Any, Any]:
        """The struct field's type and default."""
        if slot.mode is Mode.ABSENT:
            return UnsetType, UNSET
        if slot.key and slot.mode is Mode.DIRECT:
            return (int if slot.kind.key == "integer" else str), msgspec.NODEFAULT
        annotation = self._indirect_type
        if slot.mode is Mode.DIRECT:
            annotation = _DIRECT_ANNOTATIONS[slot.kind.direct or "text"]
        if slot.key:
            return annotation, msgspec.NODEFAULT
        if slot.column.name not in self._minded:
            return annotation, None
        if slot.optional:
            # Raw and Any take no part in a union; the default stands all the same.
            return annotation, UNSET
        return annotation, msgspec.NODEFAULT

    _indirect_type: Any = Any

    @staticmethod
    def _text_of(kind: Kind) -> Callable[[Any], Text]:
        raise NotImplementedError

    def _built(self, row_type: type) -> None:
        raise NotImplementedError


def _quoted(name: str) -> str:
    return f'"{name}"'


# --- From messages ---------------------------------------------------------------------------------------------------

_decode_tokens = msgspec.json.Decoder(dict[str, Raw]).decode
_encode_tokens = msgspec.json.Encoder().encode
_CONTAINERS = frozenset({dict, list})


class JsonShaper(Shaper):
    """Rows straight from the messages; implements `RecordDecoder`. No transform runs.

    Numbers with a fraction or an exponent become their text (``float_hook=str``), so every digit stays and no float is
    ever made. Indirect values stay tokens (`Raw`).
    """

    _indirect_type = Raw

    def __init__(
        self,
        columns: Sequence[Column],
        key: Sequence[str],
        *,
        forbid_unknown: bool,
        keep_missing: bool,
        skip_null_values: bool = False,
    ) -> None:
        self.skip_null_values = skip_null_values
        super().__init__(columns, key, forbid_unknown=forbid_unknown, keep_missing=keep_missing)

    def _built(self, row_type: type) -> None:
        self.row_type = row_type
        self._many: Any = msgspec.json.Decoder(list[Union[row_type, str]], float_hook=str)  # type: ignore[valid-type]
        self._one: Any = msgspec.json.Decoder(row_type, float_hook=str)
        # Fields that take any value, as no msgspec type takes numbers of all sizes with their digits.
        self._open = [
            attrgetter(slot.attribute)
            for slot in self.shape.slots
            if slot.mode is Mode.DIRECT and slot.kind.direct == "number" and not slot.key
        ]

    @staticmethod
    def _text_of(kind: Kind) -> Callable[[Any], Text]:
        from_token = kind.from_token

        def text(raw: Any) -> Text:
            # A field with a default may hold None instead of a token.
            return None if raw is None else from_token(str(raw, "utf-8"))

        return text

    def decode_many(self, array: bytes) -> list[Any]:
        """Decode a JSON array of rows and strings."""
        if not self._forbid_unknown and not array.isascii():
            array.decode()  # msgspec skips the values of unknown fields without a look at their UTF-8
        items: list[Any] = self._many.decode(array)
        if array.find(b"[", 1) >= 0 or array.count(b"{") > (len(items) + 1) // 2:
            self._refuse_containers(items)
        return items

    def decode_one(self, message: bytes) -> Any:
        """Decode one row."""
        if not self._forbid_unknown and not message.isascii():
            message.decode()
        try:
            row = self._one.decode(message)
        except msgspec.ValidationError:
            # Of several fields with one name the last counts, also where an earlier one does not fit.
            row = self._one.decode(_encode_tokens(_decode_tokens(message)))
        self._refuse_containers([row])
        return row

    def _refuse_containers(self, items: Sequence[Any]) -> None:
        """An object or array where a number is expected must not be written as Python writes it."""
        row_type = self.row_type
        for value_of in self._open:
            if not {value_of(item).__class__ for item in items if item.__class__ is row_type}.isdisjoint(_CONTAINERS):
                raise ValueError("an object or array in a scalar column")

    def explain(self, message: bytes, error: Exception) -> Optional[Guilty]:
        """Find the message guilty, or widen the shape so that it fits."""
        try:
            message.decode()
            tokens = _decode_tokens(message)
        except (ValueError, OverflowError, RecursionError) as fault:
            return explain_json(message, fault)
        guilty = self._judge(tokens, lambda raw: bytes(raw) == b"null")
        if guilty is not None:
            return guilty
        return None if self._learn(tokens, _token_fits) else explain_json(message, error)


def _token_fits(slot: Slot, raw: Any) -> bool:
    token = bytes(raw)
    if slot.kind.direct is None:
        return False
    first = token[:1]
    if slot.key:
        return _is_integer(token) if slot.kind.key == "integer" else bool(slot.kind.key) and first == b'"'
    if first == b'"' or token == b"null":
        return True
    if first in (b"{", b"["):
        return False
    if first in (b"t", b"f") or slot.kind.direct == "string":
        return slot.kind.direct == "number"
    return _is_integer(token) or (slot.kind.direct == "number" and not token.lstrip(b"-").isdigit())


def _is_integer(token: bytes) -> bool:
    return token.lstrip(b"-").isdigit() and len(token) <= INTEGER_LIMIT_DIGITS


# --- From transforms -------------------------------------------------------------------------------------------------


class DictShaper(Shaper):
    """Rows from the dicts that a transform returned."""

    def _built(self, row_type: type) -> None:
        self._row_type = row_type
        self._list_type: Any = list[row_type]  # type: ignore[valid-type]
        self._checks = [(slot, _direct_types(slot)) for slot in self.shape.slots if slot.mode is Mode.DIRECT]
        self._aliases = {name: slot.attribute for name, slot in self._slots.items()}

    @staticmethod
    def _text_of(kind: Kind) -> Callable[[Any], Text]:
        return kind.from_value

    def rows_of(self, records: Sequence[Mapping[str, Any]]) -> tuple[list[Any], dict[int, Guilty]]:
        """The rows of the records, but for those that are guilty (by index)."""
        guilty: dict[int, Guilty] = {}
        while True:
            innocent = [record for index, record in enumerate(records) if index not in guilty]
            rows = self._convert(innocent)
            if rows is not None:
                return rows, guilty
            shape, known = self.shape, len(guilty)
            for index, record in enumerate(records):
                if index not in guilty and self._convert([record]) is None:
                    why = self._explain(record)
                    if why is not None:
                        guilty[index] = why
                    if self.shape is not shape:
                        break
            if self.shape is shape and len(guilty) == known:
                raise AssertionError("records that convert one by one do not convert together")

    def _convert(self, records: Sequence[Mapping[str, Any]]) -> Optional[list[Any]]:
        """The rows, or None if the shape does not fit all of them."""
        if self.renames:
            records = [self._renamed(record) for record in records]
        try:
            rows: list[Any] = msgspec.convert(records, self._list_type)
        except (ValueError, OverflowError, RecursionError):
            return None
        for slot, types in self._checks:
            if not types.issuperset(type(getattr(row, slot.attribute)) for row in rows):
                return None
        return rows

    def _renamed(self, record: Mapping[Any, Any]) -> dict[str, Any]:
        # An unknown name, behind a sign that no attribute has, stays unknown to the struct.
        renamed = {self._aliases.get(name, f"?{name}"): value for name, value in record.items()}
        if not self._forbid_unknown:
            renamed = {name: value for name, value in renamed.items() if not name.startswith("?")}
        return renamed

    def _explain(self, record: Mapping[Any, Any]) -> Optional[Guilty]:
        guilty = self._judge(record, lambda value: value is None)
        if guilty is not None:
            return guilty
        return None if self._learn(record, _value_fits) else Guilty("not usable: a dict that can not be converted")


def _value_fits(slot: Slot, value: Any) -> bool:
    return slot.kind.direct is not None and type(value) in _direct_types(slot)


def _direct_types(slot: Slot) -> frozenset[type]:
    """The exact types whose f-string is their text (an enum that is a str, say, prints otherwise)."""
    if slot.key:
        return frozenset({int if slot.kind.key == "integer" else str} if slot.kind.key else ())
    types = _DIRECT_TYPES[slot.kind.direct or "text"]
    return types | {UnsetType} if slot.optional else types
