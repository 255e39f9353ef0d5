"""Whatever comes through the control socket, the server answers or hangs up, and serves the next client."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixtures.waiting import wait_until
from speedlayer.supervisor import control
from speedlayer.supervisor.control import ControlClient, ControlCommand, ControlServer

WAIT_SECONDS = 10.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ControlServer]:
    inbox: SimpleQueue[ControlCommand] = SimpleQueue()
    server = ControlServer(tmp_path / "control.sock", inbox)
    server.start()

    def answer() -> None:
        while (command := inbox.get()).command != "(stop)":
            if command.command == "drain":
                continue  # it takes longer than any test
            size = command.args.get("size")
            padding = "x" * size if isinstance(size, int) else ""
            command.reply({"ok": True, "command": command.command, "padding": padding})

    shell = threading.Thread(target=answer, daemon=True)
    shell.start()
    yield server
    inbox.put(ControlCommand("(stop)", {}, lambda answer: None))
    server.stop()
    shell.join(WAIT_SECONDS)


def connected(server: ControlServer) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(server.path))  # without a timeout, since it waits for a place in the backlog
    connection.settimeout(WAIT_SECONDS)
    return connection


def answers_to(server: ControlServer, pieces: list[bytes]) -> list[bytes]:
    received = b""
    with connected(server) as connection, contextlib.suppress(ConnectionError):
        for piece in pieces:
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
        while block := connection.recv(65536):
            received += block
    assert received == b"" or received.endswith(b"\n")
    return received.splitlines()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
REQUESTS = st.fixed_dictionaries(
    {}, optional={"command": JSON | st.just("status"), "args": JSON | st.dictionaries(st.text(), JSON), "x": JSON}
).map(lambda request: json.dumps(request).encode() + b"\n")
PIECES = st.lists(
    st.binary(max_size=30) | REQUESTS | st.sampled_from([b"\n", b"\0\n", b"[" * 60_000 + b"\n", b"x" * 70_000]),
    max_size=5,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PIECES)
def test_any_bytes_are_answered_in_order_or_refused_and_the_server_lives(
    server: ControlServer, pieces: list[bytes]
) -> None:
    for line in answers_to(server, pieces):
        answer = json.loads(line)
        assert answer["ok"] is True or answer["error"].startswith(("not a request", "a request has at most"))
    assert ControlClient(server.path).call("status")["command"] == "status"


def test_clients_that_say_nothing_hold_no_more_than_their_places_and_are_let_go(
    server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "REQUEST_TIMEOUT_SECONDS", 0.5)
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(connected(server)) for _ in range(200)]
        for connection in crowd[::2]:
            with contextlib.suppress(ConnectionError):
                connection.sendall(b'{"comm')
        assert crowd[-1].recv(1) == b"", "the last one is hung up on"

        def served() -> bool:
            try:
                return bool(ControlClient(server.path).call("status")["ok"])
            except control.NoAnswer:
                return False

        wait_until(served, "a client that asks is served while the others keep their sockets open")


def test_a_client_that_never_reads_its_answer_loses_its_place(
    server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "SEND_TIMEOUT_SECONDS", 0.3)
    with contextlib.ExitStack() as stack:
        for _ in range(control.CONNECTION_LIMIT):
            deaf = stack.enter_context(connected(server))
            deaf.sendall(b'{"command":"status","args":{"size":4000000}}\n')
        assert ControlClient(server.path).call("status")["ok"] is True


def test_a_client_that_leaves_while_its_drain_waits_loses_its_place(
    server: ControlServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "LEFT_CHECK_SECONDS", 0.1)
    for _ in range(control.CONNECTION_LIMIT):
        with connected(server) as impatient:
            impatient.sendall(b'{"command":"drain"}\n')
    assert ControlClient(server.path).call("status")["ok"] is True


def test_a_client_that_ended_its_requests_keeps_waiting_for_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "LEFT_CHECK_SECONDS", 0.01)
    looks: list[bool] = []
    has_left = control._has_left
    monkeypatch.setattr(control, "_has_left", lambda client: looks.append(has_left(client)) or looks[-1])
    inbox: SimpleQueue[ControlCommand] = SimpleQueue()
    server = ControlServer(tmp_path / "control.sock", inbox)
    server.start()
    try:
        with connected(server) as patient:
            patient.sendall(b'{"command":"drain"}\n')
            patient.shutdown(socket.SHUT_WR)
            command = inbox.get(timeout=WAIT_SECONDS)
            wait_until(lambda: len(looks) > 2, "the server has looked whether the client left")
            command.reply({"ok": True})
            assert patient.recv(100) == b'{"ok":true}\n'
    finally:
        server.stop()
