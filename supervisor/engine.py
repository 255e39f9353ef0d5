"""The Python interface: an engine, its dataframes and their sinks (built in the user's program, supervisor process).

Building pipelines does nothing but remember them; `SimpleStreamingEngine.run` turns them into settings and becomes the
daemon. A worker may import the user's file again, so nothing here may load the Kafka library or touch the outside.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional, Union, cast

from speedlayer.supervisor import kafka_properties, main_guard
from speedlayer.supervisor.errors import ConfigurationError, InvalidSetting
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
)
from speedlayer.supervisor.sources import KafkaSource

if TYPE_CHECKING:
    from speedlayer.workers.sinks.base import Sink
    from speedlayer.workers.transform import Step


@dataclass(frozen=True)
class _Pipeline:
    """What `StreamingDataFrame.sink` hands to the engine."""

    name: str
    source: KafkaSource
    steps: tuple[Step, ...]
    sink: Sink
    dead_letters: Mapping[str, Any]


class StreamingDataFrame:
    """A stream of records on its way to a sink. It never changes: `filter` and `map` return a new one."""

    def __init__(
        self, engine: SimpleStreamingEngine, source: KafkaSource, name: str, steps: tuple[Step, ...] = ()
    ) -> None:
        self._engine = engine
        self._source = source
        self._name = name
        self._steps = steps

    @property
    def name(self) -> str:
        """The pipeline's name, which keys its checkpoints."""
        return self._name

    def filter(self, function: Callable[[Any], Any]) -> StreamingDataFrame:
        """Keep the records for which the function returns true. It runs in the workers."""
        return self._with("filter", function)

    def map(self, function: Callable[[Any], Any]) -> StreamingDataFrame:
        """Replace each record by what the function returns. It runs in the workers."""
        return self._with("map", function)

    def _with(self, kind: Literal["filter", "map"], function: Callable[[Any], Any]) -> StreamingDataFrame:
        from speedlayer.workers.transform import Step

        if not callable(function):
            raise InvalidSetting(kind, f"{function!r} is not a function of one record")
        return StreamingDataFrame(self._engine, self._source, self._name, (*self._steps, Step(kind, function)))

    def sink(
        self,
        sink: Sink,
        *,
        dead_letter_ratio: float = 0.1,
        dead_letter_minimum: int = 100,
        dead_letter_window_seconds: float = 60.0,
    ) -> None:
        """Write the records to a sink; this completes the pipeline.

        It stops when, of at least ``dead_letter_minimum`` messages within ``dead_letter_window_seconds``, more than
        the share ``dead_letter_ratio`` became dead letters.
        """
        dead_letters = {
            "dead_letter_ratio": dead_letter_ratio,
            "dead_letter_minimum": dead_letter_minimum,
            "dead_letter_window_seconds": dead_letter_window_seconds,
        }
        self._engine._add(_Pipeline(self._name, self._source, self._steps, sink, dead_letters))


