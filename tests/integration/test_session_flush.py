"""Flushes on a real PostgreSQL: each message counts once, whoever else believes to own its partition."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fixtures.flights import OWNER, flight, lane, part
from fixtures.operations import BeforeOperation
from fixtures.postgres import connect, execute, locked, query, scalar
from fixtures.sessions import Opened, counters, next_offset, order, order_ids, orders, session_of
from fixtures.waiting import wait_until
from speedlayer.workers import StreamingOverloadException
from speedlayer.workers.checkpoint import Advance, Commit, WriteRows
from speedlayer.workers.errors import SinkContended
from speedlayer.workers.protocol import Fenced, Seed
from speedlayer.workers.sinks.base import WriteOutcome
from speedlayer.workers.sinks.postgres.flush import FlushTransaction

TABLE = "CREATE TABLE orders (order_id bigint, note text, amount numeric(10, 2))"


@pytest.fixture
def dsn(each_postgres_dsn: str) -> str:
    execute(each_postgres_dsn, TABLE)
    return each_postgres_dsn


def test_rows_checkpoint_and_counters_are_written_together(dsn: str) -> None:
    with session_of(dsn, transform=lambda record: None if record["order_id"] == 2 else record) as opened:
        epoch = opened.take(0)
        outcome = opened.session.write(flight(part([*orders(1, 2, 3), b"nonsense"], epoch=epoch)))
    assert (outcome.rows, outcome.filtered, outcome.dead_lettered, outcome.fenced) == (2, 1, 1, ())
    assert order_ids(dsn) == [1, 3]
    assert next_offset(dsn) == 4
    assert counters(dsn) == (2, 1, 1)


def test_a_flight_may_carry_many_partitions(dsn: str) -> None:
    with session_of(dsn) as opened:
        epoch = opened.take(*range(50))
        parts = [part(orders(partition), partition=partition, epoch=epoch) for partition in reversed(range(50))]
        assert opened.session.write(flight(*parts)).rows == 50
    assert order_ids(dsn) == list(range(50))
    assert query(dsn, "SELECT DISTINCT next_offset, rows FROM speedlayer.checkpoints") == [(1, 1)]


def test_a_part_without_messages_moves_the_checkpoint(dsn: str) -> None:
    with session_of(dsn) as opened:
        epoch = opened.take(0, start=100)
        outcome = opened.session.write(flight(part([], epoch=epoch, start=100, end=250)))
    assert (outcome.rows, outcome.fenced) == (0, ())
    assert next_offset(dsn) == 250


def test_the_end_of_a_part_may_be_past_its_last_message(dsn: str) -> None:
    with session_of(dsn) as opened:
        epoch = opened.take(0)
        opened.session.write(flight(part(orders(1, 2), epoch=epoch, end=7)))
        opened.session.write(flight(part(orders(3), epoch=epoch, start=7)))
    assert order_ids(dsn) == [1, 2, 3]
    assert next_offset(dsn) == 8


def test_the_same_flight_is_not_written_twice(dsn: str) -> None:
    with session_of(dsn) as opened:
        once = flight(part(orders(1, 2), epoch=opened.take(0)))
        assert opened.session.write(once).rows == 2
        assert opened.session.write(once) == WriteOutcome(0.0, 0, 0, 0, (0,))
    assert order_ids(dsn) == [1, 2]


def test_a_flight_that_leaves_a_gap_is_fenced(dsn: str) -> None:
    with session_of(dsn) as opened:
        outcome = opened.session.write(flight(part(orders(1), epoch=opened.take(0), start=5)))
    assert outcome.fenced == (0,)
    assert order_ids(dsn) == []


def test_a_flight_of_another_owner_is_fenced_even_under_the_same_epoch(dsn: str) -> None:
    with session_of(dsn) as opened:
        epoch = opened.take(0)
        outcome = opened.session.write(flight(part(orders(1), epoch=epoch, owner="somebody else")))
    assert outcome.fenced == (0,)
    assert order_ids(dsn) == []


def test_a_claim_without_a_start_takes_no_rows(dsn: str) -> None:
    with session_of(dsn) as opened:
        claimed = opened.claim(lane(0))
        assert claimed.next_offset is None
        assert opened.session.write(flight(part(orders(1), epoch=claimed.epoch))).fenced == (0,)
    assert order_ids(dsn) == []


@pytest.mark.parametrize("step", [WriteRows, Advance, Commit])
def test_a_claim_in_the_middle_of_a_flush_loses_and_doubles_nothing(
    dsn: str, before_operation: BeforeOperation, step: type[Any]
) -> None:
    with session_of(dsn) as old, session_of(dsn, worker="worker-1") as new, ThreadPoolExecutor(1) as pool:
        flying = flight(part(orders(1, 2, 3), epoch=old.take(0)))
        claims: list[Any] = []

        def claim_from_elsewhere(_: FlushTransaction) -> None:
            claims.append(pool.submit(claim_patiently, new))
            # Before COMMIT the old flush holds the lock: the claim has to wait. Otherwise it goes through now.
            if step is not Commit:
                claims[0].result(30)

        before_operation[step] = claim_from_elsewhere
        outcome = old.session.write(flying)
        claimed = claims[0].result(30)
        assert outcome.fenced == (() if step is Commit else (0,))
        assert claimed.next_offset == (3 if step is Commit else 0)

        assert claimed.next_offset is not None
        rest = [order(number + 1) for number in range(claimed.next_offset, 5)]
        again = flight(part(rest, epoch=claimed.epoch, start=claimed.next_offset, owner="new"))
        assert new.session.write(again).fenced == ()
    assert order_ids(dsn) == [1, 2, 3, 4, 5]


def claim_patiently(opened: Opened, owner: str = "new") -> Any:
    while True:
        with contextlib.suppress(SinkContended):
            return opened.claim(lane(0), owner)


def test_an_epoch_raised_while_the_checkpoint_is_locked_fences_the_flush_that_waits(
    dsn: str, before_operation: BeforeOperation
) -> None:
    """The UPDATE has read the old version of the row already when it comes to wait for the claim's lock."""
    with contextlib.closing(connect(dsn)) as claimant, session_of(dsn) as old, ThreadPoolExecutor(1) as pool:
        epoch = old.take(0, 1)
        cursor = claimant.cursor()
        cursor.execute("BEGIN; UPDATE speedlayer.checkpoints SET epoch = epoch + 1 WHERE partition = 0")
        flush = pool.submit(
            old.session.write,
            flight(part(orders(1), epoch=epoch), part(orders(2), partition=1, epoch=epoch)),
        )
        wait_until(
            lambda: scalar(
                dsn,
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%%WITH move%%'",
            ),
            "the flush waits for the checkpoint",
        )
        cursor.execute("COMMIT")
        outcome = flush.result(30)
    assert outcome.fenced == (0,)
    assert order_ids(dsn) == [2]
    assert (next_offset(dsn, 0), next_offset(dsn, 1)) == (0, 1)


