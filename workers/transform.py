"""The user's filters and maps: packed once in the supervisor, unpacked and run in every worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal


@dataclass(frozen=True)
class Step:
    """One step of a transform: a filter keeps records for which it returns true, a map returns the new record."""

    kind: Literal["filter", "map"]
    function: Callable[[Any], Any]


class Transform:
    """Steps in order, as one callable: the record to write, or None when a filter left it out."""

    def __init__(self, steps: Sequence[Step]) -> None:
        raise NotImplementedError

    def __call__(self, record: Any) -> Any:
        raise NotImplementedError


def pack(steps: Sequence[Step]) -> bytes:
    """Pickle the steps with everything they use (supervisor side). Raises `ConfigurationError` naming the step."""
    raise NotImplementedError


def unpack(packed: bytes) -> Transform:
    """Load a packed transform (worker side). Raises `ConfigurationError` saying what is missing."""
    raise NotImplementedError


def load_user_file(path: str | Path) -> ModuleType:
    """Run a user's .py file under a private module name, so that dill ships its functions by value."""
    raise NotImplementedError
