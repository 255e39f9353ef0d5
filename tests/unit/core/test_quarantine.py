"""Quarantine: the message that kills workers is found, whoever else dies meanwhile, and nothing else is condemned."""

from __future__ import annotations

import itertools
import logging
import math
from array import array
from collections.abc import Callable, Collection, Sequence
from typing import Any, Optional

import pytest

from fixtures.core_driver import TOPIC, CoreDriver, pipeline
from fixtures.flights import chunk
from speedlayer.supervisor.core import actions as a
from speedlayer.supervisor.core import events as e
from speedlayer.supervisor.core.ledger import OpenBatch
from speedlayer.supervisor.core.quarantine import Suspicion, acquit, how_it_died, probe_size, suspect
from speedlayer.supervisor.core.workforce import Killed, WorkerState
from speedlayer.workers import protocol as p

DECODE, TRANSFORM, DATABASE = p.Phase.DECODE, p.Phase.TRANSFORM, p.Phase.DATABASE
SEGFAULT = -11

Kills = Callable[[list[tuple[int, int]]], bool]  # whether these (partition, offset) kill whoever looks at them


def messages_of(flight: p.Flight) -> list[tuple[int, int]]:
    """The partition and offset of each message."""
    return [
        (part.lane.partition, each.offset_of(index))
        for part in flight.parts
        for each in part.chunks
        for index in range(each.count)
    ]


def any_of(*guilty: tuple[int, int]) -> Kills:
    return lambda messages: bool(set(messages) & set(guilty))


class Lab(CoreDriver):
    """A core whose workers die of messages. ``topic`` holds the offsets that each partition's log has."""

    def __init__(self, kills: Kills, logs: dict[int, Collection[int]], **settings: Any) -> None:
        super().__init__(**{"batch_rows": 1000, **settings})
        self.kills, self.topic = kills, logs
        self.deaths = 0
        self.rows: list[tuple[int, int]] = []
        self.dead: list[tuple[int, int]] = []
        self.reasons: list[str] = []
        self.assign(*logs)

    def read(self) -> None:
        """Every partition that is read brings all that it has, in one slice."""
        for number, offsets in self.topic.items():
            lane = self.core.state.ledger.get(self.partition(number))
            left = [offset for offset in offsets if lane is not None and offset >= lane.expected]
            if lane is not None and lane.state.value == "fetching" and left:
                first, last = left[0], left[-1]
                one = chunk([b"{}"] * len(left))
                packed = p.Chunk(
                    **{**{name: getattr(one, name) for name in one.__struct_fields__}, "offsets": _packed(left)}
                )
                self.poll(number, count=len(left), first=first, last=last, end=last + 1, chunk=packed)

    def work(self, index: int = 0) -> bool:
        """A worker takes up a flight: it dies of it, or writes it. Returns whether it lives."""
        worker, flight = self.under_way[index]
        messages = messages_of(flight)
        if flight.condemned is None:
            self.enter(index, DECODE)
            self.enter(index, TRANSFORM)
            if self.kills(messages):
                self.deaths += 1
                self.exit(worker, SEGFAULT)
                return False
        self.enter(index, DATABASE)
        self.flush(index=index, dead=len(messages) if flight.condemned is not None else 0)
        if flight.condemned is not None:
            self.dead += messages
            self.reasons.append(flight.condemned)
        else:
            self.rows += messages
        return True

    def enter(self, index: int, phase: p.Phase) -> None:
        worker, flight = self.under_way[index]
        self.report(worker, p.PhaseEntered(flight.flight_id, flight.pipeline, phase))

    def run(self, turns: int = 400) -> None:
        """Go on until everything is written."""
        total = sum(len(offsets) for offsets in self.topic.values())
        for _ in range(turns):
            self.read()
            self.tick(0.25)
            if self.under_way:
                self.work()
            if len(self.rows) + len(self.dead) == total:
                return
        raise AssertionError(f"{len(self.rows)} rows and {len(self.dead)} dead letters of {total} after {turns} turns")


def _packed(offsets: Sequence[int]) -> bytes:
    return array("q", offsets).tobytes()


def everything(logs: dict[int, Collection[int]]) -> set[tuple[int, int]]:
    return {(number, offset) for number, offsets in logs.items() for offset in offsets}


