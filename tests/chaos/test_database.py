"""Each fault of the database really strikes, and really ends."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import psycopg2.errors
import pytest

from chaos.database import DATABASE, ReplicatedDatabase
from chaos.disk import SmallDisk, remove_stale_mounts
from chaos.rights import MissingRight, privileged
from fixtures.ports import HOST
from fixtures.postgres import Shutdown, connect, execute, query, scalar
from fixtures.processes import unprivileged_account
from fixtures.waiting import holds_for, wait_until
from fixtures.workspace import private_folder

MEBIBYTE = 1024 * 1024


@contextlib.contextmanager
def running(**options: object) -> Iterator[ReplicatedDatabase]:
    with (
        private_folder("database", unprivileged_account()) as folder,
        ReplicatedDatabase(folder, **options) as database,  # type: ignore[arg-type]
    ):
        yield database


@pytest.fixture(scope="module")
def shared() -> Iterator[ReplicatedDatabase]:
    with running(sides=(HOST, HOST), disk_bytes=256 * MEBIBYTE, wal_bytes=512 * MEBIBYTE) as database:
        yield database


@pytest.fixture
def database(shared: ReplicatedDatabase) -> Iterator[ReplicatedDatabase]:
    yield shared
    shared.heal()


@pytest.fixture
def table(database: ReplicatedDatabase) -> Iterator[str]:
    execute(database.dsn, "CREATE TABLE kept (n int, text text)")
    yield "kept"
    database.heal()
    execute(database.dsn, "DROP TABLE kept")


def numbers(database: ReplicatedDatabase) -> list[int]:
    return [n for (n,) in query(database.dsn, "SELECT n FROM kept ORDER BY n")]


def insert_a_megabyte(database: ReplicatedDatabase) -> None:
    execute(database.dsn, "INSERT INTO kept SELECT n, repeat('x', 1000) FROM generate_series(1, 1000) n")


class Inserter:
    """Inserts 0, 1, 2, … one commit each, through a side's proxies, and remembers what was acknowledged."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._stop = threading.Event()
        self.acknowledged: list[int] = []
        self.unknown: list[int] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        number = 0
        while not self._stop.is_set():
            try:
                with contextlib.closing(connect(self._dsn)) as connection, connection.cursor() as cursor:
                    while not self._stop.is_set():
                        number += 1
                        cursor.execute("INSERT INTO kept VALUES (%s)", (number,))
                        self.acknowledged.append(number)
            except psycopg2.Error:
                self.unknown.append(number)
                self._stop.wait(0.05)


def test_a_fail_over_loses_nothing_that_was_committed_and_can_be_made_again(
    database: ReplicatedDatabase, table: str
) -> None:
    inserter = Inserter(database.dsn_of(0))
    for turn in (1, 2):
        before = len(inserter.acknowledged)
        wait_until(lambda before=before: len(inserter.acknowledged) > before + 50, "it writes")
        old = database.primary
        database.fail_over()
        assert database.primary is not old, turn
        assert database.replicates()
    before = len(inserter.acknowledged)
    wait_until(lambda: len(inserter.acknowledged) > before + 50, "it writes again")
    inserter.stop()
    found = numbers(database)
    assert len(set(found)) == len(found)
    assert set(inserter.acknowledged) <= set(found) <= {*inserter.acknowledged, *inserter.unknown}


def test_without_synchronous_replication_a_fail_over_loses_the_last_commits() -> None:
    with running(synchronous=False) as database:
        execute(database.dsn, "CREATE TABLE kept (n int)")
        execute(database.dsn, "INSERT INTO kept VALUES (1)")
        lsn = scalar(database.dsn, "SELECT pg_current_wal_lsn()::text")
        wait_until(
            lambda: database.standby.query("SELECT pg_last_wal_replay_lsn() >= %s", (lsn,)) == [(True,)], "it follows"
        )
        database._primary.replication.stall()
        execute(database.dsn, "INSERT INTO kept VALUES (2)")
        assert numbers(database) == [1, 2]
        database.fail_over()
        assert numbers(database) == [1]


def test_a_commit_waits_for_the_standby(database: ReplicatedDatabase, table: str) -> None:
    database._primary.replication.stall()
    with contextlib.closing(connect(database.dsn)) as connection, connection.cursor() as cursor:
        cursor.execute("SET statement_timeout = '500ms'")
        with pytest.raises(psycopg2.errors.QueryCanceled):
            cursor.execute("BEGIN; INSERT INTO kept VALUES (1); SELECT pg_sleep(10); COMMIT")
    committing = threading.Thread(target=execute, args=(database.dsn, "INSERT INTO kept VALUES (2)"))
    committing.start()
    holds_for(committing.is_alive, "the commit waits", seconds=1)
    database._primary.replication.heal()
    committing.join(20)
    assert not committing.is_alive()
    assert numbers(database) == [2]


def test_both_hosts_are_reached_through_the_proxies_of_the_side(database: ReplicatedDatabase, table: str) -> None:
    accepted = [proxy.accepted for proxy in database.proxies[1]]
    assert scalar(database.dsn_of(1), "SELECT pg_is_in_recovery()") is False
    assert sum(proxy.accepted for proxy in database.proxies[1]) > sum(accepted)
    for proxy in database.proxies[1]:
        proxy.refuse()
    with pytest.raises(psycopg2.OperationalError):
        connect(database.dsn_of(1))
    assert scalar(database.dsn_of(0), "SELECT 1") == 1
    for proxy in database.proxies[1]:
        proxy.heal()
    assert scalar(database.dsn_of(1), "SELECT 1") == 1


