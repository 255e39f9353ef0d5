"""Checks that filters and maps survive the way to a worker (the process of `speedlayer check`, and one it spawns)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Optional

from speedlayer.supervisor.check.findings import Finding, failed, ok
from speedlayer.supervisor.errors import SpeedlayerError
from speedlayer.supervisor.settings import DaemonSettings, PipelineSettings

# A worker that imports the user's libraries may take its time; one that takes longer hangs.
ROUND_TRIP_SECONDS = 60.0


def check(settings: DaemonSettings) -> Iterator[Finding]:
    """Send the steps of each pipeline to a new process, as the daemon will, and have it load them."""
    for pipeline in settings.pipelines:
        if pipeline.steps:
            yield _round_trip(settings, pipeline)


def _round_trip(settings: DaemonSettings, pipeline: PipelineSettings) -> Finding:
    from speedlayer.workers.transform import pack

    what = f"transform of {pipeline.name}"
    names = ", ".join(f"{step.kind} {getattr(step.function, '__name__', 'callable')}" for step in pipeline.steps)
    try:
        packed = pack(pipeline.steps)
    except SpeedlayerError as error:
        return failed(what, str(error))
    problem = _load_in_a_worker(settings.workers.start_method, packed, list(settings.python_path))
    if problem is not None:
        return failed(what, f"a worker can not load it: {problem}", "see docs/transforms.md: what travels to a worker")
    return ok(what, f"{names}: {len(packed):,} bytes, loaded in a worker process")


def _load_in_a_worker(start_method: str, packed: bytes, python_path: list[str]) -> Optional[str]:
    """Load the packed steps in a new process; returns what went wrong there."""
    import multiprocess

    context = multiprocess.get_context(start_method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_load, args=(packed, python_path, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(ROUND_TRIP_SECONDS):
            return f"it did not answer within {ROUND_TRIP_SECONDS:g} s"
        answer: Optional[str] = receiver.recv()
        return answer
    except EOFError:
        process.join(ROUND_TRIP_SECONDS)
        return f"it exited with {process.exitcode}"
    finally:
        receiver.close()
        process.kill()
        process.join()


def _load(packed: bytes, python_path: list[str], answer: Any) -> None:
    """Load the steps (runs in the new process)."""
    from speedlayer.workers.transform import unpack

    sys.path[:0] = python_path
    try:
        unpack(packed)
    except Exception as error:
        answer.send(f"{type(error).__name__}: {error}")
    else:
        answer.send(None)
