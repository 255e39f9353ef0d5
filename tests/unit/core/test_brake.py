"""Three strikes, flush by flush."""

from __future__ import annotations

import pytest

from speedlayer.supervisor.core.brake import ThreeStrikes
from speedlayer.workers.errors import StreamingOverloadException

THRESHOLD = 2.0
PAUSE = 5.0
SLOW, FAST, EXACT = THRESHOLD + 0.001, THRESHOLD - 0.001, THRESHOLD
SPEEDS = {"s": SLOW, "f": FAST, "=": EXACT}


def brake(limit: int = 3) -> ThreeStrikes:
    return ThreeStrikes(THRESHOLD, limit, PAUSE)


def tripped(limit: int = 3, now: float = 100.0) -> ThreeStrikes:
    pulled = brake(limit)
    for _ in range(limit - 1):
        pulled.observe(SLOW)
    with pytest.raises(StreamingOverloadException) as caught:
        pulled.observe(SLOW)
    assert pulled.handle_overload(caught.value, now)
    return pulled


@pytest.mark.parametrize(
    ("flushes", "counts", "trips"),
    [
        ("sss", [1, 2, 0], 1),
        ("ss", [1, 2], 0),
        ("ssfs", [1, 2, 1, 2], 0),
        ("ssfss", [1, 2, 1, 2, 0], 1),
        ("sfsfsfsf", [1, 0, 1, 0, 1, 0, 1, 0], 0),
        ("ssfsfsfs", [1, 2, 1, 2, 1, 2, 1, 2], 0),
        ("ffff", [0, 0, 0, 0], 0),
        ("fffsss", [0, 0, 0, 1, 2, 0], 1),
        ("ssfffsss", [1, 2, 1, 0, 0, 1, 2, 0], 1),
        ("ssssss", [1, 2, 0, 1, 2, 0], 2),
        ("sssf", [1, 2, 0, 0], 1),
        ("ss=s", [1, 2, 1, 2], 0),
        ("====", [0, 0, 0, 0], 0),
    ],
)
def test_a_slow_flush_adds_one_any_other_takes_one_off_and_the_third_trips(
    flushes: str, counts: list[int], trips: int
) -> None:
    watched, seen, raised = brake(), [], 0
    for flush in flushes:
        try:
            watched.observe(SPEEDS[flush])
        except StreamingOverloadException:
            raised += 1
        seen.append(watched.slow_count)
    assert (seen, raised) == (counts, trips)


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_the_limit_is_the_number_of_strikes_that_trips(limit: int) -> None:
    watched = brake(limit)
    for expected in range(1, limit):
        watched.observe(SLOW)
        assert watched.slow_count == expected
    with pytest.raises(StreamingOverloadException):
        watched.observe(SLOW)
    assert watched.slow_count == 0


def test_the_exception_names_the_strikes_and_the_limit_and_asks_for_the_pause() -> None:
    watched = brake()
    watched.observe(9.0)
    watched.observe(9.0)
    with pytest.raises(StreamingOverloadException, match=r"3 slow flushes, the last took 2\.50 s \(limit 2 s\)") as got:
        watched.observe(2.5)
    assert got.value.pause_seconds == PAUSE
    assert not watched.paused, "it is the handler that pauses"
    assert watched.overload_count == 0


def test_an_overload_is_counted_and_sets_the_end_of_the_pause() -> None:
    pulled = tripped(now=100.0)
    assert (pulled.overload_count, pulled.pause_until, pulled.paused) == (1, 105.0, True)


def test_an_overload_during_the_pause_neither_counts_nor_extends_it() -> None:
    pulled = tripped(now=100.0)
    assert not pulled.handle_overload(StreamingOverloadException("again", pause_seconds=60.0), 104.0)
    assert (pulled.overload_count, pulled.pause_until) == (1, 105.0)


def test_the_pause_is_the_one_the_error_asks_for() -> None:
    watched = brake()
    assert watched.handle_overload(StreamingOverloadException("from a sink", pause_seconds=0.5), 100.0)
    assert watched.pause_until == 100.5


@pytest.mark.parametrize("flushes", ["sss", "ssssssssss", "fff", "sfs"])
def test_reports_during_the_pause_do_not_count(flushes: str) -> None:
    pulled = tripped(now=100.0)
    for flush in flushes:
        pulled.observe(SPEEDS[flush])
    assert (pulled.slow_count, pulled.overload_count, pulled.pause_until) == (0, 1, 105.0)


@pytest.mark.parametrize(
    ("now", "drained", "still"),
    [
        (104.999, False, True),
        (104.999, True, True),
        (105.0, False, True),
        (1000.0, False, True),
        (105.0, True, False),
        (1000.0, True, False),
    ],
)
def test_the_pause_ends_when_its_time_is_over_and_the_queues_are_drained(
    now: float, drained: bool, still: bool
) -> None:
    pulled = tripped(now=100.0)
    assert pulled.should_pause(now, drained) is still
    assert pulled.paused is still


def test_without_an_overload_there_is_nothing_to_wait_for() -> None:
    assert not brake().should_pause(0.0, queues_drained=False)


def test_after_the_pause_three_strikes_count_anew() -> None:
    pulled = tripped(now=100.0)
    assert not pulled.should_pause(105.0, queues_drained=True)
    pulled.observe(SLOW)
    pulled.observe(SLOW)
    assert pulled.slow_count == 2
    with pytest.raises(StreamingOverloadException) as caught:
        pulled.observe(SLOW)
    assert pulled.handle_overload(caught.value, 200.0)
    assert (pulled.overload_count, pulled.pause_until) == (2, 205.0)
