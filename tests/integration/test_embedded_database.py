"""The demo's database: the competitor really leaves it the capacity it says, and the audit finds every fault."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest

from fixtures.waiting import wait_until
from speedlayer.supervisor.demo.capacity import measure_capacity
from speedlayer.supervisor.demo.competitor import Competitor, CompetitorError, Gate
from speedlayer.supervisor.demo.database import Database
from speedlayer.supervisor.demo.embedded_postgres import embedded_postgres
from speedlayer.supervisor.demo.orders import make_order
from speedlayer.supervisor.demo.private_folder import private_folder, unprivileged_account
from speedlayer.supervisor.errors import Unreachable

AT = "2026-11-27T00:00:00.000001+00:00"
INSERT = "INSERT INTO {} (order_id, customer, status, amount, note, created_at) VALUES {}"


@pytest.fixture(scope="module")
def dsn() -> Iterator[str]:
    with private_folder(unprivileged_account()) as folder, embedded_postgres(folder) as server:
        yield server.dsn


@pytest.fixture
def database(dsn: str) -> Iterator[Database]:
    opened = Database(dsn, "speedlayer_demo_test", "demo-group")
    with opened.tables():
        yield opened


class Writers:
    """Sessions that write batches without a pause, like workers with a backlog."""

    def __init__(self, database: Database, count: int, batch_rows: int) -> None:
        rows = ", ".join([f"(1, 'c', 'NEW', 1, '', '{AT}')"] * batch_rows)
        self._statement = INSERT.format(database.table, rows)
        self._dsn = database.dsn
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._write) for _ in range(count)]
        self.batches = 0

    def _write(self) -> None:
        with contextlib.closing(psycopg2.connect(self._dsn)) as connection, connection.cursor() as cursor:
            while not self._stopping.is_set():
                cursor.execute(self._statement)
                connection.commit()
                self.batches += 1

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stopping.set()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()


@pytest.mark.parametrize("count", [1, 2])
def test_a_competitor_leaves_the_capacity_that_it_is_told_to(database: Database, count: int) -> None:
    # Ten times the article's rate, so that a few seconds hold enough batches.
    writers = Writers(database, count, batch_rows=100)
    competitor = Competitor(database.dsn, database.table, Gate(500, 100, 0.1))
    competitor.start()
    start = database.now()
    with writers.running():
        wait_until(lambda: writers.batches >= 24, "24 batches got through", timeout_seconds=30)
        end = database.now()
    competitor.stop()
    writers.join()
    capacity = measure_capacity(database.flushes(), start, end)
    assert capacity == pytest.approx(500, rel=0.2)


def test_a_competitor_that_stops_leaves_the_table_to_the_others(database: Database) -> None:
    writers = Writers(database, 2, batch_rows=10)
    competitor = Competitor(database.dsn, database.table, Gate(1, 10, 3600.0))
    competitor.start()
    with writers.running():
        competitor.stop()
        wait_until(lambda: writers.batches > 100, "the writers get through", timeout_seconds=30)
    writers.join()


def test_a_competitor_whose_session_ends_says_so(database: Database) -> None:
    competitor = Competitor(database.dsn, database.table, Gate(1, 10, 3600.0))
    competitor.start()
    with psycopg2.connect(database.dsn) as connection, connection.cursor() as cursor:
        ends = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE %s"

        def ended() -> bool:
            cursor.execute(ends, ("speedlayer-demo-competitor",))
            return bool(cursor.fetchall())

        wait_until(ended, "the competitor's session is terminated")
    connection.close()
    with pytest.raises(CompetitorError, match="the competing session failed"):
        wait_until(competitor.check, "the competitor notices", timeout_seconds=10)
    with pytest.raises(CompetitorError):
        competitor.stop()


# --- The audit ----------------------------------------------------------------------------------------------------


@pytest.fixture
def logs(tmp_path: Path) -> tuple[Path, Path]:
    produced, broken = tmp_path / "produced.tsv", tmp_path / "broken.tsv"
    orders = [make_order(number, AT) for number in range(600)]
    produced.write_text("".join(order.log_line for order in orders if order.log_line is not None))
    broken.write_text("".join(f"\\\\x{order.value.hex()}\n" for order in orders if order.log_line is None))
    return produced, broken


@pytest.fixture
def connection(database: Database, logs: tuple[Path, Path]) -> Iterator[psycopg2.extensions.connection]:
    """A database in which everything is as it should be, to be spoilt by a test."""
    with contextlib.closing(psycopg2.connect(database.dsn)) as opened:
        opened.autocommit = True
        with opened.cursor() as cursor, logs[0].open() as file:
            columns = "order_id, customer, status, amount, note, created_at"
            cursor.copy_expert(f"COPY {database.table} ({columns}) FROM STDIN", file)
            cursor.execute("CREATE SCHEMA IF NOT EXISTS speedlayer")
            cursor.execute("DROP TABLE IF EXISTS speedlayer.dead_letters")
            cursor.execute("CREATE TABLE speedlayer.dead_letters (consumer_group text, value bytea)")
            broken = make_order(500, AT).value
            cursor.execute("INSERT INTO speedlayer.dead_letters VALUES ('demo-group', %s), ('other', 'x')", (broken,))
        yield opened


def test_the_audit_is_content_when_all_is_well(
    database: Database, logs: tuple[Path, Path], connection: psycopg2.extensions.connection
) -> None:
    audit = database.audit(*logs, clock_offset_seconds=0.0)
    assert (audit.rows, audit.dead_letters, audit.lost, audit.surplus) == (599, 1, 0, 0)
    assert audit.latency is not None
    assert audit.latency.p50_seconds == pytest.approx(audit.latency.max_seconds, abs=1)


@pytest.mark.parametrize(
    ("fault", "lost", "surplus"),
    [
        ("DELETE FROM {t} WHERE order_id = 7", 1, 0),
        ("INSERT INTO {t} SELECT * FROM {t} WHERE order_id IN (7, 8)", 0, 2),
        ("UPDATE {t} SET amount = round(amount, 7) + 0.00000001 WHERE order_id = 7", 1, 1),
        ("UPDATE {t} SET note = note || ' ' WHERE order_id = 7", 1, 1),
        ("DELETE FROM speedlayer.dead_letters", 1, 0),
        ("INSERT INTO speedlayer.dead_letters SELECT * FROM speedlayer.dead_letters", 0, 1),
        ("UPDATE speedlayer.dead_letters SET value = value || 'x'", 1, 1),
    ],
)
def test_the_audit_finds(
    database: Database,
    logs: tuple[Path, Path],
    connection: psycopg2.extensions.connection,
    fault: str,
    lost: int,
    surplus: int,
) -> None:
    connection.cursor().execute(fault.format(t=database.table))
    audit = database.audit(*logs, clock_offset_seconds=0.0)
    assert (audit.lost, audit.surplus) == (lost, surplus)


def test_nothing_of_a_run_stays_in_the_database(dsn: str) -> None:
    opened = Database(dsn, "speedlayer_demo_gone", "demo-group")
    with contextlib.closing(psycopg2.connect(dsn)) as other, other.cursor() as cursor:
        other.autocommit = True
        cursor.execute("CREATE SCHEMA IF NOT EXISTS speedlayer")
        cursor.execute("CREATE TABLE IF NOT EXISTS speedlayer.checkpoints (consumer_group text)")
        cursor.execute("INSERT INTO speedlayer.checkpoints VALUES ('demo-group'), ('another')")
        with opened.tables():
            cursor.execute("SELECT count(*) FROM pg_namespace WHERE nspname = 'speedlayer_demo_gone'")
            assert cursor.fetchone() == (1,)
        cursor.execute("SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'speedlayer_demo_gone'")
        assert cursor.fetchone() == (0,)
        cursor.execute("SELECT consumer_group FROM speedlayer.checkpoints")
        assert cursor.fetchall() == [("another",)]


def test_a_server_that_is_not_there_is_named_in_a_sentence() -> None:
    with pytest.raises(Unreachable, match="PostgreSQL can not be reached: "):
        Database("postgresql://nobody@127.0.0.1:1/postgres", "speedlayer_demo_x", "g")
