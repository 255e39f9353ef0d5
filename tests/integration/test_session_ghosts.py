"""Old owners that were stopped in the middle of a transaction: their locks hold up nobody for long."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from fixtures.flights import flight, lane, part
from fixtures.operations import BeforeOperation
from fixtures.postgres import connect, execute, locked, query, scalar
from fixtures.sessions import Opened, next_offset, order, order_ids, orders, session_of
from fixtures.waiting import wait_until
from speedlayer.workers.checkpoint import Advance, Commit
from speedlayer.workers.errors import FateUnknown, SinkContended, SinkUnavailable
from speedlayer.workers.protocol import Claimed
from speedlayer.workers.sinks.postgres import guardian
from speedlayer.workers.sinks.postgres.flush import FlushTransaction


@pytest.fixture
def dsn(each_postgres_dsn: str) -> str:
    execute(each_postgres_dsn, "CREATE TABLE orders (order_id bigint PRIMARY KEY, note text)")
    return each_postgres_dsn


class Frozen:
    """An old owner, stopped before an operation of its flush, as by SIGSTOP: its transaction stays open."""

    def __init__(self, opened: Opened, before_operation: BeforeOperation, step: type[Any], values: list[Any]) -> None:
        self.reached, self.thawed = threading.Event(), threading.Event()
        self._pool = ThreadPoolExecutor(1)
        epoch = opened.take(0, owner="old")

        def freeze(_: FlushTransaction) -> None:
            self.reached.set()
            assert self.thawed.wait(60)

        before_operation[step] = freeze
        flying = flight(part(values, epoch=epoch, owner="old"))
        self.flush: Future[Any] = self._pool.submit(opened.session.write, flying)
        assert self.reached.wait(30)

    def thaw(self) -> None:
        self.thawed.set()
        self._pool.shutdown()


@pytest.fixture
def freeze(dsn: str, before_operation: BeforeOperation) -> Iterator[Callable[..., Frozen]]:
    with contextlib.ExitStack() as cleanup:

        def start(step: type[Any], values: list[Any]) -> Frozen:
            opened = cleanup.enter_context(session_of(dsn, worker="old-worker"))
            frozen = Frozen(opened, before_operation, step, values)
            cleanup.callback(frozen.thaw)
            return frozen

        yield start


def claim_patiently(opened: Opened, partition: int = 0) -> tuple[Claimed, int]:
    """Claim as the claim thread does: again and again. Returns the answer and the number of blocked attempts."""
    refusals = []

    def answer() -> Claimed | None:
        try:
            return opened.claim(lane(partition), "new")
        except SinkContended as error:
            refusals.append(error.sqlstate)
            return None

    claimed = wait_until(answer, "the lane is claimed")
    assert set(refusals) <= {"55P03"}
    return claimed, len(refusals)


def test_a_claim_ends_the_old_owner_that_was_stopped_just_before_its_commit(
    dsn: str, freeze: Callable[..., Frozen]
) -> None:
    frozen = freeze(Commit, orders(1, 2))
    with session_of(dsn) as new:
        claimed, blocked = claim_patiently(new)
        assert blocked >= 2
        assert claimed.next_offset == 0
        assert any("ended backend" in warning for warning in new.warnings())
        outcome = new.session.write(flight(part(orders(1, 2, 3), epoch=claimed.epoch, owner="new")))
        assert outcome.rows == 3
    frozen.thaw()
    with pytest.raises(FateUnknown):
        frozen.flush.result(30)
    assert order_ids(dsn) == [1, 2, 3]


def test_a_claim_waits_for_an_old_owner_that_is_only_slow(dsn: str, freeze: Callable[..., Frozen]) -> None:
    frozen = freeze(Commit, orders(1, 2))
    with session_of(dsn) as new:
        with pytest.raises(SinkContended):
            new.claim(lane(0), "new")
        frozen.thaw()
        assert frozen.flush.result(30).fenced == ()
        assert new.claim(lane(0), "new").next_offset == 2
        assert new.warnings() == []


def test_a_claim_never_ends_a_strangers_backend(dsn: str) -> None:
    with session_of(dsn) as opened, contextlib.closing(connect(dsn)) as stranger:
        opened.take(0)
        cursor = stranger.cursor()
        cursor.execute("BEGIN; SELECT 1 FROM speedlayer.checkpoints FOR UPDATE")
        silent = "SELECT state_change < now() - interval '2.5 seconds' FROM pg_stat_activity WHERE pid = %s"
        wait_until(lambda: scalar(dsn, silent, (stranger.info.backend_pid,)), "it has been silent for long")
        for _ in range(2):
            with pytest.raises(SinkContended):
                opened.claim(lane(0))
        cursor.execute("COMMIT")
        assert opened.claim(lane(0)).epoch == 2


def test_a_claim_never_ends_a_backend_that_only_has_the_old_ones_pid(dsn: str, freeze: Callable[..., Frozen]) -> None:
    freeze(Advance, orders(1))
    with contextlib.closing(connect(dsn)) as holder, session_of(dsn) as new:
        # As if the server had given the old owner's pid to another backend of ours since.
        cursor = holder.cursor()
        cursor.execute("SET application_name = 'speedlayer/orders/other'")
        execute(
            dsn,
            "UPDATE speedlayer.checkpoints SET backend_pid = %s, backend_start = now() - interval '1 hour'",
            (holder.info.backend_pid,),
        )
        cursor.execute("BEGIN; SELECT 1 FROM speedlayer.checkpoints FOR UPDATE")
        silent = "SELECT state_change < now() - interval '2.5 seconds' FROM pg_stat_activity WHERE pid = %s"
        wait_until(lambda: scalar(dsn, silent, (holder.info.backend_pid,)), "it has been silent for long")
        with pytest.raises(SinkContended):
            new.claim(lane(0), "new")
        cursor.execute("COMMIT")


def test_a_flush_that_waits_for_a_stopped_old_owners_rows_is_set_free(dsn: str, freeze: Callable[..., Frozen]) -> None:
    frozen = freeze(Advance, orders(1, 2))  # its rows are written, and their keys are taken
    with session_of(dsn) as new, ThreadPoolExecutor(1) as pool:
        claimed, blocked = claim_patiently(new)
        assert blocked == 0  # the checkpoint comes last: nothing keeps the claim waiting
        flush = pool.submit(new.session.write, flight(part(orders(1, 2), epoch=claimed.epoch, owner="new")))

        def done() -> bool:
            new.session.guard()
            return flush.done()

        wait_until(done, "the flush goes through", interval_seconds=0.3)
        outcome = flush.result()
        assert (outcome.rows, outcome.dead_lettered, outcome.fenced) == (2, 0, ())
        assert outcome.duration_seconds > guardian.WATCH_AFTER_SECONDS
        assert any("old owner's" in warning for warning in new.warnings())
    frozen.thaw()
    with pytest.raises(SinkUnavailable):
        frozen.flush.result(30)
    assert order_ids(dsn) == [1, 2]


def test_a_flush_that_waits_for_a_stranger_names_it_and_leaves_it_alone(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guardian, "TELL_AFTER_SECONDS", 1.5)
    with session_of(dsn) as opened, ThreadPoolExecutor(1) as pool:
        epoch = opened.take(0)
        opened.session.guard()
        with locked(dsn, "orders"):
            flush = pool.submit(opened.session.write, flight(part(orders(1), epoch=epoch)))

            def told() -> list[str]:
                opened.session.guard()
                return opened.warnings()

            (warning,) = wait_until(told, "the blocker is named", interval_seconds=0.2)
            assert "speedlayer tests" in warning
            assert "idle in transaction" in warning
            for _ in range(2 * guardian.LOOKS_BEFORE_EVICTION):
                opened.session.guard()
        assert flush.result(30).rows == 1


def test_a_silent_backend_of_ours_that_owned_none_of_our_lanes_is_left_alone(dsn: str) -> None:
    with session_of(dsn) as opened, ThreadPoolExecutor(1) as pool, contextlib.closing(connect(dsn)) as sibling:
        epoch = opened.take(0)
        cursor = sibling.cursor()
        cursor.execute("SET application_name = 'speedlayer/orders/worker-9'")
        cursor.execute("BEGIN; LOCK TABLE orders")
        flush = pool.submit(opened.session.write, flight(part(orders(1), epoch=epoch)))
        waiting_long = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND wait_event_type = 'Lock' AND now() - xact_start > '1.5 seconds'"
        )
        wait_until(lambda: scalar(dsn, waiting_long), "the flush has waited for long")
        for _ in range(2 * guardian.LOOKS_BEFORE_EVICTION):
            opened.session.guard()
        cursor.execute("COMMIT")
        assert flush.result(30).rows == 1


def test_a_working_old_owner_is_not_taken_for_a_ghost(dsn: str) -> None:
    """An old owner that holds a lock and is busy (here: with another lock) is left to finish."""
    execute(dsn, "CREATE TABLE audit (order_id bigint)")
    execute(
        dsn,
        "CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO audit VALUES (NEW.order_id); RETURN NULL; END $$;"
        " CREATE TRIGGER audit AFTER INSERT ON orders FOR EACH ROW WHEN (NEW.note = 'audited')"
        " EXECUTE FUNCTION audit()",
    )
    with session_of(dsn, worker="old") as old, session_of(dsn) as new, ThreadPoolExecutor(2) as pool:
        old_epoch = old.take(0, owner="old")
        with locked(dsn, "audit"):
            busy = pool.submit(
                old.session.write, flight(part([order(1, note="audited")], epoch=old_epoch, owner="old"))
            )
            waiting = (
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            wait_until(lambda: scalar(dsn, waiting) == 1, "the old flush is busy")
            claimed = new.claim(lane(0), "new")
            flush = pool.submit(new.session.write, flight(part(orders(1), epoch=claimed.epoch, owner="new")))
            wait_until(lambda: scalar(dsn, waiting) == 2, "the new flush waits for the old one's row")
            waiting_long = f"{waiting} AND now() - xact_start > '1.5 seconds'"
            wait_until(lambda: scalar(dsn, waiting_long) == 2, "both have waited for long")
            for _ in range(2 * guardian.LOOKS_BEFORE_EVICTION):
                new.session.guard()
        assert busy.result(30).fenced == (0,)
        assert flush.result(30).rows == 1
        assert not any("ended backend" in warning for warning in new.warnings())
    assert query(dsn, "SELECT order_id, note FROM orders") == [(1, None)]


# --- which backend flushes --------------------------------------------------------------------------------------------


def named_backend(dsn: str, partition: int = 0) -> Any:
    return query(
        dsn, "SELECT backend_pid, backend_start FROM speedlayer.checkpoints WHERE partition = %s", (partition,)
    )[0]


def test_a_claim_names_the_backend_that_will_flush(dsn: str) -> None:
    with session_of(dsn) as opened:
        opened.take(0)
        backend = opened.session._flush.get().backend
        assert backend is not None
        assert named_backend(dsn) == (backend.pid, backend.started_at)
        live = query(dsn, "SELECT pid, backend_start FROM pg_stat_activity WHERE pid = %s", (backend.pid,))
        assert live == [(backend.pid, backend.started_at)]


def test_a_new_flush_connection_is_named_before_its_first_rows(dsn: str, before_operation: BeforeOperation) -> None:
    with session_of(dsn) as opened:
        epoch = opened.take(0, 1)
        first = named_backend(dsn)
        execute(dsn, "SELECT pg_terminate_backend(%s)", (first[0],))
        seen: list[Any] = []

        def look(transaction: FlushTransaction) -> None:
            backend = transaction.connection.backend
            assert backend is not None
            seen.append((backend.pid, backend.started_at))
            seen.append(named_backend(dsn))

        before_operation[Advance] = look
        opened.session.write(flight(part(orders(1), epoch=epoch)))
        assert seen[0] == seen[1] != first
        # A lane without a flush keeps the old name until its own next flush.
        assert named_backend(dsn, 1) == first
        opened.session.write(flight(part(orders(2), partition=1, epoch=epoch)))
        assert named_backend(dsn, 1) == seen[0]


def test_a_lane_that_has_another_owner_is_not_renamed(dsn: str) -> None:
    with session_of(dsn) as old, session_of(dsn, worker="worker-1") as new:
        epoch = old.take(0)
        new.claim(lane(0), "new")
        named = named_backend(dsn)
        execute(dsn, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '%%/worker-0'")
        assert old.session.write(flight(part(orders(1), epoch=epoch))).fenced == (0,)
        assert named_backend(dsn) == named


def test_behind_a_pooler_no_backend_is_named(dsn: str) -> None:
    with session_of(dsn, pooled=True, mode="upsert") as opened:
        epoch = opened.take(0)
        assert named_backend(dsn) == (None, None)
        assert opened.session.write(flight(part(orders(1, 2), epoch=epoch))).rows == 2
        opened.session.guard()
    assert next_offset(dsn) == 2
