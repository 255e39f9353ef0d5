"""The schema ``speedlayer`` in the target database: its tables, its forward migrations, its grants.

Runs in the workers, on the first connection of each, and in the commands that print or check the SQL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

import psycopg2

from speedlayer.workers.errors import SinkMisconfigured
from speedlayer.workers.sinks.postgres.failures import INSUFFICIENT_PRIVILEGE, explain
from speedlayer.workers.sinks.postgres.names import quote_identifier

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection
    from psycopg2.extensions import cursor as Cursor

# The advisory lock under which migrations run: "speedlay" as eight ASCII bytes, so that it means the same to every
# version and collides with nobody who counts from 1.
MIGRATION_LOCK = int.from_bytes(b"speedlay", "big")

# A migration waits at most so long for another one; a worker tries again, so this only bounds a stopped migrator.
MIGRATION_LOCK_TIMEOUT_SECONDS = 30

_CHECKPOINTS = """
CREATE TABLE speedlayer.checkpoints (
    cluster_id      text    NOT NULL,
    consumer_group  text    NOT NULL,
    pipeline        text    NOT NULL,
    topic           text    NOT NULL,
    partition       integer NOT NULL,
    lane            integer NOT NULL,
    topic_id        text,
    leader_epoch    integer NOT NULL DEFAULT -1,
    next_offset     bigint,
    epoch           bigint  NOT NULL,
    owner           text    NOT NULL,
    backend_pid     integer,
    backend_start   timestamptz,
    rows            bigint  NOT NULL DEFAULT 0,
    filtered        bigint  NOT NULL DEFAULT 0,
    dead_lettered   bigint  NOT NULL DEFAULT 0,
    updated_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (cluster_id, consumer_group, pipeline, topic, partition, lane)
) WITH (
    -- Every flush updates a row of this small table in place: room for new versions beside the old ones, and a vacuum
    -- that comes after a thousand of them whatever the size of the table.
    fillfactor = 20,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_cost_delay = 0,
    autovacuum_analyze_threshold = 10000,
    autovacuum_analyze_scale_factor = 0
);
COMMENT ON TABLE speedlayer.checkpoints IS
    'Where each partition''s rows end, moved by the transaction that writes them. By hand: speedlayer offsets seek.';
