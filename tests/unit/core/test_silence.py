"""Why no message comes: the nearest cause, in one sentence, once."""

from __future__ import annotations

from typing import Any

import pytest

from fixtures.core_driver import CoreDriver, pipeline
from speedlayer.supervisor.core import actions as a
from speedlayer.supervisor.core import events as e
from speedlayer.supervisor.core.silence import why_silent

QUIET = "no message for 10 s"


def reason(world: CoreDriver, name: str = "orders") -> str:
    return why_silent(world.core.state, world.pipeline(name))


def reading(**settings: Any) -> CoreDriver:
    world = CoreDriver(**settings)
    world.assign(0)
    return world


def trouble(world: CoreDriver) -> None:
    world.tell(e.ConsumerTrouble(world.now, "group", "_ALL_BROKERS_DOWN", "1/1 brokers are down"))


def marks(world: CoreDriver, low: int, high: int) -> None:
    world.tell(e.Watermarks(world.now, {world.partition(): (low, high), world.partition(99): (0, 0)}))


def test_a_held_pipeline_is_silent_because_of_its_hold() -> None:
    world = reading()
    world.command("pause")
    trouble(world)
    assert reason(world) == "it is held (paused): an operator paused it; speedlayer resume goes on"


@pytest.mark.parametrize(("troubled", "more"), [(False, ""), (True, "; Kafka says: 1/1 brokers are down")])
def test_without_a_partition_that_is_why(troubled: bool, more: str) -> None:
    world = CoreDriver(pipeline(topics=("orders", "refunds")))
    if troubled:
        trouble(world)
    assert reason(world) == f"no partition of orders, refunds is assigned to this daemon{more}"


def test_where_every_partition_is_stopped_the_first_says_why() -> None:
    world = reading(start="error")
    assert reason(world).startswith("every partition is stopped, the first because there is no checkpoint")


def test_a_partition_that_is_on_its_way_says_how_far_it_is() -> None:
    world = CoreDriver(silent=[a.SendClaim])
    world.assign(0)
    assert reason(world) == "orders/0 is claiming: claim sent to worker-0"


def test_one_stopped_partition_does_not_explain_the_silence_of_the_others() -> None:
    world = reading()
    world.assign(1)
    world.poll(1, count=5)
    world.poll(1, first=0)
    marks(world, 0, 0)
    assert world.state(1) == "stopped"
    world.lane(1).high_watermark = world.lane(1).low_watermark
    assert reason(world) == "the topic is empty"


def test_trouble_with_kafka_explains_the_silence_of_a_partition_that_is_read() -> None:
    world = reading()
    trouble(world)
    assert reason(world) == "Kafka says: 1/1 brokers are down"


def test_trouble_with_kafka_is_told_once_and_explains_nothing_once_it_is_over() -> None:
    world = reading()
    trouble(world)
    trouble(world)
    assert len(world.logged("1/1 brokers are down")) == 1
    world.tick(15.0)
    world.poll()
    assert world.logged("Kafka answers again; it is over: 1/1 brokers are down")
    assert "Kafka says" not in reason(world)


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (0, 0, "the topic is empty"),
        (3, 3, "the topic is empty"),
        (0, 5, "the end of the topic is reached; everything is written"),
        (0, 6, "the broker sends nothing, although there is something to read"),
    ],
)
def test_otherwise_the_log_explains_it(low: int, high: int, told: str) -> None:
    world = reading()
    world.poll(count=5)
    world.tick(0.25)
    world.flush()
    marks(world, low, high)
    assert reason(world) == told


def test_without_the_logs_range_nothing_is_claimed_of_its_end() -> None:
    world = reading()
    world.lane().high_watermark = None
    assert reason(world) == "the broker sends nothing, although there is something to read"


def test_what_is_still_being_written_is_told_with_its_age() -> None:
    world = reading()
    world.poll(count=5)
    world.tick(0.25)
    marks(world, 0, 5)
    world.tick(12.0)
    assert reason(world) == "the end of the topic is reached; what was read is still being written, for 12 s now"


def test_after_ten_quiet_seconds_it_is_told_once_for_each_pipeline_until_a_message_comes() -> None:
    world = CoreDriver(pipeline("orders"), pipeline("payments", topics=("payments",)))
    world.assign(0)
    world.tick(9.5)
    assert not world.logged(QUIET)
    world.tick(0.5)
    assert [line.split(":")[0] for line in world.logged(QUIET)] == ["pipeline orders", "pipeline payments"]
    world.tick(60.0)
    assert len(world.logged(QUIET)) == 2
    world.poll()
    world.tick(10.0)
    assert len(world.logged(QUIET)) == 4
