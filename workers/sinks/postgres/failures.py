"""What an SQLSTATE means for a batch: wait, try again, look for the guilty rows, or call somebody (worker processes).

SQLSTATE classes decide, never the text of a message, with one exception: libpq hands out no SQLSTATE for a connection
that could not be opened. There the text only chooses between two ways of waiting, so a server that speaks another
language costs a worse reason, not a row.
"""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING, Optional

import psycopg2

from speedlayer.workers.errors import (
    ConnectionLost,
    SinkContended,
    SinkError,
    SinkMisconfigured,
    SinkUnavailable,
)

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection


class Verdict(enum.Enum):
    """Whose fault an error is, and so what is done about it."""

    UNAVAILABLE = "unavailable"  # the server's, for now: keep the batch and wait
    CONTENDED = "contended"  # another transaction's: try the transaction again
    DATA = "data"  # some rows': find them, they become dead letters
    SUSPECT = "suspect"  # 42501, perhaps of some rows (a row-level policy), perhaps of the sink: find out
    MISCONFIGURED = "misconfigured"  # the sink's: keep the batch until somebody mends it
    UNEXPLAINED = "unexplained"  # nobody's yet: try a few times, then find out


INSUFFICIENT_PRIVILEGE = "42501"
QUERY_CANCELED = "57014"
FEATURE_NOT_SUPPORTED = "0A000"  # what a standby answers to BEGIN READ WRITE
INVALID_PARAMETER_VALUE = "22023"

_BY_STATE: dict[str, Verdict] = {
    "25006": Verdict.UNAVAILABLE,  # read-only: a standby, or a server whose disk filled up
    "25P03": Verdict.UNAVAILABLE,  # idle_in_transaction_session_timeout: we were stopped for too long
    "25P04": Verdict.UNAVAILABLE,  # transaction_timeout
    "55P03": Verdict.CONTENDED,  # lock_timeout
    "55006": Verdict.CONTENDED,  # object in use
    INSUFFICIENT_PRIVILEGE: Verdict.SUSPECT,
    "42939": Verdict.MISCONFIGURED,
    "54000": Verdict.DATA,  # an index row that is too large, say
    "54001": Verdict.DATA,  # stack depth: a value nested too deeply
    "3F000": Verdict.MISCONFIGURED,  # no such schema
}

_BY_CLASS: dict[str, Verdict] = {
    "08": Verdict.UNAVAILABLE,
    "53": Verdict.UNAVAILABLE,
    "57": Verdict.UNAVAILABLE,
    "58": Verdict.UNAVAILABLE,
    "40": Verdict.CONTENDED,
    "21": Verdict.DATA,
    "22": Verdict.DATA,
    "23": Verdict.DATA,
    "44": Verdict.DATA,
    "P0": Verdict.DATA,
    "28": Verdict.MISCONFIGURED,
    "3D": Verdict.MISCONFIGURED,
    "42": Verdict.MISCONFIGURED,
}

# Fragments of what libpq and the server say when a connection can not be opened, the SQLSTATE that was not passed on,
# and the remedy.
_CONNECT_TEXTS: tuple[tuple[str, Optional[str], str], ...] = (
    ("password authentication failed", "28P01", "correct the user or the password in the DSN"),
    ("no password supplied", "28P01", "put the password into the DSN, PGPASSWORD or a .pgpass file"),
    ("is not permitted to log in", "28000", "ALTER ROLE … LOGIN, or use another role"),
    ("no pg_hba.conf entry", "28000", "have an administrator allow this host, user and database in pg_hba.conf"),
    ("authentication failed", "28000", "correct the user or the credentials in the DSN"),
    ("permission denied for database", "42501", "GRANT CONNECT ON DATABASE … TO the role"),
    ("server does not support SSL", None, "change sslmode in the DSN, or switch SSL on at the server"),
    ("certificate has expired", None, "renew the server's certificate"),
    ("does not match host name", None, "name the host in the DSN as the server's certificate does, or renew that"),
    ("certificate verify failed", None, "correct sslrootcert in the DSN"),
    ("requires a valid client certificate", "28000", "set sslcert and sslkey in the DSN"),
    ("root certificate file", None, "correct sslrootcert in the DSN"),
)

