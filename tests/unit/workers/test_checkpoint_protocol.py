"""The checkpoint protocol, operation by operation, without a database."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speedlayer.workers import checkpoint
from speedlayer.workers.checkpoint import (
    Advance,
    Backend,
    Begin,
    Checkpoint,
    Commit,
    Counts,
    EvictOldOwner,
    FlushResult,
    LockCheckpoint,
    Operation,
    Purpose,
    RaiseEpoch,
    RecordGap,
    Rollback,
    SetStart,
    WriteDeadLetters,
    WriteRows,
)
from speedlayer.workers.errors import ConnectionLost, FateUnknown, SinkContended, SinkMisconfigured, SinkUnavailable
from speedlayer.workers.protocol import LaneKey, Part, Seed

BACKEND = Backend(4711, datetime(2026, 1, 1, tzinfo=timezone.utc))


def lane(partition: int) -> LaneKey:
    return LaneKey("cluster", "group", "orders", "orders", partition)


def part(partition: int, start: int = 0, end: int = 10, epoch: int = 1) -> Part:
    return Part(lane(partition), epoch, "me", start, end, -1, [])


class Script:
    """Answers operations in order, and remembers them. An exception as an answer is raised."""

    def __init__(self, *answers: tuple[type[Any], Any]) -> None:
        self._answers = list(answers)
        self.seen: list[Operation] = []

    def __call__(self, operation: Operation) -> Any:
        self.seen.append(operation)
        if not self._answers:
            raise AssertionError(f"one operation more than expected: {operation}")
        kind, answer = self._answers.pop(0)
        assert isinstance(operation, kind), f"{operation} came where a {kind.__name__} was due"
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kinds(self) -> list[str]:
        return [type(operation).__name__ for operation in self.seen]


def test_a_flush_writes_rows_then_moves_the_checkpoints_in_key_order_then_commits() -> None:
    parts = [part(2), part(1)]
    counts = (Counts(10, 0, 0), Counts(8, 2, 0))
    script = Script((Begin, None), (WriteRows, counts), (Advance, {lane(1), lane(2)}), (Commit, None))

    result = checkpoint.run(checkpoint.flush(parts), script)

    assert result == FlushResult((0, 1), counts, ())
    advance = script.seen[2]
    assert isinstance(advance, Advance)
    assert [(move.lane, move.counts) for move in advance.moves] == [(lane(1), counts[1]), (lane(2), counts[0])]
    assert {(move.epoch, move.owner, move.start, move.end) for move in advance.moves} == {(1, "me", 0, 10)}


def test_dead_letters_are_written_after_the_rows_and_before_the_checkpoints() -> None:
    script = Script(
        (Begin, None),
        (WriteRows, (Counts(9, 0, 1),)),
        (WriteDeadLetters, None),
        (Advance, {lane(1)}),
        (Commit, None),
    )
    checkpoint.run(checkpoint.flush([part(1)]), script)
    assert script.kinds() == ["Begin", "WriteRows", "WriteDeadLetters", "Advance", "Commit"]


def test_a_fenced_part_is_left_out_and_the_rest_is_flushed_again() -> None:
    count = Counts(10, 0, 0)
    script = Script(
        (Begin, None),
        (WriteRows, (count,) * 3),
        (Advance, {lane(0), lane(2)}),
        (Rollback, None),
        (Begin, None),
        (WriteRows, (count,) * 2),
        (Advance, {lane(0), lane(2)}),
        (Commit, None),
    )
    result = checkpoint.run(checkpoint.flush([part(0), part(1), part(2)]), script)
    assert result == FlushResult((0, 2), (count,) * 2, (1,))
    assert script.seen[5] == WriteRows((0, 2))


def test_nothing_is_committed_when_every_part_is_fenced() -> None:
    script = Script((Begin, None), (WriteRows, (Counts(10, 0, 0),) * 2), (Advance, frozenset()), (Rollback, None))
    result = checkpoint.run(checkpoint.flush([part(0), part(1)]), script)
    assert result == FlushResult((), (), (0, 1))
    assert "Commit" not in script.kinds()


def test_two_parts_of_one_lane_are_refused() -> None:
    with pytest.raises(ValueError, match="same lane"):
        checkpoint.run(checkpoint.flush([part(1), part(1, 10, 20)]), Script())


@pytest.mark.parametrize(
    "error", [SinkUnavailable("away"), SinkContended("deadlock"), SinkMisconfigured("no table"), RuntimeError("bug")]
)
@pytest.mark.parametrize("step", [0, 1, 2])
def test_an_error_before_commit_rolls_back_and_comes_through(step: int, error: Exception) -> None:
    answers: list[tuple[type[Any], Any]] = [(Begin, None), (WriteRows, (Counts(1, 0, 0),)), (Advance, {lane(1)})]
    answers[step] = (answers[step][0], error)
    script = Script(*answers[: step + 1], (Rollback, None))
    with pytest.raises(type(error)) as caught:
        checkpoint.run(checkpoint.flush([part(1)]), script)
    assert caught.value is error
    assert script.kinds()[-1] == "Rollback"


def committing_with(error: Exception, *more: tuple[type[Any], Any]) -> Script:
    return Script((Begin, None), (WriteRows, (Counts(1, 0, 0),)), (Advance, {lane(1)}), (Commit, error), *more)


def test_a_lost_answer_to_commit_leaves_the_fate_unknown() -> None:
    with pytest.raises(FateUnknown):
        checkpoint.run(checkpoint.flush([part(1)]), committing_with(ConnectionLost("gone")))


def test_a_refused_commit_is_a_rollback() -> None:
    error = SinkContended("serialization failure")
    with pytest.raises(SinkContended) as caught:
        checkpoint.run(checkpoint.flush([part(1)]), committing_with(error, (Rollback, None)))
    assert caught.value is error


def test_an_unexpected_error_at_commit_leaves_the_fate_unknown() -> None:
    script = committing_with(RuntimeError("bug"), (Rollback, None))
    with pytest.raises(FateUnknown, match="RuntimeError: bug"):
        checkpoint.run(checkpoint.flush([part(1)]), script)


FOUND = Checkpoint(7, "old", 100, "topic-id", 3, BACKEND)


def test_a_claim_locks_the_checkpoint_before_it_raises_the_epoch() -> None:
    after = dataclasses.replace(FOUND, epoch=8, owner="me", backend=None)
    script = Script((Begin, None), (LockCheckpoint, FOUND), (RaiseEpoch, after), (Commit, None))
    result = checkpoint.run(checkpoint.claim(lane(1), "me", None), script)
    assert result == checkpoint.ClaimResult(after, BACKEND)
    assert script.seen[0] == Begin(Purpose.CLAIM)


def test_a_claim_that_is_blocked_looks_whether_the_old_owner_is_to_blame() -> None:
    error = SinkContended("lock timeout")
    script = Script((Begin, None), (LockCheckpoint, error), (Rollback, None), (EvictOldOwner, None))
    with pytest.raises(SinkContended) as caught:
        checkpoint.run(checkpoint.claim(lane(1), "me", BACKEND), script)
    assert caught.value is error


def test_a_claim_whose_commit_had_no_answer_may_be_made_again() -> None:
    script = Script(
        (Begin, None), (LockCheckpoint, None), (RaiseEpoch, FOUND), (Commit, ConnectionLost("gone")), (Rollback, None)
    )
    with pytest.raises(ConnectionLost):
        checkpoint.run(checkpoint.claim(lane(1), "me", None), script)


def seed_of(expected: int | None, start: int, gap_reason: str | None = None) -> Seed:
    return Seed(1, lane(1), "me", 8, expected, start, "new-id", gap_reason)


MINE = Checkpoint(8, "me", None, None, -1, None)


def test_a_seed_sets_the_start() -> None:
    script = Script((Begin, None), (LockCheckpoint, MINE), (SetStart, True), (Commit, None))
    found = checkpoint.run(checkpoint.seed(seed_of(None, 40)), script)
    assert found == dataclasses.replace(MINE, next_offset=40, topic_id="new-id")


def test_a_seed_with_a_reason_records_the_gap() -> None:
    before = dataclasses.replace(MINE, next_offset=10)
    script = Script((Begin, None), (LockCheckpoint, before), (SetStart, True), (RecordGap, None), (Commit, None))
    checkpoint.run(checkpoint.seed(seed_of(10, 40, "retention")), script)
    assert script.seen[3] == RecordGap(lane(1), 10, 40, "retention")


@pytest.mark.parametrize(
    "before",
    [
        None,
        dataclasses.replace(MINE, epoch=9),
        dataclasses.replace(MINE, owner="somebody"),
        dataclasses.replace(MINE, next_offset=11),
    ],
)
def test_a_seed_of_a_lane_that_has_moved_on_is_fenced(before: Checkpoint | None) -> None:
    script = Script((Begin, None), (LockCheckpoint, before), (Rollback, None))
    assert checkpoint.run(checkpoint.seed(seed_of(10, 40)), script) is None


def test_a_seed_that_was_committed_without_an_answer_is_not_made_twice() -> None:
    before = dataclasses.replace(MINE, next_offset=40)
    script = Script((Begin, None), (LockCheckpoint, before), (Rollback, None))
    assert checkpoint.run(checkpoint.seed(seed_of(10, 40, "retention")), script) == before


# --- Every interleaving -------------------------------------------------------------------------------------------


class Blocked(Exception):
    """The operation must wait for another transaction."""


class Store:
    """One lane in a database that holds row locks until a transaction ends, as READ COMMITTED does."""

    def __init__(self) -> None:
        self.state = Checkpoint(0, "", 0, None, -1, None)
        self.rows: list[int] = []
        self.locked_by: object = None


class Transaction:
    """One session's transaction on the store."""

    def __init__(self, store: Store, parts: list[Part]) -> None:
        self._store, self._parts = store, parts
        self._rows: list[int] = []
        self._state: Checkpoint | None = None

    def __call__(self, operation: Operation) -> Any:
        match operation:
            case WriteRows(indexes):
                for index in indexes:
                    self._rows += range(self._parts[index].start, self._parts[index].end)
                return tuple(Counts(self._parts[index].end - self._parts[index].start, 0, 0) for index in indexes)
            case Advance((move,)):
                self._lock()
                found = self._store.state
                if (found.epoch, found.owner, found.next_offset) != (move.epoch, move.owner, move.start):
                    self._unlock()  # a row that does not match is not locked
                    return frozenset()
                self._state = dataclasses.replace(found, next_offset=move.end)
                return {move.lane}
            case LockCheckpoint():
                self._lock()
                return self._store.state
            case RaiseEpoch(_, owner, _):
                self._state = dataclasses.replace(self._store.state, epoch=self._store.state.epoch + 1, owner=owner)
                return self._state
            case Commit():
                if self._state is not None:
                    self._store.state = self._state
                self._store.rows += self._rows
                self._end()
            case Rollback():
                self._end()
        return None

    def _lock(self) -> None:
        if self._store.locked_by not in (None, self):
            raise Blocked
        self._store.locked_by = self

    def _unlock(self) -> None:
        self._store.locked_by = None

    def _end(self) -> None:
        if self._store.locked_by is self:
            self._unlock()
        self._rows, self._state = [], None


