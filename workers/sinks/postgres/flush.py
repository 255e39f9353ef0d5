"""One flush transaction on a real connection: the rows, the guilty among them, the dead letters (worker processes).

The checkpoint protocol decides what comes when; this carries out `WriteRows` and `WriteDeadLetters` and passes all
other operations on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psycopg2

from speedlayer.workers import checkpoint
from speedlayer.workers.checkpoint import Counts, Operation
from speedlayer.workers.decoding.limits import MAX_MESSAGE_BYTES
from speedlayer.workers.decoding.records import DeadRecord, Records
from speedlayer.workers.errors import SinkMisconfigured
from speedlayer.workers.protocol import Flight
from speedlayer.workers.sinks.postgres.connection import ROWS_SAVEPOINT, Connection
from speedlayer.workers.sinks.postgres.dead_letters import write_dead_letters
from speedlayer.workers.sinks.postgres.failures import Verdict, explain, verdict_on_rows
from speedlayer.workers.sinks.postgres.isolate import Guilty, Write, isolate
from speedlayer.workers.sinks.postgres.statements import Statements
from speedlayer.workers.sinks.postgres.write import UnwritableRows

if TYPE_CHECKING:
    from psycopg2.extensions import cursor as Cursor


@dataclass
class FlushTransaction:
    """Carries out the operations of one flush. ``began_at`` is when the transaction that counts began.

    ``look_again`` is called before any row is blamed, and raises if the table was altered; ``be_patient`` is called
    with an error that explains nothing, and raises until it has come often enough. ``row_policy`` says that the table
    has taken rows from us before and lets a policy decide about each: only then can a lone row be refused for its own
    sake.
    """

    connection: Connection
    cursor: Cursor
    write: Write
    flight: Flight
    records: Records
    worker: str
    table: str
    look_again: Callable[[], None]
    be_patient: Callable[[psycopg2.Error], None]
    row_policy: bool
    on_begin: Callable[[], None]
    limit_bytes: int = MAX_MESSAGE_BYTES
    began_at: float = 0.0
    _written: Records | None = None
    _details: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._statements = Statements(self.connection)

    def execute(self, operation: Operation) -> Any:
        """Carry out one operation; raises the errors of `speedlayer.workers.errors`."""
        match operation:
            case checkpoint.Begin():
                self.began_at = time.monotonic()
                self._statements.execute(operation)
                self.on_begin()
                return None
            case checkpoint.WriteRows(parts):
                return self._write_rows(parts)
            case checkpoint.WriteDeadLetters():
                return self._write_dead_letters()
        return self._statements.execute(operation)

    def _write_rows(self, parts: tuple[int, ...]) -> tuple[Counts, ...]:
        left_out = set(range(len(self.flight.parts))) - set(parts)
        records = self.records.without_parts(left_out) if left_out else self.records
        if records.rows:
            records = self._write_or_blame(records)
        self._written = records
        counts = records.counts()
        return tuple(Counts(*counts[index]) for index in parts)

    def _write_or_blame(self, records: Records) -> Records:
        """Write the rows; those that the table does not take move to the dead."""
        try:
            self.write(self.cursor, records.rows)
            return records
        except UnwritableRows:
            pass  # `isolate` finds them
        except psycopg2.Error as error:
            verdict = verdict_on_rows(error, self.connection.raw)
            if verdict is Verdict.UNEXPLAINED:
                self.be_patient(error)
            if verdict not in (Verdict.DATA, Verdict.SUSPECT, Verdict.UNEXPLAINED):
                raise explain(error, self.connection.raw, f"writing rows to {self.table}") from error
        try:
            guilty = self._search(records)
        except psycopg2.Error as error:
            raise explain(error, self.connection.raw, f"writing rows to {self.table}") from error
        self._acquit_rows_of_the_sinks_fault(guilty, len(records.rows))
        for found in guilty:
            if found.detail:
                self._details[records.ordinals[found.index]] = found.detail
        return records.bury(
            [DeadRecord(records.ordinals[found.index], found.reason, found.sqlstate) for found in guilty]
        )

    def _search(self, records: Records) -> list[Guilty]:
        self.cursor.execute(f"ROLLBACK TO SAVEPOINT {ROWS_SAVEPOINT}")
        self.look_again()
        return isolate(self.write, self.cursor, records.rows)

    def _acquit_rows_of_the_sinks_fault(self, guilty: list[Guilty], count: int) -> None:
        """Where no row passes for a reason that need not be the rows', the sink is to blame, and the rows wait."""
        excuses = [found for found in guilty if found.verdict is not Verdict.DATA]
        if len(guilty) < count or not excuses:
            return
        found = excuses[0]
        if count == 1 and found.verdict is Verdict.SUSPECT and self.row_policy:
            return
        raise SinkMisconfigured(
            f"{self.table} takes none of {count} rows: {found.reason}",
            sqlstate=found.sqlstate,
            remedy="mend what the message names; the batch is kept and tried again",
        )

    def _write_dead_letters(self) -> None:
        assert self._written is not None
        try:
            write_dead_letters(
                self.cursor,
                self.flight,
                self._written,
                worker=self.worker,
                encoding=self.connection.encoding,
                details=self._details,
                limit_bytes=self.limit_bytes,
            )
        except psycopg2.Error as error:
            raise explain(error, self.connection.raw, "writing dead letters") from error
