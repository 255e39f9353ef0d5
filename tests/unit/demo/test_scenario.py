"""The phases of a run: how many messages are due when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speedlayer.supervisor.demo.scenario import Phase, Scenario, black_friday, load_test

phases = st.builds(
    Phase, st.just("p"), st.floats(0.5, 100), st.floats(1, 10_000), st.one_of(st.none(), st.floats(1, 100))
)
scenarios = st.lists(phases, min_size=1, max_size=5).map(lambda some: Scenario(tuple(some), 100))


def test_the_article_in_ninety_seconds() -> None:
    scenario = black_friday(90, 100)
    assert [(phase.rate, phase.capacity) for phase in scenario.phases] == [(100, None), (300, 50), (100, None)]
    assert scenario.seconds == pytest.approx(90)
    assert scenario.batch_rows == 100
    assert scenario.messages == 18 * 100 + 36 * 300 + 36 * 100


def test_another_rate_keeps_the_proportions() -> None:
    scenario = black_friday(60, 400)
    assert [(phase.rate, phase.capacity) for phase in scenario.phases] == [(400, None), (1200, 200), (400, None)]
    # A batch from each of two workers takes as long as in the article: two batches at half of the rate.
    assert 2 * scenario.batch_rows / 200 == 4.0


def test_messages_are_due_phase_by_phase() -> None:
    scenario = Scenario((Phase("a", 2, 10), Phase("b", 1, 100), Phase("c", 2, 1)), 10)
    assert [scenario.due(at) for at in (0, 0.1, 1, 2, 2.5, 3, 4, 5, 6, 1000)] == [
        0,
        1,
        10,
        20,
        70,
        120,
        121,
        122,
        122,
        122,
    ]
    assert [scenario.phase_ends_at(number) for number in range(3)] == [2, 3, 5]
    assert [scenario.phase_at(at) for at in (0, 1.9, 2, 2.9, 3, 4.9, 5, 1000)] == [0, 0, 1, 1, 2, 2, 2, 2]


@given(scenarios, st.floats(0, 600), st.floats(0, 600))
def test_what_is_due_never_shrinks_and_ends_at_the_total(scenario: Scenario, one: float, other: float) -> None:
    early, late = sorted((one, other))
    assert 0 <= scenario.due(early) <= scenario.due(late) <= scenario.messages
    assert scenario.due(scenario.seconds + 1) == scenario.messages


def test_the_largest_backlog_is_a_slow_phase_in_which_nothing_is_read() -> None:
    assert black_friday(90, 100).largest_backlog == 36 * 300
    assert load_test(60, 500, None, None, 100).largest_backlog == 5000
    assert load_test(60, 500, 2000, None, 100).largest_backlog == 20_000
    assert load_test(60, 500, 2000, 250, 100).largest_backlog == 40_000


def test_a_load_test_has_its_spike_in_the_middle() -> None:
    scenario = load_test(90, 100, 400, 50, 10)
    assert [(phase.seconds, phase.rate, phase.capacity) for phase in scenario.phases] == [
        (30, 100, None),
        (30, 400, 50),
        (30, 100, None),
    ]
    assert load_test(90, 100, None, 50, 10).phases == (Phase("steady", 90, 100, 50),)
