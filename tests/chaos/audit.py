"""Compares the tables with what the topics were given: row by row, and in order. Runs in the campaign's process.

An appended table must hold every acknowledged message once, as it was, in the order of its partition; an upserted one
the last of each key, and never went back. What is no row is a dead letter, byte for byte. What retention took unread is
missing, exactly as far as a recorded gap says so.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import psycopg2
import psycopg2.extensions

from chaos.stage import Stream
from chaos.traffic import Acknowledged, Lane, Traffic, document, is_bad, key_of, value

EXAMPLES = 20

COLUMNS = "number, key, text, price, mapped"

_TABLE = "CREATE TABLE {table} (number bigint, key int{key}, text text, price numeric(12, 2), mapped boolean{order})"

# Tells of every committed write that did not bring a newer message than the one it replaced.
_SETBACKS = """
CREATE TABLE setbacks (topic text, key int, was bigint, became bigint);
CREATE FUNCTION note_setback() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.number <= OLD.number THEN
        INSERT INTO setbacks VALUES (TG_ARGV[0], OLD.key, OLD.number, NEW.number);
    END IF;
    RETURN NEW;
END $$;
"""


def make_tables(dsn: str, streams: Sequence[Stream]) -> None:
    with contextlib.closing(psycopg2.connect(dsn)) as connection, connection, connection.cursor() as cursor:
        cursor.execute(_SETBACKS)
        for stream in streams:
            key, order = (" PRIMARY KEY", "") if stream.upserts else ("", ", written bigserial")
            cursor.execute(_TABLE.format(table=stream.table, key=key, order=order))
            if stream.upserts:
                cursor.execute(
                    f"CREATE TRIGGER note_setback BEFORE UPDATE ON {stream.table} FOR EACH ROW "
                    f"EXECUTE FUNCTION note_setback('{stream.topic}')"
                )


@dataclass
class Audit:
    """What was found; a promise is broken where anything but ``messages``, ``skipped`` and ``dead`` is not 0."""

    messages: int = 0
    rows: int = 0
    dead: int = 0
    skipped: int = 0
    lost: int = 0
    duplicated: int = 0
    altered: int = 0
    disordered: int = 0
    unexplained: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.lost or self.duplicated or self.altered or self.disordered or self.unexplained)

    def note(self, kind: str, what: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{kind}: {what}")


def audit(dsn: str, streams: Sequence[Stream], traffic: Traffic, forgotten: Mapping[Lane, int]) -> Audit:
    """Compare everything. ``forgotten`` says up to which offsets retention was made to take what was not read."""
    found = Audit()
    with contextlib.closing(psycopg2.connect(dsn)) as connection:
        gaps = _gaps(connection, forgotten, found)
        for stream in streams:
            lanes = {lane: one for lane, one in traffic.acknowledged().items() if lane[0] == stream.topic}
            _dead_letters(connection, stream, lanes, gaps, found)
            if stream.upserts:
                _upserted(connection, stream, lanes, gaps, found)
            else:
                _appended(connection, stream, lanes, gaps, found)
    return found


def _gaps(
    connection: psycopg2.extensions.connection, forgotten: Mapping[Lane, int], found: Audit
) -> dict[Lane, list[range]]:
    gaps: dict[Lane, list[range]] = {}
    with connection.cursor() as cursor:
        cursor.execute("SELECT topic, partition, coalesce(from_offset, 0), to_offset FROM speedlayer.gaps")
        for topic, partition, start, end in cursor.fetchall():
            if end > forgotten.get((topic, partition), 0):
                found.note("unexplained", f"a gap of {topic} {partition} from {start} to {end}")
            gaps.setdefault((topic, partition), []).append(range(start, end))
    return gaps


def _expected(
    lane: Lane, one: Acknowledged, gaps: Mapping[Lane, list[range]], found: Audit
) -> Iterator[tuple[int, int]]:
    """Number and offset of each message of a lane that was there to be read."""
    skipped = gaps.get(lane, [])
    for number, offset in zip(one.numbers, one.offsets, strict=True):
        if any(offset in gap for gap in skipped):
            found.skipped += 1
        else:
            yield number, offset


def _dead_letters(
    connection: psycopg2.extensions.connection,
    stream: Stream,
    lanes: Mapping[Lane, Acknowledged],
    gaps: Mapping[Lane, list[range]],
    found: Audit,
) -> None:
    expected = {
        (partition, offset): number
        for (topic, partition), one in lanes.items()
        for number, offset in _expected((topic, partition), one, gaps, Audit())
        if is_bad(number)
    }
    seen: Counter[tuple[int, int]] = Counter()
    with connection.cursor() as cursor:
        cursor.execute(
            'SELECT partition, "offset", value FROM speedlayer.dead_letters WHERE topic = %s', (stream.topic,)
        )
        for partition, offset, content in cursor.fetchall():
            where = f"dead letter {stream.topic} {partition} {offset}"
            seen[partition, offset] += 1
            if (partition, offset) not in expected:
                found.note("altered", f"{where} is no bad message: {bytes(content)!r}")
            elif bytes(content) != value(expected[partition, offset], stream):
                found.note("altered", f"{where} is {bytes(content)!r}")
    found.dead += len(seen)
    for partition, offset in expected.keys() - seen.keys():
        found.note("lost", f"dead letter {stream.topic} {partition} {offset}")
    for (partition, offset), count in seen.items():
        if count > 1:
            found.note("duplicated", f"dead letter {stream.topic} {partition} {offset}, {count} times")


def _appended(
    connection: psycopg2.extensions.connection,
    stream: Stream,
    lanes: Mapping[Lane, Acknowledged],
    gaps: Mapping[Lane, list[range]],
    found: Audit,
) -> None:
    where: dict[int, tuple[int, int]] = {}
    for lane, one in lanes.items():
        found.messages += len(one.numbers)
        for number, offset in _expected(lane, one, gaps, found):
            if not is_bad(number):
                where[number] = (lane[1], offset)
    seen: Counter[int] = Counter()
    newest: dict[int, tuple[int, int]] = {}
    for row in _rows(connection, f"SELECT {COLUMNS} FROM {stream.table} ORDER BY written"):
        found.rows += 1
        number = row[0]
        seen[number] += 1
        at = where.get(number)
        if at is None:
            found.note("unexplained", f"a row of {stream.topic} that no message asks for: {row}")
            continue
        text = f"{stream.topic} {at[0]} {at[1]} (number {number})"
        if row != _row(number, stream):
            found.note("altered", f"{text} is {row}")
        before = newest.get(at[0])
        if before is not None and before[0] > at[1]:
            found.note("disordered", f"{text} after offset {before[0]}")
        newest[at[0]] = (at[1], number)
    for number, (partition, offset) in where.items():
        if not seen[number]:
            found.note("lost", f"{stream.topic} {partition} {offset} (number {number})")
        elif seen[number] > 1:
            found.note("duplicated", f"{stream.topic} {partition} {offset} (number {number}), {seen[number]} times")


def _upserted(
    connection: psycopg2.extensions.connection,
    stream: Stream,
    lanes: Mapping[Lane, Acknowledged],
    gaps: Mapping[Lane, list[range]],
    found: Audit,
) -> None:
    last: dict[int, tuple[int, int, int]] = {}
    for lane, one in lanes.items():
        found.messages += len(one.numbers)
        for number, offset in _expected(lane, one, gaps, found):
            if not is_bad(number):
                last[key_of(number)] = (number, lane[1], offset)
    rows = {row[1]: row for row in _rows(connection, f"SELECT {COLUMNS} FROM {stream.table}")}
    found.rows += len(rows)
    for key, (number, partition, offset) in last.items():
        text = f"{stream.topic} {partition} {offset} (key {key}, number {number})"
        row = rows.get(key)
        if row is None:
            found.note("lost", text)
        elif row[0] != number:
            found.note("lost" if row[0] < number else "unexplained", f"{text}: the row is that of number {row[0]}")
        elif row != _row(number, stream):
            found.note("altered", f"{text} is {row}")
    for key in rows.keys() - last.keys():
        found.note("unexplained", f"a row of {stream.topic} that no message asks for: key {key}")
    with connection.cursor() as cursor:
        cursor.execute("SELECT key, was, became FROM setbacks WHERE topic = %s", (stream.topic,))
        for key, was, became in cursor.fetchall():
            found.note("disordered", f"{stream.topic}, key {key}: number {became} was written over {was}")


def _row(number: int, stream: Stream) -> tuple[Any, ...]:
    record = document(number)
    return (number, record["key"], record["text"], Decimal(str(record["price"])), True if stream.mapped else None)


def _rows(connection: psycopg2.extensions.connection, statement: str) -> Iterator[tuple[Any, ...]]:
    with connection.cursor(name="audit") as cursor:
        cursor.itersize = 10_000
        cursor.execute(statement)
        yield from cursor
