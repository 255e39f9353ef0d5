"""Rows into the table: COPY for append, COPY and one merge for upsert. Runs in the worker.

An upsert copies its rows into a temporary table, the *stage*, and merges them with one INSERT … ON CONFLICT. The stage
lives as long as the connection and is emptied at each COMMIT, so that the catalogs do not churn; behind a pooler, where
the connection is another's at the next transaction, it is made in the transaction and dropped with it.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from msgspec import UNSET

from speedlayer.workers.decoding.json_records import DictDecoder, RecordDecoder
from speedlayer.workers.decoding.records import DeadRecord, Records, shorten_reason
from speedlayer.workers.errors import SpeedlayerError
from speedlayer.workers.sinks.postgres.encode import CLEAN, Fault, Lines, encode, find_faults, fold, mend, survey
from speedlayer.workers.sinks.postgres.names import quote_identifier
from speedlayer.workers.sinks.postgres.shape import DictShaper, JsonShaper, Shape, Shaper, Slot
from speedlayer.workers.sinks.postgres.table import Column, Table

if TYPE_CHECKING:
    from psycopg2.extensions import cursor as Cursor

    from speedlayer.workers.sinks.postgres.sink import PostgreSQLSink

# psycopg2 reads this much at once for each piece that it sends; its default of 8 KiB makes hundreds of calls a batch.
COPY_READ_BYTES = 1 << 18


class UnwritableRows(SpeedlayerError):
    """Some rows can not be encoded for the table: ``reasons`` maps their index in ``rows`` to (reason, SQLSTATE).

    Raised before anything was sent. `TableWriter.prepare` moves such rows away, so `write` raises it for rows only
    that were never prepared.
    """

    def __init__(self, reasons: dict[int, Fault]) -> None:
        first = next(iter(reasons.values()))[0] if reasons else "none"
        super().__init__(f"{len(reasons)} rows can not be written, the first: {first}")
        self.reasons = reasons


class PreparedRows(list[Any]):
    """Rows that are encoded already, by `TableWriter.prepare`; a slice of them is a plain list, encoded when written.

    ``batches`` are written one after the other; several only where `_runs` explains it.
    """

    writer: TableWriter
    batches: list[list[Lines]]
    folded_by_server: bool


class TableWriter:
    """Writes the records of one pipeline into one table. One for each session and plan; not for two threads.

    The order of use, for one flight:

        records = decode_flight(flight, writer.decoder(transformed=transform is not None))
        if transform is not None: records = apply_transform(records, transform)
        records = writer.prepare(records)          # encodes, before the transaction begins
        ... BEGIN, SAVEPOINT ...
        writer.write(cursor, records.rows)         # or any slice of records.rows, as often as you like
    """

    def __init__(self, table: Table, sink: PostgreSQLSink) -> None:
        self.table = table
        self.key = table.key_of(sink)
        self._skip_null_values = sink.null_values == "skip"
        self._keep_missing = bool(self.key) and sink.missing_fields == "keep"
        forbid_unknown = sink.unknown_fields == "error"
        self._json_shaper = JsonShaper(
            table.columns,
            self.key,
            forbid_unknown=forbid_unknown,
            keep_missing=self._keep_missing,
            skip_null_values=self._skip_null_values,
        )
        self._dict_shaper = DictShaper(
            table.columns, self.key, forbid_unknown=forbid_unknown, keep_missing=self._keep_missing
        )
        self._statements = _Statements(table, self.key, keep_missing=self._keep_missing, pooled=sink.pooled)
        # COPY can not write under row security, INSERT can.
        self._staged = bool(self.key) or table.row_security

    def decoder(self, *, transformed: bool) -> RecordDecoder:
        """The decoder for `decode_flight`: rows made for this table, or dicts when a transform is to see them."""
        if not transformed and not self._json_shaper.renames:
            return self._json_shaper
        # Exact also for a table of floats alone: 1e400 must reach the server, which refuses it, not become infinity.
        return DictDecoder(skip_null_values=self._skip_null_values)

    def prepare(self, records: Records) -> Records:
        """Encode all rows, for the `write` of the very ``rows`` that come back; those that can not be are buried.

        Rows that were dicts become this table's rows.
        """
        records = self._shaped(records)
        while records.rows:
            shape = self._shape_of(records.rows)
            seen = CLEAN
            faults = mend(shape, records.rows)
            if not faults and not records.plain:
                seen = survey(shape, records.rows)
                faults = seen.faults
            if not faults:
                try:
                    return replace(records, rows=self._encode(shape, records.rows, seen.escaped))
                except (ValueError, OverflowError, RecursionError):
                    faults = find_faults(shape, records.rows, seen.escaped)
                    if not faults:
                        raise
            records = records.bury(
                DeadRecord(records.ordinals[index], shorten_reason(reason), sqlstate)
                for index, (reason, sqlstate) in faults.items()
            )
        return records

    def write(self, cursor: Cursor, rows: Sequence[Any]) -> None:
        """Write the rows, in the caller's transaction; psycopg2's errors pass through.

        The cursor is a plain one, inside a transaction. Call it for a whole ``records.rows``, a slice or a single row;
        several calls in one transaction act one after the other.
        """
        if not rows:
            return
        prepared = rows if isinstance(rows, PreparedRows) and rows.writer is self else self._encode_anew(rows)
        for batch in prepared.batches:
            if not self._staged:
                self._append(cursor, batch)
            elif prepared.folded_by_server:
                self._merge_folded(cursor, batch)
            else:
                self._merge(cursor, batch)

    # --- statements ---

    def _append(self, cursor: Cursor, batch: list[Lines]) -> None:
        for lines in batch:
            if lines.slots:
                _copy(cursor, self._statements.copy(lines.slots), lines.data)
            else:
                cursor.execute(self._statements.insert_defaults(lines.count))

    def _merge(self, cursor: Cursor, batch: list[Lines]) -> None:
        for lines in batch:
            if lines.slots:
                _copy(cursor, self._statements.stage(lines.slots), lines.data)
                cursor.execute(self._statements.merge(lines.slots))
            else:
                cursor.execute(self._statements.insert_defaults(lines.count))

    def _merge_folded(self, cursor: Cursor, batch: list[Lines]) -> None:
        # All groups are staged before the first is merged: the last row of a key may be in any of them.
        for lines in batch:
            _copy(cursor, self._statements.stage(lines.slots, numbered=True, emptied=lines.group == 0), lines.data)
        for lines in batch:
            cursor.execute(self._statements.merge_folded(lines.slots, lines.group, several=len(batch) > 1))

    # --- encoding ---

    def _shaped(self, records: Records) -> Records:
        """The records with rows of this table's struct."""
        if not records.rows or not isinstance(records.rows[0], dict):
            return records
        rows, guilty = self._dict_shaper.rows_of(records.rows)
        ordinals: Sequence[int] = records.ordinals
        dead = [DeadRecord(ordinals[at], shorten_reason(why.reason), why.sqlstate) for at, why in guilty.items()]
        if guilty:
            ordinals = [ordinal for at, ordinal in enumerate(ordinals) if at not in guilty]
        return replace(
            records,
            rows=rows,
            ordinals=ordinals,
            dead=tuple(sorted((*records.dead, *dead), key=lambda record: record.ordinal)),
            unknown_fields=records.unknown_fields.union(*(why.unknown_fields for why in guilty.values())),
        )

    def _encode_anew(self, rows: Sequence[Any]) -> PreparedRows:
        if isinstance(rows[0], dict):
            rows, guilty = self._dict_shaper.rows_of(rows)
            if guilty:
                raise UnwritableRows({index: (why.reason, why.sqlstate) for index, why in guilty.items()})
        shape = self._shape_of(rows)
        seen = CLEAN
        faults = mend(shape, rows)
        if not faults:
            seen = survey(shape, rows)
            faults = seen.faults
        if not faults:
            try:
                return self._encode(shape, rows, seen.escaped)
            except (ValueError, OverflowError, RecursionError):
                faults = find_faults(shape, rows, seen.escaped)
                if not faults:
                    raise
        raise UnwritableRows(faults)

    def _shape_of(self, rows: Sequence[Any]) -> Shape:
        row_type = type(rows[0])
        shapers: tuple[Shaper, ...] = (self._json_shaper, self._dict_shaper)
        for shaper in shapers:
            if row_type in shaper.shapes:
                return shaper.shapes[row_type]
        raise TypeError(f"rows of {row_type} were not made for {self.table.sql}")

    def _encode(self, shape: Shape, rows: Sequence[Any], escaped: frozenset[str]) -> PreparedRows:
        prepared = PreparedRows(rows)
        prepared.writer = self
        prepared.folded_by_server = bool(self.key) and not shape.folds_exactly
        if not self.key:
            prepared.batches = [encode(shape, rows, escaped)]
        elif not prepared.folded_by_server:
            folded = fold(shape, rows, self.key, keep_missing=self._keep_missing)
            prepared.batches = [encode(shape, folded, escaped)]
        else:
            runs = _runs(shape, rows) if self._keep_missing else [rows]
            prepared.batches = [encode(shape, run, escaped, numbered=True) for run in runs]
        return prepared


