"""A member that is thawed after its partitions have moved writes nothing more of them, and begins no quarrel.

The database itself proves it: it notes each step of a checkpoint, under which epoch and with which rows it was taken,
in the order of the commits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import pytest

from fixtures.catching import Catcher
from fixtures.compare import assert_table_equals, last_of_each_key, values_of
from fixtures.daemon import Daemon
from fixtures.group import PARTITIONS, PROTOCOLS, Group
from fixtures.history import WRITTEN_BY
from fixtures.kafka import Message, PacedProducer
from fixtures.open_flushes import OpenFlushes
from fixtures.orders import (
    EVENT_COLUMNS,
    EVENTS_TABLE,
    ORDER_COLUMNS,
    ORDER_KEY,
    ORDERS_TABLE,
    SETBACKS,
    OrderUpdates,
    event,
)
from fixtures.postgres import PostgresServer, locked, query
from fixtures.proxy import Proxy
from fixtures.waiting import wait_until

EVENTS = f"{EVENTS_TABLE}; ALTER TABLE events ADD COLUMN {WRITTEN_BY}"
MESSAGES_PER_SECOND = 1_000

# What a flush sends when all its rows are written.
CHECKPOINT_STATEMENT = b"RELEASE SAVEPOINT speedlayer_rows"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [False, True], ids=["alone", "with its workers"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_frozen_supervisor_writes_nothing_more_of_the_partitions_that_have_moved(
    make_group: Callable[..., Group], protocol: str, workers: bool
) -> None:
    group = make_group(protocol, "events", EVENTS)
    first, second = group.first, group.join()
    with PacedProducer(group.broker, group.topic, numbered_event, per_second=MESSAGES_PER_SECOND) as producer:
        group.wait_until_shared(first, second)
        group.wait_until_it_writes(first)
        group.wait_until_it_writes(second)
        moved, backend = set(group.held_by(first)), group.backend_of(first)
        with locked(group.dsn, "events"):
            flush = wait_until(lambda: waiting_transaction(group, backend), "a flush of the first waits for the table")
            first.freeze(workers=workers)
            frozen_at = group.history.last_note()
            group.wait_until_shared(second)
            assert {claim.partition for claim in group.history.claims(after=frozen_at)} == moved
            assert waiting_transaction(group, backend) == flush, "the flush has outlived the claims of its partitions"
        if not workers:
            # Nothing holds it up any more: it writes its rows, finds that it is fenced, and rolls back.
            wait_until(lambda: transaction_of(group, backend) != flush, "the late flush is over")
        group.wait_until_it_writes(second)
        first.thaw()
        group.wait_until_shared(first, second)
        group.wait_until_it_writes(first)
        group.wait_until_it_writes(second)

    log = group.wait_until_written(first, second)
    assert len(log) == producer.sent
    assert_table_equals(group.dsn, "events", values_of(log), EVENT_COLUMNS)
    group.history.assert_each_step_was_taken_under_the_last_epoch()
    group.history.assert_each_row_came_with_a_step()
    assert_no_quarrel(group, first, second, since=frozen_at)


@pytest.mark.slow
def test_a_ghost_that_holds_checkpoints_is_ended_by_the_new_owner(
    make_group: Callable[..., Group], start_proxy: Callable[..., Proxy], postgres: PostgresServer, postgres_dsn: str
) -> None:
    proxy = start_proxy(postgres.host, postgres.port).start()
    through_proxy = postgres_dsn.replace(f":{postgres.port}/", f":{proxy.port}/")
    group = make_group("cooperative-sticky", "events", EVENTS, first_dsn=through_proxy)
    first, second = group.first, group.join()
    with (
        PacedProducer(group.broker, group.topic, numbered_event, per_second=MESSAGES_PER_SECOND) as producer,
        OpenFlushes(group.dsn, "events") as flushes,
    ):
        group.wait_until_shared(first, second)
        group.wait_until_it_writes(first)
        ghost = Catcher(first, flushes, proxy).hold_commit().pid
        first.freeze(workers=True)
        frozen_at = group.history.last_note()
        group.wait_until_shared(second)
        assert "from being claimed" in second.process.wait_for_log(f"ended backend {ghost} ")
        assert transaction_of(group, ghost) is None
        first.thaw()
        proxy.heal()
        group.wait_until_shared(first, second)
        group.wait_until_it_writes(first)

    log = group.wait_until_written(first, second)
    assert len(log) == producer.sent
    assert_table_equals(group.dsn, "events", values_of(log), EVENT_COLUMNS)
    group.history.assert_each_step_was_taken_under_the_last_epoch()
    group.history.assert_each_row_came_with_a_step()
    assert_no_quarrel(group, first, second, since=frozen_at)


@pytest.mark.slow
def test_a_ghost_that_holds_the_locks_of_keys_is_ended_by_the_new_owner(
    make_group: Callable[..., Group], start_proxy: Callable[..., Proxy], postgres: PostgresServer, postgres_dsn: str
) -> None:
    proxy = start_proxy(postgres.host, postgres.port).start()
    through_proxy = postgres_dsn.replace(f":{postgres.port}/", f":{proxy.port}/")
    upsert = {"mode": "upsert", "key": list(ORDER_KEY)}
    group = make_group("consumer", "orders", f"{ORDERS_TABLE};{SETBACKS}", first_dsn=through_proxy, pipeline=upsert)
    first, second = group.first, group.join()
    with PacedProducer(group.broker, group.topic, OrderUpdates(200), per_second=MESSAGES_PER_SECOND) as producer:
        group.wait_until_shared(first, second)
        group.wait_until_it_writes(first)
        held = proxy.hold_back(CHECKPOINT_STATEMENT)
        wait_until(held.is_set, "a flush has written its rows and is about to move its checkpoints")
        ghost = group.backend_of(first)
        first.freeze(workers=True)
        frozen_at = group.history.last_note()
        flush = transaction_of(group, ghost)
        assert flush is not None and flush.state == "idle in transaction"
        group.wait_until_shared(second)
        group.wait_until_it_writes(second)
        assert "held up a flush" in second.process.wait_for_log(f"ended backend {ghost}:")
        assert transaction_of(group, ghost) is None
        first.thaw()
        proxy.heal()
        group.wait_until_shared(first, second)
        group.wait_until_it_writes(first)

    log = group.wait_until_written(first, second)
    assert len(log) == producer.sent
    assert_table_equals(group.dsn, "orders", last_of_each_key(log, ORDER_KEY), ORDER_COLUMNS)
    assert query(group.dsn, "SELECT * FROM setbacks") == [], "no record has replaced a newer one, or itself"
    group.history.assert_each_step_was_taken_under_the_last_epoch()
    assert_no_quarrel(group, first, second, since=frozen_at)


def numbered_event(number: int) -> Message:
    return event(number, partitions=PARTITIONS)


@dataclass(frozen=True)
class Transaction:
    """The transaction that a backend is in."""

    began_at: datetime
    state: str


def transaction_of(group: Group, backend: int, condition: str = "true") -> Transaction | None:
    """The transaction of a backend, if it is in one and the condition on pg_stat_activity holds."""
    rows = query(
        group.dsn,
        f"SELECT xact_start, state FROM pg_stat_activity WHERE pid = %s AND xact_start IS NOT NULL AND {condition}",
        (backend,),
    )
    return next((Transaction(*row) for row in rows), None)


def waiting_transaction(group: Group, backend: int) -> Transaction | None:
    return transaction_of(group, backend, "wait_event_type = 'Lock'")


def assert_no_quarrel(group: Group, first: Daemon, second: Daemon, *, since: int) -> None:
    """The partitions of the first went to the second, some went back, and nobody took one from the other in turns."""
    claims = group.history.claims(after=since)
    for partition in range(PARTITIONS):
        owners = [claim.owner for claim in claims if claim.partition == partition]
        assert len(owners) <= 2, f"partition {partition} was claimed by {owners}"
    # What the first had in flight when it froze is fenced, once; the second is the owner all along.
    assert first.pipeline()["fenced"] <= PARTITIONS
    assert second.pipeline()["fenced"] == 0
