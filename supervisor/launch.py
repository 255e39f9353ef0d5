"""Starting the daemon, the same way from `engine.run()` and from `speedlayer run` (supervisor process)."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from speedlayer.supervisor import control, logs
from speedlayer.supervisor.errors import SpeedlayerError, exit_code_of
from speedlayer.supervisor.exit_codes import ExitCode
from speedlayer.supervisor.settings import DaemonSettings

if TYPE_CHECKING:
    from speedlayer.supervisor.supervisor import Supervisor


def run_daemon(settings: DaemonSettings) -> int:
    """Run the daemon in this process until it is told to stop; returns its exit code.

    Where a thread can not be ended, one of librdkafka's or one that writes a log which nobody reads, the process leaves
    at once instead.
    """
    background = logs.to_background(logs.configure(settings.log, logs.secrets_of(settings)))
    code, stuck = _run(settings)
    if not background.stop() or stuck:
        os._exit(code)
    return code


def _run(settings: DaemonSettings) -> tuple[int, bool]:
    """Run the daemon; returns its exit code, and whether librdkafka hangs."""
    from speedlayer.supervisor.supervisor import Supervisor

    _introduce(settings)
    try:
        supervisor = Supervisor(settings)
        with _control(settings, supervisor), _http(settings, supervisor):
            code = supervisor.run()
    except SpeedlayerError as error:
        logs.log(logging.ERROR, str(error))
        return exit_code_of(error), False
    except Exception:
        logs.log(
            logging.ERROR, "a fault in speedlayer itself ended the daemon; what is committed stays", exception=True
        )
        return ExitCode.INTERNAL_ERROR, False
    return code, supervisor.stuck


def _introduce(settings: DaemonSettings) -> None:
    """Say what the daemon is about to do, and where a setting could not be followed to the letter."""
    for pipeline in settings.pipelines:
        what = f"{', '.join(pipeline.topics)} into {pipeline.sink.describe()}, as group {pipeline.group_id}"
        logs.log(logging.INFO, f"pipeline {pipeline.name}: {what}", {"pipeline": pipeline.name})
        allowed = settings.batch_bytes_of(pipeline)
        if allowed < pipeline.sink.batch_bytes:
            logs.log(
                logging.WARNING,
                f"pipeline {pipeline.name}: a batch closes at {allowed} bytes, not at batch_bytes = "
                f"{pipeline.sink.batch_bytes}, to keep within budget_mb = {settings.memory.budget_mb}",
                {"pipeline": pipeline.name},
            )


def run_or_exit(settings_of: Callable[[], DaemonSettings]) -> None:
    """Run a daemon, and leave the process with its exit code unless that is `ExitCode.OK`."""
    try:
        settings = settings_of()
    except SpeedlayerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_code_of(error))
    code = run_daemon(settings)
    if code != ExitCode.OK:
        sys.exit(code)


def socket_of(settings: DaemonSettings) -> Path:
    """Return the path of the daemon's control socket."""
    return Path(settings.control.socket or control.default_path(settings.group_ids[0]))


@contextlib.contextmanager
def _control(settings: DaemonSettings, supervisor: Supervisor) -> Iterator[None]:
    server = control.ControlServer(socket_of(settings), supervisor.inbox)
    server.start()
    logs.log(logging.INFO, f"commands are taken on {server.path}")
    try:
        yield
    finally:
        server.stop()


@contextlib.contextmanager
def _http(settings: DaemonSettings, supervisor: Supervisor) -> Iterator[None]:
    if settings.http.listen is None:
        yield
        return
    from speedlayer.supervisor.metrics import HttpServer

    server = HttpServer(settings.http.listen, supervisor.snapshot)
    server.start()
    host, port = server.address
    logs.log(logging.INFO, f"metrics and health are served on http://{host}:{port}/metrics, /healthz and /readyz")
    try:
        yield
    finally:
        server.stop()
