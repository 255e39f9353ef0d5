"""Every setting of the daemon: its default, its range and its meaning, each written once (supervisor process).

The dataclasses below are what the whole supervisor reads. The metadata of their fields is the registry: it drives the
validation, the TOML reader (`toml_settings`), `speedlayer config` and docs/configuration.md. An instance is valid by
construction: `__post_init__` raises `InvalidSetting` for a value of the wrong type or out of its range.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Optional

from speedlayer.supervisor.errors import ConfigurationError, InvalidSetting

if TYPE_CHECKING:
    from speedlayer.workers.sinks.base import Sink
    from speedlayer.workers.transform import Step

BYTES_PER_MB = 1024 * 1024

# The part of the memory budget that batches of full size take together. A quarter is librdkafka's to prefetch; what is
# left lets reading go on while they are written.
FLIGHT_SHARE = 0.5

# A batch smaller than this costs more for its transaction than for its rows.
SMALLEST_BATCH_BYTES = 64 * 1024


# --- The registry -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What is known of one setting besides its name and default: the kind of its value, its range, its meaning."""

    kind: Literal["integer", "number", "boolean", "text", "list of text", "table of text"]
    meaning: str
    minimum: Optional[float] = None
    maximum: Optional[float] = None
    choices: tuple[str, ...] = ()
    optional: bool = False  # None is allowed: the setting is off, or taken from elsewhere

    def problem_with(self, value: object) -> Optional[str]:
        """Say what is wrong with a value, or None."""
        if value is None:
            return None if self.optional else f"needs a value ({self.range})"
        if not self._has_right_type(value):
            return "is empty" if value == "" else f"{shown(value)} is not {self.range}"
        if self.choices and value not in self.choices:
            return f"{shown(value)} is not one of {', '.join(self.choices)}"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            below = self.minimum is not None and value < self.minimum
            above = self.maximum is not None and value > self.maximum
            if below or above or value != value:  # the last is not-a-number
                return f"{shown(value)} is out of range ({self.range})"
        return None

    def _has_right_type(self, value: object) -> bool:
        if self.kind == "boolean":
            return isinstance(value, bool)
        if isinstance(value, bool):
            return False
        if self.kind == "integer":
            return isinstance(value, int)
        if self.kind == "number":
            return isinstance(value, (int, float))
        if self.kind == "text":
            return isinstance(value, str) and value != ""
        if self.kind == "table of text":
            return isinstance(value, Mapping) and all(isinstance(item, str) and item for item in value.values())
        return isinstance(value, (list, tuple)) and all(isinstance(item, str) and item for item in value)

    @property
    def range(self) -> str:
        """What values the setting takes, for people."""
        if self.choices:
            return " | ".join(self.choices)
        name = _KIND_NAMES[self.kind]
        if self.minimum is None and self.maximum is None:
            return name
        if self.maximum is None:
            return f"{name} of at least {self.minimum:,}"
        return f"{name} from {self.minimum:,} to {self.maximum:,}"


_KIND_NAMES = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "text": "a text",
    "list of text": "a list of texts",
    "table of text": "a table of texts",
}


def shown(value: object) -> str:
    """Show a value as TOML writes it, so that an error can be compared with the file."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(shown(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} = {shown(item)}" for name, item in value.items()) + "}"
    return str(value)


def suggestion(name: str, valid: Iterable[str]) -> str:
    """Return ``; did you mean "…"?`` for the nearest valid name, or nothing if none is near."""
    nearest = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {shown(nearest[0])}?" if nearest else ""


# The default of a setting that has none.
REQUIRED: Any = dataclasses.MISSING


def integer(default: Any, meaning: str, minimum: Optional[int] = None, maximum: Optional[int] = None) -> Any:
    """Declare a field that is an integer setting."""
    return field(default=default, metadata={"setting": Setting("integer", meaning, minimum, maximum)})


def number(default: Any, meaning: str, minimum: Optional[float] = None, maximum: Optional[float] = None) -> Any:
    """Declare a field that is a setting of whole or broken numbers."""
    return field(default=default, metadata={"setting": Setting("number", meaning, minimum, maximum)})


def text(default: Any, meaning: str, optional: bool = False) -> Any:
    """Declare a field that is a text setting."""
    return field(default=default, metadata={"setting": Setting("text", meaning, optional=optional)})


def choice(default: Any, meaning: str, *choices: str) -> Any:
    """Declare a field whose value is one of a few words."""
    return field(default=default, metadata={"setting": Setting("text", meaning, choices=choices)})


def texts(default: Any, meaning: str) -> Any:
    """Declare a field that is a list of texts."""
    return field(default=default, metadata={"setting": Setting("list of text", meaning)})


def settings_of(section: type) -> Iterator[tuple[dataclasses.Field[Any], Setting]]:
    """Yield the fields of a settings class that are settings, in their order."""
    for declared in dataclasses.fields(section):
        if "setting" in declared.metadata:
            yield declared, declared.metadata["setting"]


class _Checked:
    """A settings class whose instances are valid by construction."""

    def __post_init__(self) -> None:
        for declared, setting in settings_of(type(self)):
            problem = setting.problem_with(getattr(self, declared.name))
            if problem is not None:
                raise InvalidSetting(declared.name, problem)


# --- The sections -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BrakeSettings(_Checked):
    """The three strikes. A pipeline's own come from its sink or `[pipelines.brake]`, else from `[brake]`."""

    mode: Literal["simple"] = choice("simple", "How the brake decides: `simple` is three strikes.", "simple")
    slow_flush_threshold: float = number(
        2.0,
        "A flush that takes longer than this many seconds adds 1 to the slow count, any other takes 1 off.",
        0.001,
        3600,
    )
    max_slow_flushes: int = integer(
        3, "The slow count at which the sink is overloaded and its pipeline pauses.", 1, 1000
    )
    pause_seconds: float = number(5.0, "How many seconds consumption pauses when the sink is overloaded.", 0.1, 3600)