class Actor:
    """An owner that claims and flushes, claims and flushes, one operation at a time."""

    def __init__(self, store: Store, name: str, goal: int) -> None:
        self._store, self._name, self._goal = store, name, goal
        self._steps = self._live()
        self._waiting: Callable[[], Any] | None = None
        self._answer: Any = None

    def _live(self) -> Generator[Callable[[], Any], Any, None]:
        while True:
            claimed = yield from self._carry_out(checkpoint.claim(lane(1), self._name, None), [])
            position, epoch = claimed.checkpoint.next_offset, claimed.checkpoint.epoch
            while position < self._goal:
                parts = [Part(lane(1), epoch, self._name, position, position + 1, -1, [])]
                result = yield from self._carry_out(checkpoint.flush(parts), parts)
                if result.fenced:
                    break
                position += 1
            else:
                return

    def _carry_out(self, protocol: Generator[Operation, Any, Any], parts: list[Part]) -> Any:
        transaction = Transaction(self._store, parts)
        answer = None
        try:
            while True:
                operation = protocol.send(answer)
                answer = yield lambda operation=operation: transaction(operation)  # type: ignore[misc]
        except StopIteration as stop:
            return stop.value

    def step(self) -> bool:
        """Do one operation, unless it must wait. False: done."""
        try:
            if self._waiting is None:
                self._waiting = self._steps.send(self._answer)
            self._answer = self._waiting()
            self._waiting = None
        except Blocked:
            pass
        except StopIteration:
            return False
        return True


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=120))
def test_whatever_the_interleaving_each_offset_is_written_once(turns: list[int]) -> None:
    store, goal = Store(), 5
    actors = [Actor(store, name, goal) for name in ("one", "two", "three")]
    for turn in turns:
        actors[turn].step()
    for actor in actors:  # and then each to its end: the last one to claim finishes the work
        for _ in range(1_000):
            if not actor.step():
                break
            for other in actors:
                if store.locked_by is not None and other is not actor:
                    other.step()
        else:
            raise AssertionError("an owner never came to its end")
    assert store.rows == list(range(goal))
    assert store.state.next_offset == goal


@pytest.mark.parametrize(("second_owner", "rows"), [("us.2", []), ("us.1", [0])], ids=["own token", "the same token"])
def test_a_flight_of_a_claim_that_a_fail_over_lost_is_fenced_by_its_owner_token(
    second_owner: str, rows: list[int]
) -> None:
    """The database falls back to before the claim, and the next claim is given the same epoch: offset 0 may by now be
    another topic's. The second case shows that nothing but the token tells the flights apart.
    """
    store = Store()
    before = store.state
    first = checkpoint.run(checkpoint.claim(lane(1), "us.1", None), Transaction(store, [])).checkpoint
    late = [Part(lane(1), first.epoch, "us.1", 0, 1, -1, [])]
    store.state = before
    second = checkpoint.run(checkpoint.claim(lane(1), second_owner, None), Transaction(store, [])).checkpoint
    assert (second.epoch, second.next_offset) == (first.epoch, 0)
    result = checkpoint.run(checkpoint.flush(late), Transaction(store, late))
    assert (store.rows, bool(result.fenced)) == (rows, not rows)
