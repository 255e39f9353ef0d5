"""The plan of a target table, read from the catalog. Runs in the worker (and in `speedlayer check`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional

from speedlayer.workers.protocol import Flight

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection

    from speedlayer.workers.sinks.postgres.sink import PostgreSQLSink


@dataclass(frozen=True)
class Table:
    """A table as far as writing to it goes."""

    @classmethod
    def load(cls, connection: Connection, name: str) -> Table:
        """Read the plan of ``name`` (an SQL name). Only SELECTs; it neither commits nor rolls back.

        Raises `TableMissing` (a `SinkMisconfigured`) when there is no such table, `SinkMisconfigured` with a remedy
        when it can not be written to.
        """
        raise NotImplementedError


def load_for(connection: Connection, sink: PostgreSQLSink, flight: Optional[Flight] = None) -> Table:
    """The plan of the sink's table; with ``create_table``, a missing table is made first.

    Its columns are the sink's ``columns``, else inferred from the flight. Making it commits, so call this outside of
    a transaction. The key of an upsert is checked here.
    """
    raise NotImplementedError


def create_table(connection: Connection, name: str, columns: Mapping[str, str], key: Sequence[str]) -> None:
    """CREATE TABLE, once, however many workers try; commits."""
    raise NotImplementedError
