"""Each fault of a line really strikes, only on this line, and really ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from chaos.brokers import BrokerCluster
from chaos.network import Line, Namespace, remove_stale_namespaces
from chaos.rights import MissingRight
from fixtures.daemon import Daemon, pipeline_toml
from fixtures.kafka import Message
from fixtures.ports import HOST
from fixtures.postgres import PostgresServer, execute, query
from fixtures.proxy import Proxy
from fixtures.waiting import wait_until
from fixtures.workspace import private_folder

CLONE_NEWNET = 0x40000000

# A partition shorter than TCP's doubled patience would not be noticed at all.
PARTITION_SECONDS = 2.0


@pytest.fixture
def echo() -> Iterator[int]:
    """A server that answers every byte with itself; returns its port."""
    listener = socket.create_server((HOST, 0))

    def serve(end: socket.socket) -> None:
        with end, contextlib.suppress(OSError):  # the test resets connections
            while received := end.recv(65_536):
                end.sendall(received)

    def accept() -> None:
        with contextlib.suppress(OSError):  # closed at the end of the test
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with Namespace(0) as namespace:
        yield namespace


def dial_inside(namespace: Namespace, address: tuple[str, int], timeout_seconds: float = 5.0) -> socket.socket:
    """A connection that comes from inside the namespace: a socket belongs to where its thread was when it was made."""

    def dial() -> socket.socket:
        with namespace.path.open() as opened:
            if ctypes.CDLL(None, use_errno=True).setns(opened.fileno(), CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return socket.create_connection(address, timeout_seconds)

    with ThreadPoolExecutor(1) as thread:  # a thread of its own, since it never comes back from in there
        return thread.submit(dial).result()


def answers(end: socket.socket, timeout_seconds: float = 5.0) -> bool:
    end.settimeout(timeout_seconds)
    end.sendall(b"hello")
    try:
        return end.recv(100) == b"hello"
    except TimeoutError:
        return False


# --- a network of one's own -------------------------------------------------------------------------------------------


def test_packets_vanish_without_a_word_and_arrive_after_the_end(namespace: Namespace, echo: int) -> None:
    with Proxy((HOST, echo), host=namespace.to_brokers.host) as proxy:
        line = Line([proxy], namespace.to_brokers)
        with dial_inside(namespace, (proxy.host, proxy.port)) as end:
            assert answers(end)
            line.begin("vanish")
            assert not answers(end, PARTITION_SECONDS)
            assert proxy.connections == 1, "the other end was not told either"
            with pytest.raises(TimeoutError):
                dial_inside(namespace, (proxy.host, proxy.port), 1.5)
            line.end()
            end.settimeout(20)
            assert end.recv(100) == b"hello"
            assert answers(end)


def test_what_the_server_sends_vanishes_as_well(namespace: Namespace) -> None:
    with socket.create_server((namespace.to_brokers.host, 0)) as listener:
        address, port = listener.getsockname()
        with dial_inside(namespace, (address, port)) as end, listener.accept()[0] as server:
            namespace.to_brokers.cut()
            server.sendall(b"hello")
            end.settimeout(1)
            with pytest.raises(TimeoutError):
                end.recv(100)
            namespace.to_brokers.mend()
            end.settimeout(20)
            assert end.recv(100) == b"hello"


def test_the_other_cable_and_the_other_side_notice_nothing(namespace: Namespace, echo: int) -> None:
    with (
        Namespace(1) as other,
        Proxy((HOST, echo), host=namespace.to_brokers.host) as cut,
        Proxy((HOST, echo), host=namespace.to_databases.host) as whole,
        Proxy((HOST, echo), host=other.to_brokers.host) as foreign,
        dial_inside(namespace, (cut.host, cut.port)) as end,
    ):
        namespace.to_brokers.cut()
        assert not answers(end, 1)
        with dial_inside(namespace, (whole.host, whole.port)) as unhurt:
            assert answers(unhurt)
        with dial_inside(other, (foreign.host, foreign.port)) as unhurt:
            assert answers(unhurt)


def test_nothing_is_left_when_it_is_closed() -> None:
    with Namespace(2) as namespace:
        interfaces = {namespace.to_brokers.here, namespace.to_databases.here}
        assert interfaces <= {path.name for path in Path("/sys/class/net").iterdir()}
    assert not namespace.path.exists()
    assert not interfaces & {path.name for path in Path("/sys/class/net").iterdir()}


def test_what_a_killed_run_left_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    pid = 4_194_400  # above the largest pid that Linux gives
    with monkeypatch.context() as patched:
        patched.setattr("chaos.network.owned_name", lambda suffix: f"sl{pid}{suffix}")
        left = Namespace(3)
    assert left.path.exists()
    assert f"sl{pid}n3" in remove_stale_namespaces()
    assert not left.path.exists()
    wait_until(lambda: not Path("/sys/class/net", f"sl{pid}kh3").exists(), "the cable is gone")


def test_a_missing_right_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ip").write_text("#!/bin/sh\necho 'RTNETLINK answers: Operation not permitted' >&2; exit 2\n")
    (tmp_path / "ip").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(MissingRight, match="CAP_NET_ADMIN and CAP_SYS_ADMIN"):
        Namespace(4)


def test_a_daemon_in_there_writes_before_a_partition_and_after_it(
    namespace: Namespace, postgres: PostgresServer, postgres_dsn: str
) -> None:
    execute(postgres_dsn, "CREATE TABLE kept (n int)")
    with (
        private_folder("cluster") as folder,
        private_folder("daemon") as home,
        BrokerCluster(
            folder, 1, 1, sides=(namespace.to_brokers.host,), properties={"min.insync.replicas": 1}
        ) as cluster,
        Proxy((HOST, postgres.port), host=namespace.to_databases.host) as database,
        contextlib.ExitStack() as cleanup,
    ):
        topic = cluster.create_topic(partitions=2)
        source = pipeline_toml(
            bootstrap_servers=cluster.bootstrap_servers_of(0),
            group_id="inside",
            dsn=postgres_dsn.replace(f"{HOST}:{postgres.port}", database.address),
            topic=topic,
            table="kept",
        )
        daemon = Daemon(home, source, prefix=namespace.command_prefix)
        cleanup.callback(daemon.close)
        daemon.start()
        line = Line(cluster.proxies[0], namespace.to_brokers)
        for begin in (0, 100):
            cluster.produce(topic, [Message(b'{"n": %d}' % n) for n in range(begin, begin + 100)])
            daemon.wait_until_caught_up(cluster.end_offsets(topic), topic)
            if begin == 0:
                line.begin("vanish")
                time_out = threading.Event()
                assert not time_out.wait(PARTITION_SECONDS)
                line.end()
        assert sorted(query(postgres_dsn, "SELECT n FROM kept")) == [(n,) for n in range(200)]
        assert daemon.stop() == 0


# --- on loopback ------------------------------------------------------------------------------------------------------


@pytest.fixture
def line(echo: int) -> Iterator[Line]:
    with Proxy((HOST, echo)) as first, Proxy((HOST, echo)) as second:
        yield Line([first, second])


def dial(line: Line, index: int = 0) -> socket.socket:
    proxy = line.proxies[index]
    return socket.create_connection((proxy.host, proxy.port), 5)


@pytest.mark.parametrize("fault", ["cut", "refuse", "deaf"])
def test_what_resets_resets(line: Line, fault: str) -> None:
    with dial(line) as end:
        assert answers(end)
        line.begin(fault)
        with pytest.raises(ConnectionResetError):
            end.recv(10)
        line.end()
    with dial(line) as end:
        assert answers(end)


def test_a_stalled_line_delivers_at_the_end_and_a_half_open_one_turns_out_to_be_dead(line: Line) -> None:
    for fault in ("stall", "half_open"):
        with dial(line) as end:
            assert answers(end)
            line.begin(fault)
            assert not answers(end, 0.5)
            with dial(line) as another:
                assert not answers(another, 0.5)
            line.end()
            end.settimeout(5)
            if fault == "stall":
                assert end.recv(10) == b"hello"
            else:
                with pytest.raises(ConnectionResetError):
                    end.recv(10)


def test_a_slow_line_is_slow_until_the_end(line: Line) -> None:
    with dial(line) as end:
        line.begin("slow")
        started = time.monotonic()
        assert answers(end)
        assert time.monotonic() - started > 0.4
        line.end()
        started = time.monotonic()
        assert answers(end)
        assert time.monotonic() - started < 0.4


def test_a_fault_of_one_proxy_leaves_the_others_alone(line: Line) -> None:
    line.begin("refuse", only=[1])
    with dial(line, 0) as end:
        assert answers(end)
    with pytest.raises(ConnectionRefusedError):
        dial(line, 1)
    line.end()
    with dial(line, 1) as end:
        assert answers(end)


def test_nothing_vanishes_on_loopback_and_there_is_one_fault_at_a_time(line: Line) -> None:
    assert "vanish" not in line.possible()
    with pytest.raises(AssertionError, match="vanish"):
        line.begin("vanish")
    line.begin("stall")
    with pytest.raises(AssertionError, match="has a fault already"):
        line.begin("cut")
    line.end()
    line.begin("cut")
