"""An open PostgreSQL sink: one connection that flushes, one that claims (worker processes).

`write` runs on the pipeline's flush thread; `claim`, `seed` and `guard` run on its claim thread. What the two share is
guarded: the slots lock themselves, and which backend each lane's checkpoint names is behind ``_lock``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional, TypeVar

import psycopg2

from speedlayer.workers import checkpoint
from speedlayer.workers.checkpoint import Backend, Purpose
from speedlayer.workers.decoding.json_records import DictDecoder, RecordDecoder, decode_flight
from speedlayer.workers.decoding.records import DeadRecord, Records, apply_transform
from speedlayer.workers.errors import ConnectionLost, SinkContended, SinkMisconfigured, SpeedlayerError
from speedlayer.workers.protocol import Claim, Claimed, Fenced, Flight, LaneKey, Phase, Seed
from speedlayer.workers.sinks.base import SinkContext, SinkSession, WriteOutcome
from speedlayer.workers.sinks.postgres.connection import Address, Connection, Slot
from speedlayer.workers.sinks.postgres.failures import explain, message_of
from speedlayer.workers.sinks.postgres.flush import FlushTransaction
from speedlayer.workers.sinks.postgres.guardian import WATCH_AFTER_SECONDS, Guardian
from speedlayer.workers.sinks.postgres.schema import ensure_schema
from speedlayer.workers.sinks.postgres.statements import Statements
from speedlayer.workers.sinks.postgres.table import Table, load_for
from speedlayer.workers.sinks.postgres.write import TableWriter

if TYPE_CHECKING:
    from psycopg2.extensions import cursor as Cursor

    from speedlayer.workers.sinks.postgres.sink import PostgreSQLSink

T = TypeVar("T")

# A column that was added is noticed within this time where its field is ignored; where an unknown field is an error, or
# a row fails, the table is looked at before anything becomes a dead letter.
PLAN_CHECK_SECONDS = 30.0

# One attempt of a flush starts over so often at most, for a table that was altered or a connection that had died idle.
RESTARTS = 4

# A batch that fails with an SQLSTATE that explains nothing is tried so often before its rows are tried one by one.
UNEXPLAINED_ATTEMPTS = 3


class _PlanChanged(SpeedlayerError):
    """The table is not what it was when the rows were encoded: encode them again."""


@dataclass
class _Plan:
    """How rows are written on one connection. ``rows_have_passed``: the table has taken rows under this plan."""

    connection: Connection
    table: Table
    writer: TableWriter
    checked_at: float
    rows_have_passed: bool = False


def _write_nothing(cursor: Cursor, rows: Sequence[Any]) -> None:
    assert not rows, "rows without a table"


class PostgreSQLSession(SinkSession):
    """Flushes and claims for one pipeline of one worker."""

    def __init__(self, sink: PostgreSQLSink, context: SinkContext) -> None:
        self._sink, self._context = sink, context
        address = Address(
            dsn=sink.dsn,
            application_name=context.application_name,
            where=sink.describe(),
            connect_timeout_seconds=sink.connect_timeout_seconds,
            lock_timeout_seconds=sink.lock_timeout_seconds,
            pooled=sink.pooled,
        )
        self._flush, self._claims = Slot(address), Slot(address)
        self._plan: Optional[_Plan] = None
        self._guardian = Guardian(self._log)
        self._lock = threading.Lock()
        self._named: dict[LaneKey, Optional[Backend]] = {}  # which backend each lane's checkpoint names
        self._schema_lock = threading.Lock()
        self._schema_is_right = False
        self._flush_started: Optional[float] = None
        self._began = False
        self._unexplained = (-1, 0)  # the flight that failed without an explanation, and how often

    # --- flush thread -------------------------------------------------------------------------------------------

    def write(self, flight: Flight) -> WriteOutcome:
        """Write the flight in one transaction; see `SinkSession.write` for what it raises."""
        for _ in range(RESTARTS):
            reused = self._flush.current is not None
            self._began = False
            try:
                return self._write(flight)
            except _PlanChanged:
                self._plan = None
            except ConnectionLost:
                self._flush.drop()
                if self._began or not reused:
                    raise
                # The connection had died while it was idle: no outage, and no news for the operator.
            except BaseException as error:
                self._forget_after(error, self._flush)
                raise
            finally:
                self._flush_started = None
        raise SinkContended(f"{self._sink.describe()} is being altered all the time")

    def _write(self, flight: Flight) -> WriteOutcome:
        connection = self._open(self._flush)
        plan = self._current_plan(connection, flight)
        records = self._prepare(plan, flight) if plan else self._prepare_without_table(flight)
        self._context.announce(flight, Phase.DATABASE)
        if plan is not None and records.dead:
            # A field without a column, or a value too long for one: was the column added or widened just now?
            self._check_plan(plan)
        self._name_backend(connection, flight)
        with connection.cursor() as cursor:
            transaction = FlushTransaction(
                connection=connection,
                cursor=cursor,
                write=plan.writer.write if plan else _write_nothing,
                flight=flight,
                records=records,
                worker=self._context.worker,
                table=self._sink.table,
                look_again=lambda: self._check_plan(plan) if plan else None,
                be_patient=lambda error: self._be_patient(flight, error),
                row_policy=plan is not None and plan.rows_have_passed and plan.table.row_security,
                on_begin=self._note_begin,
                limit_bytes=self._sink.max_message_bytes,
            )
            self._flush_started = time.monotonic()
            result = checkpoint.run(checkpoint.flush(flight.parts), transaction.execute)
            ended_at = time.monotonic()
        rows = sum(count.rows for count in result.counts)
        if plan is not None and rows:
            plan.rows_have_passed = True
        return WriteOutcome(
            duration_seconds=ended_at - transaction.began_at if result.written else 0.0,
            rows=rows,
            filtered=sum(count.filtered for count in result.counts),
            dead_lettered=sum(count.dead_lettered for count in result.counts),
            fenced=result.fenced,
        )

    def _note_begin(self) -> None:
        self._began = True

    def _be_patient(self, flight: Flight, error: psycopg2.Error) -> None:
        """Have the whole batch tried again, a few times, when the server's error explains nothing."""
        flight_id, attempts = self._unexplained
        attempts = attempts + 1 if flight_id == flight.flight_id else 1
        self._unexplained = (flight.flight_id, attempts)
        if attempts < UNEXPLAINED_ATTEMPTS:
            raise SinkContended(
                f"writing rows to {self._sink.table}: {message_of(error)}", sqlstate=error.pgcode
            ) from error

    def _current_plan(self, connection: Connection, flight: Flight) -> Optional[_Plan]:
        """The plan for this connection, loaded anew when it is old (what a writer keeps ends with its connection).

        None while there is no table and the flight holds nothing to make it from.
        """
        plan, now = self._plan, time.monotonic()
        if plan is None or plan.connection is not connection:
            table = self._load(connection, flight)
            if table is None:
                return None
            plan = self._plan = _Plan(connection, table, TableWriter(table, self._sink), now)
        elif now - plan.checked_at >= PLAN_CHECK_SECONDS:
            self._check_plan(plan)
        return plan

    def _load(self, connection: Connection, flight: Flight) -> Optional[Table]:
        try:
            return load_for(connection.raw, self._sink, lambda: self._sample(flight))
        except psycopg2.Error as error:
            raise explain(error, connection.raw, f"reading the definition of {self._sink.table}") from error

    def _check_plan(self, plan: _Plan) -> None:
        """Raise `_PlanChanged` if the table was altered since the plan was made."""
        try:
            table = Table.load(plan.connection.raw, self._sink.table, self._sink.value_rules)
        except psycopg2.Error as error:
            doing = f"reading the definition of {self._sink.table}"
            raise explain(error, plan.connection.raw, doing) from error
        if table != plan.table:
            self._log(logging.INFO, f"table {self._sink.table} was altered; going on with its new definition", {})
            raise _PlanChanged(self._sink.table)
        plan.checked_at = time.monotonic()

    def _prepare(self, plan: _Plan, flight: Flight) -> Records:
        """Everything that needs no transaction: decode, transform, encode."""
        transformed = self._context.transform is not None
        return plan.writer.prepare(self._records(flight, plan.writer.decoder(transformed=transformed)))

    def _records(self, flight: Flight, decoder: RecordDecoder) -> Records:
        """Decode and transform, each announced before it begins."""
        transform, announce = self._context.transform, self._context.announce
        if flight.condemned is not None:
            return decode_flight(flight, decoder)  # which does not look at it
        announce(flight, Phase.DECODE)
        records = decode_flight(flight, decoder, self._sink.limits)
        if transform is None:
            return records
        announce(flight, Phase.TRANSFORM)
        return apply_transform(records, transform)

    def _sample(self, flight: Flight) -> list[Any]:
        """The flight's records, to make a table from."""
        records = self._records(flight, DictDecoder())
        self._context.announce(flight, Phase.DATABASE)
        return records.rows

    def _prepare_without_table(self, flight: Flight) -> Records:
        """Nothing in the flight says what columns the new table should have: there are dead letters at most."""
        records = self._records(flight, DictDecoder())
        reason = f"{self._sink.table} is not made yet, and this record has no field to make it from"
        return records.bury([DeadRecord(ordinal, reason) for ordinal in records.ordinals])

    def _name_backend(self, connection: Connection, flight: Flight) -> None:
        """Let the checkpoints name the backend that flushes now, where they name another (the connection is new)."""
        backend = connection.backend
        if backend is None:
            return
        with self._lock:
            stale = [part for part in flight.parts if self._named.get(part.lane) != backend]
        if not stale:
            return
        try:
            connection.begin(Purpose.CLAIM)
            Statements(connection).refresh_backend(stale, backend)
            connection.commit()
        except SinkContended:
            connection.roll_back()  # a claim is under way; the next flush tries again
            return
        except BaseException:
            connection.roll_back()
            raise
        with self._lock:
            self._named.update({part.lane: backend for part in stale})

    # --- claim thread -------------------------------------------------------------------------------------------

    def claim(self, claim: Claim) -> Claimed:
        """Take a lane over; see `SinkSession.claim`."""
        return self._with_claims(lambda connection: self._claim(connection, claim))

    def _claim(self, connection: Connection, claim: Claim) -> Claimed:
        # Not `_open`: the flush thread may be in a transaction on it.
        backend = None if self._sink.pooled else self._flush.get().backend
        statements = Statements(connection)
        try:
            result = checkpoint.run(checkpoint.claim(claim.lane, claim.owner, backend), statements.execute)
        finally:
            for pid, name in statements.evicted:
                self._log(
                    logging.WARNING,
                    f"ended backend {pid} ({name}), an old owner's that was stopped in a transaction and kept"
                    f" {claim.lane.topic}[{claim.lane.partition}] from being claimed",
                    {"backend_pid": pid},
                )
        if result.previous != backend:
            self._guardian.remember(result.previous)
        with self._lock:
            self._named[claim.lane] = backend
        found = result.checkpoint
        return Claimed(claim.claim_id, claim.lane, found.epoch, found.next_offset, found.topic_id, found.leader_epoch)

    def seed(self, seed: Seed) -> Claimed | Fenced:
        """Set where a lane starts; see `SinkSession.seed`."""
        return self._with_claims(lambda connection: self._seed(connection, seed))

    @staticmethod
    def _seed(connection: Connection, seed: Seed) -> Claimed | Fenced:
        found = checkpoint.run(checkpoint.seed(seed), Statements(connection).execute)
        if found is None:
            return Fenced(seed.claim_id, seed.lane)
        return Claimed(seed.claim_id, seed.lane, found.epoch, found.next_offset, found.topic_id, found.leader_epoch)

    def guard(self) -> None:
        """Called about once a second: see whether a flush under way is held up by the ghost of an old owner."""
        started, flushing = self._flush_started, self._flush.current
        waited_seconds = 0.0 if started is None else time.monotonic() - started
        if flushing is None or flushing.backend is None or waited_seconds < WATCH_AFTER_SECONDS:
            self._guardian.rest()
            return
        backend = flushing.backend
        self._with_claims(lambda connection: self._guardian.look(connection, backend, waited_seconds))

    def _with_claims(self, action: Callable[[Connection], T]) -> T:
        reused = self._claims.current is not None
        try:
            return action(self._open(self._claims))
        except ConnectionLost:
            self._claims.drop()
            if not reused:
                raise
        except BaseException as error:
            self._forget_after(error, self._claims)
            raise
        # The connection had died while it was idle. A claim or a seed that may have been committed can be made again.
        try:
            return action(self._open(self._claims))
        except BaseException as error:
            self._forget_after(error, self._claims)
            raise

    # --- both ---------------------------------------------------------------------------------------------------

    def _open(self, slot: Slot) -> Connection:
        connection = slot.get()
        if not self._schema_is_right:
            with self._schema_lock:
                if not self._schema_is_right:
                    ensure_schema(connection.raw)
                    self._schema_is_right = True
        return connection

    def _forget_after(self, error: BaseException, slot: Slot) -> None:
        """Keep nothing that the error puts in doubt."""
        slot.drop_if_unfit(error)
        if isinstance(error, SinkMisconfigured):
            # Whoever mends it may alter the table, or make the schema: look again before the next attempt.
            self._schema_is_right = False
            if slot is self._flush:
                self._plan = None

    def _log(self, level: int, message: str, fields: dict[str, Any]) -> None:
        self._context.log(level, message, {"pipeline": self._context.pipeline, **fields})

    def close(self) -> None:
        """Close both connections."""
        self._flush.drop()
        self._claims.drop()
