"""The errors of the workers. Each docstring is the message's meaning; SQLSTATE classes, not texts, choose the type."""

from __future__ import annotations

from typing import Optional


class SpeedlayerError(Exception):
    """Something speedlayer can explain: the message names the file, key or offset and the remedy."""


class ConfigurationError(SpeedlayerError):
    """A setting is wrong or missing; nothing was started."""


class StreamingOverloadException(SpeedlayerError):
    """A sink is overloaded and wants no new work for ``pause_seconds``.

    The supervisor raises it from a `FlushReport` when the slow count reaches its limit; a sink of one's own may raise
    it in a worker before it commits, and its batch is kept and tried again after the pause.
    """

    def __init__(self, message: str, pause_seconds: float = 3.0) -> None:
        super().__init__(message)
        self.pause_seconds = pause_seconds

    def __reduce__(self) -> tuple[type[StreamingOverloadException], tuple[str, float]]:
        return (type(self), (str(self), self.pause_seconds))


class SinkError(SpeedlayerError):
    """A flush or a claim did not succeed."""

    def __init__(self, message: str, *, sqlstate: Optional[str] = None, remedy: str = "") -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.remedy = remedy


class SinkUnavailable(SinkError):
    """The database can not be reached or takes no writes now. Surely rolled back; the batch is kept."""


class ConnectionLost(SinkUnavailable):
    """The connection broke. Rolled back, unless COMMIT was under way: then this becomes `FateUnknown`."""


class SinkContended(SinkError):
    """A deadlock, a serialization failure or a lock timeout. Surely rolled back; the transaction is tried again."""


class SinkMisconfigured(SinkError):
    """A table, column or permission is missing. Surely rolled back; the batch waits until somebody mends it."""


class FateUnknown(SinkError):
    """The connection broke while COMMIT was under way: the rows may be there or not. Only a new claim can tell."""
