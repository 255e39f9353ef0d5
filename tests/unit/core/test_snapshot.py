"""The snapshot shows what is, in values that JSON knows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fixtures.core_driver import CoreDriver, pipeline
from speedlayer.supervisor.core import actions as a
from speedlayer.supervisor.core import events as e
from speedlayer.supervisor.core.pipelines import Hold
from speedlayer.workers import protocol as p


def reading(**settings: Any) -> CoreDriver:
    world = CoreDriver(**settings)
    world.assign(0)
    return world


def lane(world: CoreDriver) -> dict[str, Any]:
    shown = world.status()["lanes"][0]
    assert isinstance(shown, dict)
    return shown


def test_the_snapshot_is_json_from_the_first_moment_to_the_last() -> None:
    world = CoreDriver(boot=False)
    json.dumps(world.core.snapshot())
    world.tell(e.Started(0.0))
    world.assign(0)
    world.poll()
    json.dumps(world.core.snapshot())
    world.stop()
    shown = json.loads(json.dumps(world.core.snapshot()))
    assert (shown["state"], shown["stop_reason"], shown["pid"]) == ("draining", "SIGTERM", 1)


def test_the_daemons_times_count_from_its_start_and_its_last_change() -> None:
    world = reading()
    world.poll()
    world.tick(10.0)
    world.stop()
    world.tick(2.5)
    shown = world.core.snapshot()
    assert (shown["uptime_seconds"], shown["since_seconds"]) == (12.5, 2.5)


def test_what_was_read_is_shown_assembled_then_in_flight_then_written() -> None:
    world = reading()
    world.poll(count=3, size_bytes=300)
    shown = world.status()
    assert (shown["assembled_rows"], shown["in_flight_rows"], shown["buffered_bytes"]) == (3, 0, 300)
    world.tick(0.25)
    shown = world.status()
    assert (shown["assembled_rows"], shown["in_flight_rows"], shown["flights"]) == (0, 3, 1)
    assert world.core.snapshot()["memory"]["buffered_bytes"] == 300
    world.flush(0.125)
    shown = world.status()
    assert (shown["rows"], shown["flushes"], shown["last_flush_seconds"]) == (3, 1, 0.125)
    assert (shown["buffered_bytes"], shown["in_flight_rows"]) == (0, 0)


def test_a_worker_shows_what_it_holds_and_since_when() -> None:
    world = reading()
    (shown,) = world.core.snapshot()["workers"]
    assert shown == {
        "name": "worker-0",
        "pid": 101,
        "state": "ready",
        "flights": 0,
        "bytes": 0,
        "restarts": 0,
        "long_flushes": 0,
        "oldest_flight_seconds": None,
    }
    world.poll(size_bytes=50)
    world.tick(0.25)
    world.tick(3.0)
    (shown,) = world.core.snapshot()["workers"]
    assert (shown["flights"], shown["bytes"], shown["oldest_flight_seconds"]) == (1, 50, 3.0)


def test_a_lane_shows_its_offsets_and_its_lag() -> None:
    world = reading()
    world.poll(count=10)
    shown = lane(world)
    assert (shown["next_offset"], shown["fetched_offset"], shown["high_watermark"], shown["lag"]) == (0, 10, 1000, 1000)
    world.tick(0.25)
    world.flush()
    assert (lane(world)["next_offset"], lane(world)["lag"], world.status()["lag"]) == (10, 990, 990)


def test_a_lane_without_a_checkpoint_shows_no_offsets() -> None:
    world = CoreDriver(silent=[a.SendClaim])
    world.assign(0)
    assert (lane(world)["next_offset"], lane(world)["fetched_offset"], world.status()["lag"]) == (None, None, None)


def test_lanes_are_shown_in_their_order() -> None:
    world = CoreDriver()
    world.assign(2, 0, 1)
    assert [shown["partition"] for shown in world.status()["lanes"]] == [0, 1, 2]


def test_rates_are_those_of_the_last_whole_seconds() -> None:
    world = reading()
    world.poll(count=50)
    world.tick(0.25)
    world.flush()
    world.tick(1.0)
    assert (world.status()["consumed_per_second"], world.status()["rows_per_second"]) == (10.0, 10.0)
    world.tick(10.0)
    assert world.status()["rows_per_second"] == 0.0


@pytest.mark.parametrize(("first", "second"), list(zip(list(Hold), list(Hold)[1:], strict=False)))
def test_of_several_holds_the_first_in_order_names_the_state_and_all_are_listed(first: Hold, second: Hold) -> None:
    world = reading()
    held = world.pipeline()
    assert held.hold(second, "second")
    assert held.hold(first, "first")
    assert not held.hold(first, "first again")
    assert (world.status()["state"], world.status()["reason"]) == (first.value, "first again")
    assert world.status()["holds"] == {second.value: "second", first.value: "first again"}
    assert held.release(first)
    assert not held.release(first)


def test_a_hold_goes_before_a_claim_that_waits() -> None:
    world = CoreDriver(silent=[a.SendClaim])
    world.assign(0)
    claim = world.of(a.SendClaim)[0].claim
    world.report("worker-0", p.ClaimDelayed(claim.claim_id, claim.lane, "no server", None))
    assert world.status()["state"] == "blocked"
    world.command("pause")
    assert world.status()["state"] == "paused"


def test_the_pause_that_is_left_is_shown_and_never_below_zero() -> None:
    world = reading(batch_rows=1, max_slow_flushes=1, pause_seconds=5.0)
    for _ in range(4):
        world.poll()
    assert world.status()["paused_until_seconds"] is None
    world.flush(9.0)
    world.tick(2.0)
    assert world.status()["paused_until_seconds"] == 3.0
    world.tick(60.0)
    assert world.status()["paused_until_seconds"] == 0.0, "the queues are not drained yet"


def test_the_groups_are_named_once_and_trouble_is_shown_for_its_group() -> None:
    pipelines = [pipeline(name, group=group, topics=(name,)) for name, group in (("b", "z"), ("a", "z"), ("c", "y"))]
    world = CoreDriver(*pipelines)
    world.tell(e.ConsumerTrouble(0.0, "y", "_TRANSPORT", "refused"))
    shown = world.core.snapshot()
    assert (shown["group_ids"], shown["consumer_trouble"]) == (["y", "z"], {"y": "refused"})
    assert [found["name"] for found in shown["pipelines"]] == ["b", "a", "c"]
