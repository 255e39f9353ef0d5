"""Reads a daemon's settings from a TOML file (supervisor process; `run FILE.toml` and `check FILE.toml`).

Every error names the file, the key with its dotted path (``pipelines[0].batch_rows``) and, where one is near, the key
or variable that was probably meant.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional

from speedlayer.supervisor import kafka_properties
from speedlayer.supervisor.errors import ConfigurationError, InvalidSetting
from speedlayer.supervisor.kafka_properties import KafkaProperties
from speedlayer.supervisor.sections import Section, section, sections
from speedlayer.supervisor.settings import (
    BrakeSettings,
    ControlSettings,
    DaemonSettings,
    HttpSettings,
    LogSettings,
    MemorySettings,
    PipelineSettings,
    ShutdownSettings,
    WatchdogSettings,
    WorkerSettings,
    shown,
    suggestion,
)
from speedlayer.workers.sinks.postgres.sink import PostgreSQLSink
from speedlayer.workers.transform import Step, load_user_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

_ONE_OF_EACH: dict[str, Callable[..., Any]] = {
    "workers": WorkerSettings,
    "memory": MemorySettings,
    "shutdown": ShutdownSettings,
    "watchdog": WatchdogSettings,
    "control": ControlSettings,
    "http": HttpSettings,
    "log": LogSettings,
}


def load_toml(path: Path, environment: Optional[Mapping[str, str]] = None) -> DaemonSettings:
    """Read the settings of a TOML file; raises `ConfigurationError`."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path} can not be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from error
    try:
        return _Reader(path, os.environ if environment is None else environment).read(document)
    except InvalidSetting as error:
        raise ConfigurationError(f"{path}: {error.key}: {error.problem}") from error


class _Reader:
    """Turns the document of one file into settings."""

    def __init__(self, path: Path, environment: Mapping[str, str]) -> None:
        self._path = path
        self._environment = environment
        self._functions = _Functions(path.resolve().parent)

    def read(self, document: dict[str, Any]) -> DaemonSettings:
        expanded = expand(document, self._environment)
        _refuse_unknown_sections(expanded)
        kafka = self._kafka(_table_of(expanded, "kafka"))
        postgres = _values(section("postgres"), _table_of(expanded, "postgres"), "postgres", optional=("dsn",))
        brake = _values(section("brake"), _table_of(expanded, "brake"), "brake")
        pipelines = tuple(
            self._pipeline(table, f"pipelines[{index}]", kafka, postgres, brake)
            for index, table in enumerate(_tables_of(expanded, "pipelines"))
        )
        singles = {
            name: make(**_values(section(name), _table_of(expanded, name), name)) for name, make in _ONE_OF_EACH.items()
        }
        try:
            return DaemonSettings(
                kafka=kafka.properties,
                pipelines=pipelines,
                python_path=(str(self._path.resolve().parent),),
                source_file=str(self._path),
                **singles,
            )
        except InvalidSetting:
            raise
        except ConfigurationError as error:
            raise InvalidSetting("pipelines", str(error)) from error

    def _kafka(self, table: dict[str, Any]) -> KafkaProperties:
        try:
            checked = kafka_properties.check(flatten(table))
            kafka_properties.check_with_librdkafka(checked.properties)
        except InvalidSetting as error:
            raise InvalidSetting(f"kafka.{shown(error.key)}", error.problem) from error
        return checked

    def _pipeline(
        self,
        table: dict[str, Any],
        prefix: str,
        kafka: KafkaProperties,
        postgres: dict[str, Any],
        brake: dict[str, Any],
    ) -> PipelineSettings:
        own_brake = _values(section("pipelines.brake"), _table_of(table, "brake", prefix), f"{prefix}.brake")
        own = {key: value for key, value in table.items() if key != "brake"}
        values = _values(section("pipelines"), own, prefix)
        settings = {
            "group_id": kafka.group_id,
            "start": kafka.start,
            "steps": self._steps(values, prefix),
            "sink": _sink({**postgres, **values}, prefix),
            "brake": BrakeSettings(**{**brake, **own_brake}),
            **{name: value for name, value in values.items() if name in _PIPELINE_FIELDS},
        }
        settings["topics"] = tuple(settings["topics"])
        if settings["group_id"] is None:
            raise InvalidSetting('kafka."group.id"', f"needs a value, or {prefix} needs a group_id")
        try:
            return PipelineSettings(**settings)
        except InvalidSetting as error:
            raise InvalidSetting(f"{prefix}.{error.key}", error.problem) from error

    def _steps(self, values: dict[str, Any], prefix: str) -> tuple[Step, ...]:
        steps: list[Step] = []
        if "filter" in values:
            steps.append(Step("filter", self._functions.find(values["filter"], f"{prefix}.filter")))
        if "map" in values:
            steps.append(Step("map", self._functions.find(values["map"], f"{prefix}.map")))
        return tuple(steps)


# --- Tables and values --------------------------------------------------------------------------------------------


_PIPELINE_FIELDS = frozenset(PipelineSettings.__dataclass_fields__)
_SINK_FIELDS = frozenset(PostgreSQLSink.__dataclass_fields__)


def _refuse_unknown_sections(document: dict[str, Any]) -> None:
    known = [candidate.name for candidate in sections() if "." not in candidate.name]
    for key in document:
        if key not in known:
            raise InvalidSetting(key, f"is not a section ({', '.join(known)}){suggestion(key, known)}")


def _table_of(parent: dict[str, Any], key: str, prefix: str = "") -> dict[str, Any]:
    table = parent.get(key, {})
    if not isinstance(table, dict):
        path = f"{prefix}.{key}" if prefix else key
        raise InvalidSetting(path, f"{shown(table)} is not a table; write [{path}]")
    return table