def check(lab: Lab, *guilty: tuple[int, int]) -> None:
    """Exactly the guilty are dead, everything else is a row, once and in order."""
    assert sorted(lab.dead) == sorted(guilty)
    assert set(lab.rows) == everything(lab.topic) - set(guilty)
    assert len(lab.rows) == len(set(lab.rows))
    for number in lab.topic:
        written = [offset for partition, offset in lab.rows if partition == number]
        assert written == sorted(written)


# --- the search ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guilty", [0, 1, 49, 50, 63, 98, 99])
def test_the_guilty_message_is_found_in_some_log2_deaths(guilty: int) -> None:
    lab = Lab(any_of((0, guilty)), {0: range(100)})
    lab.run()
    check(lab, (0, guilty))
    assert lab.deaths <= 2 + math.ceil(math.log2(100)) + 1
    assert lab.reasons == ["killed its worker twice: signal 11 (SIGSEGV), in the phase transform"]


def test_offsets_that_hold_no_message_are_no_suspects() -> None:
    offsets = [0, 3, 4, 90, 91, 500, 501, 10_000]
    for guilty in offsets:
        lab = Lab(any_of((0, guilty)), {0: offsets})
        lab.run()
        check(lab, (0, guilty))
        assert lab.deaths <= 2 + 3 + 1
        assert lab.checkpoint().next_offset == 10_001


@pytest.mark.parametrize("guilty", list(itertools.combinations(range(6), 2)))
def test_two_guilty_messages_of_one_batch_are_both_found(guilty: tuple[int, int]) -> None:
    lab = Lab(any_of(*((0, offset) for offset in guilty)), {0: range(6)})
    lab.run()
    check(lab, *((0, offset) for offset in guilty))


def test_guilty_messages_in_neighbouring_partitions_are_found_apart() -> None:
    lab = Lab(any_of((0, 3), (1, 7)), {0: range(10), 1: range(10), 2: range(10)})
    lab.run()
    check(lab, (0, 3), (1, 7))


def test_what_kills_only_together_is_written_in_pieces() -> None:
    lab = Lab(lambda messages: {(0, 2), (0, 3)} <= set(messages), {0: range(8)})
    lab.run()
    check(lab)
    assert not lab.lane().quarantined


def test_what_kills_only_across_partitions_is_written_apart() -> None:
    lab = Lab(lambda messages: {(0, 0), (1, 0)} <= set(messages), {0: range(4), 1: range(4)})
    lab.run()
    check(lab)


def test_a_message_that_kills_now_and_then_is_written_when_it_does_not() -> None:
    luck = itertools.cycle([True, True, True, False])
    lab = Lab(lambda messages: (0, 5) in messages and next(luck), {0: range(8)})
    lab.run()
    check(lab)


def test_a_single_message_that_kills_is_condemned_after_two_deaths() -> None:
    lab = Lab(any_of((0, 0)), {0: range(1)})
    lab.run()
    check(lab, (0, 0))
    assert lab.deaths == 2


def test_every_message_may_be_guilty() -> None:
    lab = Lab(lambda messages: True, {0: range(5)})
    lab.run()
    check(lab, *((0, offset) for offset in range(5)))


def test_a_quarantined_lane_travels_alone_one_flight_at_a_time_with_half_of_the_suspects() -> None:
    lab = Lab(any_of((0, 0)), {0: range(8), 1: range(8)})
    sizes: list[list[int]] = []
    for _ in range(60):
        lab.read()
        lab.tick(0.25)
        for flight in lab.flights:
            if lab.lane().quarantined and flight.parts[0].lane.partition == 0:
                assert len(flight.parts) == 1
        assert sum(flight.parts[0].lane.partition == 0 for flight in lab.flights) <= 1 or not lab.lane().quarantined
        if lab.under_way:
            sizes.append([part.messages for part in lab.flights[0].parts if part.lane.partition == 0])
            lab.work()
    check(lab, (0, 0))
    assert [each for each in sizes if each][:7] == [[8], [8], [8], [4], [2], [1], [1]]


def test_the_rest_goes_on_at_full_speed_when_the_message_is_found() -> None:
    lab = Lab(any_of((0, 0)), {0: range(8)})
    while not lab.dead:
        lab.read()
        lab.tick(0.25)
        if lab.under_way:
            lab.work()
    lab.read()
    lab.tick(0.25)
    assert [messages_of(flight) for flight in lab.flights] == [[(0, offset) for offset in range(1, 8)]]
    assert lab.logged("leaves quarantine after 6 deaths")


