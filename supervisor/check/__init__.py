"""`speedlayer check`: looks at everything a pipeline needs, and changes nothing (a process of its own)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Optional

from speedlayer.supervisor.check import daemon, kafka, postgres, transforms
from speedlayer.supervisor.check.findings import Finding, failed, ok, warning
from speedlayer.supervisor.errors import ConfigurationError
from speedlayer.supervisor.settings import DaemonSettings
from speedlayer.supervisor.targets import load_settings

__all__ = ["examine"]


def examine(file: Path, engine: Optional[str], timeout_seconds: float) -> Iterator[Finding]:
    """Yield what is found, one after the other; without settings there is nothing more to look at."""
    try:
        settings = load_settings(file, engine)
    except ConfigurationError as error:
        yield failed("configuration", str(error))
        return
    yield ok("configuration", f"{file} has {len(settings.pipelines)} pipeline(s)")
    yield from _batch_limits(settings)
    yield from daemon.check(settings)
    yield from transforms.check(settings)
    cluster, findings = kafka.check(settings, timeout_seconds)
    yield from findings
    yield from postgres.check(settings, cluster, timeout_seconds)


def _batch_limits(settings: DaemonSettings) -> Iterator[Finding]:
    for pipeline in settings.pipelines:
        wanted, allowed = pipeline.sink.batch_bytes, settings.batch_bytes_of(pipeline)
        if allowed < wanted:
            yield warning(
                f"pipeline {pipeline.name}",
                f"a batch closes at {allowed:,} bytes and not at batch_bytes = {wanted:,}, since all batches that can "
                f"exist at once must fit into half of [memory] budget_mb = {settings.memory.budget_mb}",
                "raise budget_mb, or lower batch_bytes, [workers] count or credit_flights",
            )
