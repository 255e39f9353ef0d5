"""The capacity of a database: rows over the time in which a flush was open."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speedlayer.supervisor.demo.capacity import Flush, measure_capacity, rows_per_step


def test_idle_time_does_not_count() -> None:
    assert measure_capacity([Flush(1.0, 1.5, 100), Flush(8.0, 8.5, 100)], 0, 10) == pytest.approx(200)


def test_flushes_that_wait_side_by_side_share_their_time() -> None:
    assert measure_capacity([Flush(0.0, 4.0, 100), Flush(0.0, 4.0, 100)], 0, 10) == pytest.approx(50)
    assert measure_capacity([Flush(0.0, 3.0, 100), Flush(2.0, 4.0, 100)], 0, 10) == pytest.approx(50)
    assert measure_capacity([Flush(0.0, 4.0, 100), Flush(1.0, 2.0, 100)], 0, 10) == pytest.approx(50)


def test_only_what_lies_within_the_phase_counts() -> None:
    flushes = [Flush(0.0, 1.0, 7), Flush(1.5, 2.0, 100), Flush(2.9, 3.1, 9), Flush(5.0, 6.0, 9)]
    assert measure_capacity(flushes, 0.5, 3.0) == pytest.approx(200)


def test_without_a_flush_there_is_no_capacity() -> None:
    assert measure_capacity([], 0, 10) is None
    assert measure_capacity([Flush(11, 12, 5)], 0, 10) is None


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0.1, 10), st.integers(1, 100)), min_size=1, max_size=20))
def test_no_order_and_no_overlap_makes_the_open_time_longer_than_its_sum(raw: list[tuple[float, float, int]]) -> None:
    flushes = [Flush(began, began + length, rows) for began, length, rows in raw]
    rows = sum(flush.rows for flush in flushes)
    capacity = measure_capacity(reversed(flushes), 0, 100)
    assert capacity is not None
    longest = max(flush.ended for flush in flushes) - min(flush.began for flush in flushes)
    in_sum = sum(flush.ended - flush.began for flush in flushes)
    assert rows / capacity <= min(longest, in_sum) + 1e-6
    assert rows / capacity >= max(flush.ended - flush.began for flush in flushes) - 1e-6


def test_rows_are_counted_in_the_second_in_which_they_become_visible() -> None:
    flushes = [Flush(-1.0, 0.0, 10), Flush(0.0, 1.9, 100), Flush(1.0, 1.1, 50), Flush(1.0, 9.0, 7)]
    assert rows_per_step(flushes, 0.0, 3, 1.0) == [10.0, 150.0, 0.0]
    assert rows_per_step(flushes, 0.0, 2, 2.0) == [80.0, 0.0]