def test_a_condemned_message_counts_for_the_dead_letter_limit() -> None:
    lab = Lab(any_of((0, 0)), {0: range(1)}, dead_letter_minimum=1)
    lab.run()
    assert lab.status()["state"] == "dead-letter limit"
    assert (lab.status()["condemned"], lab.status()["dead_lettered"]) == (1, 1)


# --- who is to blame ----------------------------------------------------------------------------------------------


def flying(*counts: int, **settings: Any) -> CoreDriver:
    """One flight of a message for each partition is under way, or of so many."""
    world = CoreDriver(**settings)
    world.assign(*range(len(counts)))
    for number, count in enumerate(counts):
        world.poll(number, count)
    world.tick(0.25)
    world.forget()
    return world


def enter(world: CoreDriver, phase: p.Phase, index: int = 0) -> None:
    worker, flight = world.under_way[index]
    world.report(worker, p.PhaseEntered(flight.flight_id, flight.pipeline, phase))


def again(world: CoreDriver, *counts: int) -> None:
    """The worker is back, and the same messages are in a flight once more."""
    world.tick(30.0)
    for number, count in enumerate(counts):
        world.poll(number, count)
    world.tick(0.25)
    world.forget()


@pytest.mark.parametrize(("phase", "suspected"), [(None, False), (DECODE, True), (TRANSFORM, True), (DATABASE, False)])
def test_only_a_death_in_decode_or_transform_counts(phase: Optional[p.Phase], suspected: bool) -> None:
    world = flying(5)
    if phase is not None:
        enter(world, phase)
    world.exit()
    assert (world.lane().suspicion is not None) is suspected
    assert world.status()["suspicious_deaths"] == int(suspected)


def test_a_death_during_the_wait_for_the_next_attempt_does_not_count() -> None:
    world = flying(5)
    enter(world, TRANSFORM)
    world.block(p.BlockKind.OVERLOADED)
    world.exit()
    assert world.lane().suspicion is None


def test_one_death_only_notes_the_messages() -> None:
    world = flying(5)
    enter(world, TRANSFORM)
    world.exit(code=-9)
    assert world.lane().suspicion == Suspicion(0, 5, how="signal 9 (SIGKILL), in the phase transform")
    assert world.logged("if it happens again, they are searched", logging.WARNING)
    again(world, 5)
    assert [part.messages for flight in world.flights for part in flight.parts] == [5], "it travels as before"
    world.flush()
    assert world.lane().suspicion is None


def test_the_messages_of_all_parts_are_suspected_and_a_part_without_any_is_not() -> None:
    world = CoreDriver()
    world.assign(0, 1, 2)
    world.poll(0, 3)
    world.poll(1, 4)
    world.tell(e.PositionMoved(world.now, world.partition(2), world.lane(2).generation, 9))
    world.tick(0.25)
    enter(world, DECODE)
    world.exit()
    assert [lane.suspicion is not None for lane in world.core.lanes()] == [True, True, False]


def test_messages_of_an_earlier_claim_are_not_suspected() -> None:
    world = flying(5)
    enter(world, TRANSFORM)
    world.command("seek", to=2)
    world.exit()
    assert world.lane().suspicion is None


def test_messages_of_a_lane_that_was_revoked_are_not_suspected() -> None:
    world = flying(5)
    enter(world, TRANSFORM)
    world.revoke(0)
    world.exit()
    world.assign(0)
    assert world.lane().suspicion is None


def quarantined(*counts: int, **settings: Any) -> CoreDriver:
    """Two workers have died over the first partition's messages."""
    world = flying(*counts, **settings)
    for _ in range(2):
        if world.lane().suspicion is not None:
            again(world, *counts)
        index = next(index for index, flight in enumerate(world.flights) if (0, 0) in messages_of(flight))
        enter(world, TRANSFORM, index)
        world.exit(world.under_way[index][0], SEGFAULT)
    assert world.lane().quarantined
    return world


def test_suspicion_ends_with_the_revocation() -> None:
    world = quarantined(8)
    world.revoke(0)
    world.assign(0)
    assert world.lane().suspicion is None


