"""The other user of the database, who makes it slow on Black Friday (demo process).

Two sessions of its own lock the orders' table in turns, as badly timed maintenance jobs would. The second queues up for
the lock before the first lets go of it: what waits at that moment gets through, and nothing else does, since PostgreSQL
grants a lock in the order of its queue. So the database really gives no more than the locks let through, and nothing in
speedlayer is told of it.

How long each hold has to be is decided in a closed loop, from the number of waiting flushes and the rows that got
through, so that the rate is the same on slow and fast machines. `Gate` decides, without I/O; `Competitor` does it.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Optional

from speedlayer.supervisor.errors import SpeedlayerError

# How often the competitor looks who waits for its lock: a hundredth of the shortest hold.
LOOK_SECONDS = 0.02

# Seeing the waiters and letting them through takes time as well, so the holds alone must come to a little more.
AIM = 1.02

# How often to look whether a session stands in the queue for the lock, which takes it a millisecond.
QUEUE_LOOK_SECONDS = 0.002

# A lock that conflicts with every write and no read, like that of REFRESH MATERIALIZED VIEW CONCURRENTLY.
LOCK_MODE = "EXCLUSIVE"

# The lock that a flush waits for; autovacuum and others wait in other modes.
WRITERS_MODE = "RowExclusiveLock"

APPLICATION_NAME = "speedlayer-demo-competitor"

_WAITS = """
NOT granted AND relation = %s AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


@dataclass
class Gate:
    """Decides when the lock opens, so that ``rows_per_second`` get through as long as there are flushes that wait.

    No flush waits less than ``minimum_hold_seconds``, so that a small batch is slow too.
    """

    rows_per_second: float
    batch_rows: int
    minimum_hold_seconds: float
    _since: float = 0.0  # when the first of those that wait was seen
    _latest: float = 0.0  # when the last of them was seen
    _waiting: int = 0
    _owed_rows: float = 0.0  # rows that got through beyond what the last hold was for; negative if fewer did

    def is_due(self, now: float, waiting: int) -> bool:
        """Tell whether the lock opens now. ``waiting`` flushes wait for it."""
        if waiting == 0:
            self._waiting = 0
            return False
        if self._waiting == 0:
            self._since = now
        if waiting > self._waiting:
            self._latest = now
        self._waiting = waiting
        hold_seconds = (self.batch_rows * waiting + self._owed_rows) / (self.rows_per_second * AIM)
        return now >= self._since + hold_seconds and now >= self._latest + self.minimum_hold_seconds

    def opened(self, rows: int) -> None:
        """Take note of how many rows got through; the next hold makes up for the difference."""
        self._owed_rows = float(rows - self.batch_rows * self._waiting)
        self._waiting = 0


class CompetitorError(SpeedlayerError):
    """The session that makes the database slow has failed, so the phase proves nothing."""


class Competitor:
    """A thread that competes for ``table`` (an SQL name) between `start` and `stop`, with two sessions in turns."""

    def __init__(self, dsn: str, table: str, gate: Gate) -> None:
        self._dsn = dsn
        self._table = table
        self._gate = gate
        # Set once the lock is held for the first time: from then on the database is slow.
        self.locked = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="competitor", daemon=True)
        self._sessions: list[_Session] = []
        self._failure: Optional[BaseException] = None

    def start(self) -> None:
        """Begin to compete."""
        self._sessions = [_Session(self._dsn, self._table) for _ in range(2)]
        self._thread.start()

    def stop(self) -> None:
        """Let go of the table. Raises `CompetitorError` if a session had failed before."""
        self._stopping.set()
        while self._thread.is_alive():
            # One may be waiting for a flush that has the table.
            for session in self._sessions:
                session.cancel()
            self._thread.join(0.2)
        for session in self._sessions:
            session.close()
        self.check()

    def check(self) -> None:
        """Raise `CompetitorError` if a session has failed."""
        if self._failure is not None:
            raise CompetitorError(f"the competing session failed: {self._failure}") from self._failure

    def _run(self) -> None:
        try:
            with ThreadPoolExecutor(1, "competitor-lock") as background:
                self._compete(background)
        except Exception as error:
            if not self._stopping.is_set():
                self._failure = error

    def _compete(self, background: Executor) -> None:
        holder, other = self._sessions
        holder.lock()
        self.locked.set()
        rows = holder.count_rows()
        while not self._stopping.wait(LOOK_SECONDS):
            if not self._gate.is_due(time.monotonic(), holder.count_waiting(WRITERS_MODE)):
                continue
            # The other session queues up first. Who comes later stands behind it, however fast a flush comes back.
            locking = background.submit(other.lock)
            while not locking.done() and not holder.sees_waiting(other):
                time.sleep(QUEUE_LOOK_SECONDS)
            holder.unlock()
            locking.result()
            holder, other = other, holder
            before, rows = rows, holder.count_rows()
            self._gate.opened(rows - before)
        holder.unlock()


class _Session:
    """One of the competitor's sessions."""

    def __init__(self, dsn: str, table: str) -> None:
        import psycopg2

        self._connection = psycopg2.connect(dsn, application_name=APPLICATION_NAME, connect_timeout=10)
        self._connection.autocommit = True
        self._table = table
        # The server's own limits are for sessions that forgot their lock; this one means it.
        self._do("SET lock_timeout = 0; SET statement_timeout = 0; SET idle_in_transaction_session_timeout = 0")
        (self._table_id,) = self._do("SELECT %s::regclass::oid", table)
        self.pid: int = self._connection.info.backend_pid

    def lock(self) -> None:
        """Take the table; returns when all those that waited before have had it."""
        self._do(f"BEGIN; LOCK TABLE {self._table} IN {LOCK_MODE} MODE")

    def unlock(self) -> None:
        """Let go of the table."""
        self._do("COMMIT")

    def count_rows(self) -> int:
        """How many rows have got through so far."""
        return int(self._do(f"SELECT count(*) FROM {self._table}")[0])

    def count_waiting(self, mode: str) -> int:
        """How many sessions wait for the table in this mode."""
        return int(self._do(f"SELECT count(*) FROM pg_locks WHERE {_WAITS} AND mode = %s", self._table_id, mode)[0])

    def sees_waiting(self, other: _Session) -> bool:
        """Whether the other session waits for the table."""
        return bool(
            self._do(f"SELECT count(*) FROM pg_locks WHERE {_WAITS} AND pid = %s", self._table_id, other.pid)[0]
        )

    def cancel(self) -> None:
        """Break off what the session is doing; from any thread."""
        self._connection.cancel()

    def close(self) -> None:
        """End the session, and with it its lock."""
        self._connection.close()

    def _do(self, statement: str, *values: Any) -> tuple[Any, ...]:
        with self._connection.cursor() as cursor:
            cursor.execute(statement, values or None)
            return (cursor.fetchone() if cursor.description else None) or ()
