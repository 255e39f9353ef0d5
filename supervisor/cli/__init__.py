"""The command `speedlayer`.

Each group of commands has a file of its own, loaded when it is used: a worker imports the console script again, and
should not pay for commands that it never runs.
"""

from speedlayer.supervisor.cli.main import main

__all__ = ["main"]