@pytest.mark.parametrize("how", [Shutdown.FAST, Shutdown.IMMEDIATE, None])
def test_a_restart_breaks_connections_and_keeps_what_is_committed(
    database: ReplicatedDatabase, table: str, how: Shutdown | None
) -> None:
    with contextlib.closing(connect(database.dsn_of(0))) as connection, connection.cursor() as cursor:
        cursor.execute("INSERT INTO kept VALUES (1)")
        if how is None:
            database.crash()
        else:
            database.restart(how)
        with pytest.raises(psycopg2.OperationalError):
            cursor.execute("SELECT 1")
    wait_until(database.replicates, "the standby follows again", timeout_seconds=60)
    assert numbers(database) == [1]


def test_speedlayers_backends_are_terminated_and_no_others(database: ReplicatedDatabase, table: str) -> None:
    with (
        contextlib.closing(connect(database.dsn_of(0))) as ours,
        contextlib.closing(database.primary.connect()) as theirs,
    ):
        assert database.terminate_backends() == 1
        with pytest.raises(psycopg2.OperationalError), ours.cursor() as cursor:
            cursor.execute("SELECT 1")
        with theirs.cursor() as cursor:
            cursor.execute("SELECT 1")


def test_a_locked_table_blocks_until_the_lock_ends(database: ReplicatedDatabase, table: str) -> None:
    database.begin_lock(table)
    with contextlib.closing(connect(database.dsn)) as connection, connection.cursor() as cursor:
        cursor.execute("SET lock_timeout = '300ms'")
        with pytest.raises(psycopg2.errors.LockNotAvailable):
            cursor.execute("INSERT INTO kept VALUES (1)")
        database.end_lock()
        cursor.execute("INSERT INTO kept VALUES (1)")


def test_a_lock_that_nobody_ends_ends_itself(database: ReplicatedDatabase, table: str) -> None:
    database.begin_lock(table, most_seconds=1)
    started = time.monotonic()
    execute(database.dsn, "INSERT INTO kept VALUES (1)")
    assert 0.5 < time.monotonic() - started < 20


def test_exhausted_connections_refuse_the_role_and_not_the_superuser(database: ReplicatedDatabase) -> None:
    with contextlib.closing(connect(database.dsn_of(0))):
        taken = database.begin_exhaustion()
        assert taken > 10
        with pytest.raises(psycopg2.OperationalError, match="remaining connection slots"):
            connect(database.dsn)
        database.primary.connect().close()
    # What is given up is taken as well.
    wait_until(lambda: len(database.primary.backends("application_name = 'taker'")) > taken, "the slot is taken")
    with pytest.raises(psycopg2.OperationalError, match="remaining connection slots"):
        connect(database.dsn)
    database.end_exhaustion()
    wait_until(lambda: not database.primary.backends("application_name = 'taker'"), "the connections are given back")
    connect(database.dsn).close()


def test_a_full_disk_is_told_by_its_sqlstate_and_the_server_lives_on(database: ReplicatedDatabase, table: str) -> None:
    pid = database.primary.process.pid
    database.fill_disk()
    with pytest.raises(psycopg2.errors.DiskFull) as caught:
        insert_a_megabyte(database)
    assert caught.value.pgcode == "53100"
    assert database.primary.process.pid == pid
    assert scalar(database.dsn, "SELECT 1") == 1
    before = scalar(database.dsn, "SELECT count(*) FROM kept")
    database.free_disk()
    insert_a_megabyte(database)
    assert scalar(database.dsn, "SELECT count(*) FROM kept") == before + 1000


def test_full_wal_ends_the_server_and_nothing_committed_is_lost(database: ReplicatedDatabase, table: str) -> None:
    inserter = Inserter(database.dsn_of(0))
    wait_until(lambda: len(inserter.acknowledged) > 50, "it writes")
    database.fill_wal()
    wait_until(lambda: not database.primary.process.running, "the server ends", timeout_seconds=60)
    assert "PANIC" in database.primary.process.log_text()
    stuck = len(inserter.acknowledged)
    database.free_wal()
    wait_until(lambda: len(inserter.acknowledged) > stuck + 50, "it writes again", timeout_seconds=60)
    inserter.stop()
    found = numbers(database)
    assert set(inserter.acknowledged) <= set(found) <= {*inserter.acknowledged, *inserter.unknown}


def test_a_mount_that_a_killed_run_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = 4_194_400  # above the largest pid that Linux gives
    monkeypatch.setattr("chaos.disk.owned_name", lambda suffix: f"sl{pid}{suffix}")
    disk = SmallDisk(tmp_path / "disk", MEBIBYTE)
    disk.mount()
    assert os.path.ismount(disk.folder)
    assert str(disk.folder) in remove_stale_mounts()
    assert not os.path.ismount(disk.folder)


def test_a_missing_right_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingRight, match="CAP_SYS_ADMIN"):
        privileged("sh", "-c", "echo 'mount: permission denied' >&2; exit 1", right="CAP_SYS_ADMIN (to mount a tmpfs)")
    with pytest.raises(MissingRight, match="no-such-program"):
        privileged("no-such-program", right="CAP_SYS_ADMIN")


def test_the_database_of_the_role_is_its_own(database: ReplicatedDatabase) -> None:
    assert scalar(database.dsn, "SELECT current_database()") == DATABASE
    assert scalar(database.dsn, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user") is False
