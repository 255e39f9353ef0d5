"""The watchdog: what stands still is repaired, one remedy after the other; what waits for good reason is left alone."""

from __future__ import annotations

from typing import Any

import pytest

from fixtures.core_driver import CoreDriver
from speedlayer.supervisor.core import actions as a
from speedlayer.supervisor.core import events as e
from speedlayer.supervisor.core.workforce import WorkerState
from speedlayer.workers import protocol as p

STALL_SECONDS = 30.0
STEP_SECONDS = 5.0


class Watched(CoreDriver):
    """A world whose workers give signs of life, and whose broker tells its watermarks, as time passes."""

    alive = True
    marks = True
    scout_answers = True
    takes_orders = True

    def spend(self, seconds: float) -> None:
        """Let time pass in steps: a long one would mean that the daemon was stopped."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + STEP_SECONDS)
            if self.alive:
                for worker in self.core.state.workforce:
                    taken = worker.orders_sent if self.takes_orders else worker.orders_taken
                    self.report(worker.name, p.Alive(taken))
            if self.marks:
                self.tell(e.Watermarks(self.now, {lane.partition: (0, 1000) for lane in self.core.lanes()}))
            elif self.scout_answers:
                self.tell(e.SurveyFailed(self.now, "no answer"))
            self.tell(e.Tick(self.now))
            while self.flights and not self.flights[-1].parts[0].chunks:  # the check of a quiet lane
                self.flush(index=len(self.flights) - 1)

    @property
    def repairs(self) -> dict[str, int]:
        """What was done so far."""
        return {remedy: count for remedy, count in self.core.snapshot()["repairs"].items() if count}

    def phase(self, phase: p.Phase, index: int = 0) -> None:
        worker, flight = self.under_way[index]
        self.report(worker, p.PhaseEntered(flight.flight_id, flight.pipeline, phase))


def watched(**settings: Any) -> Watched:
    world = Watched(**settings)
    world.assign(0)
    return world


def flying(**settings: Any) -> Watched:
    """One flight is under way, and nothing more can be read."""
    world = watched(**settings)
    world.marks = False
    world.poll()
    world.tick(0.25)
    world.forget()
    return world


# --- a partition from which nothing comes ---------------------------------------------------------------------------


def test_a_partition_from_which_nothing_comes_is_read_again_claimed_again_and_its_consumer_rebuilt() -> None:
    world = watched()
    world.forget()
    world.spend(STALL_SECONDS)
    assert world.repairs == {}
    world.spend(4 * STEP_SECONDS)  # the checkpoint of a lane that was claimed is looked at after 15 s
    assert world.repairs == {"re-seek": 1}
    assert (len(world.of(a.Pause)), len(world.of(a.Resume)), world.of(a.SendClaim)) == (1, 1, [])
    assert world.logged("orders/0 stands still: messages can be read, and none comes")
    assert (world.status()["stalled_lanes"], world.status()["lanes"][0]["stall"]) == (
        1,
        "messages can be read, and none comes; tried: re-seek",
    )
    world.spend(STALL_SECONDS + STEP_SECONDS)
    world.spend(STEP_SECONDS)
    assert (world.repairs["re-claim"], len(world.of(a.SendClaim)), world.of(a.RebuildConsumer)) == (1, 1, [])
    world.spend(STALL_SECONDS + STEP_SECONDS)
    (rebuilt,) = world.of(a.RebuildConsumer)
    assert rebuilt.group == "group"
    # The new consumer gets the partition again, and nothing of it either.
    world.assign(0)
    world.spend(STALL_SECONDS + STEP_SECONDS)
    assert (world.core.lifecycle.value, world.of(a.Stop)[0].exit_code) == ("stopped", 13)
    assert world.repairs == {"re-seek": 1, "re-claim": 1, "rebuild the consumer": 1, "stop the daemon": 1}


def test_once_rows_are_written_the_ladder_begins_anew() -> None:
    world = watched()
    world.spend(STALL_SECONDS + 4 * STEP_SECONDS)
    assert world.repairs == {"re-seek": 1}
    world.poll()
    world.tick(0.25)
    world.flush()
    world.spend(STALL_SECONDS + 4 * STEP_SECONDS)
    assert world.repairs == {"re-seek": 2}


def test_a_lane_that_is_at_the_end_stands_still_for_good_reason() -> None:
    world = watched()
    world.log().high = 5
    world.marks = False
    world.poll(count=5)
    world.tick(0.25)
    world.flush()
    world.lane().check_at = None
    for _ in range(30):
        world.tell(e.Watermarks(world.now, {world.partition(): (0, 5)}))
        world.spend(STEP_SECONDS)
    assert world.repairs == {}


def test_while_the_broker_tells_nothing_nobody_is_blamed() -> None:
    world = watched()
    world.marks = False
    world.spend(10 * STALL_SECONDS)
    assert world.repairs == {}


@pytest.mark.parametrize("command", ["pause", "drain"])
def test_what_is_held_on_purpose_is_left_alone(command: str) -> None:
    world = watched()
    world.command(command)
    world.spend(10 * STALL_SECONDS)
    assert world.repairs == {}


def test_where_kafka_complains_the_daemon_does_not_stop() -> None:
    world = watched()
    for _ in range(4):
        world.tell(e.ConsumerTrouble(world.now, "group", "TOPIC_AUTHORIZATION_FAILED", "not allowed"))
        world.spend(STALL_SECONDS + 4 * STEP_SECONDS)
        if world.of(a.RebuildConsumer) and not list(world.core.lanes()):
            world.assign(0)
    assert world.core.lifecycle.value == "running"
    assert world.logged("every remedy was tried. Kafka says: not allowed", a.ERROR)
    world.spend(STALL_SECONDS + STEP_SECONDS)
    assert "stop the daemon" not in world.repairs
    assert world.repairs["re-seek"] == 1
    world.spend(20 * STALL_SECONDS)
    assert world.repairs["re-seek"] == 2, "after a long while it tries again"


def test_a_daemon_that_was_stopped_blames_nobody_for_the_time() -> None:
    world = watched()
    world.marks = False
    world.tick(1000.0)
    world.tell(e.Watermarks(world.now, {world.partition(): (0, 1000)}))
    world.tick()
    assert world.repairs == {}
    assert world.core.state.workforce["worker-0"].killed is None


# --- a claim, a question, a poll ------------------------------------------------------------------------------------


def test_a_claim_that_nobody_answers_is_made_again_then_its_worker_is_restarted_then_the_daemon_stops() -> None:
    world = watched(silent=[a.SendClaim])
    world.spend(STALL_SECONDS + STEP_SECONDS)
    assert (world.repairs, len(world.of(a.SendClaim))) == ({"re-claim": 1}, 2)
    world.spend(STALL_SECONDS + STEP_SECONDS)
    assert (len(world.of(a.KillWorker)), world.repairs["restart the worker"]) == (1, 1)
    world.spend(2 * STALL_SECONDS)
    assert world.of(a.Stop)[0].exit_code == 13


def test_a_claim_that_waits_for_the_database_says_so_and_is_left_alone() -> None:
    world = watched(silent=[a.SendClaim])
    for _ in range(20):
        claim = world.of(a.SendClaim)[0].claim
        world.report("worker-0", p.ClaimDelayed(claim.claim_id, claim.lane, "no server", None))
        world.spend(2 * STEP_SECONDS)
    assert world.repairs == {}


def test_a_claim_of_a_worker_that_still_boots_is_the_workers_own_affair() -> None:
    world = Watched(silent=[a.StartWorker, a.SendClaim])
    world.assign(0)
    assert world.state() == "claiming"
    world.spend(2 * STALL_SECONDS)
    assert world.repairs == {}


def test_a_question_that_is_forgotten_is_asked_again_after_a_new_claim_and_then_the_daemon_stops() -> None:
    world = watched(silent=[a.Inspect])
    world.marks = False
    world.spend(STALL_SECONDS + STEP_SECONDS)
    assert (world.repairs, len(world.of(a.Inspect))) == ({"re-claim": 1}, 2)
    world.spend(STALL_SECONDS + 2 * STEP_SECONDS)
    assert world.of(a.Stop)[0].exit_code == 13


def test_a_scout_that_hangs_is_renewed_though_nothing_else_stands_still_and_asks_again() -> None:
    world = watched()
    world.silent.add(a.Inspect)
    world.assign(1)
    world.marks = world.scout_answers = False
    world.silent.clear()  # what is asked from now on is answered, by the other scout
    world.spend(STALL_SECONDS + STEP_SECONDS)
    assert (world.repairs, len(world.of(a.RenewScout))) == ({"renew the scout": 1}, 1)
    assert (world.state(0), world.state(1)) == ("fetching", "fetching")
    assert world.logged("the thread that asks Kafka has not answered for 30 s; another one is started")


def test_a_scout_that_hangs_again_and_again_ends_the_daemon_unless_it_answers() -> None:
    world = watched()
    world.marks = world.scout_answers = False
    world.spend(3 * (STALL_SECONDS + STEP_SECONDS))
    assert world.repairs == {"renew the scout": 3}
    world.tell(e.SurveyFailed(world.now, "no answer"))
    world.spend(2 * (STALL_SECONDS + STEP_SECONDS))
    assert world.of(a.Stop) == []
    world.spend(4 * STALL_SECONDS)
    assert world.of(a.Stop)[0].exit_code == 13


def test_a_scout_that_is_asked_nothing_owes_nothing() -> None:
    world = Watched()
    world.spend(10 * STALL_SECONDS)
    assert world.repairs == {}


def test_a_consumer_that_always_fails_is_rebuilt() -> None:
    world = flying()
    world.flush(fenced=[0])
    world.spend(2 * STALL_SECONDS)
    assert len(world.of(a.RebuildConsumer)) == 1


def test_a_lane_that_waits_for_its_back_off_is_left_alone() -> None:
    world = flying()
    world.flush(fenced=[0])
    world.poll_nothing()
    world.lane().claim_not_before = 1e9
    world.spend(2 * STALL_SECONDS)
    assert world.repairs == {}


# --- a batch that is not sent ---------------------------------------------------------------------------------------


def test_a_batch_that_is_not_sent_is_given_up_and_its_lane_claimed_again() -> None:
    world = watched(credit=(0, 0))
    world.marks = False
    world.poll()
    world.spend(STALL_SECONDS + 2 * STEP_SECONDS)
    assert world.repairs == {"re-claim": 1}
    assert world.logged("what was read is not sent to a worker")


def test_a_batch_that_is_young_waits_for_its_time() -> None:
    world = watched(batch_seconds=3600.0)
    world.marks = False
    world.poll()
    world.spend(10 * STALL_SECONDS)
    assert world.repairs == {}


# --- workers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [p.Phase.DECODE, p.Phase.TRANSFORM])
@pytest.mark.parametrize("alive", [True, False])
def test_a_worker_that_hangs_in_user_code_is_killed_and_its_messages_are_suspected(phase: p.Phase, alive: bool) -> None:
    world = flying()
    world.alive = alive
    world.phase(phase)
    world.spend(60.0 - STEP_SECONDS)
    assert world.of(a.KillWorker) == []
    world.spend(2 * STEP_SECONDS)
    assert len(world.of(a.KillWorker)) == 1
    assert world.repairs == {"restart the worker": 1}
    assert world.logged("worker-0 is killed and started again: pipeline orders: it hung in user code for 60 s")
    suspicion = world.lane().suspicion
    assert suspicion is not None
    assert suspicion.how == f"it hung in user code for 60 s, in the phase {phase.value}"


def test_filters_and_maps_that_begin_one_record_after_the_other_are_slow_and_do_not_hang() -> None:
    world = flying()
    world.phase(p.Phase.TRANSFORM)
    for _ in range(10):
        world.spend(60.0 - STEP_SECONDS)
        world.report("worker-0", p.Alive(1, ["another", "orders"]))
    assert world.of(a.KillWorker) == []
    world.spend(60.0 + STEP_SECONDS)
    assert len(world.of(a.KillWorker)) == 1


def test_records_that_are_begun_excuse_no_decoder() -> None:
    world = flying()
    world.phase(p.Phase.DECODE)
    for _ in range(3):
        world.spend(30.0)
        world.report("worker-0", p.Alive(1, ["orders"]))
    assert len(world.of(a.KillWorker)) == 1


def test_a_flush_that_takes_long_is_told_once_and_left_alone() -> None:
    world = flying()
    world.phase(p.Phase.DATABASE)
    world.spend(20 * STALL_SECONDS)
    assert world.of(a.KillWorker) == []
    assert len(world.logged("has waited for the database for 30 s")) == 1
    assert world.core.snapshot()["workers"][0]["long_flushes"] == 1
    world.flush(600.0)
    assert world.core.snapshot()["workers"][0]["long_flushes"] == 0


def test_a_flight_that_is_blocked_says_so_itself() -> None:
    world = flying()
    world.block()
    world.spend(2 * STALL_SECONDS)
    assert world.logged("has waited for the database") == []


def test_a_worker_of_which_nothing_is_heard_is_restarted_whatever_it_does_and_no_message_is_to_blame() -> None:
    world = flying()
    world.phase(p.Phase.DATABASE)
    world.alive = False
    world.spend(STALL_SECONDS + STEP_SECONDS)
    assert len(world.of(a.KillWorker)) == 1
    assert world.logged("it has not given a sign of life for 30 s")
    assert world.lane().suspicion is None


def test_a_worker_that_does_not_take_its_orders_is_restarted() -> None:
    world = watched()
    world.spend(STEP_SECONDS)
    world.takes_orders = False
    world.poll()
    world.tick(0.25)
    world.spend(STALL_SECONDS - STEP_SECONDS)
    assert world.of(a.KillWorker) == []
    world.spend(2 * STEP_SECONDS)
    assert len(world.of(a.KillWorker)) == 1
    assert world.logged("it has not taken its orders for 30 s")


def test_a_worker_that_does_not_become_ready_is_restarted() -> None:
    world = Watched(silent=[a.StartWorker])
    world.spend(4 * STALL_SECONDS - STEP_SECONDS)
    assert world.of(a.KillWorker) == []
    world.spend(STEP_SECONDS)
    assert len(world.of(a.KillWorker)) == 1
    assert world.core.state.workforce["worker-0"].boot_failures == 1


def test_a_worker_that_is_restarted_again_and_again_ends_the_daemon_unless_it_flushes() -> None:
    world = Watched()
    world.alive = False
    world.spend(3 * (STALL_SECONDS + 2 * STEP_SECONDS))
    worker = world.core.state.workforce["worker-0"]
    assert worker.hangs_in_a_row == 3
    worker.showed_life()
    world.spend(2 * (STALL_SECONDS + 2 * STEP_SECONDS))
    assert world.of(a.Stop) == []
    world.spend(4 * STALL_SECONDS)
    assert world.of(a.Stop)[0].exit_code == 13


def test_a_worker_that_can_not_be_killed_ends_the_daemon_once() -> None:
    world = flying(workers=2, silent=[a.KillWorker])
    world.alive = False
    world.spend(STALL_SECONDS + STEP_SECONDS)
    assert len(world.of(a.KillWorker)) == 2
    assert world.core.state.workforce["worker-0"].state is WorkerState.READY
    world.spend(2 * STALL_SECONDS)
    assert world.core.snapshot()["repairs"]["stop the daemon"] == 1
    assert world.logged("is still there")
