"""The settings: valid by construction, and valid together."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest

from speedlayer.supervisor.errors import ConfigurationError, InvalidSetting
from speedlayer.supervisor.settings import (
    BrakeSettings,
    DaemonSettings,
    MemorySettings,
    PipelineSettings,
    WorkerSettings,
    settings_of,
)
from speedlayer.workers.sinks.base import Sink, SinkContext, SinkSession

MB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Nowhere(Sink):
    def describe(self) -> str:
        return "nowhere"

    def open(self, context: SinkContext) -> SinkSession:
        raise NotImplementedError


def pipeline(name: str = "orders", **given: Any) -> PipelineSettings:
    given = {"topics": ("orders",), "group_id": "speed-layer", "sink": Nowhere(), **given}
    return PipelineSettings(name=name, **given)


def test_the_defaults_are_those_of_the_article() -> None:
    brake = BrakeSettings()
    assert (brake.slow_flush_threshold, brake.max_slow_flushes, brake.pause_seconds) == (2.0, 3, 5.0)


@pytest.mark.parametrize(
    ("values", "key", "problem"),
    [
        ({"max_slow_flushes": 0}, "max_slow_flushes", "out of range (an integer from 1 to 1,000)"),
        ({"max_slow_flushes": 2.5}, "max_slow_flushes", "2.5 is not an integer"),
        ({"max_slow_flushes": True}, "max_slow_flushes", "true is not an integer"),
        ({"pause_seconds": "5"}, "pause_seconds", '"5" is not a number'),
        ({"pause_seconds": math.nan}, "pause_seconds", "out of range"),
        ({"pause_seconds": math.inf}, "pause_seconds", "out of range"),
        ({"pause_seconds": None}, "pause_seconds", "needs a value"),
        ({"mode": "simpel"}, "mode", '"simpel" is not one of simple'),
    ],
)
def test_a_wrong_value_is_refused_by_name(values: dict[str, Any], key: str, problem: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        BrakeSettings(**values)
    assert caught.value.key == key
    assert problem in caught.value.problem


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"topics": ()}, "reads no topic"),
        ({"topics": ("a", "b", "a")}, "a is named twice"),
        ({"topics": "orders"}, "not a list of texts"),
        ({"name": "new\nline"}, "printable"),
        ({"name": ""}, "is empty"),
        ({"group_id": ""}, "is empty"),
        ({"dead_letter_ratio": 1.5}, "out of range"),
    ],
)
def test_a_pipeline_that_can_not_work_is_refused(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidSetting, match=problem):
        pipeline(**given)


def test_two_pipelines_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigurationError, match='two pipelines are named "orders"'):
        DaemonSettings(kafka={}, pipelines=(pipeline(), pipeline(topics=("payments",))))


def test_two_pipelines_of_one_group_on_one_topic_are_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigurationError, match=r'"a" and "b" both read the topic "orders".*group_id of its own'):
        DaemonSettings(kafka={}, pipelines=(pipeline("a"), pipeline("b")))


def test_two_groups_may_read_one_topic() -> None:
    settings = DaemonSettings(kafka={}, pipelines=(pipeline("a"), pipeline("b", group_id="second")))
    assert settings.group_ids == ("speed-layer", "second")
    assert [p.name for p in settings.pipelines_of("second")] == ["b"]


def test_a_daemon_without_a_pipeline_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no pipeline"):
        DaemonSettings(kafka={}, pipelines=())


@pytest.mark.parametrize(("budget_mb", "count", "credit"), [(16, 64, 8), (32, 2, 2), (256, 2, 2), (4096, 64, 1)])
def test_all_the_batches_that_workers_can_hold_fit_into_half_the_budget(
    budget_mb: int, count: int, credit: int
) -> None:
    settings = DaemonSettings(
        kafka={},
        pipelines=(pipeline(sink=Nowhere(batch_bytes=1024 * MB)),),
        workers=WorkerSettings(count=count, credit_flights=credit),
        memory=MemorySettings(budget_mb=budget_mb),
    )
    in_hand = settings.batch_bytes_of(settings.pipelines[0]) * (count * credit + 1)
    smallest = 64 * 1024 * (count * credit + 1)
    assert in_hand <= max(budget_mb * MB / 2, smallest)


def test_a_batch_within_the_limit_keeps_its_size() -> None:
    settings = DaemonSettings(kafka={}, pipelines=(pipeline(sink=Nowhere(batch_bytes=1 * MB)),))
    assert settings.batch_bytes_of(settings.pipelines[0]) == 1 * MB


@pytest.mark.parametrize("section", [BrakeSettings, WorkerSettings, MemorySettings, PipelineSettings])
def test_every_default_is_within_its_range(section: type) -> None:
    checked = 0
    for declared, setting in settings_of(section):
        if declared.default is not dataclasses.MISSING:
            assert setting.problem_with(declared.default) is None, declared.name
            checked += 1
    assert checked > 0
