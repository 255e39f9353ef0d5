"""Who keeps a flush waiting, and whether it is a ghost (worker processes, the claim thread).

A flush that waits for a lock may wait for an old owner that was stopped in the middle of a transaction: its rows are
doomed, since its checkpoint has moved to another epoch, and yet they block ours. Such a backend is ended. Everybody
else's locks are only reported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Optional

from speedlayer.workers.checkpoint import Backend
from speedlayer.workers.settings import APPLICATION_PREFIX
from speedlayer.workers.sinks.postgres.connection import Connection

# A flush is watched once it has run so long; before that it waits for nobody worth naming.
WATCH_AFTER_SECONDS = 1.0

# A backend is a ghost if it was found waiting for its client at so many looks in a row (one look a second). A living
# owner that happens to hold a lock is seen at work at one of them.
LOOKS_BEFORE_EVICTION = 3

# Old owners' backends that are remembered; an older one has long ended, or its transaction has timed out.
PREVIOUS_LIMIT = 1_000

# The operator is told who blocks after so long, and then whenever the wait has doubled.
TELL_AFTER_SECONDS = 5.0

_BLOCKERS = """
SELECT blocker.pid, a.backend_start, a.application_name, a.usename, a.state, a.wait_event_type
FROM unnest(pg_blocking_pids(%(pid)s)) AS blocker (pid) LEFT JOIN pg_stat_activity a ON a.pid = blocker.pid
"""

_TERMINATE = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = %(pid)s AND backend_start = %(started_at)s
"""

Log = Callable[[int, str, dict[str, Any]], None]


@dataclass(frozen=True)
class Blocker:
    """A backend that holds what our flush waits for. What our role may not see is None."""

    pid: int
    started_at: Optional[datetime]
    application_name: Optional[str]
    user: Optional[str]
    state: Optional[str]
    wait_event_type: Optional[str]

    @property
    def backend(self) -> Optional[Backend]:
        """Its identity, if it may be seen."""
        return None if self.started_at is None else Backend(self.pid, self.started_at)

    def __str__(self) -> str:
        if self.pid == 0:
            return "a prepared transaction"
        name = self.application_name or "no application name"
        return f"backend {self.pid} ({name}, user {self.user or 'unknown'}, {self.state or 'state unknown'})"


class Guardian:
    """Watches one session's flushes. Everything here runs on the claim thread."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._previous: dict[Backend, None] = {}  # in the order in which they were met
        self._seen_silent: dict[Backend, int] = {}
        self._tell_at_seconds = TELL_AFTER_SECONDS

    def remember(self, previous: Optional[Backend]) -> None:
        """Take note of the backend with which the old owner of a lane of ours had flushed."""
        if previous is None:
            return
        self._previous[previous] = None
        if len(self._previous) > PREVIOUS_LIMIT:
            del self._previous[next(iter(self._previous))]

    def rest(self) -> None:
        """No flush has been running for long: forget what was seen."""
        self._seen_silent.clear()
        self._tell_at_seconds = TELL_AFTER_SECONDS

    def look(self, connection: Connection, flushing: Backend, waited_seconds: float) -> None:
        """See who blocks the flush; end the ghosts, name the others."""
        rows = connection.execute(_BLOCKERS, {"pid": flushing.pid}, doing="looking who blocks a flush")
        blockers = [Blocker(*row) for row in rows]
        silent = {blocker.backend for blocker in blockers if self._is_silent_old_owner(blocker)} - {None}
        self._seen_silent = {
            backend: self._seen_silent.get(backend, 0) + 1 for backend in silent if backend is not None
        }
        for backend, looks in self._seen_silent.items():
            if looks >= LOOKS_BEFORE_EVICTION:
                self._evict(connection, backend)
        self._tell(blockers, waited_seconds)

    def _is_silent_old_owner(self, blocker: Blocker) -> bool:
        return (
            blocker.backend in self._previous
            and (blocker.application_name or "").startswith(APPLICATION_PREFIX)
            and blocker.wait_event_type == "Client"
        )

    def _evict(self, connection: Connection, backend: Backend) -> None:
        parameters = {"pid": backend.pid, "started_at": backend.started_at}
        if connection.execute(_TERMINATE, parameters, doing="ending an old owner's backend") == [(True,)]:
            self._log(
                logging.WARNING,
                f"ended backend {backend.pid}: an old owner's, stopped in a transaction that could not commit any more"
                " and whose locks held up a flush",
                {"backend_pid": backend.pid},
            )

    def _tell(self, blockers: list[Blocker], waited_seconds: float) -> None:
        if waited_seconds < self._tell_at_seconds or not blockers:
            return
        self._tell_at_seconds = waited_seconds * 2
        self._log(
            logging.WARNING,
            f"a flush has waited {waited_seconds:.0f} s for a lock held by {', '.join(map(str, blockers))};"
            " it goes on when the lock is released",
            {"waited_seconds": round(waited_seconds, 1), "blocker_pid": blockers[0].pid},
        )