_REMEDIES: dict[str, str] = {
    "25006": "wait for the primary, or point the DSN at it (target_session_attrs=read-write)",
    "28P01": "correct the user or the password in the DSN",
    "3D000": "create the database, or correct its name in the DSN",
    "3F000": "create the schema, or correct the name of the table",
    "42P01": "create the table, or correct its name",
    "42703": "add the column, or have the field ignored (unknown_fields)",
    "53100": "free disk space on the database server",
    "53200": "give the database server more memory",
    "53300": "raise max_connections, or close other connections",
    INSUFFICIENT_PRIVILEGE: "GRANT what is missing; speedlayer init --print-sql prints the least that is needed",
    QUERY_CANCELED: "somebody cancelled the statement, or statement_timeout is too short for this role",
}


def verdict_of(sqlstate: Optional[str]) -> Verdict:
    """Judge by SQLSTATE. None stands for an error of the client library, which explains nothing."""
    if sqlstate is None:
        return Verdict.UNEXPLAINED
    return _BY_STATE.get(sqlstate) or _BY_CLASS.get(sqlstate[:2], Verdict.UNEXPLAINED)


def verdict_on_rows(error: psycopg2.Error, connection: Connection) -> Verdict:
    """Judge an error that writing rows led to."""
    return Verdict.UNAVAILABLE if is_lost(error, connection) else verdict_of(error.pgcode)


def is_lost(error: psycopg2.Error, connection: Connection) -> bool:
    """Whether the connection is gone: the server closed it, the network did, or it was closed here."""
    if connection.closed or error.diag.severity_nonlocalized in ("FATAL", "PANIC"):
        return True
    # libpq may need one more call to notice; an error of the server always has an SQLSTATE.
    return error.pgcode is None and isinstance(error, (psycopg2.OperationalError, psycopg2.InterfaceError))


def explain(error: psycopg2.Error, connection: Connection, doing: str) -> SinkError:
    """The error of a statement that no row is to blame for, as what the caller is to do about it."""
    sqlstate, reason = error.pgcode, f"{doing}: {message_of(error)}"
    remedy = _REMEDIES.get(sqlstate or "", "")
    if is_lost(error, connection):
        return ConnectionLost(reason, sqlstate=sqlstate, remedy=remedy)
    verdict = verdict_of(sqlstate)
    if verdict is Verdict.UNAVAILABLE:
        return SinkUnavailable(reason, sqlstate=sqlstate, remedy=remedy)
    if verdict is Verdict.CONTENDED:
        return SinkContended(reason, sqlstate=sqlstate, remedy=remedy)
    return SinkMisconfigured(reason, sqlstate=sqlstate, remedy=remedy)


def explain_connect(error: psycopg2.Error, where: str) -> SinkError:
    """The error of a connection that could not be opened."""
    reason = f"can not connect to {where}: {message_of(error)}"
    if error.pgcode is not None and verdict_of(error.pgcode) in (Verdict.MISCONFIGURED, Verdict.SUSPECT):
        return SinkMisconfigured(reason, sqlstate=error.pgcode, remedy=_REMEDIES.get(error.pgcode, ""))
    if isinstance(error, psycopg2.ProgrammingError):
        return SinkMisconfigured(reason, remedy="correct the DSN")
    text = str(error)
    for fragment, sqlstate, remedy in _CONNECT_TEXTS:
        if fragment in text:
            return SinkMisconfigured(reason, sqlstate=sqlstate, remedy=remedy)
    if "does not exist" in text and 'database "' in text:
        return SinkMisconfigured(reason, sqlstate="3D000", remedy=_REMEDIES["3D000"])
    if "does not exist" in text and 'role "' in text:
        return SinkMisconfigured(reason, sqlstate="28000", remedy="create the role, or correct it in the DSN")
    return SinkUnavailable(reason, sqlstate=error.pgcode, remedy=_REMEDIES.get(error.pgcode or "", ""))


def message_of(error: BaseException) -> str:
    """One line: what the server said, with its detail, or what the client library said."""
    diagnostics = getattr(error, "diag", None)
    primary = getattr(diagnostics, "message_primary", None)
    if primary is None:
        # libpq sets a second sentence on a line of its own, without a full stop before it.
        sentences = re.sub(r"(?<=\w)\s*\n\s*(?=[A-Z])", ". ", str(error).strip())
        return " ".join(sentences.split()) or type(error).__name__
    detail = getattr(diagnostics, "message_detail", None)
    return " ".join((f"{primary} ({detail})" if detail else primary).split())


def context_of(error: BaseException) -> Optional[str]:
    """Where in the server it happened (the COPY line and column, the trigger function), and its hint."""
    diagnostics = getattr(error, "diag", None)
    parts = [getattr(diagnostics, "message_hint", None), getattr(diagnostics, "context", None)]
    return "\n".join(part for part in parts if part) or None
