"""`speedlayer run`: becomes the daemon (supervisor process)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional

import click

from speedlayer.supervisor.cli.daemon import example


@click.command(
    epilog=example(
        "speedlayer run speedlayer.toml",
        "speedlayer run pipelines.py --engine orders --http :9187 --log-format json",
    )
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--engine", help="The variable that holds the engine, if a .py file has several.")
@click.option("--socket", type=click.Path(path_type=Path), help="The control socket, instead of the group's default.")
@click.option("--http", "listen", metavar="HOST:PORT", help="Serve metrics and health here.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="The least severe lines.")
@click.option("--log-format", type=click.Choice(["text", "json"]), help="For people, or one JSON object a line.")
def run(
    file: Path,
    engine: Optional[str],
    socket: Optional[Path],
    listen: Optional[str],
    log_level: Optional[str],
    log_format: Optional[str],
) -> None:
    """Run the daemon on FILE, a .toml file or a .py file with an engine, until a signal ends it.

    SIGTERM and SIGINT stop it in good order: what is read is written, within the shutdown deadline; a second one
    hurries it.
    """
    from speedlayer.supervisor.launch import run_daemon
    from speedlayer.supervisor.targets import load_settings, override

    settings = override(
        load_settings(file, engine), socket=socket, listen=listen, log_level=log_level, log_format=log_format
    )
    sys.exit(run_daemon(settings))
