"""The sections of a TOML file, as the TOML reader, `speedlayer config` and docs/configuration.md see them.

A section lists its keys with what the registry says of each. Most come from the settings classes; those of a
`PostgreSQLSink` stand here, with the defaults of the class itself.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from speedlayer.supervisor.settings import (
    REQUIRED,
    BrakeSettings,
    ControlSettings,
    HttpSettings,
    LogSettings,
    MemorySettings,
    PipelineSettings,
    Setting,
    ShutdownSettings,
    WatchdogSettings,
    WorkerSettings,
    settings_of,
)
from speedlayer.workers.sinks.postgres.rules import (
    BYTEA_ENCODINGS,
    EPOCH_UNITS,
    NON_FINITE_POLICIES,
    NUL_POLICIES,
)
from speedlayer.workers.sinks.postgres.sink import PostgreSQLSink


@dataclass(frozen=True)
class Entry:
    """One key of a section. ``target`` is the field or argument that takes its value."""

    key: str
    setting: Setting
    default: Any
    target: str

    @property
    def required(self) -> bool:
        """Whether a file must have the key."""
        return self.default is REQUIRED


@dataclass(frozen=True)
class Section:
    """One table of the TOML file. An open section takes any key (`[kafka]`)."""

    name: str
    meaning: str
    entries: tuple[Entry, ...]
    open: bool = False
    repeated: bool = False

    @property
    def title(self) -> str:
        """The section as TOML writes it."""
        return f"[[{self.name}]]" if self.repeated else f"[{self.name}]"

    def entry(self, key: str) -> Entry:
        """Return the entry of a key; raises `KeyError`."""
        for entry in self.entries:
            if entry.key == key:
                return entry
        raise KeyError(key)


def _entries_of(settings: type) -> tuple[Entry, ...]:
    return tuple(
        Entry(declared.name, setting, declared.default, declared.name) for declared, setting in settings_of(settings)
    )


def _sink_entry(key: str, target: str, setting: Setting) -> Entry:
    """Describe an argument of the sink. Its default is the sink's own, so that it is written once."""
    declared = {field.name: field for field in dataclasses.fields(PostgreSQLSink)}[target]
    return Entry(key, setting, declared.default, target)


def _kafka() -> tuple[Entry, ...]:
    return (
        Entry(
            "bootstrap.servers", Setting("text", "The brokers to ask first, `host:port`, with commas."), REQUIRED, ""
        ),
        Entry(
            "group.id",
            Setting("text", "The consumer group of every pipeline that has no `group_id`.", optional=True),
            None,
            "",
        ),
        Entry(
            "auto.offset.reset",
            Setting(
                "text",
                "Where a partition without a checkpoint begins, for every pipeline that has no `start`.",
                choices=("earliest", "latest", "error"),
            ),
            "earliest",
            "",
        ),
        Entry(
            "isolation.level",
            Setting(
                "text",
                "Whether messages of open and aborted transactions are left out.",
                choices=("read_committed", "read_uncommitted"),
            ),
            "read_committed",
            "",
        ),
    )


def _postgres() -> tuple[Entry, ...]:
    return (
        Entry(
            "dsn",
            Setting("text", "The database: `postgresql://user:password@host:port/database` or `key=value` pairs."),
            REQUIRED,
            "dsn",
        ),
        _sink_entry(
            "pooled",
            "pooled",
            Setting("boolean", "The database is reached through PgBouncer or another pooler of transactions."),
        ),
        _sink_entry(
            "connect_timeout_seconds",
            "connect_timeout_seconds",
            Setting("number", "How many seconds a connection may take to be made.", 1, 3600),
        ),
        _sink_entry(
            "lock_timeout_seconds",
            "lock_timeout_seconds",
            Setting(
                "number",
                "How many seconds a flush waits for a lock before it is rolled back and retried. A flush that waits "
                "is slow, which the brake counts; one that gave up is neither slow nor normal.",
                0.001,
                86_400,
            ),
        ),
    )


