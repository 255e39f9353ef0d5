"""Checks of PostgreSQL: connection, schema, privileges, table, earlier checkpoints (the process of `speedlayer check`).

The session is read-only, so the server itself sees to it that nothing changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Optional

from speedlayer.supervisor.check.findings import Finding, failed, ok, warning
from speedlayer.supervisor.errors import ConfigurationError
from speedlayer.supervisor.settings import DaemonSettings, PipelineSettings
from speedlayer.workers.errors import SinkError
from speedlayer.workers.sinks.postgres.sink import PostgreSQLSink

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection
    from psycopg2.extensions import cursor as Cursor

# For flushes and for claims: each worker holds two connections for each pipeline.
CONNECTIONS_PER_WORKER = 2

_SCHEMA_REMEDY = "have an administrator run what `speedlayer init --print-sql` prints"

_TABLE_PRIVILEGES = {
    "speedlayer.schema_version": "SELECT",
    "speedlayer.checkpoints": "SELECT, INSERT, UPDATE",
    "speedlayer.dead_letters": "SELECT, INSERT",
    "speedlayer.gaps": "SELECT, INSERT",
}


def check(settings: DaemonSettings, cluster: Optional[str], timeout_seconds: float) -> Iterator[Finding]:
    """Look at the database of every pipeline, once for each, and at each pipeline's table."""
    databases: dict[str, list[PipelineSettings]] = {}
    for pipeline in settings.pipelines:
        if isinstance(pipeline.sink, PostgreSQLSink):
            databases.setdefault(pipeline.sink.dsn, []).append(pipeline)
        else:
            yield ok(f"sink of {pipeline.name}", f"{pipeline.sink.describe()}: a sink of your own is not looked into")
    for dsn, pipelines in databases.items():
        yield from _database(settings, dsn, pipelines, cluster, timeout_seconds)


def _database(
    settings: DaemonSettings,
    dsn: str,
    pipelines: list[PipelineSettings],
    cluster: Optional[str],
    timeout_seconds: float,
) -> Iterator[Finding]:
    import psycopg2

    from speedlayer.workers.sinks.postgres.failures import explain_connect, message_of

    where = _where(pipelines[0])
    try:
        connection = psycopg2.connect(
            dsn, connect_timeout=max(2, round(timeout_seconds)), application_name="speedlayer/check"
        )
    except psycopg2.Error as error:
        explained = explain_connect(error, where)
        yield failed("database", str(explained), explained.remedy)
        return
    with contextlib.closing(connection):
        connection.set_session(readonly=True, autocommit=True)
        try:
            yield from _server(connection, where, settings.workers.count * len(pipelines))
            finding, has_schema = _schema(connection)
            yield finding
            for pipeline in pipelines:
                yield _table(connection, pipeline)
                if has_schema:
                    yield from _earlier_names(connection, settings, pipeline, cluster)
        except psycopg2.Error as error:
            yield failed("database", f"{where}: {message_of(error)}")


def _where(pipeline: PipelineSettings) -> str:
    """Name the database without its password, and without the table that `describe` adds."""
    import psycopg2.extensions

    sink = pipeline.sink
    assert isinstance(sink, PostgreSQLSink)
    try:
        given = psycopg2.extensions.parse_dsn(sink.dsn)
    except psycopg2.ProgrammingError:
        return "the database of the DSN"
    return f"{given.get('dbname', 'the default database')} on {given.get('host', 'the local socket')}"


def _one(cursor: Cursor, statement: str, parameters: Any = None) -> Any:
    cursor.execute(statement, parameters)
    row = cursor.fetchone()
    return None if row is None else row[0]


def _server(connection: Connection, where: str, pipelines_times_workers: int) -> Iterator[Finding]:
    with connection.cursor() as cursor:
        version, user = _one(cursor, "SHOW server_version"), _one(cursor, "SELECT current_user")
        yield ok("database", f"{where} answers: PostgreSQL {version}, as {user}")
        if _one(cursor, "SELECT pg_is_in_recovery()"):
            yield failed("database", f"{where} is a standby and takes no writes", "point the DSN at the primary")
        encoding = _one(cursor, "SHOW server_encoding")
        if encoding != "UTF8":
            yield warning("database", f"its encoding is {encoding}: text that it can not hold becomes dead letters")
        needed = CONNECTIONS_PER_WORKER * pipelines_times_workers
        free = _one(
            cursor,
            "SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int"
            " - count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'",
        )
        if free < needed:
            yield warning(
                "database",
                f"the workers need up to {needed} connections, and {free} are free",
                "raise max_connections, or lower [workers] count",
            )


