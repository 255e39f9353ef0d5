"""The daemon's own life, and that of its workers: starts, deaths, the drain, the deadline, the second signal."""

from __future__ import annotations

import logging
from itertools import product
from typing import Any

import pytest

from fixtures.core_driver import CoreDriver, pipeline
from speedlayer.supervisor.core import actions as a
from speedlayer.supervisor.core import events as e
from speedlayer.supervisor.core.core import Core
from speedlayer.supervisor.core.pipelines import Hold
from speedlayer.supervisor.core.state import Lifecycle, State
from speedlayer.workers import protocol as p

ALLOWED = {
    ("starting", "running"),
    ("starting", "draining"),
    ("starting", "stopped"),
    ("running", "draining"),
    ("running", "stopped"),
    ("draining", "leaving"),
    ("draining", "stopped"),
    ("leaving", "stopped"),
}


def busy(**settings: Any) -> CoreDriver:
    """A core with a flight under way."""
    world = CoreDriver(**settings)
    world.assign(0)
    world.poll(count=3)
    world.tick(0.25)
    world.forget()
    return world


def stops(world: CoreDriver) -> list[tuple[int, str]]:
    return [(stop.exit_code, stop.reason) for stop in world.of(a.Stop)]


@pytest.mark.parametrize(("before", "after"), list(product(Lifecycle, Lifecycle)), ids=lambda state: state.value)
def test_the_daemon_moves_only_as_the_table_allows(before: Lifecycle, after: Lifecycle) -> None:
    state = State.new(CoreDriver().config, 0)
    state.lifecycle, state.now = before, 7.0
    if (before.value, after.value) in ALLOWED:
        state.enter(after)
        assert (state.lifecycle, state.lifecycle_since) == (after, 7.0)
    else:
        with pytest.raises(AssertionError, match=f"{before.value} -> {after.value}"):
            state.enter(after)


def test_time_never_goes_back() -> None:
    world = CoreDriver()
    world.tick(10.0)
    world.tell(e.Tick(5.0))
    assert world.core.state.now == 10.0


def test_two_cores_with_one_seed_do_the_same() -> None:
    config = CoreDriver().config
    first, second = (Core(config, seed=7).state.jitter(1.0) for _ in range(2))
    assert first == second
    assert 0.5 <= first <= 1.0


# --- workers ------------------------------------------------------------------------------------------------------


def test_all_workers_are_started_at_once() -> None:
    world = CoreDriver(workers=3)
    assert [(start.worker, start.incarnation) for start in world.of(a.StartWorker)] == [
        ("worker-0", 1),
        ("worker-1", 1),
        ("worker-2", 1),
    ]


def test_a_worker_that_died_is_started_again_later_each_time_up_to_ten_seconds() -> None:
    world = CoreDriver()
    worker = world.core.state.workforce["worker-0"]
    for delay in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0):
        world.forget()
        world.exit()
        assert worker.start_at - world.now == pytest.approx(delay)
        assert not world.of(a.StartWorker)
        world.now = worker.start_at
        world.tick()
        assert len(world.of(a.StartWorker)) == 1
    assert worker.restarts == 9


def test_a_flush_that_comes_through_makes_the_next_death_the_first_again() -> None:
    world = CoreDriver()
    world.exit()
    world.tick(0.25)
    world.assign(0)
    world.poll()
    world.tick(0.25)
    world.flush()
    world.exit()
    assert world.core.state.workforce["worker-0"].start_at - world.now == pytest.approx(0.1)


@pytest.mark.parametrize("incarnation", [0, 2])
def test_the_exit_of_a_process_that_was_replaced_means_nothing(incarnation: int) -> None:
    world = busy()
    world.tell(e.WorkerExited(world.now, "worker-0", incarnation, -9))
    assert world.state() == "fetching"


def test_an_exit_that_is_told_twice_counts_once() -> None:
    world = CoreDriver()
    world.exit()
    world.exit()
    assert world.core.state.workforce["worker-0"].restarts == 1


def test_five_deaths_in_a_row_before_it_was_ready_stop_the_daemon_with_the_named_exit_code() -> None:
    world = CoreDriver(silent=[a.StartWorker])
    for attempt in range(1, 6):
        assert not world.of(a.Stop), attempt
        world.exit(code=1)
        world.tick(10.0)
    assert stops(world) == [(78, "worker-0 died 5 times in a row before it was ready")]


