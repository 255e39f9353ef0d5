"""The schema speedlayer: made once, by whoever may, and refused where it is newer than we are."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest

from fixtures.flights import OWNER, flight, lane, part
from fixtures.postgres import PostgresServer, connect, execute, query, scalar
from fixtures.sessions import order, order_ids, orders, session_of
from fixtures.waiting import wait_until
from speedlayer.workers.errors import SinkMisconfigured
from speedlayer.workers.protocol import Seed
from speedlayer.workers.sinks.postgres import schema
from speedlayer.workers.sinks.postgres.schema import MIGRATION_LOCK, SCHEMA_VERSION, ensure_schema, print_sql


def ensure(dsn: str) -> None:
    with closing(connect(dsn)) as connection:
        ensure_schema(connection)


def versions(dsn: str) -> list[int]:
    return [version for (version,) in query(dsn, "SELECT version FROM speedlayer.schema_version ORDER BY version")]


def test_the_schema_is_made_and_made_again_without_change(each_postgres_dsn: str) -> None:
    dsn = each_postgres_dsn
    ensure(dsn)
    made_at = query(dsn, "SELECT * FROM speedlayer.schema_version")
    execute(dsn, "INSERT INTO speedlayer.gaps VALUES (DEFAULT, 'c', 'g', 'p', 't', 0, 0, 1, 2, 'kept')")
    ensure(dsn)
    assert query(dsn, "SELECT * FROM speedlayer.schema_version") == made_at
    assert versions(dsn) == list(range(1, SCHEMA_VERSION + 1))
    assert scalar(dsn, "SELECT count(*) FROM speedlayer.gaps") == 1


def test_many_workers_make_it_at_the_same_time(each_postgres_dsn: str) -> None:
    dsn, count = each_postgres_dsn, 12
    together = threading.Barrier(count)

    def make(_: int) -> None:
        with closing(connect(dsn)) as connection:
            together.wait(30)
            ensure_schema(connection)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(make, range(count)))
    assert versions(dsn) == list(range(1, SCHEMA_VERSION + 1))


def test_a_schema_without_tables_is_filled(postgres_dsn: str) -> None:
    execute(postgres_dsn, "CREATE SCHEMA speedlayer")
    ensure(postgres_dsn)
    assert versions(postgres_dsn) == list(range(1, SCHEMA_VERSION + 1))


def test_an_older_schema_moves_forward_and_keeps_what_it_holds(
    postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure(postgres_dsn)
    execute(postgres_dsn, "INSERT INTO speedlayer.gaps VALUES (DEFAULT, 'c', 'g', 'p', 't', 0, 0, 1, 2, 'kept')")
    step = "ALTER TABLE speedlayer.gaps ADD COLUMN note text DEFAULT 'new'"
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, step))
    monkeypatch.setattr(schema, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    ensure(postgres_dsn)
    assert versions(postgres_dsn) == list(range(1, SCHEMA_VERSION + 2))
    assert query(postgres_dsn, "SELECT reason, note FROM speedlayer.gaps") == [("kept", "new")]


def test_a_migration_that_fails_leaves_no_trace(postgres_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, "SELECT 1/0"))
    monkeypatch.setattr(schema, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    with closing(connect(postgres_dsn)) as connection:
        with pytest.raises(SinkMisconfigured, match="division by zero"):
            ensure_schema(connection)
        with connection.cursor() as cursor:  # the connection is as good as before
            cursor.execute("SELECT count(*) FROM pg_namespace WHERE nspname = 'speedlayer'")
            assert cursor.fetchone() == (0,)


def test_a_newer_schema_is_refused_by_name_and_left_alone(postgres_dsn: str) -> None:
    ensure(postgres_dsn)
    newer = SCHEMA_VERSION + 1
    execute(postgres_dsn, "INSERT INTO speedlayer.schema_version (version) VALUES (%s)", (newer,))
    execute(postgres_dsn, "CREATE TABLE orders (order_id bigint)")
    with session_of(postgres_dsn) as opened:
        for action in (
            lambda: opened.claim(lane(0)),
            lambda: opened.session.write(flight(part(orders(1)))),
        ):
            with pytest.raises(SinkMisconfigured) as caught:
                action()
            assert f"version {newer}" in str(caught.value)
            assert f"knows {SCHEMA_VERSION}" in str(caught.value)
            assert "upgrade" in caught.value.remedy
    assert scalar(postgres_dsn, "SELECT count(*) FROM speedlayer.checkpoints") == 0


def test_a_newer_schema_that_appears_while_we_wait_to_migrate_is_refused(postgres_dsn: str) -> None:
    with closing(connect(postgres_dsn)) as other, ThreadPoolExecutor(1) as pool:
        cursor = other.cursor()
        cursor.execute("BEGIN; SELECT pg_advisory_xact_lock(%s)", (MIGRATION_LOCK,))
        migrating = pool.submit(ensure, postgres_dsn)
        wait_until(
            lambda: scalar(postgres_dsn, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"),
            "we wait for the lock",
        )
        cursor.execute("CREATE SCHEMA speedlayer; CREATE TABLE speedlayer.schema_version (version int)")
        cursor.execute("INSERT INTO speedlayer.schema_version VALUES (999); COMMIT")
        with pytest.raises(SinkMisconfigured, match="version 999"):
            migrating.result(30)


# --- the least that a role needs --------------------------------------------------------------------------------------


@pytest.fixture
def role(postgres: PostgresServer, postgres_dsn: str) -> Iterator[str]:
    """A role that may log in and nothing else, with a name that has to be quoted."""
    name = f'Work "{postgres_dsn.rsplit("_", 1)[1]}"'
    execute(postgres_dsn, f"CREATE ROLE {quoted(name)} LOGIN PASSWORD 'secret'")
    # What PostgreSQL 14 and older still grant to everybody.
    execute(postgres_dsn, "REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    yield name
    execute(postgres_dsn, f"DROP OWNED BY {quoted(name)} CASCADE; DROP ROLE {quoted(name)}")


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def dsn_of(postgres: PostgresServer, postgres_dsn: str, role: str) -> str:
    database = postgres_dsn.rsplit("/", 1)[1]
    return f"host={postgres.host} port={postgres.port} dbname={database} user='{role}' password=secret"


def run_as_administrator(postgres: PostgresServer, dsn: str, sql: str) -> None:
    subprocess.run(
        [postgres.psql, "--no-psqlrc", "--set=ON_ERROR_STOP=1", "--quiet", "--dbname", dsn],
        input=sql,
        text=True,
        check=True,
        timeout=60,
        stdout=subprocess.DEVNULL,
    )


def test_a_role_that_may_not_make_the_schema_says_who_can(
    postgres: PostgresServer, postgres_dsn: str, role: str
) -> None:
    execute(postgres_dsn, "CREATE TABLE orders (order_id bigint)")
    with session_of(dsn_of(postgres, postgres_dsn, role)) as opened:
        with pytest.raises(SinkMisconfigured) as caught:
            opened.claim(lane(0))
        assert caught.value.sqlstate == "42501"
        assert "speedlayer init --print-sql" in caught.value.remedy
        # Mended by hand, it goes on without a restart.
        run_as_administrator(postgres, postgres_dsn, print_sql(role, ["orders"]))
        assert opened.claim(lane(0)).epoch == 1


@pytest.mark.parametrize("settings", [{"mode": "append"}, {"mode": "upsert", "key": "order_id"}], ids=str)
def test_the_printed_sql_is_all_that_a_worker_needs(
    postgres: PostgresServer, postgres_dsn: str, role: str, settings: dict[str, Any]
) -> None:
    table = 'public."Mixed Case"'
    execute(postgres_dsn, f"CREATE TABLE {table} (order_id bigint PRIMARY KEY, amount numeric(4, 2))")
    for _ in range(2):  # running it again changes nothing
        run_as_administrator(postgres, postgres_dsn, print_sql(role, [table]))
    with session_of(dsn_of(postgres, postgres_dsn, role), table=table, **settings) as opened:
        epoch = opened.take(0)
        values = [order(1), order(2, amount=12345), b"nonsense", order(3)]
        outcome = opened.session.write(flight(part(values, epoch=epoch)))
        assert (outcome.rows, outcome.dead_lettered) == (2, 2)
        opened.session.seed(Seed(1, lane(0), OWNER, epoch, 4, 9, None, "a gap"))
        opened.session.guard()
    assert scalar(postgres_dsn, f"SELECT count(*) FROM {table}") == 2
    assert scalar(postgres_dsn, "SELECT count(*) FROM speedlayer.dead_letters") == 2
    assert scalar(postgres_dsn, "SELECT count(*) FROM speedlayer.gaps") == 1


def test_the_printed_sql_and_the_workers_make_the_same_schema(postgres: PostgresServer) -> None:
    shapes = []
    for make in (ensure, lambda dsn: run_as_administrator(postgres, dsn, print_sql("postgres"))):
        name = postgres.create_database()
        try:
            dsn = postgres.dsn(name)
            make(dsn)
            shapes.append(
                query(
                    dsn,
                    "SELECT table_name, column_name, ordinal_position, column_default, is_nullable, data_type"
                    " FROM information_schema.columns WHERE table_schema = 'speedlayer' ORDER BY 1, 3",
                )
                + query(dsn, "SELECT indexdef FROM pg_indexes WHERE schemaname = 'speedlayer' ORDER BY 1")
                + query(
                    dsn,
                    "SELECT relname, reloptions FROM pg_class"
                    " WHERE relnamespace = 'speedlayer'::regnamespace AND relkind = 'r' ORDER BY 1",
                )
            )
        finally:
            postgres.drop_database(name)
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) > 40


def test_a_schema_that_was_dropped_is_made_again_and_nothing_is_written_without_a_claim(postgres_dsn: str) -> None:
    execute(postgres_dsn, "CREATE TABLE orders (order_id bigint)")
    with session_of(postgres_dsn) as opened:
        epoch = opened.take(0)
        opened.session.write(flight(part(orders(1), epoch=epoch)))
        execute(postgres_dsn, "DROP SCHEMA speedlayer CASCADE")
        flying = flight(part(orders(2), epoch=epoch, start=1))
        with pytest.raises(SinkMisconfigured):
            opened.session.write(flying)
        assert opened.session.write(flying).fenced == (0,)
        assert opened.claim(lane(0)).next_offset is None
    assert order_ids(postgres_dsn) == [1]
