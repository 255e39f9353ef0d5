"""Who ends is started again, as the documented unit of systemd would, and every end is judged by who asked for it."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

import pytest

from chaos.keeper import NOT_RESTARTED, Keeper, Member
from fixtures.waiting import holds_for, wait_until
from speedlayer.supervisor.exit_codes import ExitCode


class Process:
    """A process that ends when it is told to, with this status."""

    def __init__(self) -> None:
        self.returncode: int | None = 0
        self.sent: list[signal.Signals] = []

    @property
    def running(self) -> bool:
        return self.returncode is None

    def send(self, number: signal.Signals) -> None:
        self.sent.append(number)
        self.returncode = -number


class Daemon:
    """As much of a daemon as the keeper starts."""

    def __init__(self) -> None:
        self.process = Process()
        self.pid = 4711

    def start(self, *, wait: bool) -> None:
        self.process.returncode = None


@pytest.fixture
def member() -> Member:
    daemon: Any = Daemon()
    daemon.start(wait=False)
    return Member("one", "group", daemon, 0, starts=1)


def test_a_member_that_was_killed_is_started_again_and_its_end_is_no_riddle(member: Member) -> None:
    keeper = Keeper([member])
    member.end(signal.SIGKILL, "kill -9")
    (ended,) = keeper.look()
    assert (ended.asked, ended.meaning) == ("kill -9", "SIGKILL")
    assert keeper.look() == [], "an end is told once"
    wait_until(lambda: keeper.look() == [] and member.running, "it runs again", timeout_seconds=5)
    assert member.starts == 2


def test_an_end_that_nobody_asked_for_is_told_by_its_name(member: Member) -> None:
    keeper = Keeper([member])
    member.daemon.process.returncode = ExitCode.INTERNAL_ERROR  # type: ignore[misc]
    (ended,) = keeper.look()
    assert (ended.asked, ended.meaning) == (None, "INTERNAL_ERROR")
    assert keeper.causes() == {"by itself: INTERNAL_ERROR": 1}


@pytest.mark.parametrize("status", NOT_RESTARTED)
def test_what_does_not_mend_itself_by_starting_again_is_not_started(member: Member, status: int) -> None:
    keeper = Keeper([member])
    member.daemon.process.returncode = status  # type: ignore[misc]
    assert len(keeper.look()) == 1
    holds_for(lambda: keeper.look() == [] and not member.running, "it stays down", seconds=0.5)


def test_counters_add_up_over_the_lives_of_a_member(member: Member) -> None:
    member.counts = {(1, "orders", "fenced"): 2, (2, "orders", "fenced"): 3, (2, "events", "flushes"): 9}
    assert (member.total("fenced"), member.total("flushes")) == (5, 9)


def test_a_member_reads_when_it_says_that_a_partition_is_fetched(member: Member) -> None:
    lane = SimpleNamespace(state="claiming")
    member.status = {"pipelines": [{"lanes": [vars(lane)]}]}
    assert not member.reads()
    lane.state = "fetching"
    assert member.reads()
    member.status = None
    assert not member.reads()
