"""The demo, played as a user plays it: Black Friday on embedded servers and on given ones, and Ctrl-C at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fixtures.kafka import Broker
from fixtures.postgres import PostgresServer, query
from fixtures.processes import lives
from fixtures.waiting import wait_until
from fixtures.workspace import REPOSITORY

# The shortest that the demo takes.
SECONDS = "35"
COMMAND = (sys.executable, "-m", "speedlayer.supervisor", "demo")
SCRIPT = (str(REPOSITORY / "scripts" / "demo"),)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
VERIFICATION_FAILED, INTERRUPTED, CONFIGURATION, UNREACHABLE = 12, 130, 3, 10

# Makes the terminal on standard input the one whose Ctrl-C reaches the program.
TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


@contextlib.contextmanager
def _hanging_up_counts() -> Iterator[None]:
    """Start children that a closed terminal ends: tests that run under nohup would pass their indifference on."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


class Demo:
    """A demo that runs in a folder of its own, with everything temporary in another one."""

    def __init__(self, folder: Path, *arguments: str, command: tuple[str, ...] = COMMAND, terminal: bool) -> None:
        self.report = folder / "report"
        # Under root the server's account has to be able to go there; pytest's own folders are closed to it.
        self.temporary = Path(tempfile.mkdtemp(prefix="speedlayer-test-demo-"))
        self.temporary.chmod(0o711)
        command = (*command, *arguments, "--report-dir", str(self.report))
        place = {"TMPDIR": str(self.temporary)}
        self._screen = -1
        if terminal:
            self._screen, far_end = pty.openpty()
            command = (sys.executable, "-c", TAKE_TERMINAL, *command)
        self.output = folder / "output"
        with self.output.open("wb") as file, _hanging_up_counts():
            out: Any = far_end if terminal else file
            self.process = subprocess.Popen(
                command,
                stdin=far_end if terminal else subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=folder,
                env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40", "HOME": str(folder), **place},
                start_new_session=True,
            )
        if terminal:
            os.close(far_end)

    def leftovers(self) -> list[str]:
        return [path.name for path in self.temporary.iterdir()]

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def shown(self) -> str:
        """What the demo has written so far."""
        if self._screen >= 0:
            with self.output.open("ab") as file:
                while select.select([self._screen], [], [], 0)[0]:
                    try:
                        file.write(os.read(self._screen, 65536))
                    except OSError:  # the far end is closed
                        break
        return self.output.read_text(errors="replace")

    def wait_for(self, text: str, timeout_seconds: float = 60.0) -> None:
        def seen() -> bool:
            assert self.process.poll() is None, self.shown()
            return text in self.shown()

        wait_until(seen, f"the demo says {text!r}", timeout_seconds=timeout_seconds, diagnose=self.shown)

    def type(self, keys: bytes) -> None:
        os.write(self._screen, keys)

    def wait(self, timeout_seconds: float = 150.0) -> int:
        """Wait for the end, reading along: a terminal that nobody reads blocks its writer."""

        def ended() -> bool:
            self.shown()
            return self.process.poll() is not None

        wait_until(ended, "the demo ends", timeout_seconds=timeout_seconds, diagnose=self.shown)
        return int(self.process.returncode)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
            self.process.kill()
            self.process.wait()
        if self._screen >= 0:
            os.close(self._screen)
        shutil.rmtree(self.temporary)


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    with contextlib.ExitStack() as cleanup:

        def start(*arguments: str, command: tuple[str, ...] = COMMAND, terminal: bool = False) -> Demo:
            demo = Demo(tmp_path, *arguments, command=command, terminal=terminal)
            cleanup.callback(demo.close)
            return demo

        yield start


def gone(family: list[psutil.Process]) -> bool:
    return not [process for process in family if lives(process)]


def check_report(demo: Demo) -> dict[str, Any]:
    """Check what every good run has to show, and return its report."""
    report: dict[str, Any] = json.loads((demo.report / "report.json").read_text())
    audit = report["audit"]
    assert report["ok"], report["problems"]
    assert (audit["lost"], audit["surplus"]) == (0, 0)
    assert report["produced"] == audit["rows"] + audit["dead_letters"]
    assert audit["dead_letters"] > 0
    assert report["brake_events"]
    assert report["brake_events"][0]["ended"] - report["brake_events"][0]["began"] >= 4.7  # looked at every 0.2 s
    normal, storm, recovery = report["phases"]
    assert 40 <= storm["capacity"] <= 60
    assert normal["capacity"] > 1000
    assert recovery["capacity"] > 1000
    assert storm["produced_per_second"] == pytest.approx(300, rel=0.1)
    assert report["peak_memory_bytes"] > 10 * 2**20
    assert (demo.report / "plot.png").read_bytes().startswith(PNG_SIGNATURE)
    assert "is overloaded" in (demo.report / "daemon.log").read_text()
    return report


