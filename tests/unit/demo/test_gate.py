"""The competitor's gate: how long the lock is held, whoever waits for it."""

from __future__ import annotations

import random

import pytest

from speedlayer.supervisor.demo.competitor import Gate

LOOK = 0.02
MINIMUM_HOLD = 2.06


class Workers:
    """Workers that always have a batch to flush, and wait for the gate with it."""

    def __init__(self, count: int, rows: list[int], pause_seconds: float) -> None:
        self.count = count
        self.rows = rows
        self.pause_seconds = pause_seconds
        self.ready_at = [0.0] * count
        self.durations: list[float] = []

    def waiting(self, now: float) -> list[int]:
        return [number for number in range(self.count) if self.ready_at[number] <= now]

    def pass_through(self, now: float) -> int:
        passed = 0
        for number in self.waiting(now):
            passed += self.rows[len(self.durations) % len(self.rows)]
            self.durations.append(now - self.ready_at[number])
            self.ready_at[number] = now + self.pause_seconds
        return passed


def play(gate: Gate, workers: Workers, seconds: float) -> float:
    """Run the gate against the workers; returns the rows per second that got through."""
    total = last = 0.0
    for step in range(int(seconds / LOOK)):
        now = step * LOOK
        if gate.is_due(now, len(workers.waiting(now))):
            passed = workers.pass_through(now)
            gate.opened(passed)
            total, last = total + passed, now
    return total / last


@pytest.mark.parametrize("count", [1, 2, 4])
def test_full_batches_get_through_at_the_rate_and_every_one_is_slow(count: int) -> None:
    workers = Workers(count, [100], pause_seconds=0.01)
    assert play(Gate(50, 100, MINIMUM_HOLD), workers, 300) == pytest.approx(50, rel=0.06)
    assert min(workers.durations) > 2.0


def test_batches_of_any_size_get_through_at_the_rate() -> None:
    rows = [random.Random(7).randint(50, 100) for _ in range(101)]
    workers = Workers(2, rows, pause_seconds=0.01)
    assert play(Gate(50, 100, MINIMUM_HOLD), workers, 300) == pytest.approx(50, rel=0.12)
    assert min(workers.durations) > 2.0


def test_a_small_batch_waits_as_long_as_a_strike_needs() -> None:
    workers = Workers(1, [3], pause_seconds=0.01)
    play(Gate(50, 100, MINIMUM_HOLD), workers, 60)
    assert workers.durations[1:] == pytest.approx([MINIMUM_HOLD] * len(workers.durations[1:]), abs=2 * LOOK)


def test_one_that_comes_late_waits_as_long_as_a_strike_needs() -> None:
    gate = Gate(50, 100, MINIMUM_HOLD)
    gate.is_due(0.0, 1)
    gate.opened(10)  # the next hold is short: 90 rows fewer than it was for
    assert not gate.is_due(10.0, 1)
    assert not gate.is_due(12.0, 2)
    assert not gate.is_due(12.0 + MINIMUM_HOLD - LOOK, 2)
    assert gate.is_due(12.0 + MINIMUM_HOLD + LOOK, 2)


def test_time_in_which_nobody_waits_is_not_saved_up() -> None:
    gate = Gate(50, 100, MINIMUM_HOLD)
    assert not gate.is_due(0.0, 1)
    assert not gate.is_due(1.0, 0)
    assert not gate.is_due(100.0, 1)
    assert not gate.is_due(100.0 + MINIMUM_HOLD - LOOK, 1)
    assert gate.is_due(100.0 + MINIMUM_HOLD + LOOK, 1)


def test_more_rows_than_expected_make_the_next_hold_longer() -> None:
    gate = Gate(50, 100, MINIMUM_HOLD)
    gate.is_due(0.0, 1)
    gate.opened(300)
    gate.is_due(10.0, 1)
    assert not gate.is_due(10.0 + 5.5, 1)
    assert gate.is_due(10.0 + 6.0, 1)