def test_a_fenced_part_is_left_out_and_the_rest_is_written(dsn: str) -> None:
    with session_of(dsn) as opened, session_of(dsn, worker="worker-1") as other:
        epoch = opened.take(0, 1, 2)
        other.claim(lane(1), "new")
        outcome = opened.session.write(
            flight(
                part([*orders(1), b"nonsense"], epoch=epoch),
                part([*orders(2), b"nonsense"], partition=1, epoch=epoch),
                part(orders(3), partition=2, epoch=epoch),
            )
        )
    assert (outcome.rows, outcome.dead_lettered, outcome.fenced) == (2, 1, (1,))
    assert order_ids(dsn) == [1, 3]
    assert query(dsn, "SELECT DISTINCT partition FROM speedlayer.dead_letters") == [(0,)]
    assert [next_offset(dsn, partition) for partition in range(3)] == [2, 0, 1]


def test_the_duration_includes_the_wait_for_a_lock(dsn: str) -> None:
    with session_of(dsn) as opened, ThreadPoolExecutor(1) as pool:
        epoch = opened.take(0)
        opened.session.write(flight(part(orders(1), epoch=epoch)))
        with locked(dsn, "orders"):
            flush = pool.submit(opened.session.write, flight(part(orders(2), epoch=epoch, start=1)))
            wait_until(lambda: waiting_for_a_lock(dsn), "the flush waits")
            since = time.monotonic()
            wait_until(lambda: time.monotonic() - since > 1.0, "a second has passed")
        outcome = flush.result(30)
    assert outcome.duration_seconds > 1.0
    assert order_ids(dsn) == [1, 2]


