"""The embedded PostgreSQL is real, closed to others, and leaves the machine as it was."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg2
import pytest

from speedlayer.supervisor.demo.embedded_postgres import EmbeddedPostgres, embedded_postgres
from speedlayer.supervisor.demo.private_folder import private_folder, unprivileged_account


@pytest.fixture
def folder() -> Iterator[Path]:
    with private_folder(unprivileged_account()) as made:
        yield made


@pytest.fixture
def server(folder: Path) -> Iterator[EmbeddedPostgres]:
    with embedded_postgres(folder) as running:
        yield running


def modes_above(folder: Path) -> dict[Path, tuple[int, int, int]]:
    return {parent: (parent.stat().st_mode, parent.stat().st_uid, parent.stat().st_gid) for parent in folder.parents}


def test_it_is_a_postgresql_18_that_keeps_rows(server: EmbeddedPostgres) -> None:
    with psycopg2.connect(server.dsn) as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE t (id int); INSERT INTO t VALUES (1), (2); SELECT count(*) FROM t")
        assert cursor.fetchone() == (2,)
        assert connection.server_version // 10_000 == 18
    connection.close()


def test_only_loopback_and_only_with_the_password(server: EmbeddedPostgres) -> None:
    addresses = {
        connection.laddr.ip
        for connection in psutil.Process(server.pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}
    assert not psutil.Process(server.pid).net_connections(kind="unix")
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        psycopg2.connect(server.dsn.replace(server.password, "guess"))
    with pytest.raises(psycopg2.OperationalError, match="no password supplied"):
        psycopg2.connect(server.dsn.replace(f":{server.password}", ""), passfile="/nonexistent")


def test_its_password_is_stored_as_scram_and_its_data_is_closed_to_others(
    server: EmbeddedPostgres, folder: Path
) -> None:
    with psycopg2.connect(server.dsn) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT DISTINCT left(rolpassword, 14) FROM pg_authid WHERE rolpassword IS NOT NULL")
        assert cursor.fetchall() == [("SCRAM-SHA-256$",)]
        cursor.execute("SELECT DISTINCT auth_method FROM pg_hba_file_rules")
        assert cursor.fetchall() == [("scram-sha-256",)]
    connection.close()
    assert stat.S_IMODE(server.data.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert server.data / "PG_VERSION" in files
    assert [path for path in files if server.password.encode() in path.read_bytes()] == []


def test_it_never_runs_as_root(server: EmbeddedPostgres) -> None:
    process = psutil.Process(server.pid)
    assert 0 not in process.uids()
    assert 0 not in process.gids()
    if os.geteuid() == 0:
        status = Path(f"/proc/{server.pid}/status").read_text().splitlines()
        assert [line.split() for line in status if line.startswith("Groups:")] == [["Groups:"]]


def test_it_leaves_accounts_modes_processes_and_files_as_they_were() -> None:
    accounts = pwd.getpwall()
    with private_folder(unprivileged_account()) as folder:
        above = modes_above(folder)
        with embedded_postgres(folder) as server:
            backends = [process.pid for process in psutil.Process(server.pid).children(recursive=True)]
            assert modes_above(folder) == above
            assert backends
        gone = [pid for pid in (server.pid, *backends) if not psutil.pid_exists(pid)]
        assert gone == [server.pid, *backends]
        assert (folder / "postgresql.log").exists()
    assert not folder.exists()
    assert modes_above(folder) == above
    assert pwd.getpwall() == accounts


def test_it_stops_under_open_transactions(folder: Path) -> None:
    with embedded_postgres(folder) as server:
        connection = psycopg2.connect(server.dsn)
        connection.cursor().execute("CREATE TABLE t (id int); LOCK TABLE t")
    assert not psutil.pid_exists(server.pid)
    connection.close()


def test_a_failure_inside_the_block_stops_it_all_the_same(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), embedded_postgres(folder) as server:
        raise ZeroDivisionError
    assert not psutil.pid_exists(server.pid)


def test_it_does_not_take_over_data_that_is_there(folder: Path) -> None:
    (folder / "data").mkdir()
    with pytest.raises(FileExistsError, match="data"), embedded_postgres(folder):
        pass
