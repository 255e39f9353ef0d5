"""The daemon as the demo runs it: `speedlayer run FILE` in a child process, seen through its control socket.

The file is an ordinary TOML file, so what the demo shows is what a user gets.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from speedlayer.supervisor.control import ControlClient
from speedlayer.supervisor.demo.broker import Broker
from speedlayer.supervisor.demo.child import bound_to_us
from speedlayer.supervisor.errors import ControlError, SpeedlayerError
from speedlayer.supervisor.settings import shown

PIPELINE = "orders"

# The three strikes of the article.
SLOW_FLUSH_THRESHOLD_SECONDS = 2.0
MAX_SLOW_FLUSHES = 3
PAUSE_SECONDS = 5.0

# Far above the longest hold of the competitor's lock: a flush that times out counts as neither slow nor normal.
LOCK_TIMEOUT_SECONDS = 60.0

# The daemon answers between two polls. An answer that takes longer is worth a gap in the picture.
STATUS_TIMEOUT_SECONDS = 2.0

# What a stop may take: the daemon's own deadline, and the workers' last transactions on top.
SHUTDOWN_DEADLINE_SECONDS = 20.0
STOP_TIMEOUT_SECONDS = SHUTDOWN_DEADLINE_SECONDS + 15.0

# What a daemon may take to stop when the run was broken off: nobody asks for the rest of its rows any more.
CLOSE_TIMEOUT_SECONDS = 5.0

# The file names the connection string by this variable, so the password is in no file.
DSN_VARIABLE = "SPEEDLAYER_DEMO_DSN"


@dataclass(frozen=True)
class DaemonPlan:
    """What the daemon is to do."""

    broker: Broker
    dsn: str
    table: str
    batch_rows: int
    batch_seconds: float
    workers: int
    memory_budget_mb: int

    def toml(self, socket: Path) -> str:
        """The settings as a file for `speedlayer run`."""
        kafka = {
            **self.broker.client,
            **self.broker.consumer,
            "group.id": self.broker.group,
            "auto.offset.reset": "earliest",
        }
        return "\n".join(
            [
                "# Written by the demo, for `speedlayer run`.",
                *_table("kafka", kafka),
                *_table("postgres", {"dsn": f"${{{DSN_VARIABLE}}}", "lock_timeout_seconds": LOCK_TIMEOUT_SECONDS}),
                *_table("workers", {"count": self.workers}),
                *_table("memory", {"budget_mb": self.memory_budget_mb}),
                *_table("shutdown", {"deadline_seconds": SHUTDOWN_DEADLINE_SECONDS}),
                *_table("control", {"socket": str(socket)}),
                *_table(
                    "brake",
                    {
                        "mode": "simple",
                        "slow_flush_threshold": SLOW_FLUSH_THRESHOLD_SECONDS,
                        "max_slow_flushes": MAX_SLOW_FLUSHES,
                        "pause_seconds": PAUSE_SECONDS,
                    },
                ),
                *_table(
                    "[pipelines]",
                    {
                        "name": PIPELINE,
                        "topics": [self.broker.topic],
                        "table": self.table,
                        "mode": "append",
                        "batch_rows": self.batch_rows,
                        "batch_seconds": self.batch_seconds,
                    },
                ),
            ]
        )


def _table(name: str, values: Mapping[str, Any]) -> list[str]:
    return [
        f"[{name}]",
        *(f"{shown(key) if '.' in key else key} = {shown(value)}" for key, value in values.items()),
        "",
    ]


class DaemonError(SpeedlayerError):
    """The daemon ended by itself; the message has the end of its log."""


class Daemon:
    """A running daemon."""

    def __init__(self, plan: DaemonPlan, folder: Path) -> None:
        self.log_path = folder / "daemon.log"
        self._socket = folder / "control.sock"
        self.file = folder / "demo.toml"
        self.file.write_text(plan.toml(self._socket), encoding="utf-8")
        self._control = ControlClient(self._socket, STATUS_TIMEOUT_SECONDS)
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._environment = {**os.environ, DSN_VARIABLE: plan.dsn}

    def start(self) -> None:
        """Start the daemon."""
        with self.log_path.open("ab") as log:
            # A session of its own: a Ctrl-C in the terminal reaches the demo alone, which stops it in its turn; and
            # all processes of the session are the daemon's.
            self._process = subprocess.Popen(
                bound_to_us([sys.executable, "-m", "speedlayer.supervisor", "run", str(self.file)], signal.SIGTERM),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The supervisor's process id."""
        assert self._process is not None
        return self._process.pid

    def status(self) -> Optional[dict[str, Any]]:
        """Ask for the daemon's state; None while it does not answer. Raises `DaemonError` if it has ended."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise DaemonError(f"the daemon ended with exit code {self._process.returncode}:\n{self.log_tail()}")
        try:
            return self._control.call("status")
        except ControlError:
            return None

    def stop(self) -> int:
        """Stop the daemon as an operator would (SIGTERM) and return its exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise DaemonError(
                f"the daemon did not stop within {STOP_TIMEOUT_SECONDS:g} s of SIGTERM:\n{self.log_tail()}"
            ) from error

    def close(self) -> None:
        """Make sure that no process of the daemon is left; it has a moment to leave its group."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + CLOSE_TIMEOUT_SECONDS
        # The supervisor is not the last to go: a process that outlives it gives its semaphores back.
        while (self._process.poll() is None or session_members(self.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def memory_bytes(self) -> Optional[int]:
        """The memory of all the daemon's processes, shared pages counted once (PSS); None where it can't be told."""
        return proportional_memory_bytes(session_members(self.pid))

    def log_tail(self, lines: int = 30) -> str:
        """The end of the daemon's log."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])


def session_members(session: int) -> list[int]:
    """The processes of a session. They come and go: one that ends meanwhile is not in the list."""
    members = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # pid (name) state parent group session …; the name may hold spaces and parentheses.
            fields = entry.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session:
                members.append(int(entry.parent.name))
    return members


def proportional_memory_bytes(pids: list[int]) -> Optional[int]:
    """The summed PSS of processes, or None if none of them can be read."""
    sizes = []
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    sizes.append(int(line.split()[1]) * 1024)
    return sum(sizes) if sizes else None
