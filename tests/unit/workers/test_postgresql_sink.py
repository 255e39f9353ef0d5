"""A sink is checked when it is built, travels to the workers, and never shows its password."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import MappingProxyType
from typing import Any

import dill
import pytest

import speedlayer.workers
from speedlayer.workers import ConfigurationError, PostgreSQLSink, Sink, StreamingOverloadException

DSN = "postgresql://writer:s3cret@db.example:6543/shop?sslmode=require"


def sink(dsn: Any = DSN, **settings: Any) -> PostgreSQLSink:
    return PostgreSQLSink(dsn, **{"table": "orders", **settings})


def test_it_is_described_without_its_password() -> None:
    made = sink(table='shop."Mixed Case"', mode="upsert", key="id", batch_size=100)
    assert made.describe() == 'postgresql://db.example:6543/shop table "shop"."Mixed Case"'
    assert "s3cret" not in repr(made) + str(made)
    assert "mode='upsert'" in repr(made)
    assert "batch_size=100" in repr(made)
    assert sink("dbname=shop user=me password=s3cret").describe() == 'postgresql://localhost/shop table "orders"'
    assert sink("user=me").describe() == 'postgresql://localhost/me table "orders"'


def test_it_travels_by_dill_as_it_is() -> None:
    columns = MappingProxyType({"id": "bigint"})
    made = sink(mode="upsert", key=["id"], create_table=True, columns=columns, pause_seconds=1.5)
    assert dill.loads(dill.dumps(made)) == made
    assert made.columns == {"id": "bigint"}


def test_it_can_not_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        sink().table = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        PostgreSQLSink(DSN, "orders")  # type: ignore[misc, call-arg]


def test_the_seeds_arguments_are_taken_and_the_brake_is_the_engines_unless_said() -> None:
    made = sink(
        batch_size=100,
        flush_interval_seconds=1.0,
        slow_flush_threshold=2.0,
        max_slow_flushes=3,
        pause_seconds=5.0,
    )
    assert (made.batch_size, made.slow_flush_threshold, made.max_slow_flushes, made.pause_seconds) == (100, 2.0, 3, 5.0)
    assert (sink().slow_flush_threshold, sink().max_slow_flushes, sink().pause_seconds) == (None, None, None)


@pytest.mark.parametrize(
    ("settings", "mode", "key"),
    [
        ({}, "append", ()),
        ({"mode": "append", "key": "id"}, "append", ("id",)),
        ({"mode": "upsert"}, "upsert", ()),
        ({"mode": "upsert", "key": "Order ID"}, "upsert", ("Order ID",)),
        ({"mode": "upsert", "key": ["a", "b"]}, "upsert", ("a", "b")),
        ({"mode": "upsert", "key": ("a",)}, "upsert", ("a",)),
    ],
)
def test_mode_and_key(settings: dict[str, Any], mode: str, key: tuple[str, ...]) -> None:
    made = sink(**settings)
    assert (made.mode, made.key_columns) == (mode, key)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dsn": ""}, "dsn must be a connection string"),
        ({"dsn": None}, "dsn must be a connection string"),
        ({"dsn": "postgresql://u:s3cret@h/x?nonsense=1"}, "dsn is not a connection string"),
        ({"dsn": "host=h password='s3cret"}, "dsn is not a connection string"),
        ({"table": "Mixed Case"}, "needs double quotes"),
        ({"table": ""}, "table: "),
        ({"key": "id"}, "a key without a mode"),
        ({"mode": "insert"}, "mode must be 'append' or 'upsert', not 'insert'"),
        ({"mode": "upsert", "key": 7}, "key must be a column's name"),
        ({"mode": "upsert", "key": ["a", 7]}, "key must be a column's name"),
        ({"mode": "upsert", "key": ["a", "a"]}, "key names a column twice"),
        ({"mode": "upsert", "key": [""]}, "key: a name can not be empty"),
        ({"unknown_fields": "drop"}, "unknown_fields must be 'error' or 'ignore', not 'drop'"),
        ({"missing_fields": "null"}, "missing_fields must be 'default' or 'keep'"),
        ({"null_values": "delete"}, "null_values must be 'dead_letter' or 'skip'"),
        ({"bytea_encoding": "escape"}, "bytea_encoding must be 'hex' or 'base64', not 'escape'"),
        ({"epoch_unit": "m"}, "epoch_unit must be 's' or 'ms' or 'us' or 'ns', not 'm'"),
        ({"nul_characters": "drop"}, "nul_characters must be 'dead_letter' or 'strip' or 'replace', not 'drop'"),
        ({"non_finite_numbers": None}, "non_finite_numbers must be 'keep' or 'null' or 'dead_letter', not None"),
        ({"create_table": 1}, "create_table must be True or False, not 1"),
        ({"pooled": "yes"}, "pooled must be True or False"),
        ({"columns": {"a": "int"}}, "columns are for create_table=True"),
        ({"columns": {}, "create_table": True}, "columns must name SQL types"),
        ({"columns": ["a"], "create_table": True}, "columns must name SQL types"),
        ({"columns": {"a": ""}, "create_table": True}, "columns: 'a' must have an SQL type"),
        ({"columns": {"a": "int"}, "create_table": True, "mode": "upsert", "key": "b"}, "the key's column 'b'"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1 to 1,000,000, not 0"),
        ({"batch_size": 10.0}, "batch_size must be a whole number"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"batch_size": None}, "batch_size must be a whole number"),
        ({"batch_bytes": 10}, "batch_bytes must be a whole number from 1,024"),
        ({"flush_interval_seconds": 0}, "flush_interval_seconds must be a number from 0.001"),
        ({"slow_flush_threshold": "2"}, "slow_flush_threshold must be a number"),
        ({"max_slow_flushes": 2.5}, "max_slow_flushes must be a whole number"),
        ({"pause_seconds": -1}, "pause_seconds must be a number from 0"),
        ({"pause_seconds": float("nan")}, "pause_seconds must be a number from 0"),
        ({"lock_timeout_seconds": 0}, "lock_timeout_seconds must be a number"),
        ({"connect_timeout_seconds": 30_000}, "connect_timeout_seconds must be a number from 1 to 3,600"),
    ],
)
def test_a_wrong_argument_is_named_when_the_sink_is_built(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        sink(**settings)
    assert says in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


# --- the package -----------------------------------------------------------------------------------------------------


def test_the_package_exports_what_it_says() -> None:
    for name in speedlayer.workers.__all__:
        assert getattr(speedlayer.workers, name).__module__.startswith("speedlayer.workers.")
        assert name in dir(speedlayer.workers)
    assert issubclass(PostgreSQLSink, Sink)
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = speedlayer.workers.nothing_like_this


def test_an_overload_pauses_for_three_seconds_unless_told_otherwise_and_survives_the_way_between_processes() -> None:
    assert StreamingOverloadException("busy").pause_seconds == 3.0
    travelled = dill.loads(dill.dumps(StreamingOverloadException("busy", pause_seconds=7.5)))
    assert (str(travelled), travelled.pause_seconds) == ("busy", 7.5)


@pytest.mark.parametrize("statement", ["import speedlayer.workers", "from speedlayer.workers import Sink"])
def test_importing_the_package_loads_no_driver_and_no_kafka(statement: str) -> None:
    code = f"{statement}; import sys; print(sorted({{'psycopg2', 'confluent_kafka', 'dill'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