class SimpleStreamingEngine:
    """Reads topics, applies filters and maps in worker processes, and writes to sinks, exactly once.

    ``config`` holds the properties of librdkafka, ``bootstrap.servers`` and ``group.id`` among them. ``brake`` takes
    `BrakeSettings` or a mapping of its fields, and holds for every sink that does not set its own. What the arguments
    mean, their defaults and ranges stand in docs/configuration.md.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        workers: int = 2,
        memory_budget_mb: int = 256,
        brake: Union[BrakeSettings, Mapping[str, Any], None] = None,
        start_method: Literal["spawn", "forkserver"] = "spawn",
        credit_flights: int = 2,
        shutdown_deadline_seconds: float = 30.0,
        stall_seconds: float = 30.0,
        user_code_seconds: float = 60.0,
        control_socket: Optional[str] = None,
        http_listen: Optional[str] = None,
        log_level: Literal["debug", "info", "warning", "error"] = "info",
        log_format: Literal["text", "json"] = "text",
    ) -> None:
        self._kafka = kafka_properties.check(config)
        self._brake = _brake_of(brake)
        self._sections: dict[str, Any] = {
            "workers": _made(WorkerSettings, count=workers, start_method=start_method, credit_flights=credit_flights),
            "memory": _made(MemorySettings, budget_mb=memory_budget_mb),
            "shutdown": _made(ShutdownSettings, deadline_seconds=shutdown_deadline_seconds),
            "watchdog": _made(WatchdogSettings, stall_seconds=stall_seconds, user_code_seconds=user_code_seconds),
            "control": _made(ControlSettings, socket=control_socket),
            "http": _made(HttpSettings, listen=http_listen),
            "log": _made(LogSettings, level=log_level, format=log_format),
        }
        self._pipelines: list[_Pipeline] = []

    def dataframe(self, source: KafkaSource, name: Optional[str] = None) -> StreamingDataFrame:
        """Begin a pipeline that reads the source.

        ``name`` (default: the topic) keys the pipeline's checkpoints: under a new name it has none.
        """
        if not isinstance(source, KafkaSource):
            raise InvalidSetting("source", f'{source!r} is not a KafkaSource, such as KafkaSource("orders")')
        return StreamingDataFrame(self, source, source.default_name if name is None else name)

    def _add(self, pipeline: _Pipeline) -> None:
        if any(other.name == pipeline.name for other in self._pipelines):
            raise ConfigurationError(
                f"two pipelines are named {shown(pipeline.name)}; the name keys the checkpoints, so give each its own: "
                f"engine.dataframe(source, name=…)"
            )
        self._pipelines.append(pipeline)

    def settings(self, source_file: Optional[Path] = None) -> DaemonSettings:
        """Return the settings of the daemon that `run` starts; raises `ConfigurationError`.

        ``source_file`` is the file that the engine was found in; the workers import from its folder.
        """
        file = source_file or _main_file()
        kafka_properties.check_with_librdkafka(self._kafka.properties)
        return DaemonSettings(
            kafka=self._kafka.properties,
            pipelines=tuple(self._settings_of(pipeline) for pipeline in self._pipelines),
            python_path=(str(file.resolve().parent),) if file else (),
            source_file=str(file) if file else None,
            **self._sections,
        )

    def _settings_of(self, pipeline: _Pipeline) -> PipelineSettings:
        source = pipeline.source
        group_id = source.group_id or self._kafka.group_id
        if group_id is None:
            raise InvalidSetting("group.id", "needs a value: the consumer group that the daemon reads as")
        try:
            return PipelineSettings(
                name=pipeline.name,
                topics=source.topics,
                group_id=group_id,
                sink=pipeline.sink,
                steps=pipeline.steps,
                brake=_brake_for(pipeline.sink, self._brake),
                start=source.start or self._kafka.start,  # type: ignore[arg-type]
                on_out_of_range=source.on_out_of_range,
                **pipeline.dead_letters,
            )
        except InvalidSetting as error:
            raise InvalidSetting(f"pipeline {shown(pipeline.name)}: {error.key}", error.problem) from error

    def run(self) -> None:
        """Run the daemon in this process until a signal ends it.

        Returns when it stopped in good order; otherwise the process exits with a code of docs/exit-codes.md.
        """
        from speedlayer.supervisor.launch import run_or_exit

        def settings() -> DaemonSettings:
            main_guard.require()
            return self.settings()

        run_or_exit(settings)


# How the arguments of the engine are called whose settings have another name.
_ARGUMENTS = {
    "count": "workers",
    "budget_mb": "memory_budget_mb",
    "deadline_seconds": "shutdown_deadline_seconds",
    "socket": "control_socket",
    "listen": "http_listen",
    "level": "log_level",
    "format": "log_format",
}


def _made(section: Callable[..., Any], **values: Any) -> Any:
    """Make a section of the settings; an error names the engine's argument."""
    try:
        return section(**values)
    except InvalidSetting as error:
        raise InvalidSetting(_ARGUMENTS.get(error.key, error.key), error.problem) from error


def _brake_of(given: Union[BrakeSettings, Mapping[str, Any], None]) -> BrakeSettings:
    if given is None or isinstance(given, BrakeSettings):
        return given or BrakeSettings()
    known = [declared.name for declared in fields(BrakeSettings)]
    for name in given:
        if name not in known:
            raise InvalidSetting(f"brake.{name}", f"is not one of {', '.join(known)}")
    return cast(BrakeSettings, _made(BrakeSettings, **given))


def _brake_for(sink: Sink, brake: BrakeSettings) -> BrakeSettings:
    """Resolve the three strikes of a pipeline: what its sink sets stands over what the engine sets."""
    names = ("slow_flush_threshold", "max_slow_flushes", "pause_seconds")
    own = {name: getattr(sink, name) for name in names if getattr(sink, name) is not None}
    return replace(brake, **own)


def _main_file() -> Optional[Path]:
    """Return the file of the program, None in an interactive one."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    return Path(file) if file else None
