"""Rows of a `Shape` to COPY text, by generated code. Runs in the worker, before the transaction begins.

A line is one f-string over a row's attributes, made once for each shape and set of columns. COPY wants ``\\``, tab,
newline and carriage return escaped, and looking for them in every value would cost more than all else. So it is done
once for a batch (`survey`): JSON can hold those characters only behind a backslash, so a flight without any backslash
needs no look at all; otherwise each column's strings are joined and searched in one go, and only the columns in which
something is found are escaped, value by value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any, Optional

import msgspec
from msgspec import UNSET

from speedlayer.workers.sinks.postgres.kinds import Kind
from speedlayer.workers.sinks.postgres.shape import Mode, Shape, Slot
from speedlayer.workers.sinks.postgres.unwritable import Unwritable

NULL = "\\N"
NUL_REASON = "a NUL character, which PostgreSQL's text can not hold"
NUL_SQLSTATE = "22021"  # character_not_in_repertoire, as the server would say

# Functions kept for one shape. Each stands for a set of columns and what of them needs escaping, so messages decide how
# many there are; making one takes some 0.3 ms.
ENCODERS_LIMIT = 256

# Why a row can not be encoded, and the SQLSTATE if there is one.
Fault = tuple[str, Optional[str]]


def escape(text: str) -> str:
    """Escape a text for COPY; a NUL is refused."""
    if "\0" in text:
        raise Unwritable(NUL_REASON, NUL_SQLSTATE)
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def _escape_value(value: Any) -> Any:
    if value is None:
        return NULL
    return escape(value) if type(value) is str else value


# --- What needs care -------------------------------------------------------------------------------------------------


def mend(shape: Shape, rows: Sequence[Any]) -> dict[int, Fault]:
    """Change, in place, those direct values that are not their own text; returns the rows where that is impossible.

    Before rows are folded, so that keys are compared as they are written.
    """
    faults: dict[int, Fault] = {}
    for slot in shape.mended:
        suspects, mended = slot.kind.suspects, slot.kind.mend
        assert suspects is not None and mended is not None
        values = list(map(attrgetter(slot.attribute), rows))
        if not suspects(values):
            continue
        for index, (row, value) in enumerate(zip(rows, values, strict=True)):
            try:
                changed = mended(value)
            except Unwritable as fault:
                faults.setdefault(index, (_in_column(slot, str(fault)), fault.sqlstate))
            else:
                if changed is not value:
                    setattr(row, slot.attribute, changed)
    return faults


@dataclass(frozen=True)
class Survey:
    """Which columns need escaping, and which rows no escaping can help (by index)."""

    escaped: frozenset[str]
    faults: dict[int, Fault]


CLEAN = Survey(frozenset(), {})


def survey(shape: Shape, rows: Sequence[Any]) -> Survey:
    """Look at all strings that go into lines directly."""
    escaped: set[str] = set()
    faults: dict[int, Fault] = {}
    for slot in shape.slots:
        if slot.mode is not Mode.DIRECT:
            continue
        column = map(attrgetter(slot.attribute), rows)
        strings = "".join([value for value in column if value.__class__ is str])
        if "\0" in strings:
            for index, row in enumerate(rows):
                value = getattr(row, slot.attribute)
                if type(value) is str and "\0" in value:
                    faults.setdefault(index, (_in_column(slot, NUL_REASON), NUL_SQLSTATE))
        if "\\" in strings or "\n" in strings or "\t" in strings or "\r" in strings:
            escaped.add(slot.attribute)
    return Survey(frozenset(escaped), faults)


def _in_column(slot: Slot, reason: str) -> str:
    return f'column "{slot.column.name}": {reason}'


# --- Lines -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lines:
    """COPY text for rows that fill the same columns. ``group`` tells several such apart."""

    slots: tuple[Slot, ...]
    data: bytes
    count: int
    group: int = 0


def encode(shape: Shape, rows: Sequence[Any], escaped: frozenset[str], *, numbered: bool = False) -> list[Lines]:
    """The rows as COPY text, one `Lines` for each set of columns that rows fill.

    With ``numbered``, two columns follow: the row's number in ``rows`` and its group, so that the server can find the
    last row of each key. Raises `Unwritable` or `UnicodeEncodeError` if a row can not be written (see `find_faults`).
    """
    result = []
    for group, (slots, members, numbers) in enumerate(_groups(shape, rows)):
        lines = _encoder(shape, slots, escaped)(members)
        if numbered:
            lines = [f"{line}\t{number}\t{group}" for line, number in zip(lines, numbers, strict=True)]
        lines.append("")
        result.append(Lines(slots, "\n".join(lines).encode(), len(members), group))
    return result


def _groups(shape: Shape, rows: Sequence[Any]) -> Iterator[tuple[tuple[Slot, ...], Sequence[Any], Sequence[int]]]:
    """Rows that fill the same columns, with their numbers."""
    optional = shape.optional
    if not optional:
        yield shape.slots, rows, range(len(rows))
        return
    groups: dict[tuple[bool, ...], tuple[list[Any], list[int]]] = {}
    values_of = [attrgetter(slot.attribute) for slot in optional]
    for number, row in enumerate(rows):
        missing = tuple([value_of(row) is UNSET for value_of in values_of])
        members, numbers = groups.setdefault(missing, ([], []))
        members.append(row)
        numbers.append(number)
    for missing, (members, numbers) in groups.items():
        absent = {slot.attribute for slot, gone in zip(optional, missing, strict=True) if gone}
        yield tuple(slot for slot in shape.slots if slot.attribute not in absent), members, numbers


def _encoder(shape: Shape, slots: tuple[Slot, ...], escaped: frozenset[str]) -> Callable[[Sequence[Any]], list[str]]:
    """The function that turns rows into lines, made on first use."""
    choice = (tuple(slot.attribute for slot in slots), escaped)
    made: Optional[Callable[[Sequence[Any]], list[str]]] = shape.encoders.get(choice)
    if made is None:
        if len(shape.encoders) >= ENCODERS_LIMIT:
            shape.encoders.clear()
        made = shape.encoders[choice] = _make_encoder(shape, slots, escaped)
    return made


def _make_encoder(
    shape: Shape, slots: tuple[Slot, ...], escaped: frozenset[str]
) -> Callable[[Sequence[Any]], list[str]]:
    # Only attribute names that speedlayer chose itself (c0, c1, …) go into the code.
    scope: dict[str, Any] = {"N": NULL, "E": _escape_value}
    pieces = []
    for slot in slots:
        value = f"r.{slot.attribute}"
        if slot.mode is Mode.INDIRECT:
            scope[f"F_{slot.attribute}"] = _indirect(slot, shape.text_of)
            pieces.append(f"{{F_{slot.attribute}({value})}}")
        elif slot.attribute in escaped:
            pieces.append(f"{{E({value})}}")
        elif slot.key:
            pieces.append(f"{{{value}}}")
        else:
            pieces.append(f"{{N if (v := {value}) is None else v}}")
    line = "\\t".join(pieces)
    exec(f"def encode(rows):\n    return [f'{line}' for r in rows]", scope)
    made: Callable[[Sequence[Any]], list[str]] = scope["encode"]
    return made


def _indirect(slot: Slot, text_of: Callable[[Kind], Callable[[Any], Optional[str]]]) -> Callable[[Any], str]:
    text_of_value = text_of(slot.kind)

    def written(value: Any) -> str:
        try:
            text = text_of_value(value)
            if text is not None:
                return escape(text)
        except Unwritable as fault:
            raise Unwritable(_in_column(slot, str(fault)), fault.sqlstate) from None
        if slot.key:
            raise Unwritable(f'key field "{slot.column.name}" is null', "23502")
        return NULL

    return written


def find_faults(shape: Shape, rows: Sequence[Any], escaped: frozenset[str]) -> dict[int, Fault]:
    """Encode every row for itself, to find those that made `encode` raise."""
    faults: dict[int, Fault] = {}
    for index, row in enumerate(rows):
        try:
            encode(shape, [row], escaped)
        except Unwritable as fault:
            faults[index] = (str(fault), fault.sqlstate)
        except UnicodeError as fault:
            faults[index] = (f"not valid Unicode: {fault}", NUL_SQLSTATE)
        except (ValueError, OverflowError, RecursionError) as fault:
            faults[index] = (f"can not be written: {fault}", None)
    return faults


# --- The last record of each key -------------------------------------------------------------------------------------


def fold(shape: Shape, rows: Sequence[Any], key: Sequence[str], *, keep_missing: bool) -> Sequence[Any]:
    """The last row of each key, sorted by key (so that two workers lock rows in one order).

    With ``keep_missing``, an earlier row lends the fields that later ones lack, as if they were written one by one.
    """
    slots = [next(slot for slot in shape.slots if slot.column.name == name) for name in key]
    columns = [_comparable(slot, map(attrgetter(slot.attribute), rows)) for slot in slots]
    keys = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
    last = dict(zip(keys, rows, strict=True))
    if keep_missing and len(last) < len(rows) and shape.optional:
        last = _merged(shape, keys, rows)
    return [row for _, row in sorted(last.items(), key=itemgetter(0))]


def _comparable(slot: Slot, values: Iterator[Any]) -> list[Any]:
    if slot.kind.key == "uuid":
        return [value.replace("-", "").strip("{}").lower() for value in values]
    return list(values)


def _merged(shape: Shape, keys: Sequence[Any], rows: Sequence[Any]) -> dict[Any, Any]:
    attributes = [slot.attribute for slot in shape.slots]
    merged: dict[Any, Any] = {}
    for key, row in zip(keys, rows, strict=True):
        earlier = merged.get(key)
        if earlier is not None:
            given = {name: value for name in attributes if (value := getattr(row, name)) is not UNSET}
            merged[key] = msgspec.structs.replace(earlier, **given)
        else:
            merged[key] = row
    return merged