def test_suspicion_ends_where_an_operator_seeks() -> None:
    world = quarantined(8)
    world.command("seek", to=1)
    assert world.lane().suspicion is None


def test_suspicion_ends_where_the_lane_is_stopped() -> None:
    world = quarantined(8)
    world.log().topic_id = "another"
    world.tick(1.0)
    assert world.state() == "stopped"
    assert world.lane().suspicion is None


def test_what_turns_out_to_be_written_is_acquitted() -> None:
    """The answer to a COMMIT was lost; the claim tells that it was one."""
    world = quarantined(8)
    again(world, 8)
    enter(world, DATABASE)
    world.fail(committed=True)
    world.tick(0.25)
    suspicion = world.lane().suspicion
    assert suspicion is not None
    assert (suspicion.start, suspicion.end) == (4, 8)


def test_before_the_suspects_goes_what_a_database_that_fell_back_has_lost() -> None:
    world = quarantined(8)
    again(world, 8)
    world.flush()
    world.checkpoint().next_offset = 2
    world.exit(code=-9)
    again(world, 6)
    suspicion = world.lane().suspicion
    assert suspicion is not None and (suspicion.start, suspicion.end) == (4, 8)
    assert [messages_of(flight) for flight in world.flights] == [[(0, 2), (0, 3)]]
    assert world.flights[0].condemned is None
    world.flush()
    world.tick(0.25)
    assert [messages_of(flight) for flight in world.flights] == [[(0, 4), (0, 5)]]


def test_suspects_that_compaction_has_taken_are_passed() -> None:
    world = quarantined(8)
    world.tick(30.0)
    world.poll(0, 3, first=8)
    world.tick(0.25)
    assert [messages_of(flight) for flight in world.flights] == [[(0, 8), (0, 9), (0, 10)]]
    world.flush()
    assert world.lane().suspicion is None


def test_part_of_the_suspects_is_probed_when_no_more_was_read() -> None:
    world = quarantined(8)
    world.tick(30.0)
    world.poll(0, 2)
    assert not world.flights
    world.tick(0.25)
    assert [messages_of(flight) for flight in world.flights] == [[(0, 0)]]


def test_a_death_of_something_else_during_the_search_condemns_nobody() -> None:
    """An operator's kill -9 strikes an innocent half: what is written acquits it, and the guilty is still found."""
    lab = Lab(any_of((0, 6)), {0: range(8)})
    for _ in range(2):
        lab.read()
        lab.tick(0.25)
        lab.work()
        lab.tick(0.25)
    lab.read()
    lab.tick(0.25)
    assert messages_of(lab.flights[0]) == [(0, offset) for offset in range(4)]
    lab.enter(0, TRANSFORM)
    lab.exit(code=-9)
    lab.run()
    check(lab, (0, 6))


# --- endless loops ------------------------------------------------------------------------------------------------


def hang(world: CoreDriver, flight_id: Optional[int]) -> None:
    """The worker is killed by us: for what it does with the flight, or for no message's sake."""
    worker = world.core.state.workforce["worker-0"]
    worker.killed = Killed("it did not come to an end within 60 s", flight_id)
    world.exit(code=-9)
    assert worker.killed is None, "the next process has a clean record"


def test_a_worker_that_was_killed_over_a_flight_counts_like_a_death_and_says_why() -> None:
    world = flying(1)
    for _ in range(2):
        enter(world, TRANSFORM)
        hang(world, world.flights[0].flight_id)
        again(world, 1)
    assert world.flights[0].condemned == (
        "killed its worker twice: it did not come to an end within 60 s, in the phase transform"
    )


def test_a_worker_that_was_killed_for_another_reason_puts_nobody_under_suspicion() -> None:
    world = flying(1)
    enter(world, TRANSFORM)
    hang(world, None)
    assert world.lane().suspicion is None


def test_only_the_flight_that_hung_is_suspected() -> None:
    world = two_pipelines(3, 3)
    enter(world, TRANSFORM, 0)
    enter(world, TRANSFORM, 1)
    hang(world, world.flights[1].flight_id)
    assert world.lane().suspicion is None
    assert world.lane(topic="payments").suspicion is not None


# --- alone --------------------------------------------------------------------------------------------------------


def two_pipelines(orders: int, payments: int, **settings: Any) -> CoreDriver:
    """A flight of each pipeline is in one worker."""
    world = CoreDriver(pipeline("orders"), pipeline("payments", topics=("payments",)), **settings)
    world.assign(0)
    world.assign(0, topic="payments")
    poll_both(world, orders, payments)
    return world