@dataclass(frozen=True)
class WorkerSettings(_Checked):
    """The worker processes, which decode, transform and write."""

    count: int = integer(2, "How many worker processes decode, transform and write.", 1, 64)
    start_method: Literal["spawn", "forkserver"] = choice(
        "spawn",
        "How worker processes are started. `fork` is not offered: librdkafka does not survive it.",
        "spawn",
        "forkserver",
    )
    credit_flights: int = integer(
        2,
        "How many flights of each pipeline one worker holds at most: one being written, the others in its queue.",
        1,
        64,
    )


@dataclass(frozen=True)
class MemorySettings(_Checked):
    """The one budget for messages that are read and not yet written."""

    budget_mb: int = integer(
        256,
        "Megabytes of messages that the daemon holds at most: prefetched, assembled, queued and being written. "
        "What Python and its libraries take comes on top, for each process.",
        16,
        1_048_576,
    )

    @property
    def budget_bytes(self) -> int:
        """The budget in bytes."""
        return self.budget_mb * BYTES_PER_MB


@dataclass(frozen=True)
class ShutdownSettings(_Checked):
    """How the daemon stops."""

    deadline_seconds: float = number(
        30.0,
        "How many seconds a stop (SIGTERM, SIGINT) may take: what is read is written if it can be; what is not written "
        "by then is read again at the next start.",
        1,
        3600,
    )


@dataclass(frozen=True)
class WatchdogSettings(_Checked):
    """The watchdog, which repairs what stands still without a reason."""

    stall_seconds: float = number(
        30.0,
        "How many seconds a partition with messages to read, or a worker, may stand still before the watchdog repairs "
        "it; each further remedy is given as long. At least twice the longest `connect_timeout_seconds`.",
        10,
        3600,
    )
    user_code_seconds: float = number(
        60.0,
        "How many seconds the filters and maps may take for one record, or decoding for one batch. A worker that takes "
        "longer hangs: it is killed, and the message on which it hangs again and again becomes a dead letter.",
        1,
        86_400,
    )


@dataclass(frozen=True)
class ControlSettings(_Checked):
    """The Unix socket that the commands talk to."""

    socket: Optional[str] = text(
        None,
        "Path of the control socket. Without it, a path for the consumer group: "
        "`$XDG_RUNTIME_DIR/speedlayer/GROUP-HASH.sock`, else `/tmp/speedlayer-UID/GROUP-HASH.sock`.",
        optional=True,
    )


@dataclass(frozen=True)
class HttpSettings(_Checked):
    """The HTTP server for metrics and health."""

    listen: Optional[str] = text(
        None,
        "`host:port` on which /metrics, /healthz and /readyz are served; off without it. A port alone (`:9187`) means "
        "127.0.0.1. Needs the extra `metrics`.",
        optional=True,
    )


@dataclass(frozen=True)
class LogSettings(_Checked):
    """The log, which the supervisor alone writes, to standard error."""

    level: Literal["debug", "info", "warning", "error"] = choice(
        "info", "The least severe log lines that are written.", "debug", "info", "warning", "error"
    )
    format: Literal["text", "json"] = choice(
        "text", "`text` is for people, `json` writes one JSON object a line.", "text", "json"
    )


# The longest pipeline name: it is stored with every checkpoint and shown in every table.
PIPELINE_NAME_LIMIT = 200


