"""Children that end with their parent, and that need not be root (demo process).

A demo that is killed with -9 can stop nothing any more; so the kernel is asked to do it (Linux).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Optional

from speedlayer.supervisor.demo.private_folder import Account

# Runs between the fork and the program. The account is changed first: a change of account would clear the death
# signal. And by then our interpreter has been loaded, which the account may not be able to reach.
_BECOME = """
import ctypes, os, sys
parent, death_signal, uid, gid = map(int, sys.argv[1:5])
if uid:
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, death_signal)
    if os.getppid() != parent:
        sys.exit(1)  # the parent was gone before we asked
os.execv(sys.argv[5], sys.argv[5:])
"""


def bound_to_us(command: Sequence[str], death_signal: signal.Signals, account: Optional[Account] = None) -> list[str]:
    """Wrap a command so that it gets ``death_signal`` when our main thread ends, and runs as ``account``."""
    uid, gid = (account.uid, account.gid) if account is not None else (0, 0)
    numbers = [os.getpid(), int(death_signal), uid, gid]
    return [sys.executable, "-I", "-S", "-c", _BECOME, *map(str, numbers), *command]