def poll_both(world: CoreDriver, orders: int, payments: int) -> None:
    world.poll(0, orders)
    world.poll(0, payments, topic="payments")
    world.tick(0.25)


def test_a_message_is_not_alone_while_another_pipeline_looks_at_its_own() -> None:
    world = two_pipelines(1, 1)
    for _ in range(3):
        for index in range(len(world.under_way)):
            enter(world, TRANSFORM, index)
        world.exit(code=SEGFAULT)
        world.tick(30.0)
        poll_both(world, 1, 1)
    lanes = [world.lane(), world.lane(topic="payments")]
    assert all(lane.suspicion is not None and lane.suspicion.alone < 2 for lane in lanes)


def lonely() -> CoreDriver:
    """Each pipeline has one message, both have died twice, and each must be alone to be judged."""
    world = two_pipelines(1, 1)
    for _ in range(2):
        for index in range(2):
            enter(world, TRANSFORM, index)
        world.exit(code=SEGFAULT)
        world.tick(30.0)
        poll_both(world, 1, 1)
    return world


def test_a_message_that_must_be_alone_is_sent_when_the_worker_looks_at_nothing_else() -> None:
    world = lonely()
    assert [flight.pipeline for flight in world.flights] == ["orders"]
    enter(world, TRANSFORM)
    assert len(world.flights) == 1, "the other one waits"
    enter(world, DATABASE)
    world.tick()
    assert [flight.pipeline for flight in world.flights] == ["orders", "payments"]


def test_nothing_else_is_sent_while_a_message_must_be_alone() -> None:
    world = lonely()
    world.assign(1)
    world.poll(1)
    world.tick(0.25)
    assert [flight.pipeline for flight in world.flights] == ["orders"]
    assert len(world.flights[0].parts) == 1
    world.flush()
    world.tick()
    assert [flight.pipeline for flight in world.flights] == ["payments"], "the other message that must be alone"
    world.flush()
    world.tick()
    assert [messages_of(flight) for flight in world.flights] == [[(1, 0)]]


def test_two_guilty_messages_in_two_pipelines_are_both_condemned() -> None:
    world = lonely()
    condemned = []
    for _ in range(12):
        if not world.flights:
            world.tick(30.0)
            for topic in (TOPIC, "payments"):
                if world.lane(topic=topic).expected == 0:
                    world.poll(0, 1, topic=topic)
            world.tick(0.25)
        if world.flights and world.flights[0].condemned is not None:
            condemned.append(world.flights[0].pipeline)
            world.flush(dead=1)
        elif world.flights:
            enter(world, TRANSFORM)
            world.exit(code=SEGFAULT)
    assert sorted(condemned) == ["orders", "payments"]


def test_a_blocked_sink_of_one_pipeline_does_not_keep_another_s_message_from_being_judged() -> None:
    world = two_pipelines(1, 1)
    enter(world, DATABASE, 1)
    world.block(index=1)
    enter(world, TRANSFORM, 0)
    world.exit(code=SEGFAULT)
    world.tick(30.0)
    poll_both(world, 1, 1)
    payments = next(index for index, flight in enumerate(world.flights) if flight.pipeline == "payments")
    world.block(index=payments)
    assert [flight.pipeline for flight in world.flights if flight.pipeline == "orders"] == ["orders"]


def test_a_message_that_must_be_alone_and_is_blocked_by_its_sink_keeps_nothing_waiting() -> None:
    world = lonely()
    enter(world, TRANSFORM)
    enter(world, DATABASE)
    world.block(retry=60.0)
    world.tick()
    assert [flight.pipeline for flight in world.flights] == ["orders", "payments"]


def test_a_paused_pipeline_s_message_keeps_nothing_waiting() -> None:
    world = two_pipelines(1, 1)
    for _ in range(2):
        for index in range(2):
            enter(world, TRANSFORM, index)
        world.exit(code=SEGFAULT)
        world.tick(30.0)
        if world.lane().quarantined:
            piece = world.slice()
            world.tell(
                e.Polled(world.now, piece.partition.group, (piece,)),
                e.Command(world.now, 99, "pause", {"pipeline": "orders"}),
            )
            world.poll(0, 1, topic="payments")
            world.tick(0.25)
            assert world.lane().batch.rows == 1
        else:
            poll_both(world, 1, 1)
    assert [flight.pipeline for flight in world.flights] == ["payments"]


