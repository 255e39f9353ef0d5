"""The flush thread: each flight ends in one report, and what can not be written now is kept."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from fixtures.flights import Pipe, lane
from fixtures.waiting import wait_until
from speedlayer.workers.errors import (
    FateUnknown,
    SinkContended,
    SinkMisconfigured,
    SinkUnavailable,
    StreamingOverloadException,
)
from speedlayer.workers.flushing import FlushDesk
from speedlayer.workers.protocol import (
    EXIT_OUT_OF_MEMORY,
    BlockKind,
    Claim,
    Claimed,
    FailureKind,
    Fenced,
    Flight,
    FlushBlocked,
    FlushFailed,
    FlushReport,
    LaneKey,
    Part,
    Seed,
    WorkerLog,
)
from speedlayer.workers.reporter import Reporter
from speedlayer.workers.sinks.base import SinkSession, WriteOutcome


class Session(SinkSession):
    """Writes as the test says."""

    def __init__(self, write: Callable[[Flight], WriteOutcome]) -> None:
        self._write = write
        self.flights: list[Flight] = []

    def write(self, flight: Flight) -> WriteOutcome:
        self.flights.append(flight)
        return self._write(flight)

    def claim(self, claim: Claim) -> Claimed:
        raise AssertionError("the flush thread never claims")

    def seed(self, seed: Seed) -> Claimed | Fenced:
        raise AssertionError("the flush thread never seeds")

    def close(self) -> None:
        pass


class Desk:
    """A flush desk with its thread, its reports and the epochs that its claim thread knows."""

    def __init__(self, write: Callable[[Flight], WriteOutcome]) -> None:
        self.session = Session(write)
        self.pipe = Pipe()
        self.epochs: dict[LaneKey, int] = {}
        self.desk = FlushDesk(
            self.session, Reporter(self.pipe), lambda key: self.epochs.get(key, -1), pipeline="orders"
        )
        self.thread = threading.Thread(target=self.desk.serve)

    def fly(self, *epochs: int, flight_id: int = 1) -> None:
        """Send a flight with a part for each epoch, of the partitions from 0 on."""
        parts = [Part(lane(partition), epoch, "me", 0, 10, -1, []) for partition, epoch in enumerate(epochs)]
        self.desk.put(Flight(flight_id, "orders", b"", parts))

    def wait_for(self, kind: type) -> None:
        wait_until(lambda: self.pipe.of(kind), f"a {kind.__name__} is reported")


@contextlib.contextmanager
def desk_of(write: Callable[[Flight], WriteOutcome]) -> Iterator[Desk]:
    desk = Desk(write)
    desk.thread.start()
    try:
        yield desk
    finally:
        desk.desk.finish()
        desk.thread.join(20)
        assert not desk.thread.is_alive()


def written(flight: Flight) -> WriteOutcome:
    return WriteOutcome(0.5, 7, 2, 1)


def failing(*errors: BaseException) -> Callable[[Flight], WriteOutcome]:
    left = list(errors)

    def write(flight: Flight) -> WriteOutcome:
        if left:
            raise left.pop(0)
        return written(flight)

    return write


def test_a_written_flight_is_reported() -> None:
    with desk_of(written) as desk:
        desk.fly(1)
        desk.wait_for(FlushReport)
    (report,) = desk.pipe.reports
    assert (report.flight_id, report.pipeline, report.duration_seconds) == (1, "orders", 0.5)
    assert (report.rows, report.filtered, report.dead_lettered, report.retries, report.fenced) == (7, 2, 1, 0, [])
    assert report.busy_seconds >= 0


def test_a_flight_that_can_not_be_written_now_is_kept_and_tried_again() -> None:
    errors = (
        SinkUnavailable("away", sqlstate="57P03", remedy="wait"),
        SinkContended("deadlock", sqlstate="40P01"),
        SinkMisconfigured("no table", sqlstate="42P01", remedy="create it"),
        StreamingOverloadException("too much", pause_seconds=0.01),
    )
    with desk_of(failing(*errors)) as desk:
        desk.fly(1)
        desk.wait_for(FlushReport)
    blocked = desk.pipe.of(FlushBlocked)
    assert [report.kind for report in blocked] == [
        BlockKind.UNAVAILABLE,
        BlockKind.CONTENDED,
        BlockKind.MISCONFIGURED,
        BlockKind.OVERLOADED,
    ]
    assert [report.attempt for report in blocked] == [1, 2, 3, 4]
    assert (blocked[0].reason, blocked[0].remedy, blocked[0].sqlstate) == ("away", "wait", "57P03")
    assert blocked[3].retry_seconds == 0.01
    assert desk.pipe.of(FlushReport)[0].retries == 4
    assert len({id(flight) for flight in desk.session.flights}) == 1


def test_an_unknown_fate_ends_the_flight() -> None:
    with desk_of(failing(FateUnknown("no answer to COMMIT", sqlstate="08006"))) as desk:
        desk.fly(1)
        desk.wait_for(FlushFailed)
    assert desk.pipe.reports == [FlushFailed(1, "orders", FailureKind.FATE_UNKNOWN, "no answer to COMMIT", "08006")]


def test_a_fault_in_the_code_gives_the_flight_up_and_tells_where_it_happened() -> None:
    with desk_of(failing(*[ZeroDivisionError("oops")] * 3)) as desk:
        desk.fly(1)
        desk.wait_for(FlushFailed)
        desk.fly(1, flight_id=2)
        desk.wait_for(FlushReport)
    (failed,) = desk.pipe.of(FlushFailed)
    assert failed.kind is FailureKind.ABANDONED
    assert "ZeroDivisionError: oops" in failed.reason
    assert len(desk.pipe.of(FlushBlocked)) == 2
    assert "test_flush_desk.py" in desk.pipe.of(WorkerLog)[0].message
    assert desk.pipe.of(FlushReport)[0].flight_id == 2


def test_an_exit_in_user_code_does_not_end_the_thread() -> None:
    with desk_of(failing(SystemExit(3))) as desk:
        desk.fly(1)
        desk.wait_for(FlushFailed)
        desk.fly(1, flight_id=2)
        desk.wait_for(FlushReport)
    assert "SystemExit" in desk.pipe.of(FlushFailed)[0].reason


def test_a_part_whose_lane_was_claimed_again_is_fenced_without_a_question() -> None:
    def write(flight: Flight) -> WriteOutcome:
        assert [part.lane.partition for part in flight.parts] == [0, 2, 3]
        return WriteOutcome(0.5, 20, 0, 0, fenced=(1,))  # the database fences partition 2

    with desk_of(write) as desk:
        desk.epochs = {lane(0): 5, lane(1): 6, lane(2): 5}
        desk.fly(5, 5, 5, 5)
        desk.wait_for(FlushReport)
    assert desk.pipe.of(FlushReport)[0].fenced == [1, 2]


def test_a_flight_of_which_nothing_is_left_never_reaches_the_database() -> None:
    with desk_of(written) as desk:
        desk.epochs = {lane(0): 6, lane(1): 6}
        desk.fly(5, 5)
        desk.wait_for(FlushReport)
    assert desk.session.flights == []
    (report,) = desk.pipe.of(FlushReport)
    assert (report.rows, report.duration_seconds, report.fenced) == (0, 0.0, [0, 1])


def test_a_claim_that_comes_while_a_flight_waits_sets_it_free() -> None:
    def away(flight: Flight) -> WriteOutcome:
        raise SinkContended("lock timeout")

    with desk_of(away) as desk:
        desk.fly(5)
        desk.wait_for(FlushBlocked)
        desk.epochs = {lane(0): 6}
        desk.wait_for(FlushReport)
    assert desk.pipe.of(FlushReport)[0].fenced == [0]


def test_a_request_to_finish_ends_a_long_wait_and_gives_up_what_can_not_be_written() -> None:
    def away(flight: Flight) -> WriteOutcome:
        raise SinkMisconfigured("no table", sqlstate="42P01")

    with desk_of(away) as desk:
        desk.fly(1)
        desk.fly(1, flight_id=2)
        desk.wait_for(FlushBlocked)
    assert [(report.flight_id, report.kind) for report in desk.pipe.of(FlushFailed)] == [
        (1, FailureKind.ABANDONED),
        (2, FailureKind.ABANDONED),
    ]


def test_without_memory_the_process_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tried again here: the supervisor is to see what the worker was looking at."""

    def write(flight: Flight) -> WriteOutcome:
        raise MemoryError

    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        sys.exit(code)  # ends the desk's thread

    monkeypatch.setattr("speedlayer.workers.flushing.os._exit", leave)
    desk = Desk(write)
    desk.fly(1)
    with contextlib.suppress(SystemExit):
        desk.desk._handle_next()
    assert codes == [EXIT_OUT_OF_MEMORY]
    assert "no memory is left" in desk.pipe.of(WorkerLog)[0].message