def _schema(connection: Connection) -> tuple[Finding, bool]:
    """Look at the schema speedlayer; says too whether its checkpoints can be read."""
    import psycopg2

    from speedlayer.workers.sinks.postgres.failures import message_of
    from speedlayer.workers.sinks.postgres.schema import SCHEMA_VERSION

    what = "schema speedlayer"
    with connection.cursor() as cursor:
        try:
            version = _schema_version(cursor)
        except psycopg2.Error as error:
            return failed(what, f"can not be read: {message_of(error)}", _SCHEMA_REMEDY), False
        if version is not None and version > SCHEMA_VERSION:
            known = f"this speedlayer knows {SCHEMA_VERSION}"
            return failed(what, f"has version {version}, and {known}", "upgrade speedlayer"), False
        if version != SCHEMA_VERSION:
            return _may_be_made(cursor, version), False
        missing = list(_missing_privileges(cursor))
        if missing:
            return failed(what, f"{', '.join(missing)}: not granted", _SCHEMA_REMEDY), False
        return ok(what, f"has version {version}, with the privileges that it takes"), True


def _schema_version(cursor: Cursor) -> Optional[int]:
    table = "SELECT 1 FROM pg_tables WHERE schemaname = 'speedlayer' AND tablename = 'schema_version'"
    if _one(cursor, table) is None:
        return None
    version: Optional[int] = _one(cursor, "SELECT max(version) FROM speedlayer.schema_version")
    return version


def _missing_privileges(cursor: Cursor) -> Iterator[str]:
    for table, privileges in _TABLE_PRIVILEGES.items():
        for privilege in privileges.split(", "):
            if not _one(cursor, "SELECT has_table_privilege(%s, %s)", (table, privilege)):
                yield f"{privilege} on {table}"


def _may_be_made(cursor: Cursor, version: Optional[int]) -> Finding:
    what = "schema speedlayer"
    exists = _one(cursor, "SELECT to_regnamespace('speedlayer') IS NOT NULL")
    if exists:
        allowed = _one(cursor, "SELECT pg_has_role(nspowner, 'USAGE') FROM pg_namespace WHERE nspname = 'speedlayer'")
    else:
        allowed = _one(cursor, "SELECT has_database_privilege(current_database(), 'CREATE')")
    state = "does not exist yet" if version is None else f"has version {version}"
    if allowed:
        return ok(what, f"{state}; the first start makes it")
    return failed(what, f"{state}, and this role may not make it", _SCHEMA_REMEDY)


def _table(connection: Connection, pipeline: PipelineSettings) -> Finding:
    from speedlayer.workers.sinks.postgres.table import Table, TableMissing

    sink = pipeline.sink
    assert isinstance(sink, PostgreSQLSink)
    what = f"table {sink.table}"
    try:
        table = Table.load(connection, sink.table)
        key = table.key_of(sink)
    except TableMissing as error:
        if sink.create_table:
            return ok(what, "does not exist yet; create_table makes it")
        return failed(what, str(error), error.remedy)
    except SinkError as error:
        return failed(what, str(error), error.remedy)
    except ConfigurationError as error:
        return failed(what, str(error))
    columns = ", ".join(f"{column.name} {column.type_sql}" for column in table.columns if not column.generated)
    how = f"upsert by ({', '.join(key)})" if key else "append"
    return ok(what, f"{how} into {columns}")


def _earlier_names(
    connection: Connection, settings: DaemonSettings, pipeline: PipelineSettings, cluster: Optional[str]
) -> Iterator[Finding]:
    """Look for checkpoints of the same group and topics that no pipeline of this name has written."""
    if cluster is None:
        return
    of_these = "cluster_id = %s AND consumer_group = %s AND topic = ANY(%s)"
    parameters: list[Any] = [cluster, pipeline.group_id, list(pipeline.topics)]
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT DISTINCT pipeline FROM speedlayer.checkpoints WHERE {of_these}", parameters)
        names = {str(row[0]) for row in cursor.fetchall()}
    others = sorted(names - {other.name for other in settings.pipelines})
    if others and pipeline.name not in names:
        yield warning(
            f"pipeline {pipeline.name}",
            f"the group {pipeline.group_id} has checkpoints of {', '.join(pipeline.topics)} under the name "
            f"{', '.join(others)}, and none under this one: was it renamed? Its partitions will not go on from there",
            f"call it {others[0]} again, or say where to go on with `speedlayer offsets seek` once it runs",
        )
