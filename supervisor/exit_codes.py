"""The exit codes of the `speedlayer` command, each with a name (used by the daemon and by every command).

`docs/exit-codes.md` is written from this file, and a test compares the two.
"""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """What a process of speedlayer tells its caller when it ends.

    The string beside each number is its documentation: when the code is given, and what to do about it.
    """

    meaning: str

    def __new__(cls, value: int, meaning: str) -> ExitCode:
        """Make a member that is its number and carries its meaning."""
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    OK = 0, "The command did what it was asked. A daemon was stopped by a signal; nothing was lost."
    FAILED = 1, "The command ran and did not succeed; the message says why."
    USAGE = 2, "The command line is wrong: unknown command, option or argument. `--help` shows what is possible."
    CONFIGURATION = 3, "A setting is wrong or missing; the message names the file and the key. Nothing was started."
    CHECK_FAILED = 4, "`speedlayer check` found something that would keep the pipelines from running."
    NO_DAEMON = 5, "No daemon listens on the control socket. Start it with `speedlayer run`, or name its `--socket`."
    ALREADY_RUNNING = 6, "A daemon of this group already holds the control socket. Give the second one a `--socket`."
    NO_ANSWER = 7, "The daemon listens but did not answer in time. What it was asked may still happen."
    REFUSED = 8, "The daemon refused the command: unknown pipeline or partition, impossible offset; it says which."
    WORKER_BOOT_FAILED = 9, "A worker could not start, and starting it again would not help. Its reason is in the log."
    UNREACHABLE = 10, "Kafka or PostgreSQL could not be reached by a command that needs it."
    MISSING_LIBRARY = 11, "An optional library is not installed; the message names the extra to install."
    VERIFICATION_FAILED = 12, "The demo or a load test found rows lost or written twice, or its brake never tripped."
    STALLED = 13, "A partition or a worker stood still, whatever the daemon tried. Start it again; nothing is lost."
    INTERNAL_ERROR = 70, "A fault in speedlayer itself; the traceback is in the log. Nothing committed is lost."
    INTERRUPTED = 130, "Ctrl-C ended a command before it was done."
