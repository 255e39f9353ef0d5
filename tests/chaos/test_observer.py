"""A stall is measured from when a partition is behind, and against the faults that overlap it."""

from __future__ import annotations

import pytest

from chaos.observer import Stall, StallClock

LANE = ("orders", 0)


def stalls_of(*seen: tuple[float, int, int]) -> list[tuple[float, float]]:
    """The stalls where the lane was seen (when, checkpoint, end of the log)."""
    clock = StallClock()
    for at, offset, end in seen:
        clock.saw(at, {LANE: offset}, {LANE: end})
    return [(stall.began, stall.ended) for stall in clock.stalls + clock.under_way(seen[-1][0])]


def test_a_lane_that_moves_does_not_stall() -> None:
    assert stalls_of((0, 0, 10), (2, 5, 20), (4, 10, 30), (6, 15, 40)) == []


def test_a_lane_that_is_not_behind_does_not_stall() -> None:
    assert stalls_of((0, 10, 10), (50, 10, 10), (100, 10, 10)) == []


def test_a_lane_that_is_behind_and_does_not_move_stalls_until_it_moves() -> None:
    assert stalls_of((0, 10, 10), (1, 10, 20), (20, 10, 30), (21, 11, 30)) == [(1, 21)]


def test_a_stall_that_goes_on_counts() -> None:
    assert stalls_of((0, 10, 20), (40, 10, 30)) == [(0, 40)]


def test_a_checkpoint_that_goes_back_is_no_progress() -> None:
    assert stalls_of((0, 10, 20), (5, 4, 30), (10, 4, 30), (15, 5, 30)) == [(0, 15)]


def test_a_partition_that_nobody_has_read_stalls() -> None:
    clock = StallClock()
    clock.saw(0, {}, {LANE: 5})
    clock.saw(31, {}, {LANE: 6})
    assert clock.under_way(31) == [Stall(LANE, 0, 31)]


@pytest.mark.parametrize(
    ("windows", "undisturbed"),
    [
        ([], 40),
        ([(5.0, 8.0, "before it")], 40),
        ([(55.0, 60.0, "after it")], 40),
        ([(5.0, 15.0, "begins before"), (12.0, 30.0, "the last")], 20),
        ([(12.0, 15.0, "short"), (45.0, None, "under way")], 30),
        ([(5.0, 49.0, "nearly all of it"), (20.0, 25.0, "within the other")], 1),
        ([(5.0, 70.0, "outlasts it")], 0),
    ],
)
def test_the_undisturbed_part_of_a_stall_is_the_longest_stretch_without_a_fault(
    windows: list[tuple[float, float | None, str]], undisturbed: float
) -> None:
    assert Stall(LANE, 10.0, 50.0).undisturbed(windows) == undisturbed
