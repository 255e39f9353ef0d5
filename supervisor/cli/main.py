"""The command `speedlayer`: which commands there are, and how errors become exit codes (any process of the user)."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Optional

import click

from speedlayer.supervisor.errors import SpeedlayerError, exit_code_of
from speedlayer.supervisor.exit_codes import ExitCode

# Where each command is, and what it does in a few words: the list of commands must not load them all.
COMMANDS: dict[str, tuple[str, str]] = {
    "init": ("init", "Write a commented configuration file, or print the SQL for the database."),
    "run": ("run", "Run the daemon on a .toml or .py file."),
    "check": ("check", "Look for what would keep the pipelines from running; changes nothing."),
    "status": ("status", "Show what the running daemon does, and why."),
    "lag": ("status", "Show how far each partition is behind."),
    "pause": ("flow", "Stop reading; what is read already is kept."),
    "resume": ("flow", "Go on after a pause, a drain or a stop over dead letters."),
    "drain": ("flow", "Stop reading and write everything that is read already."),
    "offsets": ("offsets", "Show the offsets in PostgreSQL, or move them."),
    "demo": ("demo", "Black Friday on this machine: the brake at work, on embedded servers."),
    "config": ("config", "List every setting: default, range and meaning."),
}


class CommandError(click.ClickException):
    """An error that ends a command with a named exit code."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.exit_code = exit_code_of(error)  # type: ignore[misc]  # click reads it from the instance, too

    def show(self, file: Any = None) -> None:
        """Print the error for people."""
        click.echo(f"error: {self.message}", err=True)


class Commands(click.Group):
    """Loads a command when it is used, and ends it with the exit code of what went wrong."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in the order of their use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> Optional[click.Command]:
        """Load a command."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"speedlayer.supervisor.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without loading them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, meaning) for name, (_, meaning) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was given."""
        with _named_exit_codes():
            return super().invoke(ctx)


@contextlib.contextmanager
def _named_exit_codes() -> Iterator[None]:
    try:
        yield
    except SpeedlayerError as error:
        raise CommandError(error) from error
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        raise click.exceptions.Exit(ExitCode.INTERRUPTED) from None
    except BrokenPipeError:
        # `speedlayer status | head`: who reads has enough. Python must not try to flush once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise click.exceptions.Exit(ExitCode.OK) from None


@click.command(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog="`speedlayer COMMAND --help` has an example of each. Exit codes are named in docs/exit-codes.md.",
)
@click.version_option(package_name="speedlayer", prog_name="speedlayer")
def cli() -> None:
    """Kafka topics into PostgreSQL tables, exactly once, as fast as the database can bear and no faster."""


def main() -> None:
    """Run the command line of this process."""
    cli(prog_name="speedlayer")
