"""The control socket: who may use it, what goes through it, and what a killed or a second daemon finds."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from speedlayer.supervisor import control
from speedlayer.supervisor.control import ControlClient, ControlCommand, ControlServer
from speedlayer.supervisor.errors import AlreadyRunning, ConfigurationError, NoAnswer, NoDaemon

WAIT_SECONDS = 10.0


class Shell:
    """Stands in for the shell: answers commands from the queue on a thread, until it is told to stop."""

    def __init__(self, answer: Callable[[str, dict[str, Any]], dict[str, Any]]) -> None:
        self.inbox: SimpleQueue[ControlCommand] = SimpleQueue()
        self._answer = answer
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            item = self.inbox.get()
            if item.command == "(stop)":
                return
            item.reply(self._answer(item.command, item.args))

    def stop(self) -> None:
        self.inbox.put(ControlCommand("(stop)", {}, lambda answer: None))
        self._thread.join(WAIT_SECONDS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.fixture
def echo(path: Path) -> Iterator[ControlServer]:
    shell = Shell(lambda command, args: {"ok": True, "command": command, **args})
    server = ControlServer(path, shell.inbox)
    server.start()
    yield server
    server.stop()
    shell.stop()


def raw_conversation(path: Path, sent: bytes) -> bytes:
    """Send bytes as they are and return all that comes back until the server closes."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(WAIT_SECONDS)
        connection.connect(str(path))
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while block := connection.recv(65536):
            received += block
        return received


def test_a_command_reaches_the_shell_with_its_arguments_and_the_answer_comes_back(echo: ControlServer) -> None:
    answer = ControlClient(echo.path).call("pause", pipeline="orders")
    assert answer == {"ok": True, "command": "pause", "pipeline": "orders"}


def test_one_connection_may_carry_several_requests(echo: ControlServer) -> None:
    received = raw_conversation(echo.path, b'{"command":"status"}\n{"command":"lag"}\n')
    assert [json.loads(line)["command"] for line in received.splitlines()] == ["status", "lag"]


@pytest.mark.parametrize("line", [b"nonsense", b"[1]", b'{"command": 3}', b'{"command":"a","x":1}', b'{"args":{}}'])
def test_a_line_that_is_no_request_is_answered_with_an_error_and_never_reaches_the_shell(
    path: Path, line: bytes
) -> None:
    inbox: SimpleQueue[ControlCommand] = SimpleQueue()
    server = ControlServer(path, inbox)
    server.start()
    try:
        answer = json.loads(raw_conversation(path, line + b"\n"))
    finally:
        server.stop()
    assert answer["ok"] is False
    assert "not a request" in answer["error"]
    assert inbox.empty()


def test_a_request_over_the_limit_is_refused(echo: ControlServer) -> None:
    too_long = b'{"command":"' + b"x" * (control.REQUEST_LIMIT_BYTES + 10) + b'"}\n'
    answer = json.loads(raw_conversation(echo.path, too_long).splitlines()[0])
    assert answer["ok"] is False
    assert str(control.REQUEST_LIMIT_BYTES) in answer["error"]


def test_a_large_answer_arrives_whole(path: Path) -> None:
    lanes = [{"topic": "orders", "partition": number, "reason": "x" * 100} for number in range(20_000)]
    shell = Shell(lambda command, args: {"ok": True, "lanes": lanes})
    server = ControlServer(path, shell.inbox)
    server.start()
    try:
        assert ControlClient(path).call("status")["lanes"] == lanes
    finally:
        server.stop()
        shell.stop()


def test_the_answer_may_come_much_later_than_other_answers(path: Path) -> None:
    """A drain is answered when it is done, and status must be answered meanwhile."""
    inbox: SimpleQueue[ControlCommand] = SimpleQueue()
    server = ControlServer(path, inbox)
    server.start()
    answers: dict[str, dict[str, Any]] = {}
    draining = threading.Thread(target=lambda: answers.update(drain=ControlClient(path).call("drain")))
    asking = threading.Thread(target=lambda: answers.update(status=ControlClient(path).call("status")))
    try:
        draining.start()
        drain = inbox.get(timeout=WAIT_SECONDS)
        asking.start()
        inbox.get(timeout=WAIT_SECONDS).reply({"state": "draining"})
        asking.join(WAIT_SECONDS)
        assert answers == {"status": {"state": "draining"}}
        drain.reply({"ok": True})
        draining.join(WAIT_SECONDS)
        assert answers["drain"] == {"ok": True}
    finally:
        server.stop()


