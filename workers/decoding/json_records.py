"""JSON messages to records, a whole flight in one call where that is safe. Runs in the worker."""

from __future__ import annotations

from typing import Any, Protocol

from speedlayer.workers.decoding.records import Records
from speedlayer.workers.protocol import Flight


class RecordDecoder(Protocol):
    """What `decode_flight` needs. `TableWriter.decoder()` makes the one that fits the table; `DictDecoder` needs none."""


class DictDecoder:
    """Records as plain dicts, for transforms and for sinks of one's own. ``exact`` keeps the digits of every number."""

    def __init__(self, *, exact: bool = True) -> None:
        raise NotImplementedError


def decode_flight(flight: Flight, decoder: Any) -> Records:
    """Decode every message of the flight; a message that is no JSON object becomes a `DeadRecord` with its reason."""
    raise NotImplementedError