@dataclass(frozen=True, kw_only=True)
class PipelineSettings(_Checked):
    """One pipeline: the topics it reads, as which group, the steps it applies, and the sink it writes to.

    ``name`` keys the pipeline's checkpoints. ``brake`` is resolved: what the sink sets stands over what the engine
    sets. ``steps`` are the filters and maps, in order.
    """

    name: str = text(
        REQUIRED,
        "Names the pipeline in its checkpoints, in logs and in commands; under a new name it has no checkpoints.",
    )
    topics: tuple[str, ...] = texts(REQUIRED, "The topics that are read.")
    group_id: str = text(REQUIRED, "The consumer group of this pipeline; without it `[kafka]` `group.id`.")
    sink: Sink
    steps: tuple[Step, ...] = ()
    brake: BrakeSettings = field(default_factory=BrakeSettings)
    start: Literal["earliest", "latest", "error"] = choice(
        "earliest",
        "Where a partition without a checkpoint begins; `error` stops it until `offsets seek` decides. "
        "Without it, `[kafka]` `auto.offset.reset`.",
        "earliest",
        "latest",
        "error",
    )
    on_out_of_range: Literal["stop", "skip"] = choice(
        "stop",
        "What happens when Kafka no longer has the next offset: `stop` the partition and name the gap, or `skip` the "
        "gap and record it in `speedlayer.gaps`.",
        "stop",
        "skip",
    )
    dead_letter_ratio: float = number(
        0.1,
        "The pipeline stops when more than this share of its messages become dead letters within the window; "
        "1 never stops it.",
        0,
        1,
    )
    dead_letter_minimum: int = integer(
        100, "Fewer messages than this within the window never stop the pipeline.", 1, 1_000_000_000
    )
    dead_letter_window_seconds: float = number(
        60.0, "Length in seconds of the window over which dead letters are judged.", 1, 86_400
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.topics:
            raise InvalidSetting("topics", "the pipeline reads no topic")
        if len(self.name) > PIPELINE_NAME_LIMIT or not self.name.isprintable():
            raise InvalidSetting(
                "name", f"{shown(self.name)} is not a printable name of at most {PIPELINE_NAME_LIMIT} characters"
            )
        repeated = sorted({topic for topic in self.topics if self.topics.count(topic) > 1})
        if repeated:
            raise InvalidSetting("topics", f"{', '.join(repeated)} is named twice")


@dataclass(frozen=True)
class DaemonSettings:
    """All settings of one daemon, valid as a whole. The supervisor reads nothing else.

    ``kafka`` holds the librdkafka properties of the user, already checked by `kafka_properties.check`, without
    ``group.id`` and without those that speedlayer owns. ``python_path`` is put in front of the workers' path.
    ``source_file`` is the file that the settings come from, if any.
    """

    kafka: Mapping[str, Any]
    pipelines: tuple[PipelineSettings, ...]
    workers: WorkerSettings = field(default_factory=WorkerSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    shutdown: ShutdownSettings = field(default_factory=ShutdownSettings)
    watchdog: WatchdogSettings = field(default_factory=WatchdogSettings)
    control: ControlSettings = field(default_factory=ControlSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    log: LogSettings = field(default_factory=LogSettings)
    python_path: tuple[str, ...] = ()
    source_file: Optional[str] = None

    def __post_init__(self) -> None:
        if not self.pipelines:
            raise InvalidSetting("pipelines", "there is no pipeline; a pipeline is a source and a sink")
        _refuse_repeated_names(self.pipelines)
        _refuse_shared_topics(self.pipelines)

    @property
    def group_ids(self) -> tuple[str, ...]:
        """The consumer groups, each once, in the order of their first pipeline."""
        return tuple(dict.fromkeys(pipeline.group_id for pipeline in self.pipelines))

    def pipelines_of(self, group_id: str) -> tuple[PipelineSettings, ...]:
        """Return the pipelines that read as this group."""
        return tuple(pipeline for pipeline in self.pipelines if pipeline.group_id == group_id)

    def pipeline(self, name: str) -> PipelineSettings:
        """Return the pipeline of this name; raises `KeyError`."""
        for pipeline in self.pipelines:
            if pipeline.name == name:
                return pipeline
        raise KeyError(name)

    @property
    def batch_bytes_limit(self) -> int:
        """The most bytes that one batch may have under the memory budget.

        Half the budget, divided by ``workers.credit_flights`` in the hands of each worker and one that each pipeline is
        assembling. With several pipelines there may be more, since the credit is for each; then their shares of the
        buffer are the bound.
        """
        batches = self.workers.count * self.workers.credit_flights + len(self.pipelines)
        return max(SMALLEST_BATCH_BYTES, int(self.memory.budget_bytes * FLIGHT_SHARE / batches))

    def batch_bytes_of(self, pipeline: PipelineSettings) -> int:
        """Return the bytes at which a batch of this pipeline closes: its sink's ``batch_bytes`` within the limit."""
        return min(pipeline.sink.batch_bytes, self.batch_bytes_limit)


def _refuse_repeated_names(pipelines: tuple[PipelineSettings, ...]) -> None:
    names = [pipeline.name for pipeline in pipelines]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(
                f"two pipelines are named {shown(name)}; the name keys the checkpoints, so each pipeline needs its own"
            )


def _refuse_shared_topics(pipelines: tuple[PipelineSettings, ...]) -> None:
    """Refuse two pipelines of one group on one topic: Kafka hands a partition to a group once."""
    readers: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for pipeline in pipelines:
        for topic in pipeline.topics:
            readers[pipeline.group_id, topic].append(pipeline.name)
    for (group_id, topic), names in readers.items():
        if len(names) > 1:
            raise ConfigurationError(
                f"the pipelines {' and '.join(shown(name) for name in names)} both read the topic {shown(topic)} in "
                f"the consumer group {shown(group_id)}; a group gets each message once, so give one of them a "
                f"group_id of its own"
            )
