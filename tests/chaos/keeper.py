"""Supervisors that are started again when they end, as an init system does it, and what they tell of themselves.

Runs in the campaign's process: `Keeper.look` on its main thread, a listener for each member on a thread of its own (a
frozen daemon does not answer, and nobody else shall wait for it).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from chaos.clock import SteppedClock
from chaos.network import Namespace
from fixtures.daemon import Daemon
from fixtures.processes import lives
from fixtures.waiting import wait_until
from speedlayer.supervisor.errors import ControlError
from speedlayer.supervisor.exit_codes import ExitCode

# As systemd waits between the end of a service and its next start, unless it is told otherwise.
RESTART_SECONDS = 0.1

# With these the documented unit does not start it again (RestartPreventExitStatus in docs/operations.md).
NOT_RESTARTED = (ExitCode.USAGE, ExitCode.CONFIGURATION, ExitCode.WORKER_BOOT_FAILED, ExitCode.MISSING_LIBRARY)

# Between two looks at a daemon's status, and how long one look may take.
LISTEN_SECONDS = 1.0
ANSWER_SECONDS = 3.0

# What a pipeline's status counts since its daemon started.
COUNTED = ("fenced", "retries", "reclaims", "overload_count", "dead_lettered", "flushes")


@dataclass(frozen=True)
class Exit:
    """A supervisor ended. ``asked``: by whom, None when it did so by itself."""

    member: str
    pid: int
    status: int
    asked: str | None
    at: float

    @property
    def meaning(self) -> str:
        if self.status < 0:
            return signal.Signals(-self.status).name
        with contextlib.suppress(ValueError):
            return ExitCode(self.status).name
        return f"exit status {self.status}"

    def __str__(self) -> str:
        return f"{self.member} (pid {self.pid}) ended with {self.meaning}, {self.asked or 'by itself'}"


@dataclass
class Member:
    """One place in the group: a daemon that is kept running, ``side`` says through which proxies it goes."""

    name: str
    group: str
    daemon: Daemon
    side: int
    clock: SteppedClock | None = None
    network: Namespace | None = None
    wanted: bool = True
    asked: str | None = None  # what ends it next, if it is known beforehand
    exits: list[Exit] = field(default_factory=list)
    starts: int = 0
    counts: dict[tuple[int, str, str], int] = field(default_factory=dict)
    status: dict[str, Any] | None = None  # the last that it told, None while it says nothing
    ended_at: float | None = None
    ghosts: dict[int, psutil.Process] = field(default_factory=dict)  # workers that were seen and may still be there

    # --- what a nemesis does to it ------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return self.daemon.process.running

    def end(self, number: signal.Signals, why: str) -> int:
        """Send the signal that ends it; returns the pid. The keeper starts it again, if it is wanted."""
        pid = self.daemon.pid
        self.asked = why
        self.daemon.process.send(number)
        return pid

    def workers(self) -> list[psutil.Process]:
        """The worker processes of the supervisor that runs now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.daemon.pid).children(recursive=True)
            return sorted((one for one in children if _is_worker(one)), key=lambda one: one.pid)
        return []

    def reads(self) -> bool:
        """Whether it says that it runs and holds partitions whose checkpoints it knows."""
        status = self.status
        return status is not None and any(lane["state"] == "fetching" for lane in _lanes(status))

    # --- what it tells ------------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Ask for its status once; a daemon that is down or frozen has none."""
        try:
            status = self.daemon.call("status", timeout_seconds=ANSWER_SECONDS)
        except ControlError:
            self.status = None
            return
        pid = status["pid"]
        for pipeline in status["pipelines"]:
            for name in COUNTED:
                self.counts[pid, pipeline["name"], name] = pipeline[name]
        self.counts[pid, "", "worker restarts"] = sum(worker["restarts"] for worker in status["workers"])
        for worker in self.workers():
            self.ghosts[worker.pid] = worker
        self.status = status

    def total(self, name: str) -> int:
        """A counter over all lives of this member, as far as they were heard of."""
        return sum(value for (_, _, counted), value in self.counts.items() if counted == name)


