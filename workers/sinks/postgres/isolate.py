"""Find the rows that the table can not take, by halving, and write all the others (worker processes).

A batch that failed is cut in halves, each tried under a savepoint of its own, until the guilty rows stand alone: about
2 · log2(n) statements for each. The halves are written in order, so an upsert still ends with the last record of a key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

import psycopg2

from speedlayer.workers.sinks.postgres.failures import Verdict, context_of, message_of, verdict_of, verdict_on_rows
from speedlayer.workers.sinks.postgres.write import UnwritableRows

if TYPE_CHECKING:
    from psycopg2.extensions import cursor as Cursor

Write = Callable[["Cursor", Sequence[Any]], None]

# Verdicts that may be a row's own: worth looking for it.
_SEARCHABLE = frozenset({Verdict.DATA, Verdict.SUSPECT, Verdict.UNEXPLAINED})


@dataclass(frozen=True)
class Guilty:
    """A row that the table does not take: its index, and what the server said."""

    index: int
    reason: str
    sqlstate: Optional[str]
    detail: Optional[str]
    verdict: Verdict


def isolate(write: Write, cursor: Cursor, rows: Sequence[Any]) -> list[Guilty]:
    """Write all rows but the guilty ones, which are returned in order.

    Called in a transaction, after the rows as a whole have failed and were undone. An error that is no row's fault is
    raised as it came.
    """
    guilty: list[Guilty] = []
    pending = [range(len(rows))] if len(rows) == 1 else _halves(range(len(rows)))[::-1]
    while pending:
        span = pending.pop()
        failure = _try(write, cursor, rows[span.start : span.stop])
        if failure is None:
            continue
        if len(span) > 1:
            pending += _halves(span)[::-1]  # a stack: the first half comes out first
        else:
            guilty.append(_guilty(span.start, failure))
    return guilty


def _halves(span: range) -> list[range]:
    middle = (span.start + span.stop) // 2
    return [range(span.start, middle), range(middle, span.stop)]


def _try(write: Write, cursor: Cursor, rows: Sequence[Any]) -> Optional[Exception]:
    """Write the rows under a savepoint; returns the error that some of them may be to blame for."""
    cursor.execute("SAVEPOINT speedlayer_half")
    try:
        write(cursor, rows)
    except UnwritableRows as error:
        failure: Exception = error
    except psycopg2.Error as error:
        if verdict_on_rows(error, cursor.connection) not in _SEARCHABLE:
            raise
        failure = error
    else:
        cursor.execute("RELEASE SAVEPOINT speedlayer_half")
        return None
    cursor.execute("ROLLBACK TO SAVEPOINT speedlayer_half; RELEASE SAVEPOINT speedlayer_half")
    return failure


def _guilty(index: int, failure: Exception) -> Guilty:
    if isinstance(failure, UnwritableRows):
        reason, sqlstate = next(iter(failure.reasons.values()))
        return Guilty(index, reason, sqlstate, None, Verdict.DATA)
    assert isinstance(failure, psycopg2.Error)
    return Guilty(index, message_of(failure), failure.pgcode, context_of(failure), verdict_of(failure.pgcode))
