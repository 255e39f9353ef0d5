"""What `run FILE` and `check FILE` are given: a .toml file, or a .py file with an engine (supervisor process)."""

from __future__ import annotations

import dataclasses
import sys
import traceback
from pathlib import Path
from typing import Any, Optional

from speedlayer.supervisor.engine import SimpleStreamingEngine
from speedlayer.supervisor.errors import ConfigurationError, SpeedlayerError
from speedlayer.supervisor.settings import DaemonSettings, shown, suggestion


def load_settings(file: Path, engine_name: Optional[str] = None) -> DaemonSettings:
    """Read the settings of a daemon from a file; raises `ConfigurationError`."""
    if not file.is_file():
        raise ConfigurationError(f"{file}: there is no such file")
    _import_from(file)
    if file.suffix == ".toml":
        from speedlayer.supervisor.toml_settings import load_toml

        return load_toml(file)
    if file.suffix == ".py":
        return _find_engine(file, engine_name).settings(file)
    raise ConfigurationError(f"{file}: neither a .toml file nor a .py file with a SimpleStreamingEngine")


def override(
    settings: DaemonSettings,
    *,
    socket: Optional[Path] = None,
    listen: Optional[str] = None,
    log_level: Optional[str] = None,
    log_format: Optional[str] = None,
) -> DaemonSettings:
    """Return the settings with what the command line says instead of the file."""
    sections: dict[str, dict[str, Any]] = {
        "control": {"socket": None if socket is None else str(socket)},
        "http": {"listen": listen},
        "log": {"level": log_level, "format": log_format},
    }
    changed = {}
    for name, values in sections.items():
        given = {key: value for key, value in values.items() if value is not None}
        if given:
            changed[name] = dataclasses.replace(getattr(settings, name), **given)
    return dataclasses.replace(settings, **changed)


def _import_from(file: Path) -> None:
    """Let the file import its neighbours, as `python FILE` would."""
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _line_of(error: BaseException, file: Path) -> str:
    """Name the line of the file that led to the error."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file.resolve())
    ]
    return f", line {lines[-1]}" if lines else ""


def _find_engine(file: Path, name: Optional[str]) -> SimpleStreamingEngine:
    from speedlayer.workers.transform import load_user_file

    try:
        names = vars(load_user_file(file))
    except SpeedlayerError as error:
        raise ConfigurationError(f"{file}: {error}") from error
    except Exception as error:  # whatever a user's file raises
        raise ConfigurationError(f"{file}{_line_of(error, file)}: {type(error).__name__}: {error}") from error
    engines = {key: value for key, value in names.items() if isinstance(value, SimpleStreamingEngine)}
    if name is not None:
        if name not in engines:
            found = f"its engines are {', '.join(engines)}" if engines else "it has none"
            raise ConfigurationError(f"{file} has no engine {shown(name)}; {found}{suggestion(name, engines)}")
        return engines[name]
    different = list({id(engine): engine for engine in engines.values()}.values())
    if not different:
        raise ConfigurationError(
            f"{file} has no SimpleStreamingEngine in a variable of its own (not inside a function)"
        )
    if len(different) > 1:
        raise ConfigurationError(f"{file} has several engines; choose one with --engine: {', '.join(engines)}")
    return different[0]
