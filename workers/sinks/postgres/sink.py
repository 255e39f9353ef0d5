"""`PostgreSQLSink`: where the rows go and how. Built in the supervisor, shipped to the workers, opened there.

It holds settings only. Every argument is checked when the sink is built, so that a typing error stops the user's
program with the argument's name, not a worker at its first flight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Optional

from speedlayer.workers.decoding.limits import MAX_HEADERS, MAX_MESSAGE_BYTES, MAX_NESTING_DEPTH, Limits
from speedlayer.workers.errors import ConfigurationError
from speedlayer.workers.sinks.base import Sink, SinkContext, SinkSession, columns_of
from speedlayer.workers.sinks.postgres.names import check_identifier, parse_table_name
from speedlayer.workers.sinks.postgres.rules import (
    BYTEA_ENCODINGS,
    EPOCH_UNITS,
    NON_FINITE_POLICIES,
    NUL_POLICIES,
    EpochUnit,
    ValueRules,
)


@dataclass(frozen=True, kw_only=True, repr=False)
class PostgreSQLSink(Sink):
    """A PostgreSQL table.

    ``dsn`` is a libpq connection string or URI. ``table`` is an SQL name: ``orders``, ``public."Mixed Case"``.

    ``mode`` "append" adds a row for each record; "upsert" keeps the last record of each ``key`` (column names, as they
    stand; the primary key if none is given). Without a mode, append. Naming a key without a mode is an error, since
    appending was hardly meant; with mode="append" a key only makes the primary key of a table that ``create_table``
    makes.

    ``unknown_fields``: a record with a field that no column has is a dead letter ("error"), or the field is left out
    ("ignore"). ``missing_fields``: where an upsert meets a row and the record lacks a field, the column takes its
    default ("default"; a computed default, such as a sequence or now(), stays as it is) or keeps its value ("keep").
    ``null_values``: a message without a value (a tombstone) is a dead letter or is filtered out ("skip").

    A message beyond ``max_message_bytes`` (key, value and headers), ``max_nesting_depth`` or ``max_headers`` is a dead
    letter, and is not decoded.

    ``bytea_encoding`` is how messages write bytes ("hex", with or without ``\\x``, or "base64"); ``epoch_unit`` what a
    number counts that goes into a date or time ("s", "ms", "us" or "ns"; without it such a number is a dead letter).
    ``nul_characters``: a NUL, which PostgreSQL's text can not hold, makes its record a dead letter, is left out
    ("strip"), or becomes U+FFFD ("replace"). ``non_finite_numbers``: NaN and infinities, written as texts, are written
    as they are ("keep"), become NULL ("null"), or make a dead letter. docs/types.md says what each type takes.

    ``create_table`` makes a missing table: with ``columns`` (name to SQL type), else inferred from the first records.

    ``pooled`` says that the dsn leads to a transaction pooler (PgBouncer): nothing then outlives a transaction.
    ``lock_timeout_seconds`` is how long a flush waits for a lock before it is tried again. It is long by default: a
    flush that waits is one slow flush for the brake, and one that gave up would be none.
    """

    dsn: str = field(kw_only=False)
    table: str
    key: str | Sequence[str] = ()
    mode: Optional[Literal["append", "upsert"]] = None
    unknown_fields: Literal["error", "ignore"] = "error"
    missing_fields: Literal["default", "keep"] = "default"
    null_values: Literal["dead_letter", "skip"] = "dead_letter"
    max_message_bytes: int = MAX_MESSAGE_BYTES
    max_nesting_depth: int = MAX_NESTING_DEPTH
    max_headers: int = MAX_HEADERS
    bytea_encoding: Literal["hex", "base64"] = "hex"
    epoch_unit: Optional[EpochUnit] = None
    nul_characters: Literal["dead_letter", "strip", "replace"] = "dead_letter"
    non_finite_numbers: Literal["keep", "null", "dead_letter"] = "keep"
    create_table: bool = False
    columns: Optional[Mapping[str, str]] = None
    pooled: bool = False
    lock_timeout_seconds: float = 600.0
    connect_timeout_seconds: float = 10.0

    def __post_init__(self) -> None:
        """Check every argument; raises `ConfigurationError` naming it."""
        _check_dsn(self.dsn)
        parse_table_name(self.table)
        object.__setattr__(self, "key", _checked_key(self.key))
        object.__setattr__(self, "mode", _checked_mode(self.mode, self.key_columns))
        _check_choice("unknown_fields", self.unknown_fields, ("error", "ignore"))
        _check_choice("missing_fields", self.missing_fields, ("default", "keep"))
        _check_choice("null_values", self.null_values, ("dead_letter", "skip"))
        _check_choice("bytea_encoding", self.bytea_encoding, BYTEA_ENCODINGS)
        if self.epoch_unit is not None:
            _check_choice("epoch_unit", self.epoch_unit, EPOCH_UNITS)
        _check_choice("nul_characters", self.nul_characters, NUL_POLICIES)
        _check_choice("non_finite_numbers", self.non_finite_numbers, NON_FINITE_POLICIES)
        _check_flag("create_table", self.create_table)
        _check_flag("pooled", self.pooled)
        self._check_columns()
        for name, (lowest, highest, whole) in _RANGES.items():
            _check_number(name, getattr(self, name), lowest, highest, whole)

    def _check_columns(self) -> None:
        if self.columns is None:
            return
        if not self.create_table:
            raise ConfigurationError("columns are for create_table=True; an existing table has its own")
        object.__setattr__(self, "columns", _checked_columns(self.columns))
        missing = [name for name in self.key_columns if name not in self.columns]
        if missing:
            raise ConfigurationError(f"columns: the key's column {missing[0]!r} is not among them")

    @property
    def key_columns(self) -> tuple[str, ...]:
        """The key as column names; empty if the table's primary key is to be taken (or for append)."""
        return columns_of(self.key)

    @property
    def limits(self) -> Limits:
        """What a message may be to be decoded."""
        return Limits(self.max_message_bytes, self.max_nesting_depth, self.max_headers)

    @property
    def value_rules(self) -> ValueRules:
        """How values are written where the author has a choice."""
        return ValueRules(
            bytea_encoding=self.bytea_encoding,
            epoch_unit=self.epoch_unit,
            nul_characters=self.nul_characters,
            non_finite_numbers=self.non_finite_numbers,
            ignore_unknown=self.unknown_fields == "ignore",
        )

    def describe(self) -> str:
        """Host, database and table, without the password."""
        found = _parsed_dsn(self.dsn)
        host = found.get("host") or found.get("hostaddr") or "localhost"
        port = f":{found['port']}" if found.get("port") else ""
        database = found.get("dbname") or found.get("user") or ""
        return f"postgresql://{host}{port}/{database} table {parse_table_name(self.table).sql}"

    def __repr__(self) -> str:
        shown = [
            f"{one.name}={getattr(self, one.name)!r}"
            for one in fields(self)
            if one.name != "dsn" and getattr(self, one.name) != one.default
        ]
        return f"PostgreSQLSink({', '.join([repr(self.describe()), *shown])})"

    def open(self, context: SinkContext) -> SinkSession:
        """The session of a worker; connects on first use."""
        # The driver is loaded in the workers, not where the sink is described.
        from speedlayer.workers.sinks.postgres.session import PostgreSQLSession

        return PostgreSQLSession(self, context)


