"""The control socket: how the commands reach a running daemon (server: supervisor process; client: any command).

One request is one line of JSON, ``{"command": "pause", "args": {"pipeline": "orders"}}``, and so is its answer. The
server runs on a thread of its own and changes nothing: it puts each command on the shell's queue with a function that
takes the answer. The socket has mode 0600, and only processes of the same user (or root) are listened to.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import re
import select
import signal
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, Optional

import msgspec

from speedlayer.supervisor.errors import AlreadyRunning, ConfigurationError, ControlError, NoAnswer, NoDaemon

# A request names a command and a few arguments.
REQUEST_LIMIT_BYTES = 64 * 1024

# The status of 10,000 partitions takes about 3 MB.
ANSWER_LIMIT_BYTES = 64 * 1024 * 1024

# An address of a Unix socket has 108 bytes, the last of which is NUL.
SOCKET_PATH_LIMIT_BYTES = 107

# More clients at a time than people and scripts need; the next ones wait.
CONNECTION_LIMIT = 32

# Of the clients that wait for one to leave, no more are kept: each holds a descriptor.
WAITING_LIMIT = 32

# A client that connects and says nothing is let go after this time.
REQUEST_TIMEOUT_SECONDS = 10.0

# A client that does not read its answer for so long is let go; it would keep its place for ever.
SEND_TIMEOUT_SECONDS = 10.0

# A client may leave while its answer is long in coming (a drain's). How often that is looked for.
LEFT_CHECK_SECONDS = 1.0

# How long a stopping server lets the last answers get through.
STOP_TIMEOUT_SECONDS = 2.0

# A connection that was accepted just now has its task after so many turns of the event loop (3 are enough); a server
# that closes between the two would lose its socket.
ACCEPT_TURNS = 5

# What a client waits for by default. The shell answers between two polls, within milliseconds.
ANSWER_TIMEOUT_SECONDS = 10.0

Reply = Callable[[dict[str, Any]], None]


class ControlCommand(NamedTuple):
    """One command for the shell. ``reply`` may be called from any thread, once, and never blocks."""

    command: str
    args: dict[str, Any]
    reply: Reply


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    command: str
    args: dict[str, Any] = {}


# --- Where the socket is ------------------------------------------------------------------------------------------


def default_directory() -> Path:
    """Return the folder of the default sockets; it need not exist."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    # A runtime folder with a long path leaves no room for a socket's name.
    if runtime and len(os.fsencode(runtime)) <= SOCKET_PATH_LIMIT_BYTES - 70 and Path(runtime).is_dir():
        return Path(runtime) / "speedlayer"
    return Path(f"/tmp/speedlayer-{os.geteuid()}")


def default_path(group_id: str) -> Path:
    """Return the default socket of a consumer group: its name made safe, and a hash that keeps names apart."""
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", group_id)[:40]
    digest = hashlib.sha256(group_id.encode()).hexdigest()[:8]
    return default_directory() / f"{safe}-{digest}.sock"


def live_sockets() -> list[Path]:
    """Return the sockets in the default folder on which a daemon listens."""
    directory = default_directory()
    if not directory.is_dir():
        return []
    return [path for path in sorted(directory.glob("*.sock")) if _is_listened_to(path)]


