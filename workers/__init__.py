"""The worker side of speedlayer: sinks, and what runs in the worker processes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speedlayer.workers.errors import (
        ConfigurationError,
        SpeedlayerError,
        StreamingOverloadException,
    )
    from speedlayer.workers.sinks.base import Sink, SinkContext, SinkSession, WriteOutcome
    from speedlayer.workers.sinks.postgres.sink import PostgreSQLSink

# Loaded on first use: a worker child imports this package before it knows what it needs, and `import
# speedlayer.workers` should not cost a database driver.
_HOMES = {
    "ConfigurationError": "speedlayer.workers.errors",
    "PostgreSQLSink": "speedlayer.workers.sinks.postgres.sink",
    "Sink": "speedlayer.workers.sinks.base",
    "SinkContext": "speedlayer.workers.sinks.base",
    "SinkSession": "speedlayer.workers.sinks.base",
    "SpeedlayerError": "speedlayer.workers.errors",
    "StreamingOverloadException": "speedlayer.workers.errors",
    "WriteOutcome": "speedlayer.workers.sinks.base",
}

__all__ = [
    "ConfigurationError",
    "PostgreSQLSink",
    "Sink",
    "SinkContext",
    "SinkSession",
    "SpeedlayerError",
    "StreamingOverloadException",
    "WriteOutcome",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
