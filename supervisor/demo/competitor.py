"""The other user of the database, who makes it slow on Black Friday (demo process).

A session of its own locks the orders' table again and again, as a badly timed maintenance job would, and opens the lock
for a moment in between. All that waits for it at that moment gets through, and nothing else does: PostgreSQL hands a
lock to its waiters before the next LOCK TABLE can have it. So the database really gives no more than the lock lets
through, and nothing in speedlayer is told of it.

How long each hold has to be is decided in a closed loop, from the number of waiting flushes and the rows that got
through, so that the rate is the same on slow and fast machines. `Gate` decides, without I/O; `Competitor` does it.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

from speedlayer.supervisor.errors import SpeedlayerError

if TYPE_CHECKING:
    from psycopg2.extensions import cursor as Cursor

# How often the competitor looks who waits for its lock: a hundredth of the shortest hold.
LOOK_SECONDS = 0.02

# Seeing the waiters and letting them through takes time as well, so the holds alone must come to a little more.
AIM = 1.02

# A lock that conflicts with every write and no read, like that of REFRESH MATERIALIZED VIEW CONCURRENTLY.
LOCK_MODE = "EXCLUSIVE"

# The lock that a flush waits for; autovacuum and others wait in other modes.
WRITERS_MODE = "RowExclusiveLock"

APPLICATION_NAME = "speedlayer-demo-competitor"


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
    """A thread with a session that competes for ``table`` (an SQL name) between `start` and `stop`."""

    def __init__(self, dsn: str, table: str, gate: Gate) -> None:
        self._dsn = dsn
        self._table = table
        self._gate = gate
        # Set once the lock is held for the first time: from then on the database is slow.
        self.locked = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="competitor", daemon=True)
        self._connection: Any = None
        self._failure: Optional[BaseException] = None

    def start(self) -> None:
        """Begin to compete."""
        import psycopg2

        self._connection = psycopg2.connect(self._dsn, application_name=APPLICATION_NAME, connect_timeout=10)
        self._connection.autocommit = True
        self._thread.start()

    def stop(self) -> None:
        """Let go of the table. Raises `CompetitorError` if the session had failed before."""
        self._stopping.set()
        while self._thread.is_alive():
            # It may be waiting for a flush that has the table.
            self._connection.cancel()
            self._thread.join(0.2)
        self._connection.close()
        self.check()

    def check(self) -> None:
        """Raise `CompetitorError` if the session has failed."""
        if self._failure is not None:
            raise CompetitorError(f"the competing session failed: {self._failure}") from self._failure

    def _run(self) -> None:
        try:
            with self._connection.cursor() as cursor:
                self._compete(cursor)
        except Exception as error:
            if not self._stopping.is_set():
                self._failure = error

    def _compete(self, cursor: Cursor) -> None:
        # The server's own limits are for sessions that forgot their lock; this one means it.
        cursor.execute("SET lock_timeout = 0; SET statement_timeout = 0; SET idle_in_transaction_session_timeout = 0")
        cursor.execute("SELECT %s::regclass::oid", (self._table,))
        (table_id,) = _one(cursor)
        cursor.execute(f"BEGIN; LOCK TABLE {self._table} IN {LOCK_MODE} MODE")
        self.locked.set()
        rows = self._count(cursor)
        while not self._stopping.wait(LOOK_SECONDS):
            if not self._gate.is_due(time.monotonic(), self._count_waiting(cursor, table_id)):
                continue
            # One round trip: who asks for the table after the COMMIT stands behind our next lock in the queue.
            cursor.execute(f"COMMIT; BEGIN; LOCK TABLE {self._table} IN {LOCK_MODE} MODE")
            before, rows = rows, self._count(cursor)
            self._gate.opened(rows - before)
        cursor.execute("COMMIT")

    def _count(self, cursor: Cursor) -> int:
        cursor.execute(f"SELECT count(*) FROM {self._table}")
        return int(_one(cursor)[0])

    def _count_waiting(self, cursor: Cursor, table_id: int) -> int:
        cursor.execute(
            "SELECT count(*) FROM pg_locks WHERE relation = %s AND mode = %s AND NOT granted AND database ="
            " (SELECT oid FROM pg_database WHERE datname = current_database())",
            (table_id, WRITERS_MODE),
        )
        return int(_one(cursor)[0])


def _one(cursor: Cursor) -> tuple[Any, ...]:
    row = cursor.fetchone()
    assert row is not None
    return row
