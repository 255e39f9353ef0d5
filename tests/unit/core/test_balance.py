"""Which worker gets which lane, and how lanes move at rest."""

from __future__ import annotations

from collections import Counter

import pytest

from fixtures.core_driver import CoreDriver, pipeline
from speedlayer.supervisor.core import actions as a
from speedlayer.supervisor.core import events as e


def spread(world: CoreDriver, topic: str = "orders") -> list[int]:
    """How many lanes of a topic each worker has, worker by worker."""
    lanes = [lane for lane in world.core.lanes() if lane.partition.topic == topic]
    counts = Counter(lane.worker for lane in lanes)
    return [counts[worker.name] for worker in world.core.state.workforce]


def after_a_death(lanes: int) -> CoreDriver:
    """All lanes are with worker-1, and worker-0 is back."""
    world = CoreDriver(workers=2)
    world.assign(*range(lanes))
    world.exit("worker-0")
    world.tick(0.125)
    assert spread(world) == [0, lanes]
    return world


@pytest.mark.parametrize(
    ("lanes", "workers", "expected"), [(4, 2, [2, 2]), (5, 2, [3, 2]), (1, 3, [1, 0, 0]), (7, 3, [3, 2, 2])]
)
def test_lanes_are_spread_evenly_from_the_start(lanes: int, workers: int, expected: list[int]) -> None:
    world = CoreDriver(workers=workers)
    world.assign(*range(lanes))
    assert spread(world) == expected


def test_each_pipelines_lanes_are_spread_by_themselves_then_the_lanes_of_all() -> None:
    world = CoreDriver(pipeline("orders"), pipeline("payments", topics=("payments",)), workers=2)
    world.assign(0)
    world.assign(0, 1, 2, topic="payments")
    assert (spread(world), spread(world, "payments")) == ([1, 0], [1, 2])


@pytest.mark.parametrize(("lanes", "expected"), [(4, [2, 2]), (5, [2, 3]), (1, [0, 1]), (2, [1, 1])])
def test_lanes_go_back_to_a_worker_that_came_back(lanes: int, expected: list[int]) -> None:
    world = after_a_death(lanes)
    world.tick(1.0)
    world.tick(0.0)
    assert spread(world) == expected
    assert {lane.state.value for lane in world.core.lanes()} == {"fetching"}
    world.forget()
    world.tick(1.0)
    world.tick(1.0)
    assert not world.of(a.SendClaim), "and there it ends"


def test_a_lane_moves_at_rest_when_everything_that_was_read_of_it_is_written() -> None:
    world = after_a_death(2)
    world.poll(0, count=3)
    world.tick(0.25)
    world.poll(0, count=2)
    world.tick(0.75)
    moving = world.lane(0)
    assert (moving.moving, moving.state.value, moving.worker) == (True, "held", "worker-1")
    assert moving.reason == "to be moved to worker-0, which has fewer partitions"
    world.flush()
    assert moving.worker == "worker-1"
    world.flush()
    world.tick()
    assert (moving.worker, moving.flushed, moving.state.value) == ("worker-0", 5, "fetching")


def test_no_further_lane_is_chosen_while_one_moves() -> None:
    world = after_a_death(4)
    world.poll(0)
    world.tick(0.25)
    world.poll(1)
    world.tick(1.0)
    chosen = [lane.partition.partition for lane in world.core.lanes() if lane.moving]
    assert chosen == [0, 1]
    world.tick(5.0)
    assert [lane.partition.partition for lane in world.core.lanes() if lane.moving] == chosen


def test_a_lane_that_is_held_for_a_moment_may_be_chosen_and_is_not_read_before_it_has_moved() -> None:
    world = after_a_death(2)
    world.forget()
    world.now += 1.0
    world.tell(e.PositionsUnknown(world.now, "group", "consume() raised"))
    assert world.lane(0).moving
    assert [resume.partition.partition for resume in world.of(a.Resume)] == [1]
    world.tick()
    assert (world.lane(0).worker, world.state(0)) == ("worker-0", "fetching")


def test_a_pipeline_that_is_held_is_not_evened_out() -> None:
    world = after_a_death(4)
    world.command("pause")
    world.tick(5.0)
    assert spread(world) == [0, 4]
    world.command("resume")
    world.tick(1.0)
    world.tick(1.0)
    assert spread(world) == [2, 2]


def test_lanes_that_are_being_claimed_are_not_moved() -> None:
    world = after_a_death(4)
    world.silent.add(a.SendClaim)
    world.command("seek", to=0)
    world.forget()
    world.tick(5.0)
    assert not any(lane.moving for lane in world.core.lanes())


def test_with_one_worker_there_is_nothing_to_even_out() -> None:
    world = CoreDriver()
    world.assign(0, 1)
    world.forget()
    world.tick(5.0)
    assert not world.of(a.Pause)


def test_a_worker_that_starts_again_is_not_waited_for() -> None:
    world = CoreDriver(workers=2)
    world.silent.add(a.StartWorker)
    world.exit("worker-0")
    world.tick(0.125)
    world.assign(0, 1)
    assert spread(world) == [0, 2]


def test_without_any_worker_lanes_wait() -> None:
    world = CoreDriver()
    world.silent.add(a.StartWorker)
    world.exit()
    world.assign(0)
    assert world.state() == "pending"
