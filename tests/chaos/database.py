"""A PostgreSQL primary with its standby, to be hurt while clients use it. Runs in the campaign's or the test's process.

Two real servers with streaming replication and a slot. Synchronous: a fail-over loses nothing that was committed.
Asynchronous: it may lose the last commits, rows and checkpoints together. Each *side* (a supervisor, say) reaches each
server through a TCP proxy of its own; replication goes through proxies as well, so that it can be held up.

Measured on two cores with an empty database: both are up after 1.2 s; a fail-over is without a primary for 0.2 s, and
the old primary is the new standby 0.7 s later (a base backup: it takes longer with more data). A full disk is told by
SQLSTATE 53100 ("could not extend file"); full WAL is a PANIC: the server restarts itself, fails in recovery for the
same reason, and ends.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg2
import psycopg2.extensions

from chaos.disk import SmallDisk
from fixtures.ports import HOST
from fixtures.postgres import Installation, PostgresServer, Shutdown, connect, find_installations
from fixtures.processes import unprivileged_account
from fixtures.proxy import Proxy
from fixtures.waiting import wait_until

ROLE = "speedlayer"
DATABASE = "speedlayer"

SETTINGS: Mapping[str, object] = {
    # Small, so that it can be exhausted; what is reserved is for the superuser, never for speedlayer's role.
    "max_connections": 40,
    "superuser_reserved_connections": 6,
    "wal_level": "replica",
    "max_wal_senders": 6,
    "max_replication_slots": 4,
    "hot_standby": "on",
    "max_wal_size": "128MB",
    "min_wal_size": "32MB",
    # A standby that is away too long is made anew; the primary does not keep WAL for it without end.
    "max_slot_wal_keep_size": "512MB",
    "wal_sender_timeout": "10s",
    "wal_receiver_timeout": "5s",
    "wal_retrieve_retry_interval": "200ms",
}

REPLICATION_SECONDS = 60.0

# The longest that a lock or taken connections are held when nobody ends them.
HOLD_SECONDS = 120.0

# How soon a connection that somebody gave up is taken by the one who exhausts them.
GRAB_SECONDS = 0.05

# WAL segments that are ready for use when the disk gets full, at most; they are used up first.
WAL_SEGMENTS = 64


@dataclass(eq=False)
class Node:
    """One of the two servers, its disks and the proxy through which the other one replicates from it."""

    name: str
    server: PostgresServer
    replication: Proxy
    disk: SmallDisk | None
    wal_disk: SmallDisk | None

    @property
    def slot(self) -> str:
        return f"slot_{self.name}"


class ReplicatedDatabase:
    """Primary and standby, the proxies of every side, and the faults. Everything may be called from any thread.

    ``sides`` has, for each side, the address on which its proxies listen. With ``disk_bytes`` the data, and with
    ``wal_bytes`` the WAL, of each server lie on a tmpfs of that size, which needs CAP_SYS_ADMIN.
    """

    def __init__(
        self,
        folder: Path,
        *,
        synchronous: bool = True,
        sides: Sequence[str] = (HOST,),
        disk_bytes: int | None = None,
        wal_bytes: int | None = None,
        installation: Installation | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        self.synchronous = synchronous
        self.password = secrets.token_hex(12)
        self._account = unprivileged_account()
        superuser = secrets.token_hex(12)
        self.nodes: list[Node] = []
        for name in ("a", "b"):
            home = folder / f"postgres-{name}"
            home.mkdir()
            disk = SmallDisk(home / "disk", disk_bytes, self._account) if disk_bytes else None
            server = PostgresServer(
                installation or find_installations()[0],
                home,
                {**SETTINGS, **(settings or {})},
                data=home / "disk" / "data" if disk else None,
                password=superuser,
            )
            wal_disk = SmallDisk(home / "wal", wal_bytes, self._account) if wal_bytes else None
            self.nodes.append(Node(name, server, Proxy((HOST, server.port)), disk, wal_disk))
        self.proxies = [[Proxy((HOST, node.server.port), host=host) for node in self.nodes] for host in sides]
        if self._account:
            for path in (folder, *folder.iterdir()):
                os.chown(path, self._account.pw_uid, self._account.pw_gid)
        self._primary, self._standby = self.nodes
        self._lock = threading.RLock()
        self._locker: psycopg2.extensions.connection | None = None
        self._grabber: _Grabber | None = None
        self.fail_overs = 0

    # --- addresses --------------------------------------------------------------------------------------------

    @property
    def primary(self) -> PostgresServer:
        return self._primary.server

    @property
    def standby(self) -> PostgresServer:
        return self._standby.server

    @property
    def dsn(self) -> str:
        """Both servers, without a proxy, as speedlayer's role: for the checker."""
        return self._dsn([(HOST, node.server.port) for node in self.nodes])

    def dsn_of(self, side: int) -> str:
        """Both servers through the proxies of this side; libpq takes the one that can be written to."""
        return self._dsn([(proxy.host, proxy.port) for proxy in self.proxies[side]])

    def _dsn(self, addresses: Sequence[tuple[str, int]]) -> str:
        hosts = ",".join(f"{host}:{port}" for host, port in addresses)
        return (
            f"postgresql://{ROLE}:{self.password}@{hosts}/{DATABASE}?target_session_attrs=read-write&connect_timeout=3"
        )

    # --- life -------------------------------------------------------------------------------------------------

    def start(self) -> ReplicatedDatabase:
        """Make and start the primary, its database and role, and the standby; wait until it replicates."""
        for node in self.nodes:
            for disk in (node.disk, node.wal_disk):
                if disk is not None:
                    disk.mount()
            node.replication.start()
        for proxies in self.proxies:
            for proxy in proxies:
                proxy.start()
        self.primary.initialise()
        if self._primary.wal_disk is not None:
            wal = self.primary.data / "pg_wal"
            shutil.move(wal, self._primary.wal_disk.folder / "pg_wal")
            wal.symlink_to(self._primary.wal_disk.folder / "pg_wal")
            self._give_to_account(self._primary.wal_disk.folder)
        self.primary.start()
        self.primary.execute(f"CREATE ROLE {ROLE} LOGIN PASSWORD '{self.password}'")
        self.primary.execute(f"CREATE DATABASE {DATABASE} OWNER {ROLE}")
        self.rebuild_standby()
        return self

    def close(self) -> None:
        """End everything, whatever state the test left it in."""
        with contextlib.ExitStack() as cleanup:
            for node in self.nodes:
                for disk in (node.disk, node.wal_disk):
                    if disk is not None:
                        cleanup.callback(disk.unmount)
                cleanup.callback(node.server.close)
                cleanup.callback(node.replication.close)
            for proxies in self.proxies:
                for proxy in proxies:
                    cleanup.callback(proxy.close)
            cleanup.callback(self.end_exhaustion)
            cleanup.callback(self.end_lock)

    def __enter__(self) -> ReplicatedDatabase:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def heal(self) -> None:
        """End every fault: locks, taken connections, full disks, disturbed proxies, a server that is down."""
        self.end_lock()
        self.end_exhaustion()
        self.free_disk()
        self.free_wal()
        for proxy in (*(node.replication for node in self.nodes), *(one for side in self.proxies for one in side)):
            proxy.heal()
        with self._lock:
            if not self.primary.process.running:
                self.primary.start()
            if not self.replicates():
                self.rebuild_standby()

    # --- replication ------------------------------------------------------------------------------------------

    def replicates(self) -> bool:
        """Whether the standby streams; in the synchronous mode, whether every commit waits for it."""
        if not self.standby.process.running:
            return False
        rows = self.primary.query(
            "SELECT state, sync_state FROM pg_stat_replication WHERE application_name = %s", (self._standby.name,)
        )
        return ("streaming", "sync" if self.synchronous else "async") in rows

    def fail_over(self, *, rebuild: bool = True) -> float:
        """Kill the primary with SIGKILL and promote the standby; returns for how many seconds there was no primary.

        Then the old primary is made the new standby, which takes seconds more; without ``rebuild``, by the caller's
        `rebuild_standby`.
        """
        with self._lock:
            assert self.replicates(), "the standby does not replicate (yet): a fail-over would lose what is committed"
            started = time.monotonic()
            self.primary.kill()
            # What a stalled proxy held back of the replication is lost with its sender.
            self._primary.replication.cut()
            self._primary.replication.heal()
            self.standby.query("SELECT pg_promote(true, 60)")
            wait_until(self._takes_writes, "the standby has become the primary", timeout_seconds=REPLICATION_SECONDS)
            self._primary, self._standby = self._standby, self._primary
            seconds = time.monotonic() - started
            self.fail_overs += 1
            if rebuild:
                self.rebuild_standby()
            return seconds

    def _takes_writes(self) -> bool:
        return self.standby.query("SELECT pg_is_in_recovery()") == [(False,)]

    def rebuild_standby(self) -> None:
        """Make the server that is not the primary a standby, from a new base backup; commits wait for it only then."""
        with self._lock:
            primary, node = self._primary, self._standby
            node.server.close()
            self._wait_for(None)
            shutil.rmtree(node.server.data, ignore_errors=True)
            for disk in (node.disk, node.wal_disk):
                if disk is not None:
                    disk.free()
            arguments = ["-c", "fast", "-X", "stream", "--no-sync", "-R", "-C", "-S", node.slot]
            if node.wal_disk is not None:
                shutil.rmtree(node.wal_disk.folder / "pg_wal", ignore_errors=True)
                arguments += ["--waldir", str(node.wal_disk.folder / "pg_wal")]
            primary.server.query(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = %s",
                (node.slot,),
            )
            source = f"host={HOST} port={primary.replication.port} user=postgres application_name={node.name}"
            node.server.run_program(
                "pg_basebackup",
                *("-D", node.server.data, "-d", f"{source} password={primary.server.password}", *arguments),
                timeout_seconds=300,
            )
            node.server.start()
            self._wait_for(node)

    def _wait_for(self, node: Node | None) -> None:
        """Let commits wait for this standby, once it has all that was committed; for None, for nobody."""
        if node is None:
            self.primary.reload(synchronous_standby_names="")
            return
        (reached,) = self.primary.query("SELECT pg_current_wal_lsn()::text")[0]
        self._wait_until_attached(node, reached, "async")
        if self.synchronous:
            self.primary.reload(synchronous_standby_names=node.name)
            self._wait_until_attached(node, reached, "sync")

    def _wait_until_attached(self, node: Node, reached: str, sync_state: str) -> None:
        wait_until(
            lambda: self.primary.query(
                "SELECT 1 FROM pg_stat_replication"
                " WHERE application_name = %s AND state = 'streaming' AND flush_lsn >= %s AND sync_state = %s",
                (node.name, reached, sync_state),
            ),
            f"the standby {node.name} has everything, {sync_state}",
            timeout_seconds=REPLICATION_SECONDS,
            diagnose=node.server.process.log_tail,
        )

    # --- the primary's process and its connections ------------------------------------------------------------

    def restart(self, how: Shutdown = Shutdown.FAST) -> None:
        """Restart the primary: FAST rolls back and ends the connections, IMMEDIATE crashes and recovers."""
        with self._lock:
            self.primary.restart(how)

    def crash(self) -> None:
        """Kill the primary's first process with SIGKILL, and start it again."""
        with self._lock:
            self.primary.kill()
            self.primary.start()

    def terminate_backends(self, where: str = f"usename = '{ROLE}'") -> int:
        """Terminate connections to the primary; returns how many."""
        return self.primary.terminate_backends(where)

    # --- a locked table ---------------------------------------------------------------------------------------

    def begin_lock(self, table: str, *, mode: str = "ACCESS EXCLUSIVE", most_seconds: float = HOLD_SECONDS) -> None:
        """Lock a table until `end_lock`, a fail-over, or ``most_seconds`` later. Waits for a flush that is open."""
        with self._lock:
            self.end_lock()
            connection = connect(self.primary.dsn(DATABASE))
            try:
                with connection.cursor() as cursor:
                    cursor.execute(
                        f"SET idle_in_transaction_session_timeout = '{most_seconds:g}s'; SET lock_timeout = '30s'"
                    )
                    cursor.execute(f"BEGIN; LOCK TABLE {table} IN {mode} MODE")
            except BaseException:
                connection.close()
                raise
            self._locker = connection

    def end_lock(self) -> None:
        with self._lock:
            if self._locker is not None:
                self._locker.close()
                self._locker = None

    # --- exhausted connections --------------------------------------------------------------------------------

    def begin_exhaustion(self, *, most_seconds: float = HOLD_SECONDS) -> int:
        """Take every free connection of speedlayer's role, and whatever becomes free, until `end_exhaustion` or
        ``most_seconds`` later. Returns how many were taken at once, when the next one was refused.
        """
        with self._lock:
            self.end_exhaustion()
            dsn = self.primary.dsn(DATABASE, user=ROLE, password=self.password)
            self._grabber = _Grabber(dsn, most_seconds)
            self._grabber.start()
            return self._grabber.wait_until_refused()

    def end_exhaustion(self) -> None:
        with self._lock:
            if self._grabber is not None:
                grabber, self._grabber = self._grabber, None
                grabber.stop()

    # --- full disks -------------------------------------------------------------------------------------------

    def fill_disk(self) -> None:
        """Leave no room for the primary's data: what makes a table longer fails with 53100, and the server lives on."""
        with self._lock:
            assert self._primary.disk is not None, "give the database disk_bytes"
            self._primary.disk.fill()

    def free_disk(self) -> None:
        for node in self.nodes:
            if node.disk is not None:
                node.disk.free()

    def fill_wal(self) -> None:
        """Leave no room for the primary's WAL and use up what is left of it: the server ends with a PANIC."""
        with self._lock:
            assert self._primary.wal_disk is not None, "give the database wal_bytes"
            self._primary.wal_disk.fill()
            with (
                contextlib.suppress(psycopg2.OperationalError),
                contextlib.closing(self.primary.connect()) as connection,
            ):
                for _ in range(WAL_SEGMENTS):
                    with connection.cursor() as cursor:
                        cursor.execute("SELECT pg_logical_emit_message(false, 'filler', 'x'), pg_switch_wal()")

    def free_wal(self) -> None:
        """Make room for WAL, and start the primary again where it has ended."""
        with self._lock:
            for node in self.nodes:
                if node.wal_disk is not None:
                    node.wal_disk.free()
            if self._primary.wal_disk is not None and not self.primary.process.running:
                self.primary.start()
            self.primary.wait_until_ready()

    def _give_to_account(self, folder: Path) -> None:
        if self._account:
            for path in (folder, *folder.rglob("*")):
                os.lchown(path, self._account.pw_uid, self._account.pw_gid)


class _Grabber:
    """Takes connections in a thread of its own, and holds them."""

    def __init__(self, dsn: str, most_seconds: float) -> None:
        self._dsn = dsn
        self._deadline = time.monotonic() + most_seconds
        self._stop = threading.Event()
        self._refused = threading.Event()
        self._taken: list[psycopg2.extensions.connection] = []
        self._thread = threading.Thread(target=self._run, name="taker of connections", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait_until_refused(self) -> int:
        assert self._refused.wait(30), f"after {len(self._taken)} connections the server refuses none"
        return len(self._taken)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive(), "the taker of connections does not end"

    def _run(self) -> None:
        try:
            while not self._stop.is_set() and time.monotonic() < self._deadline:
                if not self._take():
                    self._stop.wait(GRAB_SECONDS)
        finally:
            for connection in self._taken:
                connection.close()

    def _take(self) -> bool:
        try:
            self._taken.append(psycopg2.connect(self._dsn, connect_timeout=3, application_name="taker"))
        except psycopg2.OperationalError as error:
            # psycopg2 has no SQLSTATE of a connection that was refused. Any other refusal (a restart) is waited out.
            if "too many" in str(error) or "remaining connection slots" in str(error):
                self._refused.set()
            return False
        return True
