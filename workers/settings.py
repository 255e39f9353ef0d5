"""What a worker is started with (made in the supervisor process, read in a worker)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

# The names of our backends begin with this, so that a backend can be told to be ours before it is ended.
APPLICATION_PREFIX = "speedlayer/"
APPLICATION_NAME_LIMIT = 63  # NAMEDATALEN - 1: the server cuts the rest off


def application_name(pipeline: str, worker: str) -> str:
    """The name by which `pg_stat_activity` shows a worker's backend."""
    name = f"{APPLICATION_PREFIX}{pipeline}/{worker}"
    return name.encode("ascii", "replace").decode("ascii")[:APPLICATION_NAME_LIMIT]


@dataclass(frozen=True)
class BootSpec:
    """Everything a new worker needs, as one value that dill can carry.

    ``sinks`` maps a pipeline to its dumped `Sink`, ``transforms`` to the output of `transform.pack` (a pipeline without
    steps is not in it). ``python_path`` goes in front of ``sys.path`` before either is loaded. The credits are what the
    worker grants for each pipeline: flights under way, and bytes of payload in them.
    """

    worker: str
    sinks: dict[str, bytes]
    transforms: dict[str, bytes] = field(default_factory=dict)
    python_path: list[str] = field(default_factory=list)
    credit_flights: int = 2
    credit_bytes: int = 16 * 1024 * 1024
    log_level: int = logging.INFO