# Lowest and highest value, and whether it is a whole number. The highest are there to catch a wrong unit. Those of the
# three strikes are the ranges of `[brake]`, which has the last word.
_RANGES: Mapping[str, tuple[float, float, bool]] = {
    "batch_size": (1, 1_000_000, True),
    "batch_bytes": (1024, 1 << 30, True),
    "flush_interval_seconds": (0.001, 3600, False),
    "max_message_bytes": (1024, 1 << 28, True),
    "max_nesting_depth": (1, 900, True),
    "max_headers": (0, 1_000_000, True),
    "slow_flush_threshold": (0.001, 3600, False),
    "max_slow_flushes": (1, 1000, True),
    "pause_seconds": (0.1, 3600, False),
    "lock_timeout_seconds": (0.001, 86_400, False),
    "connect_timeout_seconds": (1, 3600, False),
}
_OPTIONAL = frozenset({"slow_flush_threshold", "max_slow_flushes", "pause_seconds"})


def _check_number(name: str, value: Any, lowest: float, highest: float, whole: bool) -> None:
    if value is None and name in _OPTIONAL:
        return
    kind = "a whole number" if whole else "a number"
    right_type = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right_type or not lowest <= value <= highest:
        raise ConfigurationError(f"{name} must be {kind} from {lowest:,} to {highest:,}, not {value!r}")


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigurationError(f"{name} must be {' or '.join(map(repr, choices))}, not {value!r}")


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} must be True or False, not {value!r}")


def _checked_key(key: Any) -> tuple[str, ...]:
    names = columns_of(key) if isinstance(key, (str, list, tuple)) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise ConfigurationError(f"key must be a column's name or a list of such names, not {key!r}")
    for name in names:
        check_identifier(name, "key")
    if len(set(names)) < len(names):
        raise ConfigurationError(f"key names a column twice: {key!r}")
    return names


def _checked_columns(columns: Any) -> dict[str, str]:
    if not isinstance(columns, Mapping) or not columns:
        raise ConfigurationError(f"columns must name SQL types by column, not {columns!r}")
    for name, type_sql in columns.items():
        if not isinstance(name, str) or not isinstance(type_sql, str) or not type_sql.strip():
            raise ConfigurationError(f"columns: {name!r} must have an SQL type, not {type_sql!r}")
        check_identifier(name, "columns")
    return dict(columns)  # what was given may not be picklable, or change


def _checked_mode(mode: Any, key: tuple[str, ...]) -> str:
    if mode is None and key:
        raise ConfigurationError(
            'a key without a mode: say mode="upsert" (or mode="append", which does not use the key)'
        )
    _check_choice("mode", mode or "append", ("append", "upsert"))
    return mode or "append"


def _parsed_dsn(dsn: str) -> dict[str, str]:
    from psycopg2.extensions import parse_dsn

    parsed: dict[str, str] = parse_dsn(dsn)
    return parsed


def _check_dsn(dsn: Any) -> None:
    if not isinstance(dsn, str) or not dsn.strip():
        raise ConfigurationError(f"dsn must be a connection string, not {type(dsn).__name__ if dsn else repr(dsn)}")
    import psycopg2

    try:
        _parsed_dsn(dsn)
    except (psycopg2.ProgrammingError, UnicodeEncodeError):
        # libpq's own text quotes the string, password and all.
        raise ConfigurationError(
            "dsn is not a connection string: write postgresql://user@host:5432/database or host=… dbname=… user=…"
        ) from None