def test_a_probe_waits_until_a_worker_without_room_is_idle() -> None:
    world = quarantined(8, credit=(2, 100))
    world.assign(1)
    world.tick(30.0)
    world.poll(1, 1)
    world.tick(0.25)
    world.poll(0, 8, size_bytes=200)
    world.tick(0.25)
    assert [messages_of(flight) for flight in world.flights] == [[(1, 0)]]
    world.flush()
    world.tick()
    assert [messages_of(flight) for flight in world.flights] == [[(0, offset) for offset in range(4)]]


# --- where, and how soon ------------------------------------------------------------------------------------------


def test_a_death_that_was_sought_is_followed_by_a_start_at_once_and_others_wait_longer_each_time() -> None:
    world = flying(8)
    worker = world.core.state.workforce["worker-0"]
    delays = []
    for _ in range(5):
        enter(world, TRANSFORM)
        world.exit(code=SEGFAULT)
        delays.append(round(worker.start_at - world.now, 3) if worker.state is WorkerState.WAITING else 0.0)
        again(world, 8)
    assert delays == [0.1, 0.2, 0.0, 0.0, 0.0]
    world.exit(code=-9)
    assert worker.start_at - world.now == pytest.approx(0.4), "this one was in no phase: it was not sought"


def test_a_quarantined_lane_keeps_to_one_worker_and_the_others_avoid_it() -> None:
    world = quarantined(8, 8, 8, 8, workers=2)
    world.tick(30.0)
    suspicion = world.lane().suspicion
    assert suspicion is not None
    ward = suspicion.ward
    assert world.lane().worker == ward
    free = [lane.worker for lane in world.core.lanes() if not lane.quarantined]
    assert ward not in free
    for _ in range(3):
        world.tick(1.0)
    assert [lane.worker for lane in world.core.lanes() if not lane.quarantined] == free, "nobody is moved there"


def test_a_quarantined_lane_waits_for_its_worker() -> None:
    world = quarantined(8, workers=2)
    world.silent.add(a.StartWorker)
    world.tick(30.0)
    assert world.core.state.workforce.ready(), "there is another one"
    assert world.state() == "pending"


def test_a_second_lane_joins_the_first_in_its_worker() -> None:
    world = CoreDriver(workers=2)
    world.assign(0, 1)
    for _ in range(2):
        for number in (0, 1):
            world.poll(number, 4)
        world.tick(0.25)
        for index in range(len(world.under_way)):
            enter(world, TRANSFORM, index)
        for name in ("worker-0", "worker-1"):
            world.exit(name, SEGFAULT)
        world.tick(30.0)
    wards = {lane.suspicion.ward for lane in world.core.lanes() if lane.suspicion is not None}
    assert len(wards) == 1
    assert {lane.worker for lane in world.core.lanes()} == wards


def test_a_lane_whose_pipeline_is_paused_makes_no_worker_dangerous() -> None:
    world = quarantined(8, 8, workers=2)
    world.command("pause")
    world.tick(30.0)
    world.assign(2, 3)
    suspicion = world.lane().suspicion
    assert suspicion is not None
    assert suspicion.ward in {world.lane(2).worker, world.lane(3).worker}


# --- what is shown ------------------------------------------------------------------------------------------------


def test_the_snapshot_shows_what_is_searched() -> None:
    world = quarantined(8)
    (lane,) = world.status()["lanes"]
    assert lane["quarantine"] == {
        "first_offset": 0,
        "last_offset": 7,
        "deaths": 2,
        "how": "signal 11 (SIGSEGV), in the phase transform",
    }
    assert (world.status()["quarantined_lanes"], world.status()["suspicious_deaths"]) == (1, 2)


def test_a_lane_under_suspicion_is_not_shown_in_quarantine_yet() -> None:
    world = flying(8)
    enter(world, TRANSFORM)
    world.exit()
    assert world.status()["lanes"][0]["quarantine"] is None
    assert world.status()["quarantined_lanes"] == 0


