"""The TOML file: what the fixed keys mean, and how errors name the file, the key and what was probably meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from speedlayer.supervisor.errors import ConfigurationError
from speedlayer.supervisor.settings import BrakeSettings, DaemonSettings
from speedlayer.supervisor.toml_settings import expand, load_toml
from speedlayer.workers import PostgreSQLSink

HEAD = """
[kafka]
"bootstrap.servers" = "localhost:9092"
"group.id" = "speed-layer"
[postgres]
dsn = "postgresql://localhost/shop"
"""

PIPELINE = """
[[pipelines]]
name = "orders"
topics = ["orders"]
table = "public.orders"
"""

Load = Callable[..., DaemonSettings]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def write_and_load(text: str, **environment: str) -> DaemonSettings:
        path = tmp_path / "speedlayer.toml"
        path.write_text(text)
        return load_toml(path, environment)

    return write_and_load


def sink_of(settings: DaemonSettings) -> PostgreSQLSink:
    sink = settings.pipelines[0].sink
    assert isinstance(sink, PostgreSQLSink)
    return sink


def test_the_documented_example_is_read_whole(load: Load, tmp_path: Path) -> None:
    (tmp_path / "my_module.py").write_text("def keep(order): return True\ndef enrich(order): return order\n")
    settings = load(
        """
        [kafka]
        "bootstrap.servers" = "localhost:9092"
        "group.id" = "speed-layer"
        [postgres]
        dsn = "${SPEEDLAYER_DSN}"
        [workers]
        count = 3
        [memory]
        budget_mb = 128
        [brake]
        mode = "simple"
        slow_flush_threshold = 1.5
        max_slow_flushes = 4
        pause_seconds = 6.0
        [[pipelines]]
        name = "orders"
        topics = ["orders", "returns"]
        table = "public.orders"
        mode = "upsert"
        key = ["order_id"]
        filter = "my_module:keep"
        map = "my_module:enrich"
        batch_rows = 500
        batch_bytes = 100_000
        batch_seconds = 0.5
        """,
        SPEEDLAYER_DSN="postgresql://app@db/shop",
    )
    (pipeline,) = settings.pipelines
    assert settings.workers.count == 3
    assert settings.memory.budget_bytes == 128 * 1024 * 1024
    assert (pipeline.name, pipeline.topics, pipeline.group_id) == ("orders", ("orders", "returns"), "speed-layer")
    assert pipeline.brake == BrakeSettings("simple", 1.5, 4, 6.0)
    assert [step.kind for step in pipeline.steps] == ["filter", "map"]
    assert [step.function.__name__ for step in pipeline.steps] == ["keep", "enrich"]
    sink = sink_of(settings)
    assert (sink.dsn, sink.table, sink.mode) == ("postgresql://app@db/shop", "public.orders", "upsert")
    assert tuple(sink.key) == ("order_id",)
    assert (sink.batch_size, sink.batch_bytes, sink.flush_interval_seconds) == (500, 100_000, 0.5)
    assert settings.python_path == (str(tmp_path),)


def test_a_file_without_more_than_it_must_have_takes_every_default(load: Load) -> None:
    settings = load(HEAD + PIPELINE)
    sink, plain = sink_of(settings), PostgreSQLSink("postgresql://localhost/shop", table="public.orders")
    assert sink == plain
    assert settings.pipelines[0].brake == BrakeSettings()
    assert settings.pipelines[0].start == "earliest"
    assert settings.pipelines[0].steps == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HEAD + "[worker]\ncount = 2" + PIPELINE, r'worker: is not a section .*did you mean "workers"\?'),
        (
            HEAD + "[workers]\ncuont = 2" + PIPELINE,
            r'workers\.cuont: is not a key of \[workers\]; did you mean "count"',
        ),
        (HEAD + '[workers]\ncount = "two"' + PIPELINE, r'workers\.count: "two" is not an integer from 1 to 64'),
        (HEAD + "[workers]\ncount = 0" + PIPELINE, r"workers\.count: 0 is out of range"),
        (HEAD + "[workers]\ncount = true" + PIPELINE, r"workers\.count: true is not an integer"),
        ("workers = 2\n" + HEAD + PIPELINE, r"workers: 2 is not a table; write \[workers\]"),
        (HEAD + PIPELINE + "batch_row = 5", r'pipelines\[0\]\.batch_row: .*did you mean "batch_rows"'),
        (HEAD + PIPELINE + 'key = "order_id"', r'pipelines\[0\]\.key: "order_id" is not a list of texts'),
        (HEAD + PIPELINE + 'mode = "merge"', r'pipelines\[0\]\.mode: "merge" is not one of append, upsert'),
        (HEAD + PIPELINE + "[pipelines.brake]\npause = 3", r'pipelines\[0\]\.brake\.pause: .*"pause_seconds"'),
        (HEAD + "[[pipelines]]\nname = 'a'\ntopics = ['a']", r"pipelines\[0\]\.table: needs a value"),
        (HEAD + "[[pipelines]]\nname = 'a'\ntable = 'a'\ntopics = []", r"pipelines\[0\]\.topics: .*reads no topic"),
        (HEAD + "[pipelines]\nname = 'a'", r"pipelines: is not a list of tables; write \[\[pipelines\]\]"),
        (HEAD, "pipelines: there is no pipeline"),
        (HEAD + PIPELINE + PIPELINE, 'pipelines: two pipelines are named "orders"'),
        (
            HEAD + PIPELINE + PIPELINE.replace('e = "orders"', 'e = "again"'),
            "both read the topic .*group_id of its own",
        ),
        (HEAD.replace("localhost:9092", "") + PIPELINE, r'kafka\."bootstrap\.servers": needs a value'),
        (HEAD.replace('"group.id" = "speed-layer"', "") + PIPELINE, r'kafka\."group\.id": needs a value, or pipelines'),
        (HEAD.replace('dsn = "postgresql://localhost/shop"', "") + PIPELINE, r"postgres\.dsn: needs a value"),
        (HEAD.replace("group.id", "gruop.id") + PIPELINE, r'kafka\."gruop\.id": .*did you mean "group\.id"'),
        (
            HEAD.replace("[postgres]", '"enable.auto.commit" = true\n[postgres]') + PIPELINE,
            r'"enable\.auto\.commit": can',
        ),
        (HEAD + "[log]\nformat = 3" + PIPELINE, r"log\.format: 3 is not text \| json"),
        ("[kafka]\na = \nb = 1", r"not TOML: .*line 2"),
    ],
)
def test_an_error_names_the_file_the_key_and_what_was_probably_meant(load: Load, text: str, expected: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"speedlayer\.toml(:| is).*{expected}"):
        load(text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent\.toml can not be read: No such file"):
        load_toml(tmp_path / "absent.toml")


def test_a_pipelines_own_brake_overrides_key_by_key(load: Load) -> None:
    settings = load(
        HEAD
        + "[brake]\nslow_flush_threshold = 4.0\npause_seconds = 7.0"
        + PIPELINE
        + "[pipelines.brake]\npause_seconds = 1.0"
    )
    assert settings.pipelines[0].brake == BrakeSettings(slow_flush_threshold=4.0, pause_seconds=1.0)


def test_a_pipeline_may_have_its_own_group_start_and_database(load: Load) -> None:
    settings = load(
        HEAD + PIPELINE + 'group_id = "own"\nstart = "latest"\ndsn = "host=other"\non_out_of_range = "skip"'
    )
    (pipeline,) = settings.pipelines
    assert (pipeline.group_id, pipeline.start, pipeline.on_out_of_range) == ("own", "latest", "skip")
    assert sink_of(settings).dsn == "host=other"


def test_the_start_is_kafkas_reset_where_the_pipeline_says_nothing(load: Load) -> None:
    text = HEAD.replace("[postgres]", '"auto.offset.reset" = "error"\n[postgres]')
    assert load(text + PIPELINE).pipelines[0].start == "error"


def test_unquoted_kafka_properties_are_the_same(load: Load) -> None:
    text = HEAD.replace('"bootstrap.servers"', "bootstrap.servers").replace('"group.id"', "group.id")
    settings = load(text + PIPELINE)
    assert settings.kafka["bootstrap.servers"] == "localhost:9092"
    assert settings.pipelines[0].group_id == "speed-layer"


def test_a_variable_may_stand_for_a_number_or_a_truth_value(load: Load) -> None:
    text = HEAD.replace("[postgres]", '[postgres]\npooled = "${POOLED}"') + '[workers]\ncount = "${COUNT}"' + PIPELINE
    settings = load(text, POOLED="true", COUNT="5")
    assert settings.workers.count == 5
    assert sink_of(settings).pooled is True


def test_a_variable_that_is_no_number_is_refused_where_one_is_needed(load: Load) -> None:
    with pytest.raises(ConfigurationError, match=r'workers\.count: "many" is not an integer'):
        load(HEAD + '[workers]\ncount = "${COUNT}"' + PIPELINE, COUNT="many")


@pytest.mark.parametrize(
    ("written", "environment", "read"),
    [
        ("${A}", {"A": "x"}, "x"),
        ("a${A}b${B}c", {"A": "1", "B": "2"}, "a1b2c"),
        ("${A:-d}", {}, "d"),
        ("${A:-d}", {"A": ""}, "d"),
        ("${A:-}", {}, ""),
        ("${A}", {"A": ""}, ""),
        ("${A:-postgresql://u@h:5432/d}", {}, "postgresql://u@h:5432/d"),
        ("$${A}", {"A": "x"}, "${A}"),
        ("${A}", {"A": "${B}", "B": "never"}, "${B}"),
        ("costs 5$", {}, "costs 5$"),
    ],
)
def test_variables_are_replaced_as_in_a_shell(written: str, environment: dict[str, str], read: str) -> None:
    assert expand({"key": [written]}, environment) == {"key": [read]}


@pytest.mark.parametrize("written", ["${}", "${1A}", "${A", "${A-b}", "${A B}"])
def test_what_is_not_quite_a_variable_is_refused(load: Load, written: str) -> None:
    with pytest.raises(ConfigurationError, match=r"postgres\.dsn: .*is not a variable"):
        load(HEAD.replace("postgresql://localhost/shop", written) + PIPELINE, A="x")


def test_a_missing_variable_is_named_with_the_nearest_that_is_set(load: Load) -> None:
    text = HEAD.replace("postgresql://localhost/shop", "${SPEEDLAYER_DSN}") + PIPELINE
    expected = r'postgres\.dsn: the environment variable SPEEDLAYER_DSN is not set.*did you mean "SPEEDLAYER_DNS"'
    with pytest.raises(ConfigurationError, match=expected):
        load(text, SPEEDLAYER_DNS="x")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("keep", '"keep" is not "module:function"'),
        ("steps:", '"steps:" is not "module:function"'),
        ("steps:kep", 'the module steps has no kep; did you mean "keep"'),
        ("step:keep", r'there is no .*step\.py, and no module step is installed; did you mean "steps"'),
        ("steps:LIMIT", "steps:LIMIT is not a function"),
        ("broken:f", "broken.*ZeroDivisionError"),
        ("needy:f", "needy.*no_such_library"),
    ],
)
def test_a_function_that_is_not_there_is_named(load: Load, tmp_path: Path, written: str, expected: str) -> None:
    (tmp_path / "steps.py").write_text("LIMIT = 3\ndef keep(order): return True\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "needy.py").write_text("import no_such_library\n")
    with pytest.raises(ConfigurationError, match=rf"pipelines\[0\]\.filter: .*{expected}"):
        load(HEAD + PIPELINE + f'filter = "{written}"')


def test_filter_and_map_of_one_module_share_its_globals(load: Load, tmp_path: Path) -> None:
    (tmp_path / "steps.py").write_text("seen = []\ndef keep(o): seen.append(o)\ndef count(o): return len(seen)\n")
    settings = load(HEAD + PIPELINE + 'filter = "steps:keep"\nmap = "steps:count"')
    keep, count = (step.function for step in settings.pipelines[0].steps)
    keep("a")
    result: Any = count("b")
    assert result == 1


def test_a_function_may_come_from_an_installed_module(load: Load) -> None:
    settings = load(HEAD + PIPELINE + 'map = "copy:copy"')
    assert settings.pipelines[0].steps[0].function({"a": 1}) == {"a": 1}