def _runs(shape: Shape, rows: Sequence[Any]) -> list[Sequence[Any]]:
    """Cut the rows where the set of columns that they fill changes.

    When records keep what they lack, records of one key with different fields add up, in their order. Where equal keys
    can not be told from here, the only way left is to write them in that order.
    """
    groups = groupby(rows, key=lambda row: [getattr(row, slot.attribute) is UNSET for slot in shape.optional])
    return [list(run) for _, run in groups]


def _copy(cursor: Cursor, statement: str, data: bytes) -> None:
    cursor.copy_expert(statement, io.BytesIO(data), size=COPY_READ_BYTES)


# --- Statements ------------------------------------------------------------------------------------------------------


class _Statements:
    """The SQL for one table and one way to write to it."""

    def __init__(self, table: Table, key: Sequence[str], *, keep_missing: bool, pooled: bool) -> None:
        self._table = table
        self._key = tuple(key)
        self._keep_missing = keep_missing
        self._columns = [column for column in table.columns if not column.generated]
        definitions = ", ".join(
            f"{quote_identifier(column.name)} {column.type_sql}"
            + (f" COLLATE {column.collation_sql}" if column.collation_sql else "")
            for column in self._columns
        )
        # Beside the table's columns: which row is the last of its key, and which columns it fills.
        self._number, self._group = self._free_name("row_number"), self._free_name("row_group")
        definitions += f", {self._number} int, {self._group} int"
        # A stage that was made for another plan of the table has another name, and is not met again.
        digest = hashlib.sha256(f"{table.sql} {definitions}".encode()).hexdigest()[:16]
        self._stage_name = f"speedlayer_stage_{digest}"
        ending = "ON COMMIT DROP" if pooled else "ON COMMIT DELETE ROWS"
        # An earlier write of this transaction may have left rows; the first finds none.
        self._make_stage = f"CREATE TEMPORARY TABLE IF NOT EXISTS {self._stage_name} ({definitions}) {ending}"
        self._empty_stage = f"DELETE FROM pg_temp.{self._stage_name}"

    def _free_name(self, name: str) -> str:
        """A name that no column of the table has."""
        while self._table.column(name):
            name += "_"
        return name

    def copy(self, slots: Sequence[Slot]) -> str:
        """COPY straight into the table."""
        return f"COPY {self._table.sql} ({_names(slots)}) FROM STDIN {_FORMAT}"

    def stage(self, slots: Sequence[Slot], *, numbered: bool = False, emptied: bool = True) -> str:
        """Make the stage if need be, empty it, and COPY into it: one round trip."""
        names = _names(slots)
        if numbered:
            names += f", {self._number}, {self._group}"
        copy = f"COPY pg_temp.{self._stage_name} ({names}) FROM STDIN {_FORMAT}"
        return f"{self._make_stage}; {self._empty_stage}; {copy}" if emptied else copy

    def merge(self, slots: Sequence[Slot]) -> str:
        """From the stage into the table, for a stage that holds each key once."""
        names = _names(slots)
        return f"{self._insert(slots)} SELECT {names} FROM pg_temp.{self._stage_name}{self._on_conflict(slots)}"

    def merge_folded(self, slots: Sequence[Slot], group: int, *, several: bool) -> str:
        """The same, for a stage in which keys recur: the last row of each key counts."""
        keys = ", ".join(map(quote_identifier, self._key))
        folded = f"SELECT DISTINCT ON ({keys}) * FROM pg_temp.{self._stage_name} ORDER BY {keys}, {self._number} DESC"
        chosen = f" WHERE {self._group} = {group}" if several else ""
        return (
            f"{self._insert(slots)} SELECT {_names(slots)} FROM ({folded}) AS folded{chosen}{self._on_conflict(slots)}"
        )

    def insert_defaults(self, count: int) -> str:
        """Rows of which no record gave any column."""
        return f"INSERT INTO {self._table.sql} SELECT FROM pg_catalog.generate_series(1, {count})"

    def _insert(self, slots: Sequence[Slot]) -> str:
        overriding = " OVERRIDING SYSTEM VALUE" if any(slot.column.always_identity for slot in slots) else ""
        return f"INSERT INTO {self._table.sql} ({_names(slots)}){overriding}"

    def _on_conflict(self, slots: Sequence[Slot]) -> str:
        if not self._key:
            return ""
        keys = ", ".join(map(quote_identifier, self._key))
        changed = [quote_identifier(column.name) for column in self._changed({slot.column.name for slot in slots})]
        if not changed:
            return f" ON CONFLICT ({keys}) DO NOTHING"
        return f" ON CONFLICT ({keys}) DO UPDATE SET {', '.join(f'{name} = EXCLUDED.{name}' for name in changed)}"

    def _changed(self, given: set[str]) -> list[Column]:
        """The columns of a row in the table that a record of the given columns changes.

        A column that the record lacks goes back to its default (EXCLUDED holds it), unless the sink keeps it or the
        default is computed: a row gets its sequence number, its primary key, its time of insertion once.
        """
        changed = []
        for column in self._columns:
            if column.name in self._key or column.always_identity:
                continue
            kept = self._keep_missing or column.default == "computed" or column.name in self._table.primary_key
            if column.name in given or not kept:
                changed.append(column)
        return changed


# A format of one's own is the default, but it is not for the session's settings to say.
_FORMAT = "WITH (FORMAT text, ENCODING 'UTF8')"


def _names(slots: Sequence[Slot]) -> str:
    return ", ".join(quote_identifier(slot.column.name) for slot in slots)