def test_the_log_tells_how_the_search_goes() -> None:
    lab = Lab(any_of((0, 0)), {0: range(4)})
    lab.run()
    assert len(lab.logged("a worker died over these messages", logging.WARNING)) == 1
    assert len(lab.logged("the partition is in quarantine", logging.WARNING)) == 1
    assert len(lab.logged("the search goes on among these messages", logging.INFO)) == 2
    (line,) = lab.logged("it becomes a dead letter", logging.ERROR)
    assert line.startswith("orders/0, offsets 0 to 0: this message killed its worker twice: signal 11 (SIGSEGV)")


@pytest.mark.parametrize(
    ("exit_code", "words"),
    [
        (-11, "signal 11 (SIGSEGV)"),
        (-40, "signal 40"),
        (None, "it went without an exit code"),
        (3, "exit code 3"),
        (p.EXIT_OUT_OF_MEMORY, "no memory was left"),
    ],
)
def test_a_death_is_told_in_words(exit_code: Optional[int], words: str) -> None:
    assert how_it_died(exit_code) == words


# --- the rules, one by one ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "start", "end", "after"),
    [
        (None, 5, 9, (5, 9, 1)),
        ((0, 100, 1), 50, 150, (50, 100, 2)),
        ((50, 150, 1), 0, 100, (50, 100, 2)),
        ((0, 100, 3), 20, 30, (20, 30, 4)),
        ((0, 100, 3), 100, 200, (100, 200, 1)),
        ((100, 200, 3), 0, 100, (0, 100, 1)),
    ],
)
def test_what_is_suspected_is_guilty_of_all_the_deaths(
    before: Optional[tuple[int, int, int]], start: int, end: int, after: tuple[int, int, int]
) -> None:
    found = suspect(Suspicion(*before) if before else None, Suspicion(start, end))
    assert (found.start, found.end, found.deaths) == after


@pytest.mark.parametrize(
    ("written", "left"), [(0, (10, 20)), (10, (10, 20)), (15, (15, 20)), (19, (19, 20)), (20, None), (25, None)]
)
def test_what_is_written_is_acquitted(written: int, left: Optional[tuple[int, int]]) -> None:
    found = acquit(Suspicion(10, 20, 2), written)
    assert (None if found is None else (found.start, found.end)) == left
    assert acquit(None, written) is None


@pytest.mark.parametrize(
    ("suspicion", "size"),
    [
        (Suspicion(0, 10, 2), 5),
        (Suspicion(0, 7, 2), 3),
        (Suspicion(0, 2, 2), 1),
        (Suspicion(0, 1, 2), 1),
        (Suspicion(0, 10, 2, single=True), 1),
        (Suspicion(0, 10, 2, shared=True), 10),
        (Suspicion(0, 7, 2, shared=True), 7),
        (Suspicion(4, 8, 2), 4),
        (Suspicion(0, 0, 2), 0),
    ],
)
def test_half_of_the_suspects_are_probed_after_what_stands_before_them(suspicion: Suspicion, size: int) -> None:
    batch = OpenBatch()
    for first in (0, 5):
        values = chunk([b"{}"] * 5, first_offset=first)
        batch.add(e.Slice(e.Partition("g", "t", 0), 1, first, first + 4, first + 5, 5, 100, 3, values), 0.0)
    assert probe_size(batch, suspicion) == size


def test_a_batch_gives_its_first_messages_and_cuts_a_slice_for_it() -> None:
    batch = OpenBatch()
    for first in (0, 5):
        values = chunk([b"{}"] * 5, first_offset=first)
        batch.add(e.Slice(e.Partition("g", "t", 0), 1, first, first + 4, first + 5, 5, 200, 3, values), 0.0)
    taken = batch.take_first(7, b',"d1c2f0a96b4e",', 2.0)
    assert [(piece.first, piece.last, piece.end, piece.count, piece.leader_epoch) for piece in taken] == [
        (0, 4, 5, 5, 3),
        (5, 6, 7, 2, -1),
    ]
    assert (batch.rows, batch.opened_at) == (3, 2.0)
    assert batch.size_bytes + sum(piece.size_bytes for piece in taken) == 400
    rest = batch.take_first(3, b',"d1c2f0a96b4e",', 3.0)
    assert [(piece.first, piece.last, piece.end, piece.leader_epoch) for piece in rest] == [(7, 9, 10, 3)]
    assert (batch.rows, batch.size_bytes, batch.opened_at) == (0, 0, None)