def test_a_worker_that_was_ready_meanwhile_begins_the_count_anew() -> None:
    world = CoreDriver(silent=[a.StartWorker])
    for _ in range(4):
        world.exit(code=1)
        world.tick(10.0)
    world.report("worker-0", p.Ready(100, 4, 1 << 20))
    for _ in range(5):
        assert not world.of(a.Stop)
        world.exit(code=1)
        world.tick(10.0)
    assert not world.of(a.Stop), "the first of these deaths was that of a ready worker"


def test_a_worker_that_says_it_cannot_boot_stops_the_daemon_at_once() -> None:
    world = CoreDriver(workers=2, silent=[a.StartWorker, a.FinishWorker])
    world.report("worker-1", p.BootFailed("no transform of that name"))
    assert stops(world) == [(78, "worker-1 cannot start: no transform of that name")]
    assert world.logged("speedlayer stops: worker-1 cannot start", logging.ERROR)
    assert len(world.of(a.KillWorker)) == 2


def test_what_a_worker_logs_is_logged_with_its_name() -> None:
    world = CoreDriver()
    world.report("worker-0", p.WorkerLog(logging.WARNING, "a ghost was ended", {"backend_pid": 7}))
    (line,) = (line for line in world.of(a.Log) if line.message == "a ghost was ended")
    assert line.fields == {"worker": "worker-0", "backend_pid": 7}


def test_the_last_word_of_a_worker_means_nothing() -> None:
    world = CoreDriver()
    world.forget()
    world.report("worker-0", p.Stopped())
    assert not world.actions


# --- the drain ----------------------------------------------------------------------------------------------------


def test_sigterm_reads_nothing_more_writes_what_was_read_and_leaves() -> None:
    world = busy()
    world.poll(count=2)
    world.stop()
    assert world.core.lifecycle is Lifecycle.DRAINING
    assert world.of(a.Pause) == [a.Pause(world.partition())]
    assert len(world.flights) == 2, "what was read is sent at once"
    world.flush()
    assert not world.of(a.FinishWorker)
    world.flush()
    ends = (a.FinishWorker, a.CommitOffsets, a.LeaveGroups, a.Stop)
    assert [action for action in world.actions if isinstance(action, ends)] == [
        a.FinishWorker("worker-0"),
        a.CommitOffsets("group", {world.partition(): 5}),
        a.LeaveGroups(),
        a.Stop(0, "SIGTERM"),
    ]
    assert world.core.lifecycle is Lifecycle.STOPPED


def test_an_idle_daemon_stops_at_once() -> None:
    world = CoreDriver()
    world.stop()
    assert stops(world) == [(0, "SIGTERM")]


def test_a_daemon_that_has_not_started_stops_too() -> None:
    world = CoreDriver(boot=False)
    world.stop()
    assert (stops(world), world.of(a.FinishWorker)) == ([(0, "SIGTERM")], [])


def test_a_daemon_that_has_stopped_does_nothing_more() -> None:
    world = CoreDriver()
    world.stop()
    world.forget()
    world.stop()
    world.tick(100.0)
    assert not world.actions


def test_a_worker_that_boots_is_waited_for_until_the_deadline() -> None:
    world = CoreDriver(silent=[a.StartWorker, a.FinishWorker])
    world.stop()
    assert world.of(a.FinishWorker) == [a.FinishWorker("worker-0")]
    assert not world.of(a.Stop)
    world.tick(30.0)
    assert world.of(a.KillWorker) == [a.KillWorker("worker-0")]
    assert stops(world) == [(0, "SIGTERM")]


@pytest.mark.parametrize("seconds", [0.0, 5.0])
def test_at_the_deadline_what_is_not_written_is_given_up(seconds: float) -> None:
    world = busy(shutdown_seconds=seconds, silent=[a.FinishWorker])
    world.stop()
    if seconds:
        world.tick(seconds - 0.5)
        assert not world.of(a.KillWorker)
        world.tick(0.5)
    assert world.logged("the deadline is over", logging.WARNING)
    assert world.of(a.KillWorker) == [a.KillWorker("worker-0")]
    assert stops(world) == [(0, "SIGTERM")]
    assert world.lane().flushed == 0