def _table() -> tuple[Entry, ...]:
    """Describe what a pipeline says of its table and its batches."""
    return (
        _sink_entry(
            "table",
            "table",
            Setting("text", 'The table, as SQL names it: `public.orders`, `public."Mixed Case"`.'),
        ),
        _sink_entry(
            "mode",
            "mode",
            Setting(
                "text",
                "`append` adds a row for every record, `upsert` keeps the newest row of each key. Without it: "
                "`append`, which is refused where there is a `key`.",
                choices=("append", "upsert"),
                optional=True,
            ),
        ),
        _sink_entry(
            "key",
            "key",
            Setting("list of text", "The columns of the key of an upsert; the table needs a unique index on them."),
        ),
        _sink_entry(
            "unknown_fields",
            "unknown_fields",
            Setting(
                "text",
                "A field that is no column makes its record a dead letter (`error`) or is left out (`ignore`).",
                choices=("error", "ignore"),
            ),
        ),
        _sink_entry(
            "missing_fields",
            "missing_fields",
            Setting(
                "text",
                "A column that an upserted record does not mention takes its `default`, or `keep`s what the row has.",
                choices=("default", "keep"),
            ),
        ),
        _sink_entry(
            "null_values",
            "null_values",
            Setting(
                "text",
                "A message with an empty value becomes a `dead_letter`, or is counted as filtered (`skip`).",
                choices=("dead_letter", "skip"),
            ),
        ),
        _sink_entry(
            "bytea_encoding",
            "bytea_encoding",
            Setting(
                "text",
                "How messages write bytes: `hex` (with or without `\\x`) or `base64`. Anything else is a dead letter.",
                choices=BYTEA_ENCODINGS,
            ),
        ),
        _sink_entry(
            "epoch_unit",
            "epoch_unit",
            Setting(
                "text",
                "What a number counts that goes into a column of a date or time: since 1970 in UTC, since midnight, or "
                "a duration (see types.md). Without it such a number is a dead letter.",
                choices=EPOCH_UNITS,
                optional=True,
            ),
        ),
        _sink_entry(
            "nul_characters",
            "nul_characters",
            Setting(
                "text",
                "A NUL character, which PostgreSQL's text can not hold: its record becomes a `dead_letter`, or the NUL "
                "is left out (`strip`) or becomes U+FFFD (`replace`).",
                choices=NUL_POLICIES,
            ),
        ),
        _sink_entry(
            "non_finite_numbers",
            "non_finite_numbers",
            Setting(
                "text",
                "`NaN`, `Infinity` and `-Infinity` (as texts) in columns of numbers: written as they are (`keep`), as "
                "NULL (`null`), or a `dead_letter`.",
                choices=NON_FINITE_POLICIES,
            ),
        ),
        _sink_entry(
            "max_message_bytes",
            "max_message_bytes",
            Setting(
                "integer",
                "A message whose key, value and headers have more bytes than this is a dead letter, which keeps this "
                "much of its key and value, and names their size and SHA-256.",
                1024,
                1 << 28,
            ),
        ),
        _sink_entry(
            "max_nesting_depth",
            "max_nesting_depth",
            Setting("integer", "A message with more objects and arrays inside each other is a dead letter.", 1, 900),
        ),
        _sink_entry(
            "max_headers",
            "max_headers",
            Setting("integer", "A message with more headers than this is a dead letter.", 0, 1_000_000),
        ),
        _sink_entry("create_table", "create_table", Setting("boolean", "Create the table where it is missing.")),
        _sink_entry(
            "columns",
            "columns",
            Setting(
                "table of text",
                "Columns and their types for `create_table`; without it they are read off the first records.",
                optional=True,
            ),
        ),
        _sink_entry("batch_rows", "batch_size", Setting("integer", "A batch closes at this many rows.", 1, 1_000_000)),
        _sink_entry(
            "batch_bytes",
            "batch_bytes",
            Setting(
                "integer",
                "A batch closes at this many bytes of keys and values. At most half of `[memory]` `budget_mb`, divided "
                "by `[workers]` `count` × `credit_flights` + the number of pipelines.",
                1024,
                1024**3,
            ),
        ),
        _sink_entry(
            "batch_seconds",
            "flush_interval_seconds",
            Setting("number", "A batch closes at this age in seconds.", 0.001, 3600),
        ),
    )


def _callables() -> tuple[Entry, ...]:
    meaning = "as `module:function`, looked for in the folder of this file first."
    return (
        Entry(
            "filter",
            Setting("text", f"Keeps the records for which it returns true; {meaning}", optional=True),
            None,
            "",
        ),
        Entry(
            "map", Setting("text", f"Makes the record to write from each record; {meaning}", optional=True), None, ""
        ),
    )


def _pipelines() -> tuple[Entry, ...]:
    """Order a pipeline's keys as a reader wants them: what it is, where it writes, how it behaves."""
    own = {entry.key: entry for entry in _entries_of(PipelineSettings)}
    for taken_from_kafka in ("group_id", "start"):
        entry = own[taken_from_kafka]
        setting = dataclasses.replace(entry.setting, optional=True)
        own[taken_from_kafka] = dataclasses.replace(entry, setting=setting, default=None)
    first = [own.pop(key) for key in ("name", "topics")]
    dsn = Entry("dsn", Setting("text", "Another database than that of `[postgres]`.", optional=True), None, "dsn")
    return (*first, *_table(), *_callables(), dsn, *own.values())


@functools.cache
def sections() -> tuple[Section, ...]:
    """Return the sections of a TOML file, in the order in which they are documented."""
    named: tuple[tuple[str, type], ...] = (
        ("workers", WorkerSettings),
        ("memory", MemorySettings),
        ("brake", BrakeSettings),
        ("shutdown", ShutdownSettings),
        ("watchdog", WatchdogSettings),
        ("control", ControlSettings),
        ("http", HttpSettings),
        ("log", LogSettings),
    )
    kafka = "Any property of librdkafka, but for those that speedlayer sets itself or that would break a promise."
    brake = "Overrides `[brake]` for the pipeline above it."
    inherited = tuple(
        dataclasses.replace(entry, setting=dataclasses.replace(entry.setting, optional=True), default=None)
        for entry in _entries_of(BrakeSettings)
    )
    return (
        Section("kafka", kafka, _kafka(), open=True),
        Section("postgres", "The database that the pipelines write to.", _postgres()),
        *(Section(name, _first_sentence(settings), _entries_of(settings)) for name, settings in named),
        Section("pipelines", "One pipeline: what it reads and where it writes.", _pipelines(), repeated=True),
        Section("pipelines.brake", brake, inherited),
    )


def section(name: str) -> Section:
    """Return the section of a name; raises `KeyError`."""
    for candidate in sections():
        if candidate.name == name:
            return candidate
    raise KeyError(name)


def _first_sentence(documented: type) -> str:
    return (documented.__doc__ or "").split("\n\n")[0].replace("\n    ", " ")
