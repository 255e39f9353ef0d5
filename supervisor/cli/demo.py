"""`speedlayer demo`: the real command is loaded from `supervisor.demo`, with what it needs."""

from __future__ import annotations

import click

from speedlayer.supervisor.errors import MissingLibrary

_EXTRA = "the demo needs more libraries than the daemon: pip install 'speedlayer[demo]'"


def _load() -> click.Command:
    """Load the demo's command, or one that says what is missing."""
    try:
        from speedlayer.supervisor.demo.command import demo
    except ImportError as error:
        if error.name is not None and error.name.startswith("speedlayer"):
            raise  # a file of speedlayer itself is missing, which no extra brings
        missing = error.name
    else:
        return demo

    @click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
    def unavailable() -> None:
        """Black Friday on this machine (needs the extra `demo`)."""
        raise MissingLibrary(f"{_EXTRA} (there is no {missing})")

    return unavailable


demo = _load()