def test_workers_that_finish_in_time_are_not_killed() -> None:
    world = CoreDriver(workers=2, silent=[a.FinishWorker])
    world.stop()
    assert world.core.lifecycle is Lifecycle.LEAVING
    world.exit("worker-0", 0)
    assert not world.of(a.Stop)
    world.exit("worker-1", 0)
    assert (stops(world), world.of(a.KillWorker)) == ([(0, "SIGTERM")], [])


def test_a_second_signal_while_draining_stops_at_once() -> None:
    world = busy(silent=[a.FinishWorker])
    world.stop()
    world.stop()
    assert world.logged("stopping at once", logging.WARNING)
    assert world.of(a.KillWorker) == [a.KillWorker("worker-0")]
    assert stops(world) == [(0, "SIGTERM")]


def test_a_second_signal_while_the_workers_finish_kills_them() -> None:
    world = CoreDriver(silent=[a.FinishWorker])
    world.stop()
    assert world.core.lifecycle is Lifecycle.LEAVING
    world.stop()
    assert world.of(a.KillWorker) == [a.KillWorker("worker-0")]
    assert len(world.of(a.Stop)) == 1


def test_a_stop_in_a_hurry_waits_for_nothing() -> None:
    world = busy(silent=[a.FinishWorker])
    world.stop(hurry=True)
    assert stops(world) == [(0, "SIGTERM")]


def test_the_reason_is_that_of_the_first_request() -> None:
    world = busy()
    world.stop("an operator")
    world.stop("SIGTERM")
    assert stops(world) == [(0, "an operator")]


def test_a_worker_that_dies_during_the_drain_is_not_started_again_and_the_rest_is_written() -> None:
    world = CoreDriver(workers=2)
    world.assign(0, 1)
    world.poll(0)
    world.poll(1)
    world.tick(0.25)
    world.stop()
    world.exit("worker-0")
    assert not world.of(a.Stop)
    world.flush()
    assert stops(world) == [(0, "SIGTERM")]
    assert len(world.of(a.StartWorker)) == 2
    assert (world.checkpoint(0).next_offset, world.checkpoint(1).next_offset) == (0, 1)


def test_a_pipeline_whose_sink_takes_nothing_does_not_hold_up_the_stop_once_nothing_is_in_flight() -> None:
    world = CoreDriver()
    world.assign(0)
    world.poll()
    world.command("pause")
    world.stop()
    assert stops(world) == [(0, "SIGTERM")]
    assert world.lane().expected == world.lane().dispatched == 0, "what was not sent is read again"
    assert world.pipeline().buffered_bytes == 0


def test_a_pause_that_ends_during_the_drain_lets_the_rest_be_written() -> None:
    world = CoreDriver(pause_seconds=5.0, max_slow_flushes=1, batch_rows=1)
    world.assign(0)
    world.poll()
    world.poll()
    world.poll()
    world.flush(2.5)
    world.stop()
    assert Hold.OVERLOAD in world.pipeline().holds
    world.tick(5.0)
    assert Hold.OVERLOAD in world.pipeline().holds or world.flights
    world.flush()
    world.flush()
    assert stops(world) == [(0, "SIGTERM")]
    assert world.checkpoint().next_offset == 3


def test_no_lane_is_read_again_during_the_drain() -> None:
    world = busy()
    world.stop()
    world.tell(e.PositionsUnknown(world.now, "group", "why"))
    world.assign(1)
    world.tick(1.0)
    assert not world.of(a.Resume)
    assert world.state(1) == "pending"


def test_every_group_is_told_its_own_offsets() -> None:
    world = CoreDriver(pipeline("orders"), pipeline("payments", group="second", topics=("payments",)))
    world.assign(0)
    world.assign(0, topic="payments", group="second")
    world.poll()
    world.poll(topic="payments", group="second", count=2)
    world.tick(0.25)
    world.flush()
    world.flush()
    world.tick(1.0)
    assert world.of(a.CommitOffsets) == [
        a.CommitOffsets("group", {world.partition(): 1}),
        a.CommitOffsets("second", {world.partition(0, "payments", "second"): 2}),
    ]
