"""The recorder turns looks at the daemon into rates and events."""

from __future__ import annotations

from typing import Any, Optional

import pytest

from speedlayer.supervisor.demo.recorder import Recorder, lag_of, take_sample


def status(
    rows: int = 0,
    slow_count: int = 0,
    overload_count: int = 0,
    overloaded: Optional[str] = None,
    dead_lettered: int = 0,
    last_flush: Optional[float] = None,
    pause_left: float = 5.0,
) -> dict[str, Any]:
    return {
        "pipelines": [
            {
                "rows": rows,
                "dead_lettered": dead_lettered,
                "lanes": [{"partition": 0, "next_offset": rows}],
                "slow_count": slow_count,
                "max_slow_flushes": 3,
                "overload_count": overload_count,
                "state": "running" if overloaded is None else "overloaded",
                "reason": overloaded or "",
                "holds": {} if overloaded is None else {"overloaded": overloaded},
                "paused_until_seconds": None if overloaded is None else pause_left,
                "last_flush_seconds": last_flush,
            }
        ]
    }


def look(recorder: Recorder, elapsed: float, produced: int = 0, **values: Any) -> list[str]:
    sample = take_sample(elapsed, 0, produced, {0: produced}, status(**values), None)
    return [event.text for event in recorder.add(sample)]


def test_rates_are_means_over_the_last_seconds() -> None:
    recorder = Recorder(pause_seconds=5.0)
    for second in range(11):
        look(recorder, second, produced=100 * second, rows=50 * second)
    assert recorder.samples[0].produced_per_second == 0
    assert recorder.samples[-1].produced_per_second == pytest.approx(100)
    assert recorder.samples[-1].rows_per_second == pytest.approx(50)
    look(recorder, 11, produced=1300, rows=500)
    assert recorder.samples[-1].produced_per_second == pytest.approx(700 / 5)
    assert recorder.peak_lag == 800


def test_a_brake_event_begins_and_ends_and_is_told() -> None:
    recorder = Recorder(pause_seconds=5.0)
    assert look(recorder, 1.0, slow_count=1, last_flush=2.5) == []  # the first look has nothing to compare with
    assert look(recorder, 2.0, slow_count=2, last_flush=4.1) == ["a flush took 4.1 s: slow count 2 of 3"]
    tripped = look(recorder, 3.1, overload_count=1, overloaded="3 slow flushes", last_flush=4.2, pause_left=4.9)
    assert tripped == ["BRAKE: 3 slow flushes"]
    assert look(recorder, 5.0, overload_count=1, overloaded="3 slow flushes") == []
    assert recorder.resumes == 0
    assert look(recorder, 8.5, produced=1200, overload_count=1) == [
        "resumed by itself after 5.5 s; 1,200 messages wait in Kafka"
    ]
    (event,) = recorder.brake_events
    assert (event.began, event.ended, event.reason) == (pytest.approx(3.0), 8.5, "3 slow flushes")
    assert recorder.resumes == 1


def test_a_second_trip_is_an_event_of_its_own() -> None:
    recorder = Recorder(pause_seconds=5.0)
    look(recorder, 1.0)
    look(recorder, 2.0, overload_count=1, overloaded="slow")
    look(recorder, 7.0, overload_count=1)
    look(recorder, 9.0, overload_count=2, overloaded="slow again")
    assert [(event.reason, event.ended) for event in recorder.brake_events] == [("slow", 7.0), ("slow again", None)]


def test_dead_letters_are_told_ever_more_seldom() -> None:
    recorder = Recorder(pause_seconds=5.0)
    told = [look(recorder, at, dead_lettered=total) for at, total in enumerate((0, 1, 1, 3, 5, 6, 6, 12))]
    assert told == [
        [],
        ["1 broken order is a dead letter"],
        [],
        ["3 broken orders are dead letters"],
        [],
        ["6 broken orders are dead letters"],
        [],
        ["12 broken orders are dead letters"],
    ]


def test_the_lag_counts_what_was_produced_and_not_written() -> None:
    lanes = [{"partition": 0, "next_offset": 7}, {"partition": 1, "next_offset": None}]
    assert lag_of({0: 10, 1: 5, 2: 4}, lanes) == 3 + 5 + 4
    assert lag_of({0: 6}, lanes) == 0
    assert lag_of({}, []) == 0


def test_what_was_produced_by_a_moment_is_read_off_between_the_looks() -> None:
    recorder = Recorder(pause_seconds=5.0)
    assert recorder.produced_at(3.0) == 0
    for elapsed, produced in ((0.5, 50), (1.5, 150), (3.0, 450)):
        look(recorder, elapsed, produced=produced)
    assert [recorder.produced_at(at) for at in (0, 0.25, 0.5, 1, 2, 3, 100)] == pytest.approx(
        [0, 25, 50, 100, 250, 450, 450]
    )