def _tables_of(parent: dict[str, Any], key: str) -> list[dict[str, Any]]:
    tables = parent.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InvalidSetting(key, f"is not a list of tables; write [[{key}]] above each pipeline")
    return tables


def _values(known: Section, table: dict[str, Any], prefix: str, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """Check a table against its section and return the values under the names of their fields.

    Keys that the file leaves out are left out here too, and so take the default of their class.
    """
    keys = [entry.key for entry in known.entries]
    values = {}
    for key, written in table.items():
        if key not in keys:
            raise InvalidSetting(f"{prefix}.{key}", f"is not a key of {known.title}{suggestion(key, keys)}")
        entry = known.entry(key)
        value = _converted(written, entry.setting.kind)
        problem = entry.setting.problem_with(value)
        if problem is not None:
            raise InvalidSetting(f"{prefix}.{key}", problem)
        values[entry.target or key] = value
    for entry in known.entries:
        if entry.required and entry.key not in table and entry.key not in optional:
            raise InvalidSetting(f"{prefix}.{entry.key}", f"needs a value ({entry.setting.range})")
    return values


def _converted(value: Any, kind: str) -> Any:
    """Read the text of a variable as the kind that is wanted; what can not be read stays, and is refused as it is."""
    if not isinstance(value, Expanded):
        return value
    if kind == "boolean":
        return {"true": True, "false": False}.get(value.lower(), value)
    if kind in ("integer", "number"):
        try:
            return int(value) if kind == "integer" else float(value)
        except ValueError:
            return value
    return str(value)


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Join nested tables with dots: TOML reads an unquoted ``bootstrap.servers = …`` as a table in a table."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _sink(values: dict[str, Any], prefix: str) -> PostgreSQLSink:
    if "dsn" not in values:
        raise InvalidSetting("postgres.dsn", f"needs a value, or {prefix} needs a dsn")
    arguments = {name: value for name, value in values.items() if name in _SINK_FIELDS}
    try:
        return PostgreSQLSink(**arguments)
    except InvalidSetting as error:
        raise InvalidSetting(f"{prefix}.{error.key}", error.problem) from error
    except ConfigurationError as error:
        raise InvalidSetting(prefix, str(error)) from error


# --- Environment variables ----------------------------------------------------------------------------------------


class Expanded(str):
    """A text that came, whole or in part, from an environment variable: it may stand for a number or a truth value."""

    __slots__ = ()


# `$${` writes `${` itself; a `${` that is not closed, or holds no name, is matched to be refused.
_VARIABLE = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}|\$\{[^}]*\}?")


def expand(value: Any, environment: Mapping[str, str], path: str = "") -> Any:
    """Replace ``${NAME}`` and ``${NAME:-default}`` in every text of a document; ``$${`` stands for ``${``."""
    if isinstance(value, dict):
        return {key: expand(item, environment, f"{path}.{key}" if path else key) for key, item in value.items()}
    if isinstance(value, list):
        return [expand(item, environment, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, str) and "${" in value:
        return Expanded(_VARIABLE.sub(lambda match: _variable(match, environment, path), value))
    return value


def _variable(match: re.Match[str], environment: Mapping[str, str], path: str) -> str:
    written, name, default = match[0], match["name"], match["default"]
    if written == "$${":
        return "${"
    if name is None:
        raise InvalidSetting(path, f"{shown(written)} is not a variable; write ${{NAME}} or ${{NAME:-default}}")
    # As in a shell, `:-` covers a variable that is set to nothing as well.
    value = environment.get(name) if default is None else environment.get(name) or default
    if value is None:
        raise InvalidSetting(
            path,
            f"the environment variable {name} is not set; set it, or write ${{{name}:-default}}"
            + suggestion(name, environment),
        )
    return value


# --- Functions ----------------------------------------------------------------------------------------------------


class _Functions:
    """Finds ``module:function``; a module is loaded once, so that filter and map of a module share its globals."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._modules: dict[str, Any] = {}

    def find(self, written: str, key: str) -> Callable[[Any], Any]:
        module_name, separator, function_name = written.partition(":")
        if not separator or not module_name or not function_name:
            raise InvalidSetting(key, f'{shown(written)} is not "module:function"')
        module = self._module(module_name, key)
        function: Any = module
        for part in function_name.split("."):
            try:
                function = getattr(function, part)
            except AttributeError:
                near = suggestion(part, [name for name in vars(function) if not name.startswith("_")])
                raise InvalidSetting(key, f"the module {module_name} has no {function_name}{near}") from None
        if not callable(function):
            raise InvalidSetting(key, f"{written} is not a function")
        found: Callable[[Any], Any] = function
        return found

    def _module(self, name: str, key: str) -> Any:
        if name not in self._modules:
            self._modules[name] = self._load(name, key)
        return self._modules[name]

    def _load(self, name: str, key: str) -> Any:
        """Load a module of the TOML's folder as a user's file, and any other as an installed module."""
        file = self._folder.joinpath(*name.split(".")).with_suffix(".py")
        try:
            return load_user_file(file) if file.is_file() else importlib.import_module(name)
        except ConfigurationError as error:
            raise InvalidSetting(key, str(error)) from error
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0] and error.name != name:
                raise InvalidSetting(key, f"{name} can not be imported: {error}") from error
            near = suggestion(name, [path.stem for path in self._folder.glob("*.py")])
            raise InvalidSetting(key, f"there is no {file}, and no module {name} is installed{near}") from error
        except Exception as error:
            raise InvalidSetting(key, f"{name} can not be imported: {type(error).__name__}: {error}") from error
