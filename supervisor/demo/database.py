"""The database of a run: its tables, the log of what was produced, and the audit of what came out (demo process).

All tables are in a schema of the run's own. The orders' table has two columns that speedlayer knows nothing of, filled
by their defaults: when the flush's transaction began, and when the row was written, after any wait for a lock. With
them the database itself tells what it could take.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from speedlayer.supervisor.demo.capacity import Flush
from speedlayer.supervisor.demo.orders import COLUMNS
from speedlayer.supervisor.errors import SpeedlayerError, Unreachable

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection
    from psycopg2.extensions import cursor as Cursor

CONNECT_TIMEOUT_SECONDS = 10
# Nobody but the run's own sessions has its tables; at the end they are gone, or go soon.
LOCK_TIMEOUT_SECONDS = 30
APPLICATION_NAME = "speedlayer-demo"

_ORDER_COLUMNS = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
_ORDER_NAMES = ", ".join(COLUMNS)

# No primary key: it would hide a row that was written twice behind an error.
_TABLES = f"""
CREATE TABLE {{schema}}.orders (
    {_ORDER_COLUMNS},
    flush_began_at timestamptz NOT NULL DEFAULT now(),
    written_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX ON {{schema}}.orders (order_id);
CREATE TABLE {{schema}}.produced ({_ORDER_COLUMNS});
CREATE TABLE {{schema}}.broken (value bytea);
"""


@dataclass(frozen=True)
class Latency:
    """Seconds from a message's making to its row being visible."""

    p50_seconds: float
    p99_seconds: float
    max_seconds: float


@dataclass(frozen=True)
class Audit:
    """What became of the messages. ``surplus`` are rows and dead letters that no message accounts for."""

    rows: int
    dead_letters: int
    lost: int
    surplus: int
    latency: Optional[Latency]


class DatabaseError(SpeedlayerError):
    """The server did not do what the run needs: no permission to make a schema, say."""


class Database:
    """The run's tables on a server, and one session that works on them."""

    def __init__(self, dsn: str, schema: str, group: str) -> None:
        self.dsn = dsn
        self.schema = schema
        self.table = f"{schema}.orders"
        self._group = group
        self._connection = _connect(dsn)
        self._commit_times = self._one("SELECT current_setting('track_commit_timestamp') = 'on'")[0]

    @property
    def description(self) -> str:
        """For people, without the password."""
        version = self._connection.server_version
        parameters = self._connection.get_dsn_parameters()
        number = f"{version // 10_000}.{version % 10_000}"
        return f"PostgreSQL {number} on {parameters.get('host', 'its socket')}:{parameters.get('port')}"

    @contextlib.contextmanager
    def tables(self) -> Iterator[None]:
        """Make the run's tables, and drop them and the run's checkpoints at the end."""
        self._do(f"CREATE SCHEMA {self.schema};" + _TABLES.format(schema=self.schema))
        try:
            yield
        finally:
            self.forget()
            self._connection.close()

    def forget(self) -> None:
        """Remove what the run made; the schema `speedlayer` stays, others may use it."""
        self._do(f"DROP SCHEMA IF EXISTS {self.schema} CASCADE")
        for table in ("checkpoints", "dead_letters", "gaps"):
            if self._one("SELECT to_regclass(%s) IS NOT NULL", f"speedlayer.{table}")[0]:
                self._do(f"DELETE FROM speedlayer.{table} WHERE consumer_group = %s", self._group)

    def now(self) -> float:
        """The server's clock, in seconds since 1970: the times of the flushes are in it."""
        return float(self._one("SELECT extract(epoch FROM clock_timestamp())")[0])

    def flushes(self) -> list[Flush]:
        """Every committed flush of the run, in order: when it began, when its rows were visible, how many there are."""
        ended = "coalesce(pg_xact_commit_timestamp(xmin), written_at)" if self._commit_times else "written_at"
        with self._cursor() as cursor:
            cursor.execute(
                f"SELECT extract(epoch FROM flush_began_at)::float8, max(extract(epoch FROM {ended}))::float8, count(*)"
                f" FROM {self.table} GROUP BY flush_began_at ORDER BY 1"
            )
            return [Flush(began, ended, rows) for began, ended, rows in cursor.fetchall()]

    def audit(self, log_path: Path, broken_path: Path, clock_offset_seconds: float) -> Audit:
        """Compare the tables with the log, both ways. ``clock_offset_seconds``: how far the server's clock is ahead."""
        self._load(f"{self.schema}.produced ({_ORDER_NAMES})", log_path)
        self._load(f"{self.schema}.broken (value)", broken_path)
        orders = f"SELECT {_ORDER_NAMES} FROM {self.table}"
        produced = f"SELECT {_ORDER_NAMES} FROM {self.schema}.produced"
        dead = "SELECT value FROM speedlayer.dead_letters WHERE consumer_group = %s"
        broken = f"SELECT value FROM {self.schema}.broken"
        count = "SELECT count(*) FROM ({}) AS counted"
        lost_rows = self._one(count.format(f"{produced} EXCEPT ALL {orders}"))[0]
        lost_dead = self._one(count.format(f"{broken} EXCEPT ALL {dead}"), self._group)[0]
        surplus_rows = self._one(count.format(f"{orders} EXCEPT ALL {produced}"))[0]
        surplus_dead = self._one(count.format(f"{dead} EXCEPT ALL {broken}"), self._group)[0]
        return Audit(
            rows=self._one(count.format(orders))[0],
            dead_letters=self._one(count.format(dead), self._group)[0],
            lost=lost_rows + lost_dead,
            surplus=surplus_rows + surplus_dead,
            latency=self._latency(clock_offset_seconds),
        )

    def cancel(self) -> None:
        """Break off what the session is doing; from any thread."""
        self._connection.cancel()

    def _latency(self, clock_offset_seconds: float) -> Optional[Latency]:
        visible = "coalesce(pg_xact_commit_timestamp(xmin), written_at)" if self._commit_times else "written_at"
        row = self._one(
            "SELECT percentile_cont(ARRAY[0.5, 0.99, 1]) WITHIN GROUP (ORDER BY seconds) FROM"
            f" (SELECT extract(epoch FROM {visible} - created_at)::float8 - %s AS seconds FROM {self.table}) AS orders",
            clock_offset_seconds,
        )
        return Latency(*row[0]) if row[0] is not None else None

    def _load(self, target: str, path: Path) -> None:
        with self._cursor() as cursor, path.open("rb") as file:
            cursor.copy_expert(f"COPY {target} FROM STDIN", file)

    def _do(self, statement: str, *values: Any) -> None:
        with self._cursor() as cursor:
            cursor.execute(statement, values or None)

    def _one(self, statement: str, *values: Any) -> tuple[Any, ...]:
        with self._cursor() as cursor:
            cursor.execute(statement, values or None)
            row = cursor.fetchone()
            assert row is not None
            return row

    @contextlib.contextmanager
    def _cursor(self) -> Iterator[Cursor]:
        import psycopg2

        try:
            with self._connection.cursor() as cursor:
                yield cursor
        except psycopg2.Error as error:
            raise DatabaseError(f"PostgreSQL refused what the run needs: {str(error).strip()}") from error


def _connect(dsn: str) -> Connection:
    import psycopg2

    try:
        connection = psycopg2.connect(dsn, application_name=APPLICATION_NAME, connect_timeout=CONNECT_TIMEOUT_SECONDS)
    except psycopg2.OperationalError as error:
        raise Unreachable(f"PostgreSQL can not be reached: {str(error).strip()}") from error
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("SET lock_timeout = %s", (f"{LOCK_TIMEOUT_SECONDS}s",))
    return connection
