"""The Python interface: what a user's file builds, and what it is told when it is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from speedlayer.supervisor import (
    BrakeSettings,
    ConfigurationError,
    KafkaSource,
    SimpleStreamingEngine,
    StreamingOverloadException,
)
from speedlayer.supervisor.exit_codes import ExitCode
from speedlayer.workers import PostgreSQLSink
from speedlayer.workers.errors import StreamingOverloadException as TheWorkersException

CONFIG = {"bootstrap.servers": "localhost:9092", "group.id": "speed-layer"}


def engine_of(**arguments: Any) -> SimpleStreamingEngine:
    return SimpleStreamingEngine(CONFIG, **arguments)


def table(name: str = "orders", **arguments: Any) -> PostgreSQLSink:
    return PostgreSQLSink("postgresql://localhost/shop", table=name, **arguments)


def keep(order: Any) -> bool:
    return bool(order)


def enrich(order: Any) -> Any:
    return order


def test_the_articles_example_becomes_a_pipeline() -> None:
    engine = SimpleStreamingEngine(CONFIG, workers=2)
    orders = engine.dataframe(KafkaSource("orders"))
    orders = orders.filter(keep).map(enrich)
    orders.sink(table(key="order_id", mode="upsert"))
    (pipeline,) = engine.settings().pipelines
    assert (pipeline.name, pipeline.topics, pipeline.group_id, pipeline.start) == (
        "orders", ("orders",), "speed-layer", "earliest",
    )  # fmt: skip
    assert [(step.kind, step.function) for step in pipeline.steps] == [("filter", keep), ("map", enrich)]
    assert pipeline.brake == BrakeSettings("simple", 2.0, 3, 5.0)


def test_a_dataframe_never_changes_so_two_pipelines_may_share_its_beginning() -> None:
    engine = engine_of()
    orders = engine.dataframe(KafkaSource("orders"), name="all")
    kept = orders.filter(keep)
    kept.map(enrich)
    kept.sink(table())
    (pipeline,) = engine.settings().pipelines
    assert [step.kind for step in pipeline.steps] == ["filter"]


def test_what_the_sink_says_of_the_brake_stands_over_what_the_engine_says() -> None:
    engine = engine_of(brake={"slow_flush_threshold": 9.0, "pause_seconds": 8.0})
    engine.dataframe(KafkaSource("orders")).sink(table(pause_seconds=1.0))
    assert engine.settings().pipelines[0].brake == BrakeSettings(slow_flush_threshold=9.0, pause_seconds=1.0)


def test_several_topics_give_the_pipeline_a_name_of_both() -> None:
    assert engine_of().dataframe(KafkaSource("a", "b")).name == "a+b"


def test_a_source_may_have_its_own_group_and_start() -> None:
    engine = engine_of()
    engine.dataframe(KafkaSource("orders", group_id="own", start="latest", on_out_of_range="skip")).sink(table())
    (pipeline,) = engine.settings().pipelines
    assert (pipeline.group_id, pipeline.start, pipeline.on_out_of_range) == ("own", "latest", "skip")


def test_the_dead_letter_limit_is_an_argument_of_the_sink_call() -> None:
    engine = engine_of()
    engine.dataframe(KafkaSource("orders")).sink(table(), dead_letter_ratio=1.0, dead_letter_minimum=5)
    (pipeline,) = engine.settings().pipelines
    assert (pipeline.dead_letter_ratio, pipeline.dead_letter_minimum) == (1.0, 5)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: engine_of(workers=0), "workers: 0 is out of range"),
        (lambda: engine_of(memory_budget_mb=1), "memory_budget_mb: 1 is out of range"),
        (lambda: engine_of(brake={"pause": 1}), r"brake\.pause: is not one of mode, slow_flush_threshold"),
        (lambda: engine_of(start_method="fork"), 'start_method: "fork" is not one of spawn, forkserver'),
        (lambda: SimpleStreamingEngine({"group.id": "g"}), r"bootstrap\.servers: needs a value"),
        (
            lambda: SimpleStreamingEngine({**CONFIG, "enable.auto.commit": True}),
            r"enable\.auto\.commit: can not be set",
        ),
        (KafkaSource, r'KafkaSource\("orders"\)'),
        (lambda: KafkaSource(["orders"]), r'KafkaSource\("orders"\)'),  # type: ignore[arg-type]
        (lambda: engine_of().dataframe("orders"), "is not a KafkaSource"),  # type: ignore[arg-type]
        (lambda: engine_of().dataframe(KafkaSource("a")).map(3), "map: 3 is not a function"),  # type: ignore[arg-type]
        (lambda: engine_of().settings(), "there is no pipeline"),
    ],
)
def test_a_mistake_is_told_where_it_is_made(build: Any, expected: str) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        build()


def test_a_second_pipeline_of_the_same_name_is_refused_where_it_is_made() -> None:
    engine = engine_of()
    orders = engine.dataframe(KafkaSource("orders"))
    orders.sink(table())
    with pytest.raises(ConfigurationError, match=r'two pipelines are named "orders".*name='):
        orders.filter(keep).sink(table("others"))


def test_without_a_group_the_error_says_what_a_group_is_for() -> None:
    engine = SimpleStreamingEngine({"bootstrap.servers": "localhost:9092"})
    engine.dataframe(KafkaSource("orders")).sink(table())
    with pytest.raises(ConfigurationError, match=r"group\.id: needs a value: the consumer group"):
        engine.settings()


def test_a_wrong_setting_of_a_pipeline_names_the_pipeline() -> None:
    engine = engine_of()
    engine.dataframe(KafkaSource("orders")).sink(table(), dead_letter_ratio=3.0)
    with pytest.raises(ConfigurationError, match=r'pipeline "orders": dead_letter_ratio: 3\.0 is out of range'):
        engine.settings()


def test_the_overload_exception_is_one_class_in_both_packages() -> None:
    assert StreamingOverloadException is TheWorkersException
    assert StreamingOverloadException("overloaded").pause_seconds == 3.0


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_importing_the_package_loads_no_kafka_library_and_no_database_driver() -> None:
    loaded = python(
        "-c",
        "import sys, speedlayer.supervisor; from speedlayer.workers import PostgreSQLSink\n"
        "print([name for name in ('confluent_kafka', 'psycopg2', 'prometheus_client') if name in sys.modules])",
    )
    assert loaded.stdout == "[]\n"


USERS_FILE = """
from speedlayer.supervisor import KafkaSource, SimpleStreamingEngine
from speedlayer.workers import PostgreSQLSink
engine = SimpleStreamingEngine({"bootstrap.servers": "localhost:1", "group.id": "g"})
engine.dataframe(KafkaSource("orders")).sink(PostgreSQLSink("host=localhost", table="orders"))
"""


@pytest.mark.parametrize("start", ["engine.run()", "def main():\n    engine.run()\nmain()"])
def test_a_file_that_runs_its_engine_without_a_guard_is_told_before_anything_starts(tmp_path: Path, start: str) -> None:
    file = tmp_path / "pipeline.py"
    file.write_text(USERS_FILE + start)
    ended = python(str(file))
    assert ended.returncode == ExitCode.CONFIGURATION
    assert 'if __name__ == "__main__":' in ended.stderr
    assert f"line {(USERS_FILE + start).count(chr(10)) + 1}" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_worker_that_imports_such_a_file_refuses_to_start_a_daemon(tmp_path: Path) -> None:
    """The condition of this file is a guard to the eye, and true in a worker as well: the worker must notice."""
    file = tmp_path / "pipeline.py"
    file.write_text(
        USERS_FILE
        + "import multiprocess, sys\n"
        + "if __name__ == '__main__':\n"
        + "    child = multiprocess.get_context('spawn').Process(target=print, args=('started',))\n"
        + "    child.start(); child.join(); sys.exit(child.exitcode)\n"
        + "if len(sys.argv) < 5:\n"
        + "    engine.run()\n"
    )
    ended = python(str(file))
    assert ended.returncode == ExitCode.CONFIGURATION
    assert "a worker process was about to start a daemon of its own" in ended.stderr
    assert "started" not in ended.stdout
