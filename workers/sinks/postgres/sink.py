"""`PostgreSQLSink`: where the rows go and how. Built in the supervisor, opened in each worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Optional

from speedlayer.workers.sinks.base import Sink, SinkContext, SinkSession


@dataclass(frozen=True, kw_only=True, repr=False)
class PostgreSQLSink(Sink):
    """A PostgreSQL table; the arguments are explained in docs/configuration.md."""

    dsn: str = field(kw_only=False)
    table: str
    key: str | Sequence[str] = ()
    mode: Optional[Literal["append", "upsert"]] = None  # None: append, and only without a key; set after __init__
    unknown_fields: Literal["error", "ignore"] = "error"
    missing_fields: Literal["default", "keep"] = "default"  # of an upsert that meets a row
    null_values: Literal["dead_letter", "skip"] = "dead_letter"
    create_table: bool = False
    columns: Optional[Mapping[str, str]] = None
    pooled: bool = False
    lock_timeout_seconds: float = 30.0
    connect_timeout_seconds: float = 10.0

    def describe(self) -> str:
        """Host, database and table, without the password."""
        raise NotImplementedError

    def open(self, context: SinkContext) -> SinkSession:
        """The session of a worker; connects on first use."""
        from speedlayer.workers.sinks.postgres.session import PostgreSQLSession

        return PostgreSQLSession(self, context)