def test_a_daemon_that_does_not_answer_in_time_is_an_error_that_says_so(path: Path) -> None:
    server = ControlServer(path, SimpleQueue())
    server.start()
    try:
        with pytest.raises(NoAnswer, match=r"did not answer status within 0\.2 s"):
            ControlClient(path, timeout_seconds=0.2).call("status")
    finally:
        server.stop()


def test_stopping_while_a_client_waits_breaks_off_its_call_instead_of_hanging(path: Path) -> None:
    inbox: SimpleQueue[ControlCommand] = SimpleQueue()
    server = ControlServer(path, inbox)
    server.start()
    errors: list[Exception] = []

    def ask() -> None:
        try:
            ControlClient(path).call("drain")
        except NoAnswer as error:
            errors.append(error)

    client = threading.Thread(target=ask)
    client.start()
    command = inbox.get(timeout=WAIT_SECONDS)
    server.stop()
    client.join(WAIT_SECONDS)
    assert "broke off" in str(errors[0])
    command.reply({"ok": True})  # too late: it must neither raise nor block


def test_without_a_daemon_the_error_says_how_to_start_one(path: Path) -> None:
    with pytest.raises(NoDaemon, match=r"speedlayer run FILE.*--socket"):
        ControlClient(path).call("status")


def test_the_socket_is_for_its_user_alone_and_gone_after_the_stop(path: Path) -> None:
    server = ControlServer(path, SimpleQueue())
    server.start()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    server.stop()
    assert list(path.parent.iterdir()) == []


def test_the_kernel_is_asked_who_connects(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox: SimpleQueue[ControlCommand] = SimpleQueue()
    server = ControlServer(path, inbox)
    server.start()
    try:
        # To this daemon, the connecting user is somebody else: neither the user whom it runs as nor root.
        monkeypatch.setattr(control, "_peer_uid", lambda connection: os.geteuid() + 1)
        answer = json.loads(raw_conversation(path, b'{"command":"status"}\n'))
    finally:
        server.stop()
    assert answer == {"ok": False, "error": "only the user who runs the daemon may control it"}
    assert inbox.empty()


def test_a_second_daemon_on_the_same_path_is_refused_and_does_not_disturb_the_first(echo: ControlServer) -> None:
    with pytest.raises(AlreadyRunning, match="--socket"):
        ControlServer(echo.path, SimpleQueue()).start()
    assert ControlClient(echo.path).call("status")["ok"] is True


def test_a_socket_that_a_killed_daemon_left_is_replaced(path: Path) -> None:
    killed = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from queue import SimpleQueue\n"
        "from speedlayer.supervisor.control import ControlServer\n"
        "ControlServer(Path(sys.argv[1]), SimpleQueue()).start()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", killed, str(path)], check=False)
    assert ended.returncode == -9
    assert path.is_socket()
    with pytest.raises(NoDaemon):
        ControlClient(path).call("status")
    server = ControlServer(path, SimpleQueue())
    server.start()
    server.stop()


def test_a_file_that_is_no_socket_is_left_alone(path: Path) -> None:
    path.write_text("somebody's notes")
    with pytest.raises(ConfigurationError, match="not a socket"):
        ControlServer(path, SimpleQueue()).start()
    assert path.read_text() == "somebody's notes"


def test_a_path_that_no_unix_socket_can_have_is_a_configuration_error(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 120)
    with pytest.raises(ConfigurationError, match="more than 107 bytes"):
        ControlServer(path, SimpleQueue()).start()


def test_a_missing_folder_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        ControlServer(tmp_path / "missing" / "control.sock", SimpleQueue()).start()


def test_default_paths_keep_groups_apart_whose_safe_names_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run")
    paths = {control.default_path(name) for name in ("a/b", "a_b", "a b", "../../etc/passwd", "ж" * 300)}
    assert len(paths) == 5
    for path in paths:
        assert path.parent == Path("/run/speedlayer")
        assert len(os.fsencode(path)) <= control.SOCKET_PATH_LIMIT_BYTES


def test_without_a_runtime_folder_the_default_is_a_private_folder_below_tmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert control.default_directory() == Path(f"/tmp/speedlayer-{os.geteuid()}")


def test_a_default_folder_that_others_may_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "default_directory", lambda: tmp_path / "shared")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    with pytest.raises(ConfigurationError, match="this user alone"):
        ControlServer(control.default_path("group"), SimpleQueue()).start()


def test_live_sockets_are_those_that_somebody_listens_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "default_directory", lambda: tmp_path / "private")
    server = ControlServer(control.default_path("alive"), SimpleQueue())
    server.start()
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(control.default_path("dead")))
    dead.close()
    try:
        assert control.live_sockets() == [control.default_path("alive")]
    finally:
        server.stop()
