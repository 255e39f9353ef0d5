"""Checks of this machine: the control socket and the library for metrics (the process of `speedlayer check`)."""

from __future__ import annotations

from collections.abc import Iterator

from speedlayer.supervisor import metrics
from speedlayer.supervisor.check.findings import Finding, failed, ok, warning
from speedlayer.supervisor.control import ControlClient
from speedlayer.supervisor.errors import ControlError, NoDaemon, SpeedlayerError
from speedlayer.supervisor.launch import socket_of
from speedlayer.supervisor.settings import DaemonSettings


def check(settings: DaemonSettings) -> Iterator[Finding]:
    """Look at what the daemon needs of this machine."""
    yield _socket(settings)
    if settings.http.listen is not None:
        yield _http(settings.http.listen)


def _socket(settings: DaemonSettings) -> Finding:
    path = socket_of(settings)
    try:
        answer = ControlClient(path).call("status")
    except NoDaemon:
        return ok("control socket", f"{path} is free")
    except ControlError as error:
        return failed("control socket", str(error), "name another socket: [control] socket, or run --socket")
    return warning(
        "control socket",
        f"a daemon already listens on {path}; it is {answer.get('state')}",
        "a second daemon of this group on this machine needs a socket of its own: run --socket",
    )


def _http(listen: str) -> Finding:
    try:
        host, port = metrics.address_of(listen)
        metrics.registry_of(dict)
    except SpeedlayerError as error:
        return failed("metrics", str(error))
    return ok("metrics", f"served on http://{host}:{port}/metrics")
