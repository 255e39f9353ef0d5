"""What is read when, how batches become flights, and what their reports mean."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from fixtures.core_driver import CoreDriver, pipeline
from fixtures.flights import lane as lane_key
from speedlayer.supervisor.core import actions as a
from speedlayer.supervisor.core import events as e
from speedlayer.supervisor.core.config import CONTENDED_TOLD_ATTEMPTS
from speedlayer.supervisor.core.pipelines import DeadLetterWindow, RateMeter
from speedlayer.workers import protocol as p

SLOW = 2.5


def offsets(flight: p.Flight) -> list[tuple[int, int, int]]:
    """The partition, start and end of each part."""
    return [(part.lane.partition, part.start, part.end) for part in flight.parts]


def reading(*numbers: int, **settings: Any) -> CoreDriver:
    """A core that reads the partitions."""
    world = CoreDriver(**settings)
    world.assign(*(numbers or (0,)))
    world.forget()
    return world


def strike(world: CoreDriver, count: int = 3) -> None:
    """Slow flushes, one after the other."""
    for _ in range(count):
        world.poll()
        world.tick(0.25)
        world.flush(SLOW)


# --- what is taken in ---------------------------------------------------------------------------------------------


def test_messages_of_an_older_generation_are_dropped() -> None:
    world = reading()
    old = world.lane().generation
    world.tell(e.PositionsUnknown(world.now, "group", "consume() raised"))
    assert world.lane().generation != old
    world.poll(generation=old)
    world.tell(e.PositionMoved(world.now, world.partition(), old, 50))
    assert (world.lane().expected, world.lane().batch.rows) == (0, 0)
    world.poll()
    assert world.lane().expected == 1


def test_messages_of_a_partition_that_is_not_ours_are_dropped() -> None:
    world = reading()
    piece = world.slice()
    world.revoke(0)
    world.tell(e.Polled(world.now, "group", (piece,)))
    world.tell(e.PositionMoved(world.now, piece.partition, piece.generation, 50))
    assert world.pipeline().buffered_bytes == 0


def test_messages_that_come_while_a_lane_is_held_are_dropped() -> None:
    world = reading()
    piece = world.slice()
    world.command("pause")
    world.tell(e.Polled(world.now, "group", (piece,)))
    assert world.lane().expected == 0


@pytest.mark.parametrize(
    ("fields", "stopped"),
    [
        ({"first": 9}, True),
        ({"first": 10}, False),
        ({"first": 15}, False),
        ({"leader_epoch": 4}, True),
        ({"leader_epoch": 5}, False),
        ({"leader_epoch": 6}, False),
        ({"leader_epoch": -1}, False),
    ],
)
def test_an_offset_or_a_leader_epoch_below_the_expected_one_stops_the_lane(
    fields: dict[str, int], stopped: bool
) -> None:
    world = reading()
    world.poll(count=10, leader_epoch=5)
    world.poll(**fields)
    assert (world.state() == "stopped") is stopped
    if stopped:
        assert "the log is not the one that was read before" in world.lane().reason
        assert world.of(a.Pause) == [a.Pause(world.partition())]
        assert world.pipeline().buffered_bytes == 0


def test_the_position_after_the_call_is_the_expected_offset() -> None:
    world = reading()
    world.poll(count=2, end=7)
    assert world.lane().expected == 7
    world.tick(0.25)
    assert offsets(world.flights[0]) == [(0, 0, 7)]


def test_a_position_that_moved_is_written_without_a_message() -> None:
    world = reading()
    world.tell(e.PositionMoved(world.now, world.partition(), world.lane().generation, 5))
    assert not world.flights
    world.tick(0.25)
    (flight,) = world.flights
    assert offsets(flight) == [(0, 0, 5)]
    assert flight.parts[0].messages == 0
    world.flush(SLOW)
    assert (world.lane().flushed, world.status()["flushes"], world.status()["slow_count"]) == (5, 0, 0)


def test_a_position_that_did_not_move_on_opens_no_batch_and_one_behind_messages_joins_theirs() -> None:
    world = reading()
    world.poll()
    generation = world.lane().generation
    world.tick(0.125)
    world.tell(e.PositionMoved(world.now, world.partition(), generation, 1))
    world.tell(e.PositionMoved(world.now, world.partition(), generation, 3))
    world.tick(0.125)
    assert [offsets(flight) for flight in world.flights] == [[(0, 0, 3)]]


# --- when batches close -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message", "after", "closed"),
    [
        ({"batch_rows": 3}, {"count": 3}, 0.0, True),
        ({"batch_rows": 3}, {"count": 2}, 0.0, False),
        ({"batch_bytes": 100}, {"size_bytes": 100}, 0.0, True),
        ({"batch_bytes": 100}, {"size_bytes": 99}, 0.0, False),
        ({"batch_seconds": 0.25}, {}, 0.25, True),
        ({"batch_seconds": 0.25}, {}, 0.125, False),
    ],
)
def test_a_batch_closes_by_rows_bytes_or_age(
    settings: dict[str, Any], message: dict[str, Any], after: float, closed: bool
) -> None:
    world = reading(**settings)
    world.poll(**message)
    world.tick(after)
    assert bool(world.flights) is closed


def test_a_flight_bundles_a_ready_lane_with_neighbours_that_are_not() -> None:
    world = reading(0, 1, 2, batch_rows=5)
    world.poll(1, count=1)
    world.poll(0, count=3)
    world.tick(0.125)
    world.poll(2, count=1)
    world.tick(0.125)
    assert [offsets(flight) for flight in world.flights] == [[(0, 0, 3), (1, 0, 1), (2, 0, 1)]]


def test_the_oldest_ready_lane_travels_first() -> None:
    world = reading(0, 1)
    world.poll(1)
    world.tick(0.125)
    world.poll(0)
    world.tick(0.5)
    assert offsets(world.flights[0]) == [(1, 0, 1), (0, 0, 1)]


def test_a_full_flight_leaves_the_neighbours_for_the_next() -> None:
    world = reading(0, 1, batch_rows=3)
    world.poll(1)
    world.poll(0, count=3)
    assert [offsets(flight) for flight in world.flights] == [[(0, 0, 3)]]
    assert world.lane(1).batch.rows == 1


def test_a_neighbour_that_does_not_fit_is_passed_over_and_smaller_ones_still_travel() -> None:
    world = reading(0, 1, 2, batch_bytes=100)
    world.poll(1, size_bytes=60)
    world.poll(2, size_bytes=30)
    world.poll(0, size_bytes=60)
    world.tick(0.25)
    taken = [offsets(flight) for flight in world.flights]
    assert [number for number, _, _ in taken[0]] == [0, 2]
    assert taken[1] == [(1, 0, 1)]


def test_what_is_left_behind_begins_where_the_part_ended() -> None:
    world = reading(batch_rows=3)
    world.poll(count=2, leader_epoch=1)
    world.poll(count=2, leader_epoch=2)
    (first,) = world.flights
    assert offsets(first) == [(0, 0, 2)]
    assert first.parts[0].leader_epoch == 1, "that of its last message"
    world.tick(0.25)
    assert offsets(world.flights[1]) == [(0, 2, 4)]


def test_flights_of_one_pipeline_never_carry_another() -> None:
    world = CoreDriver(pipeline("orders"), pipeline("payments", topics=("payments",)))
    world.assign(0)
    world.assign(0, topic="payments")
    world.poll()
    world.poll(topic="payments")
    world.tick(0.25)
    assert sorted((flight.pipeline, flight.parts[0].lane.topic) for flight in world.flights) == [
        ("orders", "orders"),
        ("payments", "payments"),
    ]


# --- credit -------------------------------------------------------------------------------------------------------


def test_no_more_flights_are_sent_than_the_worker_has_granted() -> None:
    world = reading(credit=(2, 1 << 20), batch_rows=1)
    for _ in range(3):
        world.poll()
    assert len(world.flights) == 2
    world.flush()
    assert [offsets(flight) for flight in world.flights] == [[(0, 1, 2)], [(0, 2, 3)]]


def test_no_more_bytes_are_sent_than_the_worker_has_granted() -> None:
    world = reading(credit=(4, 100), batch_rows=1)
    world.poll(size_bytes=60)
    world.poll(size_bytes=60)
    assert len(world.flights) == 1
    world.flush()
    assert len(world.flights) == 1
    assert world.lane().batch.rows == 0


def test_credit_that_is_used_up_to_the_byte_is_none() -> None:
    world = reading(credit=(4, 100), batch_rows=1)
    world.poll(size_bytes=100)
    world.poll(size_bytes=1)
    assert len(world.flights) == 1


def test_a_message_larger_than_the_credit_travels_alone_once_the_worker_is_idle_and_is_not_overtaken() -> None:
    world = reading(0, 1, credit=(4, 100), batch_rows=1)
    world.poll(1, size_bytes=10)
    world.poll(0, size_bytes=500)
    world.tick(0.25)
    world.poll(1, size_bytes=10)
    world.tick(0.25)
    assert [offsets(flight) for flight in world.flights] == [[(1, 0, 1)]]
    world.flush()
    assert [offsets(flight) for flight in world.flights] == [[(0, 0, 1)]]
    world.flush()
    assert [offsets(flight) for flight in world.flights] == [[(1, 1, 2)]]


def test_the_credit_of_one_pipeline_is_not_used_by_another() -> None:
    pipelines = [pipeline(name, topics=(name,), batch_rows=1) for name in ("orders", "payments")]
    world = CoreDriver(*pipelines, credit=(1, 100))
    world.assign(0)
    world.assign(0, topic="payments")
    world.poll(size_bytes=100)
    world.poll(topic="payments", size_bytes=100)
    assert sorted(flight.pipeline for flight in world.flights) == ["orders", "payments"]


def test_nothing_is_sent_to_a_worker_that_is_not_ready() -> None:
    world = reading(batch_rows=1)
    worker = world.core.state.workforce["worker-0"]
    assert worker.room("orders")
    world.silent.add(a.StartWorker)
    world.exit()
    assert not worker.room("orders")


# --- what comes back ----------------------------------------------------------------------------------------------


def test_a_report_moves_the_lane_on_and_the_group_is_told_once_a_second() -> None:
    world = reading()
    world.tick(0.5)
    world.poll(count=3)
    world.tick(0.25)
    world.flush()
    assert world.lane().flushed == 3
    assert not world.of(a.CommitOffsets)
    world.tick(0.25)
    assert world.of(a.CommitOffsets) == [a.CommitOffsets("group", {world.partition(): 3})]
    world.tick(1.0)
    assert len(world.of(a.CommitOffsets)) == 1, "nothing new to tell"


def test_reports_of_flights_that_are_not_under_way_mean_nothing() -> None:
    world = reading()
    world.report("worker-0", p.FlushReport(99, "orders", SLOW, SLOW, 5, 0, 0, 0, []))
    world.report("worker-0", p.FlushFailed(99, "orders", p.FailureKind.ABANDONED, "", None))
    world.report("worker-0", p.FlushBlocked(99, "orders", p.BlockKind.UNAVAILABLE, "", "", None, 1.0, 1))
    assert (world.state(), world.status()["rows"], world.status()["holds"]) == ("fetching", 0, {})


def test_reports_of_a_process_that_was_replaced_mean_nothing() -> None:
    world = reading()
    world.poll()
    world.tick(0.25)
    (flight,) = world.flights
    report = p.FlushReport(flight.flight_id, "orders", 0.1, 0.1, 1, 0, 0, 0, [])
    world.report("worker-0", report, incarnation=0)
    assert world.lane().flushed == 0


def test_a_report_of_a_flight_before_the_last_claim_says_nothing_about_the_lane() -> None:
    world = reading()
    world.poll(count=5)
    world.tick(0.25)
    world.command("seek", to=100)
    assert world.lane().flushed == 100
    world.flush()
    assert (world.lane().flushed, world.lane().in_flight, world.status()["rows"]) == (100, 0, 5)


def test_a_failure_of_a_flight_before_the_last_claim_does_not_claim_again() -> None:
    world = reading()
    world.poll(count=5)
    world.tick(0.25)
    world.command("seek", to=100)
    world.forget()
    world.fail()
    assert not world.of(a.SendClaim)
    assert world.state() == "fetching"


def test_a_report_about_a_revoked_partition_is_counted_and_moves_nothing() -> None:
    world = reading(0, 1)
    world.poll(0)
    world.poll(1)
    world.tick(0.25)
    world.revoke(1)
    world.flush()
    assert world.lane(0).flushed == 1
    assert world.status()["rows"] == 2


@pytest.mark.parametrize(("committed", "goes_on_at"), [(False, 0), (True, 5)])
def test_after_an_unknown_fate_the_lane_is_claimed_again_and_goes_on_from_what_is_committed(
    committed: bool, goes_on_at: int
) -> None:
    world = reading()
    world.poll(count=5)
    world.tick(0.25)
    world.poll(count=2)
    world.forget()
    world.fail(committed=committed)
    assert len(world.of(a.SendClaim)) == 1
    assert [resume.offset for resume in world.of(a.Resume)] == [goes_on_at]
    assert world.of(a.Pause) == [a.Pause(world.partition())]
    assert world.pipeline().buffered_bytes == 0
    assert world.status()["reclaims"] == 1
    assert world.logged("ended fate-unknown", logging.WARNING)


def test_a_lane_that_stays_quiet_has_its_checkpoint_looked_at_once() -> None:
    world = reading()
    world.tick(29.0)
    assert not world.flights
    world.tick(1.0)
    world.tick(0.25)
    assert [offsets(flight) for flight in world.flights] == [[(0, 0, 0)]]
    world.flush()
    world.tick(100.0)
    assert not world.flights
    world.poll()
    world.tick(0.25)
    world.flush()
    world.tick(30.0)
    world.tick(0.25)
    assert [offsets(flight) for flight in world.flights] == [[(0, 1, 1)]]


# --- three strikes ------------------------------------------------------------------------------------------------


def test_three_slow_flushes_pause_reading_and_dispatch_and_it_resumes_by_itself() -> None:
    world = reading(pause_seconds=5.0)
    strike(world, 2)
    assert (world.status()["slow_count"], world.state()) == (2, "fetching")
    strike(world, 1)
    assert (world.status()["slow_count"], world.status()["overload_count"]) == (0, 1)
    assert (world.status()["state"], world.status()["paused_until_seconds"]) == ("overloaded", 5.0)
    assert world.state() == "held"
    assert world.logged("is overloaded (no. 1): 3 slow flushes", logging.WARNING)
    world.tick(4.5)
    assert world.state() == "held"
    world.tick(0.5)
    assert (world.state(), world.status()["state"]) == ("fetching", "running")
    assert world.logged("the pause is over, the queues are drained")


def test_during_the_pause_what_was_read_is_kept_and_not_sent() -> None:
    world = reading(0, 1, max_slow_flushes=1)
    world.poll(0)
    world.tick(0.25)
    world.poll(1)
    world.flush(SLOW)
    world.tick(1.0)
    assert not world.flights
    assert world.lane(1).batch.rows == 1
    world.tick(4.0)
    assert len(world.flights) == 1


def test_the_pause_lasts_until_the_queues_are_drained_and_reports_meanwhile_do_not_count() -> None:
    world = reading(batch_rows=1, max_slow_flushes=1)
    for _ in range(4):
        world.poll()
    world.flush(SLOW)
    world.tick(10.0)
    assert world.state() == "held", "two flights wait behind the one that is being written"
    world.flush(SLOW)
    assert world.state() == "held"
    world.flush(SLOW)
    assert world.state() == "fetching", "each worker has at most the one that it is writing"
    assert world.status()["overload_count"] == 1


def test_exactly_the_threshold_is_not_slow() -> None:
    world = reading(slow_flush_threshold_seconds=2.0, max_slow_flushes=1)
    world.poll()
    world.tick(0.25)
    world.flush(2.0)
    assert world.status()["overload_count"] == 0


def test_the_strikes_of_all_workers_count_for_one_sink() -> None:
    world = reading(0, 1, 2, workers=3)
    for number in (0, 1, 2):
        world.poll(number)
    world.tick(0.25)
    assert len({worker for worker, _ in world.under_way}) == 3
    for _ in range(3):
        world.flush(SLOW)
    assert world.status()["overload_count"] == 1


def test_one_overloaded_pipeline_does_not_hold_another() -> None:
    world = CoreDriver(pipeline("orders", max_slow_flushes=1), pipeline("payments", topics=("payments",)))
    world.assign(0)
    world.assign(0, topic="payments")
    strike(world, 1)
    assert (world.status("orders")["state"], world.status("payments")["state"]) == ("overloaded", "running")


def test_a_sink_of_ones_own_that_says_overloaded_pauses_for_as_long_as_it_asks_once() -> None:
    world = reading()
    world.poll()
    world.tick(0.25)
    world.block(p.BlockKind.OVERLOADED, retry=3.0)
    world.block(p.BlockKind.OVERLOADED, retry=60.0)
    assert (world.status()["overload_count"], world.status()["paused_until_seconds"]) == (1, 3.0)
    world.tick(3.0)
    assert world.status()["state"] == "running"


# --- a sink that does not take rows -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [p.BlockKind.UNAVAILABLE, p.BlockKind.MISCONFIGURED])
def test_a_blocked_flight_holds_the_pipeline_until_it_is_written(kind: p.BlockKind) -> None:
    world = reading()
    world.poll()
    world.tick(0.25)
    world.block(kind, remedy="mend it")
    assert world.status()["state"] == "blocked"
    assert world.status()["reason"] == f"{kind.value}: the sink says no — mend it"
    assert world.state() == "held"
    world.block(kind)
    assert len(world.logged("waits, its batches are kept")) == 1
    world.flush()
    assert (world.status()["state"], world.state()) == ("running", "fetching")
    assert world.logged("its sink takes rows again")


def test_a_block_ends_with_the_last_of_the_blocked_flights() -> None:
    world = reading(batch_rows=1)
    world.poll()
    world.poll()
    world.block(index=0)
    world.block(index=1)
    world.flush()
    assert world.status()["state"] == "blocked"
    world.flush()
    assert world.status()["state"] == "running"


def test_a_block_ends_with_the_death_of_the_worker() -> None:
    world = reading()
    world.poll()
    world.tick(0.25)
    world.block()
    world.exit()
    assert world.status()["state"] == "running"


def test_contention_holds_nothing() -> None:
    world = reading()
    world.poll()
    world.tick(0.25)
    world.block(p.BlockKind.CONTENDED)
    assert (world.status()["state"], world.status()["retries"], world.state()) == ("running", 1, "fetching")


def test_contention_that_lasts_is_told_once_and_still_holds_nothing() -> None:
    world = reading()
    world.poll()
    world.tick(0.25)
    for attempt in range(1, CONTENDED_TOLD_ATTEMPTS + 3):
        assert bool(world.logged("is tried again and again")) is (attempt > CONTENDED_TOLD_ATTEMPTS)
        world.block(p.BlockKind.CONTENDED, attempt=attempt)
    assert len(world.logged("is tried again and again: the sink says no", logging.WARNING)) == 1
    assert world.status()["reason"].startswith("contended, attempt ")
    assert world.state() == "fetching"
    world.flush()
    assert world.status()["reason"] == ""


# --- dead letters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "dead", "stopped"),
    [(100, 99, False), (100, 100, True), (1000, 100, False), (999, 100, True), (1000, 101, True)],
)
def test_too_many_dead_letters_stop_the_pipeline(count: int, dead: int, stopped: bool) -> None:
    world = reading(dead_letter_minimum=100, dead_letter_ratio=0.1)
    world.poll(count=count)
    world.tick(0.25)
    world.flush(dead=dead)
    assert (world.status()["state"] == "dead-letter limit") is stopped
    assert world.status()["dead_lettered"] == dead
    assert bool(world.logged("became dead letters (limit 10%)", logging.ERROR)) is stopped


def test_resume_goes_on_after_the_dead_letter_limit_and_counts_anew() -> None:
    world = reading(dead_letter_minimum=2)
    world.poll(count=2)
    world.tick(0.25)
    world.flush(dead=2)
    assert world.state() == "held"
    assert world.command("resume")["ok"]
    assert world.state() == "fetching"
    world.poll()
    world.tick(0.25)
    world.flush(dead=1)
    assert world.status()["state"] == "running"


def test_the_limit_is_told_once_although_more_flights_end_so() -> None:
    world = reading(dead_letter_minimum=1, batch_rows=1)
    world.poll()
    world.poll()
    world.flush(dead=1)
    world.flush(dead=1)
    assert len(world.logged("is stopped", logging.ERROR)) == 1


def test_dead_letters_are_forgotten_after_the_window() -> None:
    window = DeadLetterWindow(60.0)
    window.add(0.0, 10, 5)
    window.add(60.0, 10, 1)
    assert (window.messages, window.dead) == (20, 6)
    window.add(60.5, 10, 0)
    assert (window.messages, window.dead) == (20, 1)
    window.clear()
    assert (window.messages, window.dead, list(window.samples)) == (0, 0, [])


def test_filtered_messages_are_counted_and_tell_of_the_sinks_speed() -> None:
    world = reading()
    world.poll(count=3)
    world.tick(0.25)
    world.flush(SLOW, filtered=3)
    assert (world.status()["filtered"], world.status()["rows"], world.status()["slow_count"]) == (3, 0, 1)


# --- memory -------------------------------------------------------------------------------------------------------


def full(patience: float = 1.0) -> CoreDriver:
    """A pipeline whose share of 1000 bytes is full: two flights of 500 under way."""
    world = reading(buffer_bytes=1000, batch_rows=1)
    world.poll(size_bytes=500)
    world.poll(size_bytes=500)
    world.tick(patience)
    return world


def test_a_full_pipeline_is_not_polled_for_and_its_partitions_are_let_go_after_a_second() -> None:
    world = full(0.5)
    assert world.core.allowance("group") == 0
    assert world.state() == "fetching"
    world.tick(0.5)
    assert (world.state(), world.status()["state"]) == ("held", "memory")
    assert "1000 bytes are read and not written; its share is 1000" in world.status()["reason"]


def test_what_frees_memory_in_time_keeps_the_partitions() -> None:
    world = full(0.5)
    world.flush()
    world.tick(5.0)
    assert world.state() == "fetching"
    assert world.core.allowance("group") == 500


def test_a_memory_hold_ends_below_half_of_the_share_and_not_at_half() -> None:
    world = full()
    world.flush()
    assert world.status()["state"] == "memory", "exactly half is still held"
    world.flush()
    assert (world.status()["state"], world.state()) == ("running", "fetching")
    assert world.core.allowance("group") == 1000


def test_under_a_memory_hold_what_was_read_is_still_written() -> None:
    world = reading(buffer_bytes=1000)
    world.poll(size_bytes=1000)
    world.tick(1.0)
    assert (world.status()["state"], len(world.flights)) == ("memory", 1)


def test_of_several_pipelines_in_a_group_the_full_one_is_let_go_at_once_and_the_others_are_read() -> None:
    world = CoreDriver(pipeline("orders"), pipeline("payments", topics=("payments",)), buffer_bytes=2000)
    world.assign(0)
    world.assign(0, topic="payments")
    world.poll(size_bytes=400)
    assert world.core.allowance("group") == 600, "the scarcest of the pipelines that read"
    world.poll(size_bytes=600)
    assert (world.state(), world.lane(topic="payments").state.value) == ("held", "fetching")
    assert world.core.allowance("group") == 1000


def test_a_group_that_nothing_is_held_for_may_read_a_share_and_nobody_while_the_daemon_stops() -> None:
    world = reading(buffer_bytes=1000)
    assert world.core.allowance("group") == 1000
    world.stop()
    assert world.core.allowance("group") == 0


# --- rates --------------------------------------------------------------------------------------------------------


def test_a_rate_is_the_mean_of_whole_seconds_without_the_one_under_way() -> None:
    meter = RateMeter()
    for at, rows in [(0.2, 5), (0.8, 5), (3.0, 10), (5.5, 1000)]:
        meter.add(at, rows)
    assert meter.per_second(5.9) == 4.0
    assert meter.per_second(6.0) == (10 + 1000) / 5
    meter.add(9.0, 1)
    assert [second for second, _ in meter.buckets] == [5, 9]


def test_a_part_travels_under_the_claim_of_its_lane() -> None:
    world = reading()
    world.poll()
    world.tick(0.25)
    (part,) = world.flights[0].parts
    assert (part.lane, part.epoch, part.owner) == (lane_key(0), world.lane().epoch, world.lane().owner)
    assert part.owner.startswith("us.")
