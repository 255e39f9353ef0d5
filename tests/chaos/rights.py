"""What a fault needs of the machine, and what a run that was killed left behind.

A right that is missing fails with its name; no fault is left out quietly. What outlives a process (mounts, network
namespaces) carries the pid of the run that made it, so that the next run removes what nobody needs any more.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import psutil

# Names are short: a network interface's has at most 15 characters.
PREFIX = "sl"
_OWNED = re.compile(rf"^{PREFIX}(\d+)[a-z]")

COMMAND_SECONDS = 20.0


class MissingRight(AssertionError):
    """The machine does not let us make a fault; the message names the right or the package."""


def owned_name(suffix: str) -> str:
    """A name that tells whose it is: ``suffix`` begins with a letter."""
    return f"{PREFIX}{os.getpid()}{suffix}"


def is_stale(name: str) -> bool:
    """Whether this is the name of something whose run has ended."""
    found = _OWNED.match(name)
    return found is not None and not psutil.pid_exists(int(found.group(1)))


def privileged(*command: str, right: str) -> str:
    """Run a command that needs a right (``CAP_SYS_ADMIN (to mount)``, say) and return what it prints."""
    if shutil.which(command[0]) is None:
        raise MissingRight(f"this fault needs the program `{command[0]}`, and {right}: install the program")
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    if done.returncode != 0:
        denied = os.geteuid() != 0 or "not permitted" in done.stderr or "denied" in done.stderr
        text = f"`{' '.join(command)}` failed: {done.stderr.strip()}"
        if denied:
            raise MissingRight(f"this fault needs {right}: run as root, or in a container with it added. {text}")
        raise AssertionError(text)
    return done.stdout