def _make_private(directory: Path) -> None:
    """Make the default folder, and refuse one that another user owns or may write to."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigurationError(
            f"{directory} is not a folder that this user alone may use; remove it, or name another socket with --socket"
        )


def _is_listened_to(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError as error:
            # A full backlog means that somebody is there; a file that is no socket, that nobody is.
            return error.errno in (errno.EAGAIN, errno.ETIMEDOUT)
        return True


# --- Server: supervisor process -----------------------------------------------------------------------------------


class ControlServer:
    """Listens on the control socket and hands commands to the shell's queue.

    `start` binds in the caller's thread, so that `AlreadyRunning` is raised there. A socket that a killed daemon left
    is replaced. While the server runs, it holds a lock on ``<path>.lock``: two daemons that start at the same moment
    can not both take the path.
    """

    def __init__(self, path: Path, inbox: SimpleQueue[ControlCommand]) -> None:
        self.path = path
        self._inbox = inbox
        self._lock: Optional[int] = None
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self._stopping: Optional[asyncio.Event] = None
        self._thread: Optional[threading.Thread] = None

    def start(self) -> None:
        """Take the path and begin to listen."""
        if self.path.parent == default_directory():
            _make_private(self.path.parent)
        self._lock = _take_lock(self.path)
        try:
            listener = _bind(self.path)
        except BaseException:
            self._release_lock()
            raise
        started = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(listener, started), name="speedlayer-control", daemon=True
        )
        self._thread.start()
        started.wait()

    def stop(self) -> None:
        """Let the answers that are ready get through, close every connection and remove the socket."""
        thread, loop, stopping = self._thread, self._loop, self._stopping
        if thread is not None and loop is not None and stopping is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                loop.call_soon_threadsafe(stopping.set)
            thread.join(2 * STOP_TIMEOUT_SECONDS)
        self._thread = None
        if self._lock is not None:
            self.path.unlink(missing_ok=True)
            self._release_lock()

    def _release_lock(self) -> None:
        if self._lock is not None:
            _lock_path(self.path).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def _run(self, listener: socket.socket, started: threading.Event) -> None:
        # Signals belong to the main thread: its blocking calls must be the ones that they interrupt.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            asyncio.run(self._serve(listener, started))
        finally:
            started.set()

    async def _serve(self, listener: socket.socket, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        connections: set[asyncio.Task[None]] = set()
        slots = asyncio.Semaphore(CONNECTION_LIMIT)

        async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            if len(connections) >= CONNECTION_LIMIT + WAITING_LIMIT:
                writer.close()
                return
            connections.add(task)
            try:
                async with slots:
                    await self._converse(reader, writer)
            finally:
                connections.discard(task)
                writer.close()

        server = await asyncio.start_unix_server(on_connection, sock=listener, limit=REQUEST_LIMIT_BYTES)
        started.set()
        await self._stopping.wait()
        self._loop.remove_reader(listener.fileno())
        for _ in range(ACCEPT_TURNS):
            await asyncio.sleep(0)
        server.close()
        if connections:
            await asyncio.wait(connections, timeout=STOP_TIMEOUT_SECONDS)
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await asyncio.sleep(0)  # a transport closes in the turn after `close`

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection: a request, its answer, and so on until the client leaves."""
        allowed = _peer_uid(writer.get_extra_info("socket")) in (os.geteuid(), 0)
        assert self._stopping is not None
        while not self._stopping.is_set():
            try:
                line = await self._next_line(reader)
            except asyncio.LimitOverrunError:
                await _send(writer, {"ok": False, "error": f"a request has at most {REQUEST_LIMIT_BYTES} bytes"})
                return
            if not line:
                return
            if not allowed:
                await _send(writer, {"ok": False, "error": "only the user who runs the daemon may control it"})
                return
            answer = await self._answer(line, writer.get_extra_info("socket"))
            if answer is None:
                return
            await _send(writer, answer)

    async def _next_line(self, reader: asyncio.StreamReader) -> bytes:
        """Return the next request, or nothing when the client left, is silent, or the server stops."""
        assert self._stopping is not None
        request = asyncio.ensure_future(reader.readuntil(b"\n"))
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait((request, stopping), timeout=REQUEST_TIMEOUT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not request.done():
            request.cancel()
            return b""
        try:
            return request.result()
        except (asyncio.IncompleteReadError, ConnectionError):
            return b""

    async def _answer(self, line: bytes, client: socket.socket) -> Optional[dict[str, Any]]:
        """Hand one request to the shell and wait for its answer, for as long as it takes (a drain takes long).

        None if the client leaves before: what it asked for still happens.
        """
        try:
            request = msgspec.json.decode(line, type=_Request)
        except msgspec.MsgspecError as error:
            return {"ok": False, "error": f"not a request: {error}"}
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[dict[str, Any]] = loop.create_future()

        def settle(value: dict[str, Any]) -> None:
            if not answer.done():
                answer.set_result(value)

        def reply(value: dict[str, Any]) -> None:
            with contextlib.suppress(RuntimeError):  # the server has stopped, and nobody waits
                loop.call_soon_threadsafe(settle, value)

        self._inbox.put(ControlCommand(request.command, request.args, reply))
        while not answer.done():
            await asyncio.wait((answer,), timeout=LEFT_CHECK_SECONDS)
            if not answer.done() and _has_left(client):
                return None
        return answer.result()


def _has_left(client: socket.socket) -> bool:
    """Whether the other end is closed. One that has only ended its requests still wants the answer."""
    # asyncio tells the two apart only when it writes, and polling takes no byte of a next request.
    poll = select.poll()
    poll.register(client.fileno(), 0)  # a hang-up and an error are always told
    return bool(poll.poll(0))


async def _send(writer: asyncio.StreamWriter, answer: dict[str, Any]) -> None:
    with contextlib.suppress(ConnectionError):  # the client left before its answer
        writer.write(msgspec.json.encode(answer) + b"\n")
        try:
            await asyncio.wait_for(writer.drain(), SEND_TIMEOUT_SECONDS)
        except asyncio.TimeoutError:
            writer.transport.abort()


def _peer_uid(connection: socket.socket) -> int:
    """Ask the kernel who connected: the mode of a socket can be changed by a hand or by a copy of its folder."""
    if not hasattr(socket, "SO_PEERCRED"):
        return os.geteuid()  # the mode of the socket must do
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", credentials)[1]
    return uid


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _take_lock(path: Path) -> int:
    """Lock the path for this process and return the lock's descriptor; the kernel frees it when the process dies."""
    while True:
        try:
            descriptor = os.open(_lock_path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigurationError(f"the control socket {path} can not be made: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise _already_running(path) from None
        # A daemon that stopped meanwhile may have removed the file that we hold: then the lock guards nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(_lock_path(path)), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)


def _already_running(path: Path) -> AlreadyRunning:
    return AlreadyRunning(
        f"a daemon already listens on {path}; stop it, or give this one a socket of its own with --socket"
    )


def _bind(path: Path) -> socket.socket:
    """Bind the socket, in place of one that a killed daemon left."""
    if len(os.fsencode(path)) > SOCKET_PATH_LIMIT_BYTES:
        raise ConfigurationError(
            f"the control socket's path has more than {SOCKET_PATH_LIMIT_BYTES} bytes: {path}; "
            "name a shorter one with --socket or [control] socket"
        )
    if path.is_symlink() or path.exists():
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigurationError(f"{path} exists and is not a socket; name another one with --socket")
        if _is_listened_to(path):
            raise _already_running(path)
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Linux takes the mode of the file from the descriptor, so that there is no moment in which others may connect.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(CONNECTION_LIMIT)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"the control socket {path} can not be made: {error.strerror}") from error
    return listener


# --- Client: any command ------------------------------------------------------------------------------------------


class ControlClient:
    """Talks to a daemon through its control socket; one connection for each call."""

    def __init__(self, path: Path, timeout_seconds: float = ANSWER_TIMEOUT_SECONDS) -> None:
        self.path = path
        self.timeout_seconds = timeout_seconds

    def call(self, command: str, timeout_seconds: Optional[float] = None, **args: Any) -> dict[str, Any]:
        """Send a command and return its answer.

        Raises `NoDaemon` if nobody listens and `NoAnswer` if the answer does not come in time.
        """
        waits = self.timeout_seconds if timeout_seconds is None else timeout_seconds
        with self._connected(waits) as connection:
            try:
                connection.sendall(msgspec.json.encode({"command": command, "args": args}) + b"\n")
                line = _receive_line(connection)
            except TimeoutError as error:
                raise NoAnswer(
                    f"the daemon on {self.path} did not answer {command} within {waits:g} s; what was asked may "
                    "still happen"
                ) from error
            except ConnectionError as error:
                raise NoAnswer(f"the daemon on {self.path} broke off during {command}: {error}") from error
        answer: dict[str, Any] = msgspec.json.decode(line, type=dict[str, Any])
        return answer

    @contextlib.contextmanager
    def _connected(self, timeout_seconds: float) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_seconds)
            try:
                connection.connect(str(self.path))
            except (ConnectionRefusedError, FileNotFoundError) as error:
                raise NoDaemon(
                    f"no daemon listens on {self.path}; start one with `speedlayer run FILE`, or name its socket "
                    "with --socket"
                ) from error
            except TimeoutError as error:
                raise NoAnswer(f"the daemon on {self.path} takes no connection") from error
            except OSError as error:
                raise ControlError(f"{self.path} can not be used: {error.strerror or error}") from error
            yield connection


def _receive_line(connection: socket.socket) -> bytes:
    received = bytearray()
    while not received.endswith(b"\n"):
        block = connection.recv(1 << 16)
        if not block:
            raise ConnectionError("the connection was closed before the answer")
        received += block
        if len(received) > ANSWER_LIMIT_BYTES:
            raise ConnectionError(f"the answer has more than {ANSWER_LIMIT_BYTES} bytes")
    return bytes(received)
