"""The user's filters and maps: packed once in the supervisor, unpacked and run in every worker.

dill pickles a function by value only if it can not find it by import. So a user's file is run under a private name that
is in no ``sys.modules`` (`load_user_file`), and then everything in it, helpers and globals included, travels as bytes.
With ``recurse`` dill takes along the globals that a function really uses, with the values they have when it is packed;
without it, a function of ``__main__`` would find none of them in the worker, or stale ones. Functions of modules that
can be imported go by name: the worker needs those modules on its path.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from speedlayer.workers.errors import ConfigurationError, SpeedlayerError, StreamingOverloadException
from speedlayer.workers.pickling import dumps, loads


class TransformError(SpeedlayerError):
    """A step of a transform could not take a record; the message names the step and what it raised."""


@dataclass(frozen=True)
class Step:
    """One step of a transform: a filter keeps records for which it returns true, a map returns the new record."""

    kind: Literal["filter", "map"]
    function: Callable[[Any], Any]

    @property
    def name(self) -> str:
        """The step as people know it: ``map add_vat``."""
        function = self.function
        name = getattr(function, "__qualname__", None) or type(function).__qualname__
        return f"{self.kind} {name.replace('<locals>.', '')}"


class Transform:
    """Steps in order, as one callable: the record to write, or None when a filter left it out.

    A map that returns None is an error: it more likely lacks a ``return`` than means to drop records, and dropping
    them is a filter's business, where it is counted.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)
        self.begun = 0  # records; that it rises tells slow code from code that hangs
        self._plan = [(step.kind == "filter", step.function) for step in self.steps]

    def __call__(self, record: Any) -> Any:
        """Run the steps; raises `TransformError`."""
        position = -1
        self.begun += 1
        try:
            for position, (is_filter, function) in enumerate(self._plan):  # noqa: B007
                if not is_filter:
                    record = function(record)
                    if record is None:
                        break
                elif not function(record):
                    return None
        except (StreamingOverloadException, MemoryError, KeyboardInterrupt):
            raise  # none is the record's fault: the batch is kept
        except BaseException as error:  # SystemExit, asyncio's CancelledError: the batch must not fail for ever
            raise TransformError(f"{self.steps[position].name}: {_said(error)}") from error
        if record is None:
            raise TransformError(f"{self.steps[position].name}: returned None instead of a record")
        return record


def _said(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def pack(steps: Sequence[Step]) -> bytes:
    """Pickle the steps with everything they use (supervisor side). Raises `ConfigurationError` naming the step."""
    packed = []
    for step in steps:
        if step.kind not in ("filter", "map"):
            raise ConfigurationError(f"a step is a filter or a map, not {step.kind!r}")
        if not callable(step.function):
            raise ConfigurationError(f"{step.kind}: {step.function!r} can not be called")
        try:
            packed.append((step.kind, dumps(step.function)))
        except Exception as error:  # whatever a user's __reduce__ raises
            raise ConfigurationError(
                f"{step.name} can not be sent to the workers: {_said(error)}. "
                "Make connections, locks and open files inside the function, on its first call"
            ) from error
    return dumps(packed)


def unpack(packed: bytes) -> Transform:
    """Load a packed transform (worker side). Raises `ConfigurationError` saying what is missing."""
    steps = []
    for kind, function in loads(packed):
        try:
            steps.append(Step(kind, loads(function)))
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                f"a {kind} needs the module {error.name!r}, which the workers can not import: install it, "
                "or put it next to the pipeline's file or on PYTHONPATH"
            ) from error
        except Exception as error:
            raise ConfigurationError(f"a {kind} can not be loaded in a worker: {_said(error)}") from error
    return Transform(steps)


def load_user_file(path: str | Path) -> ModuleType:
    """Run a user's .py file under a private module name, so that dill ships its functions by value.

    The file's folder goes to the front of ``sys.path``, as it would for ``python file.py``; the workers need it too.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise ConfigurationError(f"{path}: no such file")
    folder = str(file.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = f"_speedlayer_user_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"{path}: not a Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    # While it runs it must be found (dataclasses look their module up); later it must not (dill would go by its name).
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module