def waiting_for_a_lock(dsn: str) -> int:
    count: int = scalar(
        dsn, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    return count


def test_the_first_flush_of_a_session_waits_inside_its_transaction_too(dsn: str) -> None:
    """What is read from the catalog before the transaction must not wait for the lock: the brake would not see it."""
    with session_of(dsn) as opened, ThreadPoolExecutor(1) as pool:
        epoch = opened.take(0)
        with locked(dsn, "orders"):
            flush = pool.submit(opened.session.write, flight(part(orders(1), epoch=epoch)))
            wait_until(
                lambda: scalar(
                    dsn,
                    "SELECT count(*) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND wait_event_type = 'Lock' AND query ILIKE 'copy%%'",
                ),
                "the COPY waits",
            )
        assert flush.result(30).rows == 1


def test_a_lock_that_is_held_longer_than_the_limit_is_contention(dsn: str) -> None:
    with session_of(dsn, lock_timeout_seconds=0.2) as opened:
        flying = flight(part(orders(1), epoch=opened.take(0)))
        with locked(dsn, "orders"), pytest.raises(SinkContended) as caught:
            opened.session.write(flying)
        assert caught.value.sqlstate == "55P03"
        assert opened.session.write(flying).rows == 1


def test_an_overload_raised_by_a_transform_comes_through_and_nothing_is_written(dsn: str) -> None:
    overloaded = threading.Event()
    overloaded.set()

    def transform(record: Any) -> Any:
        if overloaded.is_set():
            raise StreamingOverloadException("the tax service is slow", pause_seconds=1.5)
        return record

    with session_of(dsn, transform=transform) as opened:
        flying = flight(part(orders(1, 2), epoch=opened.take(0)))
        with pytest.raises(StreamingOverloadException) as caught:
            opened.session.write(flying)
        assert caught.value.pause_seconds == 1.5
        overloaded.clear()
        assert opened.session.write(flying).rows == 2
    assert query(dsn, "SELECT count(*) FROM speedlayer.dead_letters") == [(0,)]


def test_the_transaction_has_its_limits_whatever_the_role_is_set_to(
    dsn: str, before_operation: BeforeOperation
) -> None:
    execute(
        dsn,
        """DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation = serializable',
        current_database()); EXECUTE format('ALTER DATABASE %I SET default_transaction_read_only = on',
        current_database()); EXECUTE format('ALTER DATABASE %I SET idle_in_transaction_session_timeout = 7000',
        current_database()); END $$""",
    )
    names = ("transaction_isolation", "transaction_read_only", "lock_timeout", "idle_in_transaction_session_timeout")
    seen: dict[str, str] = {}
    with session_of(dsn, lock_timeout_seconds=77) as opened:
        epoch = opened.take(0)
        connection = opened.session._flush.get()
        before_operation[Advance] = lambda _: seen.update(
            {name: connection.execute(f"SHOW {name}", doing="looking")[0][0] for name in names}
        )
        assert opened.session.write(flight(part(orders(1), epoch=epoch))).rows == 1
    assert seen == {
        "transaction_isolation": "read committed",
        "transaction_read_only": "off",
        "lock_timeout": "77s",
        "idle_in_transaction_session_timeout": "30s",
    }


def test_a_backend_looks_whether_its_client_is_still_there(dsn: str, before_operation: BeforeOperation) -> None:
    with session_of(dsn) as opened:
        epoch = opened.take(0)
        connection = opened.session._flush.get()
        seen: list[Any] = []
        before_operation[Advance] = lambda _: seen.extend(
            connection.execute("SELECT setting FROM pg_settings WHERE name LIKE 'client_conn%%'", doing="looking")
        )
        opened.session.write(flight(part(orders(1), epoch=epoch)))
        if connection.raw.info.server_version >= 140000:
            assert seen == [("2000",)]


def test_a_connection_is_known_by_pipeline_and_worker(dsn: str) -> None:
    with session_of(dsn, worker="worker-7") as opened:
        opened.take(0)
        names = query(
            dsn,
            "SELECT DISTINCT application_name FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name LIKE 'speedlayer/%%'",
        )
    assert names == [("speedlayer/orders/worker-7",)]


def test_a_seed_from_an_owner_that_lost_the_lane_is_fenced(dsn: str) -> None:
    with session_of(dsn) as opened:
        first = opened.claim(lane(0))
        opened.claim(lane(0), "new")
        answer = opened.session.seed(Seed(9, lane(0), OWNER, first.epoch, None, 5, None))
    assert answer == Fenced(9, lane(0))
    assert next_offset(dsn) is None


def test_a_seed_over_a_gap_records_it(dsn: str) -> None:
    with session_of(dsn) as opened:
        epoch = opened.take(0, start=10)
        seed = Seed(3, lane(0), OWNER, epoch, 10, 400, "topic-id", "retention removed offsets 10 to 399")
        opened.session.seed(seed)
        opened.session.seed(seed)  # its answer was lost, say
        claimed = opened.claim(lane(0))
    assert (claimed.next_offset, claimed.topic_id) == (400, "topic-id")
    gaps = query(dsn, "SELECT topic, partition, from_offset, to_offset, reason FROM speedlayer.gaps")
    assert gaps == [("orders", 0, 10, 400, "retention removed offsets 10 to 399")]


def test_checkpoints_are_updated_in_place(dsn: str) -> None:
    with session_of(dsn) as opened:
        epoch = opened.take(0)
        for number in range(40):
            opened.session.write(flight(part(orders(number), epoch=epoch, start=number)))
    # The statistics of a backend arrive when it ends.
    updates, hot = wait_until(
        lambda: next(
            (
                row
                for row in query(
                    dsn, "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'checkpoints'"
                )
                if row[0] >= 40
            ),
            None,
        ),
        "the statistics are there",
    )
    assert hot >= updates - 1


def test_many_workers_claim_new_lanes_at_the_same_time(dsn: str) -> None:
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(session_of(dsn, worker=f"worker-{number}")) for number in range(4)]

        def claim_all(one: Opened) -> list[int]:
            return [one.claim(lane(partition), one.session._context.worker).epoch for partition in range(20)]

        with ThreadPoolExecutor(4) as pool:
            epochs = list(pool.map(claim_all, opened))
    assert [sorted(epochs_of_lane) for epochs_of_lane in zip(*epochs, strict=True)] == [[1, 2, 3, 4]] * 20
