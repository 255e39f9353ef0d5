"""Starting the daemon, the same way from `engine.run()` and from `speedlayer run` (supervisor process)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from speedlayer.supervisor import logs
from speedlayer.supervisor.errors import SpeedlayerError, exit_code_of
from speedlayer.supervisor.exit_codes import ExitCode
from speedlayer.supervisor.settings import DaemonSettings


def run_daemon(settings: DaemonSettings) -> int:
    """Run the daemon in this process until it is told to stop; returns its exit code."""
    from speedlayer.supervisor.supervisor import Supervisor

    logs.configure(settings.log, logs.secrets_of(settings))
    try:
        return Supervisor(settings).run()
    except SpeedlayerError as error:
        logs.log(logging.ERROR, str(error))
        return exit_code_of(error)
    except Exception:
        logs.log(
            logging.ERROR, "a fault in speedlayer itself ended the daemon; what is committed stays", exception=True
        )
        return ExitCode.INTERNAL_ERROR


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