"""

_DEAD_LETTERS = """
CREATE TABLE speedlayer.dead_letters (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    cluster_id      text    NOT NULL,
    consumer_group  text    NOT NULL,
    pipeline        text    NOT NULL,
    topic           text    NOT NULL,
    partition       integer NOT NULL,
    lane            integer NOT NULL,
    "offset"        bigint  NOT NULL,
    message_timestamp timestamptz,
    key             bytea,
    value           bytea,
    headers         jsonb   NOT NULL DEFAULT '[]',
    reason          text    NOT NULL,
    sqlstate        text,
    detail          text,
    worker          text,
    at              timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX dead_letters_message ON speedlayer.dead_letters (pipeline, topic, partition, "offset");
CREATE INDEX dead_letters_at ON speedlayer.dead_letters (at);
COMMENT ON TABLE speedlayer.dead_letters IS
    'Messages that could not become rows, byte for byte, with the reason.';
"""

_GAPS = """
CREATE TABLE speedlayer.gaps (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    cluster_id      text    NOT NULL,
    consumer_group  text    NOT NULL,
    pipeline        text    NOT NULL,
    topic           text    NOT NULL,
    partition       integer NOT NULL,
    lane            integer NOT NULL,
    from_offset     bigint,
    to_offset       bigint  NOT NULL,
    reason          text    NOT NULL,
    at              timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE speedlayer.gaps IS
    'Where a checkpoint jumped from one offset to another without the messages between them, and why.';
"""

# The n-th entry brings version n - 1 to version n. An entry that was released is never edited; a new one corrects it.
MIGRATIONS: tuple[str, ...] = (_CHECKPOINTS + _DEAD_LETTERS + _GAPS,)
SCHEMA_VERSION = len(MIGRATIONS)

_VERSION_TABLE = """
CREATE TABLE IF NOT EXISTS speedlayer.schema_version (
    version     integer PRIMARY KEY,
    applied_at  timestamptz NOT NULL DEFAULT clock_timestamp()
);
"""

# The least that a worker's role needs.
_GRANTS: tuple[str, ...] = (
    "USAGE ON SCHEMA speedlayer",
    "SELECT ON speedlayer.schema_version",
    "SELECT, INSERT, UPDATE ON speedlayer.checkpoints",
    "SELECT, INSERT ON speedlayer.dead_letters",
    "SELECT, INSERT ON speedlayer.gaps",
)


def ensure_schema(connection: Connection) -> None:
    """Bring the schema to `SCHEMA_VERSION`, once, however many workers try; refuse a newer one.

    The connection is in autocommit mode and outside of a transaction. Where the schema is right already, which an
    administrator may have seen to, no privilege beyond reading its version is needed.
    """
    with connection.cursor() as cursor:
        try:
            version = _version(cursor)
        except psycopg2.Error as error:
            raise explain(error, connection, "reading the version of the schema speedlayer") from error
        if version is not None:
            _refuse_newer(version)
        if version != SCHEMA_VERSION:
            _migrate(connection, cursor)


def _version(cursor: Cursor) -> Optional[int]:
    """The version of the schema that is there; None without one."""
    # Not to_regclass: it may answer from a cache that does not know yet what another migrator has just committed.
    cursor.execute(
        "SELECT 1 FROM pg_catalog.pg_tables WHERE schemaname = 'speedlayer' AND tablename = 'schema_version'"
    )
    if cursor.fetchone() is None:
        return None
    cursor.execute("SELECT max(version) FROM speedlayer.schema_version")
    row = cursor.fetchone()
    return None if row is None or row[0] is None else int(row[0])


def _refuse_newer(version: int) -> None:
    if version > SCHEMA_VERSION:
        raise SinkMisconfigured(
            f"the schema speedlayer in the database has version {version}, and this speedlayer knows {SCHEMA_VERSION}:"
            " a newer one has been here, and what it wrote may mean something else",
            remedy="upgrade speedlayer on this machine to the version of the others",
        )


def _migrate(connection: Connection, cursor: Cursor) -> None:
    try:
        cursor.execute(
            "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;"
            f"SET LOCAL lock_timeout = '{MIGRATION_LOCK_TIMEOUT_SECONDS}s';"
            "SET LOCAL idle_in_transaction_session_timeout = '60s'"
        )
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", (MIGRATION_LOCK,))
        # READ COMMITTED: this sees what the migrator before us has committed.
        version = _version(cursor)
        if version is not None:
            _refuse_newer(version)
        for statement in _steps(version, _schema_exists(cursor)):
            cursor.execute(statement)
        cursor.execute("COMMIT")
    except psycopg2.Error as error:
        failure = _explain_migration(error, connection)
        _roll_back(connection)
        raise failure from error
    except SinkMisconfigured:
        _roll_back(connection)
        raise


def _roll_back(connection: Connection) -> None:
    try:
        with connection.cursor() as cursor:
            cursor.execute("ROLLBACK")
    except psycopg2.Error:
        connection.close()  # which rolls back as well


def _explain_migration(error: psycopg2.Error, connection: Connection) -> Exception:
    failure = explain(error, connection, "making the schema speedlayer")
    if error.pgcode == INSUFFICIENT_PRIVILEGE:
        return SinkMisconfigured(
            str(failure),
            sqlstate=error.pgcode,
            remedy="have an administrator run what `speedlayer init --print-sql` prints",
        )
    return failure


def _schema_exists(cursor: Cursor) -> bool:
    """CREATE SCHEMA IF NOT EXISTS asks for the privilege even where the schema is there."""
    cursor.execute("SELECT 1 FROM pg_catalog.pg_namespace WHERE nspname = 'speedlayer'")
    return cursor.fetchone() is not None


def _steps(version: Optional[int], schema_exists: bool) -> list[str]:
    steps = [] if schema_exists else ["CREATE SCHEMA speedlayer"]
    if version is None:
        steps.append(_VERSION_TABLE)
    for number in range((version or 0) + 1, SCHEMA_VERSION + 1):
        steps.append(MIGRATIONS[number - 1])
        steps.append(f"INSERT INTO speedlayer.schema_version (version) VALUES ({number})")
    return steps


def print_sql(role: str, tables: Sequence[str] = ()) -> str:
    """The SQL by which an administrator makes the schema and grants ``role`` the least that a worker needs.

    ``tables`` are SQL names as they stand in the pipelines (quoted where they need it); without them a comment shows
    what to grant. Running it where the schema is there already changes nothing but the grants.
    """
    return "\n".join([_print_schema().strip(), "", *_print_grants(role, tables), ""])


def _print_schema() -> str:
    body = "\n".join(
        f"    IF NOT EXISTS (SELECT 1 FROM speedlayer.schema_version WHERE version = {number}) THEN\n"
        f"        EXECUTE $migration${MIGRATIONS[number - 1]}$migration$;\n"
        f"        INSERT INTO speedlayer.schema_version (version) VALUES ({number});\n"
        "    END IF;"
        for number in range(1, SCHEMA_VERSION + 1)
    )
    return (
        f"-- speedlayer's schema, version {SCHEMA_VERSION}. Run it in the target database, as its owner:\n"
        "--     speedlayer init --print-sql | psql DATABASE\n"
        "BEGIN;\n"
        f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK});\n"
        "CREATE SCHEMA IF NOT EXISTS speedlayer;\n"
        f"{_VERSION_TABLE.strip()}\n"
        f"DO $speedlayer$\nBEGIN\n{body}\nEND\n$speedlayer$;\n"
        "COMMIT;\n"
    )


def _print_grants(role: str, tables: Sequence[str]) -> list[str]:
    grantee = quote_identifier(role)
    lines = ["-- The least that the role of the workers needs."]
    lines += [f"GRANT {privileges} TO {grantee};" for privileges in _GRANTS]
    lines += ["-- On each target table: INSERT to append; SELECT and UPDATE as well to upsert."]
    lines += [f"GRANT SELECT, INSERT, UPDATE ON {table} TO {grantee};" for table in tables]
    if not tables:
        lines += [f"-- GRANT SELECT, INSERT, UPDATE ON public.orders TO {grantee};"]
    return lines
