"""What an operator asks for, and the one answer to each command."""

from __future__ import annotations

from typing import Any

import pytest

from fixtures.core_driver import CoreDriver, pipeline
from speedlayer.supervisor.core import actions as a


def reading(*numbers: int, **settings: Any) -> CoreDriver:
    world = CoreDriver(**settings)
    world.assign(*(numbers or (0,)))
    return world


def two_pipelines() -> CoreDriver:
    world = CoreDriver(pipeline("orders"), pipeline("payments", topics=("payments",)))
    world.assign(0)
    world.assign(0, topic="payments")
    return world


# --- pause and resume ---------------------------------------------------------------------------------------------


def test_pause_stops_reading_and_sending_and_resume_goes_on() -> None:
    world = reading()
    world.poll()
    assert world.command("pause") == {"ok": True, "pipelines": ["orders"]}
    world.tick(10.0)
    assert (world.state(), world.status()["state"], world.flights) == ("held", "paused", [])
    assert world.command("resume") == {"ok": True, "pipelines": ["orders"], "still_held": {}}
    assert (world.state(), world.status()["state"], len(world.flights)) == ("fetching", "running", 1)


def test_pause_of_one_pipeline_leaves_the_others() -> None:
    world = two_pipelines()
    assert world.command("pause", pipeline="payments") == {"ok": True, "pipelines": ["payments"]}
    assert (world.status("orders")["state"], world.status("payments")["state"]) == ("running", "paused")


def test_without_a_name_all_pipelines_are_meant() -> None:
    world = two_pipelines()
    assert world.command("pause")["pipelines"] == ["orders", "payments"]


def test_resume_says_what_still_holds() -> None:
    world = reading(max_slow_flushes=1)
    world.poll()
    world.tick(0.25)
    world.command("pause")
    world.flush(2.5)
    (held,) = world.command("resume")["still_held"].items()
    assert held[0] == "orders"
    assert "1 slow flushes" in held[1]


# --- drain --------------------------------------------------------------------------------------------------------


def test_drain_sends_at_once_and_is_answered_when_all_is_written() -> None:
    world = reading()
    world.poll()
    assert world.command("drain") is None
    token = world.token
    assert (world.state(), len(world.flights)) == ("held", 1)
    world.flush()
    assert world.replies[token] == {"ok": True, "pipelines": ["orders"]}
    assert world.status()["reason"].startswith("drained: everything that was read is written")
    world.tick(60.0)
    assert world.state() == "held"
    world.command("resume")
    assert world.state() == "fetching"


def test_drain_of_an_idle_pipeline_is_answered_at_once() -> None:
    assert reading().command("drain") == {"ok": True, "pipelines": ["orders"]}


def test_drain_writes_a_position_that_moved_too() -> None:
    world = reading()
    world.poll(count=1)
    world.tick(0.25)
    world.flush()
    world.poll(count=1, end=9)
    assert world.command("drain") is None
    world.flush()
    assert world.replies[world.token]["ok"]
    assert world.lane().flushed == 9


def test_drain_that_is_resumed_before_it_is_done_says_so() -> None:
    world = reading()
    world.poll()
    world.command("drain")
    token = world.token
    world.command("resume")
    assert world.replies[token] == {"ok": False, "error": "resumed before it was drained"}


def test_two_drains_are_both_answered() -> None:
    world = reading()
    world.poll()
    world.command("drain")
    world.command("drain")
    world.flush()
    assert world.replies == {token: {"ok": True, "pipelines": ["orders"]} for token in (1, 2)}


# --- seek ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "target", "offset"),
    [
        (500, None, 500),
        (0, None, 100),
        (99, None, 100),
        (100, None, 100),
        (900, None, 900),
        (5000, None, 900),
        ("earliest", None, 100),
        ("latest", None, 900),
        ({"timestamp_ms": 1_700_000_000_000}, 321, 321),
        ({"timestamp_ms": 1_700_000_000_000}, None, 900),
    ],
)
def test_seek_goes_to_an_offset_an_edge_or_a_time_within_the_log(to: Any, target: int | None, offset: int) -> None:
    world = reading()
    world.log().low, world.log().high, world.log().target = 100, 900, target
    world.forget()
    assert world.command("seek", to=to) == {
        "ok": True,
        "offsets": [{"topic": "orders", "partition": 0, "offset": offset}],
    }
    (asked,) = world.of(a.Inspect)
    assert asked.timestamp_ms == (to["timestamp_ms"] if isinstance(to, dict) else None)
    (seed,) = (order.seed for order in world.of(a.SendSeed))
    assert seed.gap_reason is not None
    assert seed.gap_reason.startswith("operator sought ")
    assert [resume.offset for resume in world.of(a.Resume)] == [offset]


