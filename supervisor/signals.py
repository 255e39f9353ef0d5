"""Which signals the processes of speedlayer handle, and how (the supervisor's and the workers' own code installs them).

`docs/signals.md` is written from this file, and a test compares it with what the kernel says of a running daemon.
"""

from __future__ import annotations

import signal

_STOP = (
    "Stops the daemon in good order: nothing more is read, what is read is written within `[shutdown]` "
    "`deadline_seconds`, the groups are left, exit code 0. A second one hurries it: what is not written is read again "
    "at the next start."
)

SUPERVISOR: dict[signal.Signals, str] = {
    signal.SIGTERM: _STOP,
    signal.SIGINT: _STOP,
}

_IGNORED = "Ignored: when to stop is the supervisor's business. A Ctrl-C in a terminal reaches the workers too."

WORKER: dict[signal.Signals, str] = {
    signal.SIGTERM: _IGNORED,
    signal.SIGINT: _IGNORED,
}
