"""What the commands that talk to a running daemon have in common: options, and how the daemon is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, TypeVar

import click

from speedlayer.supervisor import control
from speedlayer.supervisor.control import ControlClient
from speedlayer.supervisor.errors import NoDaemon, Refused

Command = TypeVar("Command", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def example(*lines: str) -> str:
    """Return the examples of a command, for the end of its help."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def daemon_options(command: Command) -> Command:
    """Add the options that name a daemon and bound the wait for its answer."""
    for add in (
        click.option(
            "--timeout",
            "timeout_seconds",
            type=click.FloatRange(min=0.1),
            help="How many seconds to wait for the answer.",
        ),
        click.option("--group", "group_id", help="The consumer group of the daemon, if several run."),
        click.option(
            "--socket",
            type=click.Path(path_type=Path),
            envvar="SPEEDLAYER_SOCKET",
            help="The control socket of the daemon, if it is not the default one of its group.",
        ),
    ):
        command = add(command)
    return command


def ask(
    command: str,
    socket: Optional[Path],
    group_id: Optional[str],
    timeout_seconds: Optional[float],
    **arguments: Any,
) -> dict[str, Any]:
    """Ask the daemon, and return its answer; raises `Refused` with its words if it can not do it."""
    client = ControlClient(socket_path(socket, group_id))
    given = {name: value for name, value in arguments.items() if value is not None}
    answer = client.call(command, timeout_seconds, **given)
    if answer.get("ok") is False:
        raise Refused(str(answer.get("error", "the daemon gave no reason")))
    return answer


def socket_path(socket: Optional[Path], group_id: Optional[str]) -> Path:
    """Return the socket that was named, or that of the only daemon of this user."""
    if socket is not None:
        return socket
    if group_id is not None:
        return control.default_path(group_id)
    alive = control.live_sockets()
    if not alive:
        raise NoDaemon(
            f"no daemon of this user listens in {control.default_directory()}; start one with `speedlayer run FILE`, "
            "or name its socket with --socket"
        )
    if len(alive) > 1:
        names = "\n".join(f"    {path}" for path in alive)
        raise click.UsageError(f"several daemons run; name one with --group or --socket:\n{names}")
    return alive[0]
