"""The errors of the supervisor process and of the commands, and the exit code that each one ends with.

Errors that both processes know live in `speedlayer.workers.errors`; the two most used are exported here as well.
"""

from __future__ import annotations

from speedlayer.supervisor.exit_codes import ExitCode
from speedlayer.workers.errors import ConfigurationError, SpeedlayerError, StreamingOverloadException

__all__ = [
    "AlreadyRunning",
    "ConfigurationError",
    "ControlError",
    "InvalidSetting",
    "MissingLibrary",
    "NoAnswer",
    "NoDaemon",
    "Refused",
    "SpeedlayerError",
    "StreamingOverloadException",
    "Unreachable",
    "exit_code_of",
]


class InvalidSetting(ConfigurationError):
    """One setting is wrong. ``key`` names it (dotted), ``problem`` says what is wrong with it."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key
        self.problem = problem

    def __reduce__(self) -> tuple[type[InvalidSetting], tuple[str, str]]:
        return (type(self), (self.key, self.problem))


class ControlError(SpeedlayerError):
    """A command did not reach the daemon, or the daemon did not do it."""


class NoDaemon(ControlError):
    """Nothing listens on the control socket."""


class AlreadyRunning(ControlError):
    """Another daemon listens on the control socket."""


class NoAnswer(ControlError):
    """The daemon did not answer in time, or broke off."""


class Refused(ControlError):
    """The daemon answered that it can not do this."""


class Unreachable(SpeedlayerError):
    """A command needs Kafka or PostgreSQL and can not reach it."""


class MissingLibrary(SpeedlayerError):
    """An optional library is needed and not installed; the message names the extra."""


_EXIT_CODES: tuple[tuple[type[BaseException], ExitCode], ...] = (
    (ConfigurationError, ExitCode.CONFIGURATION),
    (NoDaemon, ExitCode.NO_DAEMON),
    (AlreadyRunning, ExitCode.ALREADY_RUNNING),
    (NoAnswer, ExitCode.NO_ANSWER),
    (Refused, ExitCode.REFUSED),
    (Unreachable, ExitCode.UNREACHABLE),
    (MissingLibrary, ExitCode.MISSING_LIBRARY),
    (SpeedlayerError, ExitCode.FAILED),
    (KeyboardInterrupt, ExitCode.INTERRUPTED),
)


def exit_code_of(error: BaseException) -> ExitCode:
    """Return the exit code that a command ends with when this error reaches the top."""
    for kind, code in _EXIT_CODES:
        if isinstance(error, kind):
            return code
    return ExitCode.INTERNAL_ERROR
