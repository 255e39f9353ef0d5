"""`Unwritable`: why a value can not be given to the server at all. Runs in the worker."""

from __future__ import annotations

from typing import Optional


class Unwritable(ValueError):
    """A value that no text can be given for; the message is the reason of its dead letter."""

    def __init__(self, reason: str, sqlstate: Optional[str] = None) -> None:
        super().__init__(reason)
        self.sqlstate = sqlstate