class Keeper:
    """Starts the members, starts them again, and listens to them, until `close`."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self._over = threading.Event()
        self._lock = threading.RLock()
        self._listeners: list[threading.Thread] = []

    def start(self) -> None:
        for member in self.members:
            member.daemon.start(wait=False)
            member.starts += 1
            listener = threading.Thread(target=self._listen, args=(member,), name=f"listener to {member.name}")
            listener.start()
            self._listeners.append(listener)

    def look(self) -> list[Exit]:
        """Notice who has ended, and start again who is wanted; returns the ends since the last look."""
        ended = []
        for member in self.members:
            with self._lock:
                if member.running:
                    continue
                if member.ended_at is None:
                    member.ended_at = time.monotonic()
                    status = member.daemon.process.returncode
                    assert status is not None
                    ended.append(Exit(member.name, member.daemon.pid, status, member.asked, time.time()))
                    member.exits.append(ended[-1])
                    member.asked = None
                    if status in NOT_RESTARTED:
                        member.wanted = False
                if member.wanted and time.monotonic() - member.ended_at >= RESTART_SECONDS:
                    member.ended_at = None
                    member.daemon.start(wait=False)
                    member.starts += 1
        return ended

    def wait_until_back(self, member: Member, starts: int, *, timeout_seconds: float = 60.0) -> None:
        """Wait until a member was started again (it may take long until it reads: that is for others to judge)."""
        wait_until(
            lambda: member.starts > starts and member.running,
            f"{member.name} is started again",
            timeout_seconds=timeout_seconds,
            diagnose=member.daemon.tail,
        )

    def ghosts(self) -> list[str]:
        """Workers that outlive their supervisor."""
        return [
            f"worker {pid} of {member.name}"
            for member in self.members
            for pid, process in member.ghosts.items()
            if lives(process) and process.ppid() != member.daemon.pid
        ]

    def total(self, name: str) -> int:
        return sum(member.total(name) for member in self.members)

    def exits(self) -> list[Exit]:
        return sorted((one for member in self.members for one in member.exits), key=lambda one: one.at)

    def causes(self) -> Counter[str]:
        """Why supervisors ended, and how often."""
        return Counter(one.asked or f"by itself: {one.meaning}" for one in self.exits())

    def stop(self, *, timeout_seconds: float = 90.0) -> dict[str, int]:
        """Stop all members in good order (SIGTERM), at once; returns their exit status."""
        for member in self.members:
            member.wanted = False
            if member.running:
                member.end(signal.SIGTERM, "the campaign's end")
        return {
            member.name: member.daemon.wait(timeout_seconds=timeout_seconds) for member in self.members if member.starts
        }

    def close(self) -> None:
        """End everything, whatever state it is in."""
        self._over.set()
        with contextlib.ExitStack() as cleanup:
            for member in self.members:
                member.wanted = False
                cleanup.callback(member.daemon.close)
            for ghost in self._live_ghosts():
                cleanup.callback(_end, ghost)
            for listener in self._listeners:
                cleanup.callback(listener.join, 2 * ANSWER_SECONDS + LISTEN_SECONDS)

    def _live_ghosts(self) -> Iterator[psutil.Process]:
        return (one for member in self.members for one in member.ghosts.values() if lives(one))

    def _listen(self, member: Member) -> None:
        while not self._over.wait(LISTEN_SECONDS):
            member.listen()


def _is_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return "spawn_main" in " ".join(process.cmdline())
    return False


def _lanes(status: dict[str, Any]) -> list[dict[str, Any]]:
    return [lane for pipeline in status["pipelines"] for lane in pipeline["lanes"]]


def _end(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        os.kill(process.pid, signal.SIGKILL)
