"""One connection to the target database: how it is opened, and how it begins and ends transactions (worker processes).

psycopg2 runs in autocommit mode and BEGIN, COMMIT and ROLLBACK are statements of ours: it must be known which round
trip carries the COMMIT, since a connection that breaks there, and only there, leaves the fate of the rows unknown.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional, Union

import psycopg2
import psycopg2.extensions

from speedlayer.workers.checkpoint import Backend, Purpose
from speedlayer.workers.errors import ConnectionLost, FateUnknown, SinkContended, SinkError, SinkUnavailable
from speedlayer.workers.sinks.postgres.failures import (
    FEATURE_NOT_SUPPORTED,
    INVALID_PARAMETER_VALUE,
    Verdict,
    explain,
    explain_connect,
    is_lost,
    verdict_of,
)

if TYPE_CHECKING:
    from psycopg2.extensions import connection as RawConnection
    from psycopg2.extensions import cursor as Cursor

# A dead network is noticed after 10 + 3 × 5 s of silence, or when what was sent is not acknowledged for 30 s.
KEEPALIVES_IDLE_SECONDS = 10
KEEPALIVES_INTERVAL_SECONDS = 5
KEEPALIVES_COUNT = 3
TCP_USER_TIMEOUT_MS = 30_000

# A running statement (one that waits for a lock, say) looks this often whether its client is still there.
CONNECTION_CHECK_MS = 2_000

# A claim waits so long for a checkpoint's lock before it looks who holds it, and lets other claims have their turn.
CLAIM_LOCK_TIMEOUT_MS = 500

# A transaction whose client says nothing for so long is ended by the server. A flush is silent while it encodes (well
# below 1 s); a claim is never silent.
FLUSH_IDLE_TIMEOUT_MS = 30_000
CLAIM_IDLE_TIMEOUT_MS = 10_000

# Set by `begin` for a flush; rows that fail are undone up to here, so that the guilty ones can be looked for.
ROWS_SAVEPOINT = "speedlayer_rows"

# What a flush's transaction reads values by, so that one message means the same in every database, whatever the server,
# the role or the DSN sets: a date and time without a zone is in UTC.
VALUE_SETTINGS: Mapping[str, str] = {"timezone": "'UTC'", "datestyle": "'ISO, MDY'", "intervalstyle": "'postgres'"}

_CLIENT_CONNECTION_CHECK_SINCE = 140_000
_TCP_USER_TIMEOUT_SINCE = 120_000


@dataclass(frozen=True)
class Address:
    """Where to connect, and as what."""

    dsn: str
    application_name: str
    where: str  # for people: without any secret
    connect_timeout_seconds: float
    lock_timeout_seconds: float
    pooled: bool


class Connection:
    """An open connection. Raises the errors of `speedlayer.workers.errors` only."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._checks_client = False
        self.raw = _connect(address)
        try:
            self._checks_client = self._can_check_client()
            self.backend: Optional[Backend] = None if address.pooled else self._introduce()
        except BaseException:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        """Whether the connection is known to be gone."""
        return bool(self.raw.closed)

    @property
    def encoding(self) -> str:
        """The encoding of the database, in which every text must be representable."""
        return self.raw.get_parameter_status("server_encoding") or "UTF8"

    def cursor(self) -> Cursor:
        """A plain cursor."""
        return self.raw.cursor()

    def execute(self, statement: str, parameters: Any = None, *, doing: str) -> list[tuple[Any, ...]]:
        """Run statements in one round trip; returns the rows of the last one."""
        try:
            with self.raw.cursor() as cursor:
                cursor.execute(statement, parameters)
                return cursor.fetchall() if cursor.description is not None else []
        except psycopg2.Error as error:
            raise explain(error, self.raw, doing) from error

    def begin(self, purpose: Purpose) -> None:
        """Open a transaction with its limits (and, for a flush, the savepoint before the rows) in one round trip."""
        try:
            with self.raw.cursor() as cursor:
                cursor.execute(self._begin_statement(purpose))
        except psycopg2.Error as error:
            if error.pgcode == FEATURE_NOT_SUPPORTED:
                raise SinkUnavailable(
                    f"{self._address.where} is a standby: {error.diag.message_primary}",
                    sqlstate=error.pgcode,
                    remedy="wait for the fail-over to end, or point the DSN at the primary",
                ) from error
            raise explain(error, self.raw, "beginning a transaction") from error

    def _begin_statement(self, purpose: Purpose) -> str:
        flush = purpose is Purpose.FLUSH
        lock_timeout_ms = int(self._address.lock_timeout_seconds * 1000) if flush else CLAIM_LOCK_TIMEOUT_MS
        settings: dict[str, Union[int, str]] = {
            "lock_timeout": lock_timeout_ms,
            "idle_in_transaction_session_timeout": FLUSH_IDLE_TIMEOUT_MS if flush else CLAIM_IDLE_TIMEOUT_MS,
        }
        if self._checks_client:
            settings["client_connection_check_interval"] = CONNECTION_CHECK_MS
        statements = ["BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE", *_set_local(settings)]
        if flush:
            statements += _set_local(VALUE_SETTINGS)
            # A deferred constraint would fail at COMMIT, where no row can be told guilty any more.
            statements += ["SET CONSTRAINTS ALL IMMEDIATE", f"SAVEPOINT {ROWS_SAVEPOINT}"]
        return "; ".join(statements)

    def commit(self) -> None:
        """Send COMMIT alone. `ConnectionLost` means that no answer came which can be relied upon.

        A constraint or a conflict is a clear no. Anything else (a cancel, a shutdown) may have struck after the commit
        and before its answer: then the connection is closed, and a claim finds out.
        """
        try:
            with self.raw.cursor() as cursor:
                cursor.execute("COMMIT")
                tag = cursor.statusmessage
        except psycopg2.Error as error:
            failure = explain(error, self.raw, "committing")
            if is_lost(error, self.raw) or verdict_of(error.pgcode) not in (Verdict.DATA, Verdict.CONTENDED):
                self.close()
                raise ConnectionLost(str(failure), sqlstate=failure.sqlstate, remedy=failure.remedy) from error
            raise failure from error
        if tag != "COMMIT":
            raise SinkContended(f"the server answered COMMIT with {tag}: the transaction had failed before")

    def roll_back(self) -> None:
        """End the transaction without a trace; never fails."""
        if self.closed:
            return
        try:
            with self.raw.cursor() as cursor:
                cursor.execute("ROLLBACK")
        except psycopg2.Error:
            self.close()  # the server rolls back what a closed connection leaves behind

    def close(self) -> None:
        """Close it; never fails."""
        with contextlib.suppress(psycopg2.Error):
            self.raw.close()

    def _can_check_client(self) -> bool:
        """Whether the server can look for its client while it works (14 on, and not on every system)."""
        if self.raw.info.server_version < _CLIENT_CONNECTION_CHECK_SINCE:
            return False
        try:
            with self.raw.cursor() as cursor:
                cursor.execute("BEGIN; " + "; ".join(_set_local({"client_connection_check_interval": 1})))
        except psycopg2.Error as error:
            if error.pgcode != INVALID_PARAMETER_VALUE:
                raise explain(error, self.raw, "opening a session") from error
            return False
        finally:
            self.roll_back()
        return True

    def _introduce(self) -> Backend:
        """Make the server notice a dead client host, and learn which backend serves us."""
        settings = {
            "tcp_keepalives_idle": KEEPALIVES_IDLE_SECONDS,
            "tcp_keepalives_interval": KEEPALIVES_INTERVAL_SECONDS,
            "tcp_keepalives_count": KEEPALIVES_COUNT,
        }
        if self.raw.info.server_version >= _TCP_USER_TIMEOUT_SINCE:
            settings["tcp_user_timeout"] = TCP_USER_TIMEOUT_MS
        statements = [f"SET {name} = {value}" for name, value in settings.items()]
        statements.append("SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()")
        rows = self.execute("; ".join(statements), doing="opening a session")
        if not rows:
            raise SinkUnavailable("the server does not show our own backend")
        return Backend(*rows[0])


