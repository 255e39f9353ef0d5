"""A clock that can be stepped, for one process and its children; the machine's own clock is never touched.

libfaketime is preloaded into the process and adds what a file holds to every answer about the time of day. The
monotonic clock stays true, as it does when an administrator or NTP steps a real clock. Runs in the campaign's or the
test's process; the library comes with the wheel `libfaketime`, which is built without the sleeping functions: those
of Debian's package (0.9.10) make Python's ``time.sleep`` fail with EINVAL.

Two kinds of waits until a time of day are unknown to this build: librdkafka's (cnd_timedwait) and multiprocessing's
(sem_timedwait). `clock_waits.c`, compiled here and preloaded as well, makes them follow the stepped clock as the kernel
makes them follow a real one that is set, in both directions: a step back by a minute makes a wait that is under way a
minute longer. That is what becomes of librdkafka under a real step (its issue 2145), so the fault shows it.

Measured: a step is seen at once; asking for the time takes 3.4 us instead of 0.07, and the monotonic clock costs what
it did.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

WAITS_SOURCE = Path(__file__).with_name("clock_waits.c")
LIBRARY = "vendor/libfaketime/src/libfaketime.so.1"


def find_library() -> Path:
    """The library to preload; fails with what to install when it is missing."""
    spec = importlib.util.find_spec("libfaketime")
    assert spec is not None and spec.origin is not None, (
        "clock steps need the wheel `libfaketime`: pip install 'speedlayer[test]'"
    )
    library = Path(spec.origin).parent / LIBRARY
    assert library.is_file(), f"{library} is missing: pip install --force-reinstall --no-binary libfaketime libfaketime"
    return library


def compile_waits(folder: Path) -> Path:
    """Compile the waits that libfaketime does not know; fails with what to install."""
    compiler = shutil.which("cc")
    assert compiler is not None, "clock steps need a C compiler: apt-get install gcc libc6-dev"
    library = folder / "clock_waits.so"
    command = [compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, WAITS_SOURCE, "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{WAITS_SOURCE.name} was not compiled (apt-get install gcc libc6-dev):\n{done.stderr}"
    return library


class SteppedClock:
    """The time of day of those processes that are started with `env`. It tells the true time until it is stepped."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock"
        self.offset_seconds = 0.0
        self._library = find_library()
        self._waits = compile_waits(folder)
        self.end()
        self._check()

    @property
    def env(self) -> dict[str, str]:
        """What to add to a process's environment."""
        return {
            "LD_PRELOAD": f"{self._waits}:{self._library}",
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
        }

    def step(self, seconds: float) -> None:
        """Step the clock by so much, from where it is now: forwards, or backwards if negative."""
        self._set(self.offset_seconds + seconds)

    def end(self) -> None:
        """Let it tell the true time again (which is a step too)."""
        self._set(0.0)

    def _set(self, offset_seconds: float) -> None:
        # Written beside it and renamed: whoever looks sees the old time or the new one, never an empty file.
        beside = self._file.with_suffix(".new")
        beside.write_text(f"{offset_seconds:+.6f}\n")
        beside.rename(self._file)
        self.offset_seconds = offset_seconds

    def _check(self) -> None:
        """Fail where the library does not work: a preload that the loader refuses is only a warning."""
        self._set(-86_400.0)
        asked = [sys.executable, "-I", "-S", "-c", "import time; print(time.time())"]
        done = subprocess.run(asked, env={**os.environ, **self.env}, capture_output=True, text=True, timeout=30)
        told = float(done.stdout) if done.returncode == 0 else 0.0
        self.end()
        assert abs(told + 86_400.0 - time.time()) < 60, (
            f"{self._library} does not work on this machine: pip install --force-reinstall --no-binary libfaketime "
            f"libfaketime builds it here (it needs make and a C compiler)\n{done.stderr}"
        )