@pytest.mark.parametrize(
    ("to", "error"),
    [
        (None, "say where to"),
        (True, "say where to"),
        (-1, "-1 is no offset"),
        (1.5, "1.5 is no offset"),
        ("middle", "'middle' is no offset"),
        ([], "[] is no offset"),
        ({}, "{} is no offset"),
        ({"timestamp_ms": "now"}, "is no offset"),
        ({"timestamp_ms": True}, "is no offset"),
        ({"timestamp_ms": -1}, "is no offset"),
    ],
)
def test_a_seek_to_nowhere_is_refused_and_changes_nothing(to: Any, error: str) -> None:
    world = reading()
    world.forget()
    answer = world.command("seek", to=to)
    assert answer is not None
    assert not answer["ok"]
    assert error in answer["error"]
    assert not world.of(a.SendClaim)


@pytest.mark.parametrize(
    ("arguments", "numbers"),
    [
        ({}, [0, 1]),
        ({"topic": "orders"}, [0, 1]),
        ({"topic": "orders", "partition": 1}, [1]),
        ({"pipeline": "orders", "partition": 0}, [0]),
    ],
)
def test_seek_takes_the_partitions_that_are_named(arguments: dict[str, Any], numbers: list[int]) -> None:
    answer = reading(0, 1).command("seek", to=7, **arguments)
    assert [found["partition"] for found in answer["offsets"]] == numbers


@pytest.mark.parametrize("arguments", [{"topic": "others"}, {"partition": 9}])
def test_a_seek_of_a_partition_that_is_not_here_is_refused(arguments: dict[str, Any]) -> None:
    answer = reading().command("seek", to=7, **arguments)
    assert "pipeline orders has no such partition in this daemon" in answer["error"]


def test_among_several_pipelines_seek_wants_a_name() -> None:
    world = two_pipelines()
    assert world.command("seek", to=7) == {"ok": False, "error": "name one pipeline of orders, payments"}
    assert world.command("seek", to=7, pipeline="payments")["ok"]


def test_seek_drops_what_was_read_and_what_is_in_flight_does_not_count() -> None:
    world = reading()
    world.poll(count=5)
    world.tick(0.25)
    world.poll(count=5)
    assert world.command("seek", to=0)["ok"]
    assert world.lane().batch.rows == 0
    world.flush()
    assert world.lane().flushed == 0


def test_a_stopped_lane_goes_on_after_a_seek() -> None:
    world = reading(start="error")
    assert world.state() == "stopped"
    assert world.command("seek", to="earliest")["ok"]
    assert world.state() == "fetching"


def test_a_seek_waits_for_the_database_and_tells_when_the_partition_goes_meanwhile() -> None:
    world = reading()
    world.silent.add(a.SendClaim)
    assert world.command("seek", to=7) is None
    world.tick(60.0)
    assert world.token not in world.replies
    world.revoke(0)
    assert world.replies[world.token] == {
        "ok": False,
        "error": "revoked before the seek was done: orders/0; ask their new owner",
    }


def test_a_paused_pipeline_is_sought_and_stays_paused() -> None:
    world = reading()
    world.command("pause")
    assert world.command("seek", to=7)["ok"]
    assert (world.state(), world.lane().flushed) == ("held", 7)


def test_a_seek_while_an_older_one_is_under_way_wins_and_both_are_answered() -> None:
    world = reading()
    world.silent.add(a.SendClaim)
    world.command("seek", to=7)
    world.silent.clear()
    assert world.command("seek", to=9)["offsets"][0]["offset"] == 9
    assert world.replies[1]["ok"]


def test_a_seek_of_a_fenced_lane_waits_for_the_back_off_and_a_poll_as_well() -> None:
    world = reading()
    world.poll()
    world.tick(0.25)
    world.flush(fenced=[0])
    assert world.command("seek", to=7) is None
    world.tick(1.0)
    assert world.token not in world.replies
    world.poll_nothing()
    assert world.replies[world.token]["ok"]


# --- the rest -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["status", "lag"])
def test_status_and_lag_show_the_snapshot(name: str) -> None:
    world = reading()
    assert world.command(name) == {"ok": True, **world.core.snapshot()}


def test_an_unknown_command_is_refused_with_those_there_are() -> None:
    assert reading().command("explode") == {
        "ok": False,
        "error": "there is no command 'explode'; there are drain, lag, pause, resume, seek, status",
    }


@pytest.mark.parametrize("command", ["pause", "resume", "drain", "seek"])
@pytest.mark.parametrize("name", ["nobody", ["orders"], 7])
def test_an_unknown_pipeline_is_refused_with_those_there_are(command: str, name: Any) -> None:
    answer = reading().command(command, pipeline=name, to=7)
    assert answer == {"ok": False, "error": f"there is no pipeline {name!r}; there are orders"}


@pytest.mark.parametrize("command", ["pause", "resume", "drain", "seek"])
def test_while_the_daemon_stops_only_status_is_answered(command: str) -> None:
    world = reading()
    world.poll()
    world.stop()
    assert world.command(command, to=7) == {"ok": False, "error": "the daemon stops"}
    assert world.command("status")["state"] == "draining"


def test_what_still_waits_is_refused_when_the_daemon_stops() -> None:
    world = reading(0)
    world.silent.add(a.SendClaim)
    world.poll()
    world.command("drain")
    world.command("seek", to=7)
    world.stop()
    assert world.replies == {token: {"ok": False, "error": "the daemon stops"} for token in (1, 2)}
