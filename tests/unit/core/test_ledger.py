"""Lanes: which state follows which, and the order of the three offsets."""

from __future__ import annotations

from itertools import product

import pytest

from fixtures.core_driver import CoreDriver
from fixtures.flights import chunk, lane
from speedlayer.supervisor.core.events import Partition, Slice
from speedlayer.supervisor.core.ledger import (
    TRANSITIONS,
    IllegalTransition,
    Lane,
    LaneState,
    Ledger,
    OpenBatch,
    SeekTarget,
)

# Written out here once more: a table that is compared with itself would allow whatever it is changed to.
ALLOWED = {
    ("pending", "claiming"),
    ("claiming", "inspecting"),
    ("claiming", "pending"),
    ("inspecting", "seeding"),
    ("inspecting", "held"),
    ("inspecting", "stopped"),
    ("inspecting", "pending"),
    ("seeding", "held"),
    ("seeding", "pending"),
    ("held", "fetching"),
    ("held", "pending"),
    ("held", "stopped"),
    ("fetching", "held"),
    ("fetching", "pending"),
    ("fetching", "stopped"),
    ("stopped", "pending"),
}


def new_lane(number: int = 0, *, topic: str = "orders", group: str = "group", pipeline: str = "orders") -> Lane:
    return Lane(Partition(group, topic, number), lane(number, topic=topic, pipeline=pipeline))


def piece(first: int, count: int, size_bytes: int) -> Slice:
    chunks = chunk([b"{}"] * count, first_offset=first)
    end = first + count
    return Slice(Partition("group", "orders", 0), 1, first, end - 1, end, count, size_bytes, -1, chunks)


@pytest.mark.parametrize(("before", "after"), list(product(LaneState, LaneState)), ids=lambda state: state.value)
def test_a_lane_moves_only_as_the_table_allows(before: LaneState, after: LaneState) -> None:
    moved = new_lane()
    moved.state = before
    if (before.value, after.value) in ALLOWED:
        moved.claim_delay = "the database is away"
        moved.move(after, 7.0, "because")
        assert (moved.state, moved.since, moved.reason, moved.claim_delay) == (after, 7.0, "because", "")
    else:
        with pytest.raises(IllegalTransition, match=f"orders/0: {before.value} -> {after.value}"):
            moved.move(after, 7.0)
        assert moved.state is before


def test_every_state_is_in_the_table_and_can_be_left() -> None:
    assert set(TRANSITIONS) == set(LaneState)
    assert all(TRANSITIONS.values())


def test_the_offsets_stand_in_their_order_all_along() -> None:
    world = CoreDriver(batch_rows=4)
    world.assign(0)
    seen = []

    def note() -> None:
        now = world.lane()
        seen.append((now.flushed, now.dispatched, now.expected))

    note()
    world.poll(count=3)
    note()
    world.poll(count=3)
    note()
    world.tick(0.25)
    note()
    world.flush()
    note()
    world.flush()
    note()
    assert seen == [(0, 0, 0), (0, 0, 3), (0, 3, 6), (0, 6, 6), (3, 6, 6), (6, 6, 6)]


def test_a_lane_that_forgets_goes_back_to_what_is_final() -> None:
    lost = new_lane()
    lost.begin_at(10)
    lost.expected, lost.dispatched, lost.in_flight = 30, 20, 1
    lost.worker, lost.epoch, lost.claim_id, lost.moving, lost.check_at = "worker-0", 4, 9, True, 1.0
    lost.batch.add(piece(20, 10, 100), 0.0)
    assert lost.forget() == 100
    assert (lost.flushed, lost.dispatched, lost.expected) == (10, 10, 10)
    assert (lost.worker, lost.epoch, lost.claim_id, lost.moving, lost.check_at, lost.in_flight) == (
        None,
        None,
        0,
        False,
        None,
        0,
    )
    assert not lost.batch.slices


@pytest.mark.parametrize(
    ("high", "flushed", "lag"),
    [(None, 5, None), (10, None, None), (10, 4, 6), (10, 10, 0), (10, 12, 0)],
)
def test_the_lag_is_known_with_a_checkpoint_and_the_end_of_the_log(
    high: int | None, flushed: int | None, lag: int | None
) -> None:
    known = new_lane()
    known.high_watermark = high
    if flushed is not None:
        known.begin_at(flushed)
    assert known.lag == lag


@pytest.mark.parametrize(
    ("rows", "size_bytes", "taken", "left"),
    [
        (100, 1000, [0, 2, 4], 0),
        (4, 1000, [0, 2], 2),
        (5, 1000, [0, 2], 2),
        (100, 40, [0, 2], 2),
        (100, 59, [0, 2], 2),
        (1, 1, [0], 4),
    ],
)
def test_what_fits_is_taken_the_oldest_first_and_at_least_one_slice(
    rows: int, size_bytes: int, taken: list[int], left: int
) -> None:
    batch = OpenBatch()
    for first in (0, 2, 4):
        batch.add(piece(first, 2, 20), 1.0)
    assert [found.first for found in batch.take(rows, size_bytes, 5.0)] == taken
    assert (batch.rows, batch.size_bytes) == (left, left * 10)
    assert batch.opened_at == (5.0 if left else None), "what is left behind is as old as this moment"


def test_a_batch_is_as_old_as_its_first_message() -> None:
    batch = OpenBatch()
    batch.add(piece(0, 1, 10), 1.0)
    batch.add(piece(1, 1, 10), 9.0)
    assert batch.opened_at == 1.0


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (SeekTarget(offset=0), "offset 0"),
        (SeekTarget(edge="latest"), "latest"),
        (SeekTarget(timestamp_ms=1700), "timestamp 1700 ms"),
    ],
)
def test_a_seek_target_reads_as_what_was_asked_for(target: SeekTarget, text: str) -> None:
    assert str(target) == text


def test_the_ledger_finds_lanes_by_partition_pipeline_group_and_worker() -> None:
    ledger = Ledger()
    mine, other = new_lane(0), new_lane(1, topic="payments", group="second", pipeline="payments")
    mine.worker = "worker-0"
    ledger.add(mine)
    ledger.add(other)
    assert len(ledger) == 2
    assert ledger.get(mine.partition) is mine
    assert ledger.of_pipeline("payments") == ledger.of_group("second") == [other]
    assert ledger.of_worker("worker-0") == [mine]
    assert ledger.remove(mine.partition) is mine
    assert ledger.remove(mine.partition) is None
    assert list(ledger) == [other]
