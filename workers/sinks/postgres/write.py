"""Rows into the table: COPY for append, COPY and one merge for upsert. Runs in the worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from speedlayer.workers.decoding.records import Records
from speedlayer.workers.errors import SpeedlayerError
from speedlayer.workers.sinks.postgres.table import Table

if TYPE_CHECKING:
    from psycopg2.extensions import cursor as Cursor

    from speedlayer.workers.sinks.postgres.sink import PostgreSQLSink


class UnwritableRows(SpeedlayerError):
    """Some rows can not be encoded for the table: ``reasons`` maps their index in ``rows`` to (reason, SQLSTATE).

    Raised before anything was sent. `TableWriter.prepare` moves such rows away, so `write` raises it for rows only
    that were never prepared.
    """

    def __init__(self, reasons: dict[int, tuple[str, str | None]]) -> None:
        super().__init__(f"{len(reasons)} rows can not be written: {next(iter(reasons.values()), ('', None))[0]}")
        self.reasons = reasons


class TableWriter:
    """Writes the records of one pipeline into one table. One per session; not for two threads.

    The order of use, for one flight:

        records = decode_flight(flight, writer.decoder(transformed=transform is not None))
        if transform is not None: records = apply_transform(records, transform)
        records = writer.prepare(records)          # encodes, before the transaction begins
        ... BEGIN, SAVEPOINT ...
        writer.write(cursor, records.rows)         # or any slice of records.rows, as often as you like
    """

    def __init__(self, table: Table, sink: PostgreSQLSink) -> None:
        raise NotImplementedError

    def decoder(self, *, transformed: bool) -> Any:
        """The decoder for `decode_flight`: rows made for this table, or dicts when a transform is to see them."""
        raise NotImplementedError

    def prepare(self, records: Records) -> Records:
        """Encode all rows (kept for the `write` of exactly this ``rows`` list); those that can not be are buried."""
        raise NotImplementedError

    def write(self, cursor: Cursor, rows: Sequence[Any]) -> None:
        """Write the rows, in the caller's transaction; psycopg2's errors pass through.

        The cursor is a plain one, inside a transaction. Call it for a whole ``records.rows``, a slice or a single row;
        several calls in one transaction act one after the other.
        """
        raise NotImplementedError
