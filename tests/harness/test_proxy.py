"""The proxy breaks what it says it breaks, and nothing else."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import psycopg2
import pytest

from fixtures.ports import HOST
from fixtures.postgres import PostgresServer, connect, execute, query
from fixtures.proxy import Proxy
from fixtures.waiting import wait_until


@pytest.fixture
def echo() -> Iterator[int]:
    """A server that answers every byte with itself; returns its port."""
    listener = socket.create_server((HOST, 0))
    ends: list[socket.socket] = []

    def serve(end: socket.socket) -> None:
        try:
            while received := end.recv(65_536):
                end.sendall(received)
            end.shutdown(socket.SHUT_WR)
        except OSError:
            return  # the test reset the connection

    def accept() -> None:
        while True:
            try:
                end, _ = listener.accept()
            except OSError:
                return  # closed at the end of the test
            ends.append(end)
            threading.Thread(target=serve, args=(end,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)
    for end in ends:
        end.close()


@pytest.fixture
def proxy(echo: int) -> Iterator[Proxy]:
    with Proxy((HOST, echo)) as started:
        yield started


def dial(proxy: Proxy) -> socket.socket:
    return socket.create_connection((proxy.host, proxy.port), timeout=5)


def ask(end: socket.socket, question: bytes) -> bytes:
    end.sendall(question)
    answer = b""
    while len(answer) < len(question):
        received = end.recv(65_536)
        if not received:
            break
        answer += received
    return answer


def test_it_forwards_more_than_any_buffer_holds(proxy: Proxy) -> None:
    question = bytes(range(256)) * 40_000
    with dial(proxy) as end:
        sender = threading.Thread(target=end.sendall, args=(question,))
        sender.start()
        answer = bytearray()
        while len(answer) < len(question):
            answer += end.recv(65_536)
        sender.join()
    assert bytes(answer) == question


def test_a_closed_end_closes_the_other(proxy: Proxy) -> None:
    with dial(proxy) as end:
        assert ask(end, b"hello") == b"hello"
        end.shutdown(socket.SHUT_WR)
        assert end.recv(10) == b""
    wait_until(lambda: proxy.connections == 0, "the connection is gone")


def test_cut_resets_what_is_open_and_serves_what_comes(proxy: Proxy) -> None:
    with dial(proxy) as end:
        assert ask(end, b"hello") == b"hello"
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            end.recv(10)
    with dial(proxy) as end:
        assert ask(end, b"again") == b"again"


def test_refuse_refuses_until_healed(proxy: Proxy) -> None:
    with dial(proxy) as end:
        assert ask(end, b"hello") == b"hello"
        proxy.refuse()
        with pytest.raises(ConnectionResetError):
            end.recv(10)
    with pytest.raises(ConnectionRefusedError):
        dial(proxy)
    proxy.heal()
    with dial(proxy) as end:
        assert ask(end, b"again") == b"again"


def test_deaf_lets_connect_and_never_answers(proxy: Proxy) -> None:
    proxy.deaf()
    with dial(proxy) as end:
        end.settimeout(0.3)
        end.sendall(b"hello")
        with pytest.raises(TimeoutError):
            end.recv(10)
        proxy.heal()
        end.settimeout(5)
        assert end.recv(10) == b"hello"


@pytest.mark.parametrize("way", ["to_server", "to_client"])
def test_stall_holds_back_and_heal_delivers(proxy: Proxy, way: str) -> None:
    with dial(proxy) as end:
        assert ask(end, b"hello") == b"hello"
        proxy.stall(to_server=way == "to_server", to_client=way == "to_client")
        end.sendall(b"held back")
        end.settimeout(0.3)
        with pytest.raises(TimeoutError):
            end.recv(10)
        assert proxy.connections == 1
        proxy.heal()
        end.settimeout(5)
        assert end.recv(10) == b"held back"


def test_a_slow_line_takes_its_time_and_loses_nothing(proxy: Proxy) -> None:
    question = os.urandom(20_000)
    with dial(proxy) as end:
        started = time.monotonic()
        assert ask(end, question) == question
        quick_seconds = time.monotonic() - started
        proxy.slow(bytes_per_second=20_000)
        started = time.monotonic()
        assert ask(end, question) == question
        assert time.monotonic() - started >= max(0.9, quick_seconds)
        proxy.heal()
        started = time.monotonic()
        assert ask(end, question) == question
        assert time.monotonic() - started < 0.5


def test_a_late_line_adds_its_latency_in_each_direction(proxy: Proxy) -> None:
    with dial(proxy) as end:
        proxy.slow(bytes_per_second=1_000_000, latency_seconds=0.3)
        started = time.monotonic()
        assert ask(end, b"hello") == b"hello"
        assert 0.6 <= time.monotonic() - started < 2


def test_what_travels_on_a_slow_line_arrives_at_once_when_it_heals(proxy: Proxy) -> None:
    with dial(proxy) as end:
        proxy.slow(bytes_per_second=1_000, latency_seconds=60)
        end.sendall(b"hello")
        end.settimeout(0.3)
        with pytest.raises(TimeoutError):
            end.recv(10)
        proxy.heal()
        end.settimeout(5)
        assert end.recv(10) == b"hello"


def test_a_server_that_is_away_resets_the_client(start_proxy: Callable[..., Proxy]) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
    proxy = start_proxy(HOST, port)
    with pytest.raises(ConnectionResetError), dial(proxy) as end:  # the reset may come before connect() returns
        end.recv(10)


def test_the_answer_to_a_commit_is_lost_and_its_rows_are_not(
    postgres: PostgresServer, postgres_dsn: str, start_proxy: Callable[..., Proxy]
) -> None:
    execute(postgres_dsn, "CREATE TABLE kept (n int)")
    proxy = start_proxy(postgres.host, postgres.port)
    through = connect(postgres_dsn.replace(f":{postgres.port}/", f":{proxy.port}/"))
    lost = proxy.lose_answer_to(b"COMMIT")
    with through.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("INSERT INTO kept VALUES (1)")
        with pytest.raises(psycopg2.OperationalError):
            cursor.execute("COMMIT")
    assert lost.wait(5)
    assert query(postgres_dsn, "SELECT n FROM kept") == [(1,)]


@pytest.mark.parametrize("delivered", [True, False])
def test_a_commit_is_held_back_beyond_its_clients_life(
    postgres: PostgresServer, postgres_dsn: str, start_proxy: Callable[..., Proxy], delivered: bool
) -> None:
    execute(postgres_dsn, "CREATE TABLE kept (n int)")
    proxy = start_proxy(postgres.host, postgres.port)
    through = connect(postgres_dsn.replace(f":{postgres.port}/", f":{proxy.port}/"))
    pid = through.info.backend_pid
    held = proxy.hold_back(b"COMMIT")
    with through.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("INSERT INTO kept VALUES (1)")
    with socket.socket(fileno=os.dup(through.fileno())) as raw:
        raw.sendall(b"Q\x00\x00\x00\x0bCOMMIT\x00")
        assert held.wait(5)
        through.close()
    [port] = proxy.held_ports()
    waiting = postgres.backends(f"pid = {pid} AND client_port = {port} AND state = 'idle in transaction'")
    assert waiting, "the server waits for its client"
    if delivered:
        proxy.deliver_held()
    else:
        proxy.drop_held()
    wait_until(lambda: not postgres.backends(f"pid = {pid}"), "the backend has ended")
    assert query(postgres_dsn, "SELECT n FROM kept") == ([(1,)] if delivered else [])


def test_what_is_held_back_on_one_connection_holds_up_no_other(proxy: Proxy) -> None:
    held = proxy.hold_back(b"secret")
    with dial(proxy) as first, dial(proxy) as second:
        first.sendall(b"sec")
        assert first.recv(10) == b"sec"
        first.sendall(b"ret")
        assert held.wait(5)
        assert ask(second, b"secret") == b"secret"
        proxy.deliver_held()
        assert first.recv(10) == b"ret"
