"""The claim thread: claims take turns, none is lost, and an old one never comes after a new one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from fixtures.flights import Pipe, lane
from fixtures.waiting import wait_until
from speedlayer.workers.claiming import ClaimDesk
from speedlayer.workers.errors import SinkContended, SinkUnavailable
from speedlayer.workers.protocol import (
    Claim,
    ClaimDelayed,
    Claimed,
    Fenced,
    Flight,
    Seed,
    WorkerLog,
)
from speedlayer.workers.reporter import Reporter
from speedlayer.workers.sinks.base import SinkSession, WriteOutcome


class Session(SinkSession):
    """Answers claims as the test says, and remembers them in order."""

    def __init__(self, answer: Callable[[Claim | Seed], Claimed | Fenced]) -> None:
        self._answer = answer
        self.asked: list[Claim | Seed] = []

    def write(self, flight: Flight) -> WriteOutcome:
        raise AssertionError("the claim thread never writes")

    def claim(self, claim: Claim) -> Claimed:
        self.asked.append(claim)
        answer = self._answer(claim)
        assert isinstance(answer, Claimed)
        return answer

    def seed(self, seed: Seed) -> Claimed | Fenced:
        self.asked.append(seed)
        return self._answer(seed)

    def close(self) -> None:
        pass


class GuardingSession(Session):
    """A session that also looks at its flushes."""

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__(claimed)
        self._look = look

    def guard(self) -> None:
        self._look()


def claimed(order: Claim | Seed, epoch: int = 1) -> Claimed:
    return Claimed(order.claim_id, order.lane, epoch, 0, None, -1)


@contextlib.contextmanager
def desk_of(session: SinkSession) -> Iterator[tuple[ClaimDesk, Pipe]]:
    pipe = Pipe()
    desk = ClaimDesk(session, Reporter(pipe))
    thread = threading.Thread(target=desk.serve)
    thread.start()
    try:
        yield desk, pipe
    finally:
        desk.stop()
        thread.join(10)
        assert not thread.is_alive()


def test_a_claim_is_answered_and_its_epoch_remembered() -> None:
    with desk_of(Session(lambda order: claimed(order, epoch=7))) as (desk, pipe):
        assert desk.epoch_of(lane(1)) == -1
        desk.put(Claim(1, lane(1), "me"))
        wait_until(lambda: pipe.reports, "the claim is answered")
        assert pipe.reports == [Claimed(1, lane(1), 7, 0, None, -1)]
        assert desk.epoch_of(lane(1)) == 7


def test_a_claim_is_made_again_until_the_database_answers() -> None:
    failures = [SinkUnavailable("away", sqlstate="57P03", remedy="wait for it")] * 3

    def answer(order: Claim | Seed) -> Claimed:
        if failures:
            raise failures.pop()
        return claimed(order)

    with desk_of(Session(answer)) as (desk, pipe):
        desk.put(Claim(1, lane(1), "me"))
        wait_until(lambda: pipe.of(Claimed), "the claim is answered")
        delayed = pipe.of(ClaimDelayed)
        assert len(delayed) == 3
        assert delayed[0] == ClaimDelayed(1, lane(1), "away — wait for it", "57P03")


def test_one_blocked_claim_holds_up_no_other() -> None:
    released = threading.Event()

    def answer(order: Claim | Seed) -> Claimed:
        if order.lane == lane(1) and not released.is_set():
            raise SinkContended("lock timeout", sqlstate="55P03")
        return claimed(order)

    with desk_of(Session(answer)) as (desk, pipe):
        for number in range(1, 6):
            desk.put(Claim(number, lane(number), "me"))
        wait_until(lambda: len(pipe.of(Claimed)) == 4, "all but the blocked one are answered")
        assert {report.lane for report in pipe.of(ClaimDelayed)} == {lane(1)}
        released.set()
        wait_until(lambda: len(pipe.of(Claimed)) == 5, "the blocked one is answered")


def test_while_the_database_is_away_one_probe_speaks_for_all() -> None:
    back = threading.Event()

    def answer(order: Claim | Seed) -> Claimed:
        if not back.is_set():
            raise SinkUnavailable("away")
        return claimed(order)

    session = Session(answer)
    with desk_of(session) as (desk, pipe):
        for number in range(100):
            desk.put(Claim(number, lane(number), "me"))
        wait_until(lambda: len(pipe.of(ClaimDelayed)) >= 3, "the third probe failed")
        assert len(session.asked) < 20
        back.set()
        wait_until(lambda: len(pipe.of(Claimed)) == 100, "all are answered")


def test_a_newer_claim_of_a_lane_replaces_the_older_one() -> None:
    open_again = threading.Event()

    def answer(order: Claim | Seed) -> Claimed:
        if not open_again.is_set():
            raise SinkContended("lock timeout")
        return claimed(order)

    session = Session(answer)
    with desk_of(session) as (desk, pipe):
        desk.put(Claim(1, lane(1), "me"))
        wait_until(lambda: pipe.of(ClaimDelayed), "the first claim failed")
        desk.put(Claim(2, lane(1), "me"))
        wait_until(lambda: any(order.claim_id == 2 for order in session.asked), "the second one was tried")
        open_again.set()
        wait_until(lambda: pipe.of(Claimed), "one is answered")
        desk.put(Claim(3, lane(3), "me"))
        wait_until(lambda: len(pipe.of(Claimed)) == 2, "the next one is answered")
        assert [report.claim_id for report in pipe.of(Claimed)] == [2, 3]


def test_a_fenced_seed_is_reported() -> None:
    with desk_of(Session(lambda order: Fenced(order.claim_id, order.lane))) as (desk, pipe):
        desk.put(Seed(5, lane(1), "me", 2, None, 40, None))
        wait_until(lambda: pipe.reports, "the seed is answered")
        assert pipe.reports == [Fenced(5, lane(1))]


def test_a_fault_in_the_code_is_told_and_the_claim_tried_again() -> None:
    faults = [ZeroDivisionError("oops")]

    def answer(order: Claim | Seed) -> Claimed:
        if faults:
            raise faults.pop()
        return claimed(order)

    with desk_of(Session(answer)) as (desk, pipe):
        desk.put(Claim(1, lane(1), "me"))
        wait_until(lambda: pipe.of(Claimed), "the claim is answered")
        assert "ZeroDivisionError: oops" in pipe.of(ClaimDelayed)[0].reason
        assert "ZeroDivisionError: oops" in pipe.of(WorkerLog)[0].message


def test_flushes_are_looked_at_while_there_is_nothing_to_claim() -> None:
    looks = threading.Semaphore(0)
    with desk_of(GuardingSession(looks.release)):
        assert looks.acquire(timeout=10)
        assert looks.acquire(timeout=10)


def test_trouble_with_looking_is_told_once_and_stops_no_claim() -> None:
    looks = threading.Semaphore(0)

    def look() -> None:
        looks.release()
        raise SinkUnavailable("away")

    with desk_of(GuardingSession(look)) as (desk, pipe):
        for _ in range(2):
            assert looks.acquire(timeout=10)
        desk.put(Claim(1, lane(1), "me"))
        wait_until(lambda: pipe.of(Claimed), "the claim is answered")
        assert len(pipe.of(WorkerLog)) == 1


def test_epochs_that_begin_again_are_believed() -> None:
    """Somebody dropped the checkpoints: what this worker knew of the lane before says nothing any more."""
    epochs = iter([7, 1])
    with desk_of(Session(lambda order: claimed(order, epoch=next(epochs)))) as (desk, pipe):
        for number, epoch in ((1, 7), (2, 1)):
            desk.put(Claim(number, lane(1), "me"))
            wait_until(lambda count=number: len(pipe.of(Claimed)) == count, "the claim is answered")
            assert desk.epoch_of(lane(1)) == epoch
