"""From assignment to the first fetch, and back after fencing, gaps and deaths."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from fixtures.core_driver import CoreDriver
from fixtures.flights import lane as lane_key
from speedlayer.supervisor.core import actions as a
from speedlayer.supervisor.core import events as e
from speedlayer.workers import protocol as p


def begun(
    *, log: dict[str, Any] | None = None, checkpoint: dict[str, Any] | None = None, **settings: Any
) -> CoreDriver:
    """A core that was assigned one partition, of such a log, with such a checkpoint."""
    world = CoreDriver(**settings)
    for kept, fields in ((world.log(), log), (world.checkpoint(), checkpoint)):
        for name, value in (fields or {}).items():
            assert hasattr(kept, name)
            setattr(kept, name, value)
    world.assign(0)
    return world


def seeds(world: CoreDriver) -> list[tuple[int | None, int, str | None]]:
    return [(order.seed.expected, order.seed.start, order.seed.gap_reason) for order in world.of(a.SendSeed)]


def read_from(world: CoreDriver) -> list[int]:
    return [resume.offset for resume in world.of(a.Resume)]


def fence(world: CoreDriver) -> None:
    """Somebody else has claimed the partition; the next flush finds out."""
    world.poll()
    world.tick(0.25)
    world.flush(fenced=[0])


# --- the way to the first fetch -----------------------------------------------------------------------------------


def test_an_assigned_partition_is_claimed_inspected_seeded_and_read_in_this_order() -> None:
    world = begun()
    kinds = (a.SendClaim, a.Inspect, a.SendSeed, a.Resume)
    assert [type(action) for action in world.actions if isinstance(action, kinds)] == list(kinds)
    assert world.of(a.SendClaim)[0].claim.lane == lane_key(0)
    assert world.of(a.Inspect)[0].want_committed


@pytest.mark.parametrize(
    ("asked", "state"),
    [(a.SendClaim, "claiming"), (a.Inspect, "inspecting"), (a.SendSeed, "seeding")],
)
def test_nothing_is_read_before_each_question_has_its_answer(asked: type, state: str) -> None:
    world = CoreDriver(silent=[asked])
    world.assign(0)
    world.tick(60.0)
    assert (world.state(), world.of(a.Resume)) == (state, [])


def test_claims_wait_in_the_queues_of_workers_that_boot_for_the_first_time() -> None:
    world = CoreDriver(workers=2, silent=[a.StartWorker])
    world.assign(0, 1)
    assert [order.worker for order in world.of(a.SendClaim)] == ["worker-0", "worker-1"]


def test_a_partition_that_is_assigned_twice_is_claimed_once() -> None:
    world = begun()
    world.assign(0)
    assert len(world.of(a.SendClaim)) == 1


def test_many_partitions_are_named_up_to_twenty() -> None:
    world = CoreDriver()
    world.assign(*range(21))
    (line,) = (line for line in world.of(a.Log) if line.message == "assigned 21 partitions")
    assert line.fields["partitions"].startswith("orders/0, orders/1, ")
    assert line.fields["partitions"].endswith("orders/19 …")


@pytest.mark.parametrize(("start", "offset"), [("earliest", 10), ("latest", 90)])
def test_without_a_checkpoint_the_start_is_the_settings_and_is_written_first(start: str, offset: int) -> None:
    world = begun(start=start, log={"low": 10, "high": 90})
    assert (seeds(world), read_from(world)) == ([(None, offset, None)], [offset])
    assert world.checkpoint().topic_id == "id"


def test_without_a_checkpoint_start_error_stops_the_lane() -> None:
    world = begun(start="error")
    assert (world.state(), seeds(world)) == ("stopped", [])
    assert 'start = "error"' in world.lane().reason
    assert world.logged("orders/0 is stopped", logging.ERROR)


@pytest.mark.parametrize("start", ["earliest", "latest", "error"])
def test_a_foreign_commit_is_where_to_start_whatever_the_setting(start: str) -> None:
    assert read_from(begun(start=start, log={"committed": 42})) == [42]


def test_our_own_commit_without_a_checkpoint_stops_the_lane() -> None:
    world = begun(log={"committed": 42, "committed_by_us": True})
    assert (world.state(), seeds(world)) == ("stopped", [])
    assert "the group's own commit says 42, and there is no checkpoint" in world.lane().reason


@pytest.mark.parametrize("offset", [0, 500, 1000])
def test_a_checkpoint_within_the_log_is_read_on_from_without_a_seed(offset: int) -> None:
    world = begun(checkpoint={"next_offset": offset, "topic_id": "id", "leader_epoch": 3})
    assert (seeds(world), read_from(world)) == ([], [offset])
    assert not world.of(a.Inspect)[0].want_committed
    assert world.of(a.Resume)[0].leader_epoch == 3


@pytest.mark.parametrize("where", ["commit", "checkpoint"])
def test_an_offset_that_retention_removed_stops_the_lane(where: str) -> None:
    log: dict[str, Any] = {"low": 50}
    if where == "commit":
        world = begun(log={**log, "committed": 30})
    else:
        world = begun(log=log, checkpoint={"next_offset": 30, "topic_id": "id"})
    assert world.state() == "stopped"
    assert "offsets 30 to 49 (20 of them) are gone from the log" in world.lane().reason
    (line,) = (line for line in world.of(a.Log) if line.level == logging.ERROR)
    assert (line.fields["gap_start"], line.fields["gap_end"]) == (30, 50)


@pytest.mark.parametrize(("where", "expected"), [("commit", None), ("checkpoint", 30)])
def test_with_skip_an_offset_that_retention_removed_is_passed_and_the_gap_recorded(
    where: str, expected: int | None
) -> None:
    log: dict[str, Any] = {"low": 50}
    if where == "commit":
        world = begun(log={**log, "committed": 30}, on_out_of_range="skip")
    else:
        world = begun(log=log, checkpoint={"next_offset": 30, "topic_id": "id"}, on_out_of_range="skip")
    assert seeds(world) == [(expected, 50, "retention removed offsets 30 to 49")]
    assert read_from(world) == [50]


@pytest.mark.parametrize("setting", ["stop", "skip"])
def test_an_offset_beyond_the_end_of_the_log_stops_the_lane_whatever_the_setting(setting: str) -> None:
    world = begun(checkpoint={"next_offset": 1001, "topic_id": "id"}, on_out_of_range=setting)
    assert world.state() == "stopped"
    assert "offset 1001 is beyond the end of the log (1000)" in world.lane().reason


# --- the topic's id -----------------------------------------------------------------------------------------------


def test_a_topic_that_was_made_again_stops_the_lane() -> None:
    world = begun(checkpoint={"next_offset": 5, "topic_id": "old"}, log={"topic_id": "new"})
    assert world.state() == "stopped"
    assert "topic orders was deleted and made again (id old, now new); offset 5" in world.lane().reason


def test_the_first_id_that_a_broker_tells_is_remembered_in_the_checkpoint() -> None:
    world = begun(checkpoint={"next_offset": 5})
    assert seeds(world) == [(5, 5, None)]
    assert world.checkpoint().topic_id == "id"


@pytest.mark.parametrize("known", [None, "id"])
def test_a_broker_that_tells_no_ids_stops_nothing(known: str | None) -> None:
    world = begun(checkpoint={"next_offset": 5, "topic_id": known}, log={"topic_id": None})
    assert (seeds(world), read_from(world), world.lane().topic_id) == ([], [5], known)


@pytest.mark.parametrize(
    ("known", "told", "state", "remembered"),
    [
        ("id", "id", "fetching", "id"),
        ("id", "other", "stopped", "id"),
        ("id", None, "fetching", "id"),
        (None, "first", "fetching", "first"),
    ],
)
def test_the_id_of_a_topic_that_is_read_is_compared_with_what_the_broker_tells(
    known: str | None, told: str | None, state: str, remembered: str
) -> None:
    world = begun(checkpoint={"next_offset": 5, "topic_id": known}, log={"topic_id": known})
    world.tell(e.TopicIds(world.now, "group", {"orders": told}))
    assert (world.state(), world.lane().topic_id) == (state, remembered)


def test_the_id_of_a_topic_that_is_not_claimed_yet_is_not_compared() -> None:
    world = CoreDriver(silent=[a.Inspect])
    world.assign(0)
    world.tell(e.TopicIds(world.now, "group", {"orders": "other"}))
    assert world.state() == "inspecting"


# --- answers that are late, or do not come ------------------------------------------------------------------------


def test_a_question_that_the_broker_does_not_answer_is_asked_again_within_a_second() -> None:
    world = begun(log={"error": "no answer in 5 s"})
    assert world.lane().reason == "the broker does not tell the topic's state: no answer in 5 s"
    world.tick(0.25)
    assert len(world.of(a.Inspect)) == 1
    world.log().error = None
    world.tick(0.75)
    assert (len(world.of(a.Inspect)), world.state()) == (2, "fetching")


def test_an_answer_to_an_older_question_is_of_no_consequence() -> None:
    world = CoreDriver(silent=[a.Inspect])
    world.assign(0)
    (asked,) = world.of(a.Inspect)
    world.tell(e.Inspected(world.now, world.partition(), asked.request + 1, "id", 0, 10))
    assert world.state() == "inspecting"
    world.tell(e.Inspected(world.now, world.partition(), asked.request, "id", 0, 10))
    assert world.state() == "fetching"
    world.tell(e.Inspected(world.now, world.partition(), asked.request, "other", 0, 10))
    world.tell(e.Inspected(world.now, world.partition(9), asked.request, "id", 0, 10))
    assert world.state() == "fetching"


@pytest.mark.parametrize("field", ["claim_id", "lane"])
def test_a_claim_that_is_not_the_lanes_latest_is_of_no_consequence(field: str) -> None:
    world = CoreDriver(silent=[a.SendClaim])
    world.assign(0)
    claim = world.of(a.SendClaim)[0].claim
    told = {"claim_id": claim.claim_id, "lane": claim.lane, field: 99 if field == "claim_id" else lane_key(7)}
    world.report("worker-0", p.Claimed(**told, epoch=1, next_offset=5, topic_id=None, leader_epoch=-1))
    world.report("worker-0", p.Fenced(**told))
    assert world.state() == "claiming"


def test_a_claim_that_comes_back_after_the_partition_went_is_of_no_consequence() -> None:
    world = CoreDriver(silent=[a.SendClaim])
    world.assign(0)
    claim = world.of(a.SendClaim)[0].claim
    world.revoke(0)
    world.report("worker-0", p.Claimed(claim.claim_id, claim.lane, 1, 5, None, -1))
    world.report("worker-0", p.ClaimDelayed(claim.claim_id, claim.lane, "away", None))
    assert not list(world.core.lanes())


def test_claims_that_wait_for_the_same_thing_are_told_of_once() -> None:
    world = CoreDriver(silent=[a.SendClaim])
    world.assign(0, 1)
    for order in world.of(a.SendClaim):
        world.report("worker-0", p.ClaimDelayed(order.claim.claim_id, order.claim.lane, "no server", "08006"))
    assert len(world.logged("waits: no server", logging.WARNING)) == 1
    assert [lane.reason for lane in world.core.lanes()] == ["no server", "no server"]
    assert (world.status()["state"], world.status()["reason"]) == (
        "blocked",
        "the claim of orders/0 waits: no server",
    )


def test_a_delay_of_an_older_claim_is_of_no_consequence() -> None:
    world = begun()
    world.report("worker-0", p.ClaimDelayed(999, lane_key(0), "no server", None))
    assert world.status()["state"] == "running"


# --- revocation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lost", "level"), [(False, logging.INFO), (True, logging.WARNING)])
def test_a_partition_that_goes_takes_what_it_holds_with_it(lost: bool, level: int) -> None:
    world = begun()
    world.poll(size_bytes=500)
    world.revoke(0, 5, lost=lost)
    assert (len(list(world.core.lanes())), world.pipeline().buffered_bytes) == (0, 0)
    assert world.logged("lost 2 partitions" if lost else "revoked 2 partitions", level)


def test_a_partition_that_comes_back_is_read_in_a_generation_of_its_own() -> None:
    world = begun()
    old = world.lane().generation
    world.revoke(0)
    world.assign(0)
    assert world.lane().generation != old


# --- fencing ------------------------------------------------------------------------------------------------------


def test_a_fenced_lane_is_claimed_again_only_after_a_back_off_and_a_later_poll() -> None:
    world = begun()
    fence(world)
    assert (world.state(), world.status()["fenced"], world.lane().flushed) == ("pending", 1, 0)
    world.tick(100.0)
    assert world.state() == "pending", "nothing shows yet that we are in the group"
    world.poll_nothing()
    assert world.state() == "fetching"


def test_each_claim_has_an_owner_token_of_its_own_and_its_seed_and_parts_carry_it() -> None:
    """A database that falls back may give an epoch twice: the token tells a flight of the lost claim from ours."""
    world = begun()
    (first,), (seed,) = world.of(a.SendClaim), world.of(a.SendSeed)
    assert seed.seed.owner == first.claim.owner
    fence(world)
    world.poll_nothing()
    world.tick(0.5)
    world.poll()
    world.tick(0.25)
    last = world.of(a.SendClaim)[-1]
    assert last.claim.owner != first.claim.owner
    assert [claim.claim.owner.split(".")[0] for claim in world.of(a.SendClaim)] == ["us"] * 2
    assert world.flights[-1].parts[0].owner == last.claim.owner


def test_a_poll_does_not_end_the_back_off() -> None:
    world = begun()
    fence(world)
    world.poll_nothing()
    assert world.state() == "pending"
    world.tick(0.125)
    assert world.state() == "pending", "half a second at most, a quarter at least"
    world.tick(0.375)
    assert world.state() == "fetching"


def test_a_poll_of_another_group_shows_nothing() -> None:
    world = begun()
    fence(world)
    world.poll_nothing("another")
    world.tick(10.0)
    assert world.state() == "pending"


def test_the_back_off_doubles_up_to_its_limit_and_a_good_flush_ends_it() -> None:
    world = begun()
    for limit in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0):
        fence(world)
        assert limit / 2 <= world.lane().claim_not_before - world.now <= limit
        world.poll_nothing()
        world.tick(limit)
        assert world.state() == "fetching"
    world.poll()
    world.tick(0.25)
    world.flush()
    fence(world)
    assert world.lane().claim_not_before - world.now <= 0.5


def test_only_the_fenced_lanes_of_a_flight_are_claimed_again() -> None:
    world = CoreDriver()
    world.assign(0, 1)
    world.poll(0)
    world.poll(1)
    world.tick(0.25)
    world.flush(fenced=[1])
    assert (world.state(0), world.state(1)) == ("fetching", "pending")
    assert (world.lane(0).flushed, world.lane(1).flushed) == (1, 0)


def test_a_seed_that_finds_another_owner_fences_the_lane() -> None:
    world = CoreDriver(silent=[a.SendSeed])
    world.assign(0)
    (order,) = world.of(a.SendSeed)
    world.report(order.worker, p.Fenced(order.seed.claim_id, order.seed.lane))
    assert (world.state(), world.status()["fenced"]) == ("pending", 1)


def test_five_fences_in_a_minute_raise_an_alarm_once_until_it_is_over() -> None:
    world = CoreDriver()
    world.assign(*range(5))
    for number in range(5):
        assert not world.status()["fenced_alarm"]
        world.poll(number)
        world.tick(0.25)
        world.flush(fenced=[0])
    assert world.status()["fenced_alarm"]
    world.poll_nothing()
    world.tick(1.0)
    fence(world)
    assert len(world.logged("do two daemons outside one consumer group", logging.ERROR)) == 1
    world.tick(61.0)
    world.poll_nothing()
    fence(world)
    assert not world.status()["fenced_alarm"]


# --- the broker serves no message ---------------------------------------------------------------------------------


def refuse(world: CoreDriver, problem: e.FetchProblem, generation: int | None = None) -> None:
    generation = world.lane().generation if generation is None else generation
    world.tell(e.FetchFailed(world.now, world.partition(), generation, problem, "says the broker"))


def test_a_fetch_out_of_range_is_claimed_and_inspected_again() -> None:
    world = begun()
    world.log().low = 7
    refuse(world, e.FetchProblem.OUT_OF_RANGE)
    assert world.state() == "stopped"
    assert "offsets 0 to 6 (7 of them) are gone" in world.lane().reason
    assert len(world.of(a.SendClaim)) == 2


def test_a_truncated_log_stops_the_lane() -> None:
    world = begun()
    world.poll(count=4)
    refuse(world, e.FetchProblem.LOG_TRUNCATED)
    assert world.state() == "stopped"
    assert "truncated below offset 4 (says the broker)" in world.lane().reason


def test_a_refusal_of_an_older_generation_or_of_a_lane_that_is_not_read_is_of_no_consequence() -> None:
    world = begun()
    refuse(world, e.FetchProblem.LOG_TRUNCATED, world.lane().generation - 1)
    assert world.state() == "fetching"
    world.command("pause")
    refuse(world, e.FetchProblem.LOG_TRUNCATED)
    assert world.state() == "held"
    failed = e.FetchFailed(world.now, world.partition(9), 1, e.FetchProblem.LOG_TRUNCATED, "")
    world.tell(failed)
    assert len(list(world.core.lanes())) == 1


def test_when_positions_are_unknown_every_lane_is_read_again_from_the_ledger() -> None:
    world = begun()
    world.assign(1)
    world.poll(0, count=3)
    world.command("seek", partition=1, to=0)
    world.silent.add(a.SendClaim)
    world.command("seek", partition=1, to=5)
    world.forget()
    world.tell(e.PositionsUnknown(world.now, "group", "consume() raised"))
    assert world.of(a.Pause) == [a.Pause(world.partition(0))]
    assert [(resume.partition.partition, resume.offset) for resume in world.of(a.Resume)] == [(0, 3)]
    assert world.lane().batch.rows == 3, "what was read is kept"


def test_a_consumer_that_is_broken_for_good_is_rebuilt_and_its_partitions_are_disowned() -> None:
    world = begun()
    world.poll()
    world.tell(e.ConsumerTrouble(world.now, "group", "_FATAL", "fenced instance id", fatal=True))
    assert world.of(a.RebuildConsumer) == [a.RebuildConsumer("group", "fenced instance id")]
    assert not list(world.core.lanes())
    assert world.core.snapshot()["consumer_trouble"] == {}
    world.tick(1.0)
    assert len(world.of(a.RebuildConsumer)) == 1


# --- the death of a worker ----------------------------------------------------------------------------------------


def test_the_partitions_of_a_worker_that_died_are_claimed_by_the_others_from_what_is_committed() -> None:
    world = CoreDriver(workers=2)
    world.assign(0, 1)
    world.poll(0, count=3)
    world.tick(0.25)
    world.forget()
    world.exit("worker-0")
    assert [(order.worker, order.claim.lane.partition) for order in world.of(a.SendClaim)] == [("worker-1", 0)]
    assert read_from(world) == [0]
    assert (world.status()["reclaims"], world.pipeline().buffered_bytes) == (1, 0)
    assert world.lane(1).worker == "worker-1"


def test_a_claim_that_was_under_way_with_the_worker_is_sent_to_another() -> None:
    world = CoreDriver(workers=2, silent=[a.SendClaim])
    world.assign(0)
    world.exit("worker-0")
    assert [order.worker for order in world.of(a.SendClaim)] == ["worker-0", "worker-1"]


def test_a_lane_that_was_stopped_stays_stopped_when_the_worker_that_writes_its_last_flight_dies() -> None:
    world = begun()
    world.poll(count=4)
    world.tick(0.25)
    refuse(world, e.FetchProblem.LOG_TRUNCATED)
    world.exit()
    world.tick(0.125)
    assert world.state() == "stopped"