def _set_local(settings: Mapping[str, Union[int, str]]) -> list[str]:
    return [f"SET LOCAL {name} = {value}" for name, value in settings.items()]


def _connect(address: Address) -> RawConnection:
    try:
        options: dict[str, Any] = psycopg2.extensions.parse_dsn(address.dsn)
        defaults = {
            "connect_timeout": max(2, round(address.connect_timeout_seconds)),  # libpq takes 1 for 2, and 0 for never
            "keepalives": 1,
            "keepalives_idle": KEEPALIVES_IDLE_SECONDS,
            "keepalives_interval": KEEPALIVES_INTERVAL_SECONDS,
            "keepalives_count": KEEPALIVES_COUNT,
            "tcp_user_timeout": TCP_USER_TIMEOUT_MS,
        }
        # What the DSN says wins, except for what the code relies on.
        forced = {"application_name": address.application_name, "client_encoding": "UTF8"}
        raw: RawConnection = psycopg2.connect(**{**defaults, **options, **forced})
    except psycopg2.Error as error:
        raise explain_connect(error, address.where) from error
    raw.autocommit = True
    return raw


class Slot:
    """The place of one connection that is opened when it is needed, and again when it broke.

    Both threads of a session may open the flush connection (a claim stores which backend will flush), so opening is
    done under a lock; using it is the business of one thread.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._connection: Optional[Connection] = None
        self._lock = threading.Lock()

    @property
    def current(self) -> Optional[Connection]:
        """The open connection, if there is one."""
        connection = self._connection
        return None if connection is None or connection.closed else connection

    def get(self) -> Connection:
        """The open connection, or a new one."""
        with self._lock:
            connection = self.current
            if connection is None:
                connection = self._connection = Connection(self._address)
            return connection

    def drop(self) -> None:
        """Close it; the next `get` opens a new one."""
        with self._lock:
            if self._connection is not None:  # perhaps one that the other thread has just opened: no harm
                self._connection.close()
                self._connection = None

    def drop_if_unfit(self, error: BaseException) -> None:
        """Drop it where the next attempt wants another connection (another host, a fresh state)."""
        if not isinstance(error, SinkError) or isinstance(error, (SinkUnavailable, FateUnknown)):
            self.drop()