@pytest.mark.timeout(900)
def test_the_script_plays_black_friday_on_embedded_servers(play: Callable[..., Demo], tmp_path: Path) -> None:
    demo = play("--seconds", SECONDS, command=SCRIPT)
    # The first time the script makes an environment, for which packages are fetched.
    demo.wait_for("Black Friday  produced", timeout_seconds=600)
    family = demo.family()
    assert demo.wait() == 0, demo.shown()
    check_report(demo)
    text = demo.shown()
    for expected in ("measured capacity", "slow count 2 of 3", "BRAKE: 3 slow flushes", "resumed by itself", "GOOD: "):
        assert expected in text
    assert gone(family)
    assert demo.leftovers() == []
    # The home of the demo is this folder as well: what it needs stays in the repository's .cache.
    assert list(tmp_path.rglob("*matplotlib*")) == []


def test_black_friday_on_given_servers_leaves_nothing_on_them(
    play: Callable[..., Demo], kafka: Broker, postgres: PostgresServer, postgres_dsn: str
) -> None:
    topics = set(kafka.admin.list_topics(timeout=30).topics)
    demo = play("--seconds", SECONDS, "--broker", kafka.bootstrap_servers, "--dsn", postgres_dsn)
    assert demo.wait() == 0, demo.shown()
    report = check_report(demo)
    assert kafka.bootstrap_servers in report["broker"]
    assert f"PostgreSQL {postgres.major_version}." in report["database"]
    wait_until(
        lambda: (
            {name for name in kafka.admin.list_topics(timeout=30).topics if name.startswith("speedlayer-demo")}
            <= topics
        ),
        "the topic is gone",
    )
    groups = kafka.admin.list_consumer_groups().result().valid
    assert [group.group_id for group in groups if group.group_id.startswith("speedlayer-demo")] == []
    assert query(postgres_dsn, "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'speedlayer\\_demo%%'") == []
    assert query(postgres_dsn, "SELECT * FROM speedlayer.checkpoints") == []
    assert query(postgres_dsn, "SELECT * FROM speedlayer.dead_letters") == []
    assert "left behind" not in demo.shown()


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGINT, "starting an embedded PostgreSQL"),
        (signal.SIGINT, "starting the daemon"),
        (signal.SIGINT, "Black Friday: 300"),
        (signal.SIGTERM, "normal: 100"),
        (signal.SIGHUP, "Black Friday: 300"),
    ],
)
def test_a_demo_that_is_broken_off_leaves_nothing(
    play: Callable[..., Demo], number: signal.Signals, moment: str
) -> None:
    demo = play("--seconds", SECONDS)
    demo.wait_for(moment)
    family = demo.family()
    demo.process.send_signal(number)
    assert demo.wait(60) == INTERRUPTED
    assert gone(family)
    assert demo.leftovers() == []
    assert not demo.report.exists()
    assert "Traceback" not in demo.shown()


def test_ctrl_c_in_the_terminal_leaves_nothing_but_the_panel(play: Callable[..., Demo]) -> None:
    demo = play("--seconds", SECONDS, terminal=True)
    demo.wait_for("Black Friday: 300 messages/s")
    for expected in ("produced", "written", "lag", "slow count", "○ ○ ○", "state", "running"):
        assert expected in demo.shown()
    family = demo.family()
    demo.type(b"\x03\x03\x03")
    assert demo.wait(60) == INTERRUPTED
    assert gone(family)
    assert demo.leftovers() == []
    assert "everything that was started or made is gone" in demo.shown()
    assert "Traceback" not in demo.shown()
    # The cursor, which the panel hides, is back.
    assert demo.shown().rfind("\x1b[?25h") > demo.shown().rfind("\x1b[?25l")


def test_a_demo_that_is_killed_takes_its_processes_with_it(play: Callable[..., Demo]) -> None:
    demo = play("--seconds", SECONDS)
    demo.wait_for("normal        produced")
    family = demo.family()
    assert len(family) > 5
    demo.process.kill()
    wait_until(lambda: gone(family), "the servers and the daemon end", timeout_seconds=60)


def test_a_backlog_that_the_embedded_broker_cannot_hold_is_refused(play: Callable[..., Demo]) -> None:
    demo = play("--rate", "5000")
    assert demo.wait(30) == CONFIGURATION
    assert "--broker" in demo.shown()
    assert not demo.report.exists()


def test_servers_that_are_not_there_are_named_in_a_sentence(play: Callable[..., Demo]) -> None:
    demo = play("--dsn", "postgresql://me@127.0.0.1:1/mine")
    assert demo.wait(60) == UNREACHABLE
    assert "PostgreSQL can not be reached" in demo.shown()
    assert "Traceback" not in demo.shown()


def test_the_script_names_the_package_that_a_python_without_ensurepip_needs(tmp_path: Path) -> None:
    """Debian's python3 comes without ensurepip. Here a wrapper stands for it."""
    wrapper = tmp_path / "python3"
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *ensurepip*) echo "No module named ensurepip" >&2; exit 1 ;; esac\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("sh", "dirname", "env", "cat", "mkdir", "apt-get"):
        (tools / tool).symlink_to(
            Path("/usr/bin") / tool if (Path("/usr/bin") / tool).exists() else Path("/bin") / tool
        )
    done = subprocess.run(
        [*SCRIPT, "--seconds", SECONDS],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:{tools}", "HOME": str(tmp_path)},
    )
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert done.returncode != 0
    assert f"python{version}-venv" in done.stderr
    assert list(tmp_path.glob("demo-report")) == []
