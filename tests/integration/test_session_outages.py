"""What a session makes of a database that is away, refuses or is wrongly set up: the batch is kept, and counts once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fixtures.flights import flight, lane, part
from fixtures.operations import BeforeOperation
from fixtures.postgres import PostgresServer, connect, execute, locked, query, scalar
from fixtures.proxy import StartProxy
from fixtures.sessions import Opened, next_offset, order, order_ids, orders, session_of
from fixtures.waiting import wait_until
from speedlayer.workers.checkpoint import Advance, Begin, Commit, WriteDeadLetters, WriteRows
from speedlayer.workers.errors import (
    FateUnknown,
    SinkContended,
    SinkError,
    SinkMisconfigured,
    SinkUnavailable,
)
from speedlayer.workers.protocol import Flight
from speedlayer.workers.sinks.postgres.flush import FlushTransaction
from speedlayer.workers.sinks.postgres.session import UNEXPLAINED_ATTEMPTS

# The statement alone as it goes over the wire; the text also stands in READ COMMITTED.
COMMIT = b"Q\0\0\0\x0bCOMMIT\0"

TABLE = "CREATE TABLE orders (order_id bigint, note text, amount numeric(10, 2))"


@pytest.fixture
def dsn(postgres_dsn: str) -> str:
    execute(postgres_dsn, TABLE)
    return postgres_dsn


def terminator(dsn: str) -> Callable[[FlushTransaction], None]:
    """Terminates the backend of the flush at hand, and waits until it is gone."""

    def terminate(transaction: FlushTransaction) -> None:
        backend = transaction.connection.backend
        assert backend is not None
        execute(dsn, "SELECT pg_terminate_backend(%s)", (backend.pid,))
        alive = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s"
        wait_until(lambda: scalar(dsn, alive, (backend.pid,)) == 0, "the backend is gone")

    return terminate


@pytest.mark.parametrize("step", [WriteRows, WriteDeadLetters, Advance])
@pytest.mark.parametrize("settings", [{}, {"mode": "upsert", "key": "order_id"}], ids=["append", "upsert"])
def test_a_backend_that_dies_before_commit_leaves_no_trace(
    dsn: str, before_operation: BeforeOperation, step: type[Any], settings: dict[str, Any]
) -> None:
    execute(dsn, "CREATE UNIQUE INDEX ON orders (order_id)")
    with session_of(dsn, **settings) as opened:
        flying = flight(part([*orders(1, 2), b"nonsense"], epoch=opened.take(0)))
        before_operation[step] = terminator(dsn)
        with pytest.raises(SinkUnavailable):
            opened.session.write(flying)
        assert order_ids(dsn) == []
        assert opened.session.write(flying).rows == 2
    assert order_ids(dsn) == [1, 2]
    assert scalar(dsn, "SELECT count(*) FROM speedlayer.dead_letters") == 1


def test_a_backend_that_dies_under_commit_leaves_the_fate_unknown_and_a_claim_tells(
    dsn: str, before_operation: BeforeOperation
) -> None:
    with session_of(dsn) as opened:
        flying = flight(part(orders(1, 2), epoch=opened.take(0)))
        before_operation[Commit] = terminator(dsn)
        with pytest.raises(FateUnknown):
            opened.session.write(flying)
        claimed = opened.claim(lane(0))
        assert claimed.next_offset == 0
        again = flight(part(orders(1, 2), epoch=claimed.epoch))
        assert opened.session.write(again).rows == 2
    assert order_ids(dsn) == [1, 2]


def test_a_lost_answer_to_commit_leaves_the_fate_unknown_and_a_claim_tells(
    postgres: PostgresServer, dsn: str, start_proxy: StartProxy
) -> None:
    proxy = start_proxy(postgres.host, postgres.port)
    with session_of(through(dsn, postgres, proxy.port)) as opened:
        epoch = opened.take(0)
        lost = proxy.lose_answer_to(COMMIT)
        with pytest.raises(FateUnknown):
            opened.session.write(flight(part(orders(1, 2), epoch=epoch)))
        assert lost.wait(10)
        claimed = opened.claim(lane(0))
        assert claimed.next_offset == 2
        assert opened.session.write(flight(part(orders(3), epoch=claimed.epoch, start=2))).rows == 1
    assert order_ids(dsn) == [1, 2, 3]


def test_a_claim_whose_answer_is_lost_is_made_again(
    postgres: PostgresServer, dsn: str, start_proxy: StartProxy
) -> None:
    proxy = start_proxy(postgres.host, postgres.port)
    with session_of(through(dsn, postgres, proxy.port)) as opened:
        first = opened.claim(lane(0))
        lost = proxy.lose_answer_to(COMMIT)
        second = opened.claim(lane(0))
        assert lost.wait(10)
    assert second.epoch == first.epoch + 2


def through(dsn: str, postgres: PostgresServer, port: int) -> str:
    """The same database by way of a proxy."""
    return dsn.replace(f":{postgres.port}/", f":{port}/")


def test_a_cut_in_the_middle_of_the_rows_leaves_no_trace(
    postgres: PostgresServer, dsn: str, start_proxy: StartProxy, before_operation: BeforeOperation
) -> None:
    proxy = start_proxy(postgres.host, postgres.port)
    with session_of(through(dsn, postgres, proxy.port)) as opened, ThreadPoolExecutor(1) as pool:
        flying = flight(part([order(number, note="x" * 1000) for number in range(5000)], epoch=opened.take(0)))
        before_operation[WriteRows] = lambda _: proxy.stall()
        flush = pool.submit(opened.session.write, flying)
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in trans%%'"
        )
        wait_until(lambda: scalar(dsn, waiting) == 1, "the transaction is open")
        proxy.cut()
        proxy.heal()
        with pytest.raises(SinkUnavailable):
            flush.result(30)
        assert opened.session.write(flying).rows == 5000
    assert scalar(dsn, "SELECT count(*) FROM orders") == 5000


def test_a_connection_that_died_idle_is_no_outage(dsn: str, before_operation: BeforeOperation) -> None:
    with session_of(dsn) as opened:
        epoch = opened.take(0)
        opened.session.write(flight(part(orders(1), epoch=epoch)))
        before_operation[Begin] = terminator(dsn)
        assert opened.session.write(flight(part(orders(2), epoch=epoch, start=1))).rows == 1
        execute(
            dsn,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'speedlayer/%%'"
            " AND datname = current_database()",
        )
        assert opened.claim(lane(0)).next_offset == 2
    assert order_ids(dsn) == [1, 2]


def test_a_server_that_refuses_connections_is_waited_for(
    postgres: PostgresServer, dsn: str, start_proxy: StartProxy
) -> None:
    proxy = start_proxy(postgres.host, postgres.port)
    with session_of(through(dsn, postgres, proxy.port)) as opened:
        flying = flight(part(orders(1), epoch=opened.take(0)))
        proxy.refuse()
        for action in (lambda: opened.session.write(flying), lambda: opened.claim(lane(1))):
            with pytest.raises(SinkUnavailable, match="can not connect to postgresql://"):
                action()
        proxy.heal()
        assert opened.session.write(flying).rows == 1
        assert opened.claim(lane(1)).epoch == 1


def test_a_server_that_accepts_and_says_nothing_is_given_up_after_the_connect_timeout(
    postgres: PostgresServer, dsn: str, start_proxy: StartProxy
) -> None:
    proxy = start_proxy(postgres.host, postgres.port)
    with session_of(through(dsn, postgres, proxy.port), connect_timeout_seconds=2) as opened:
        proxy.deaf()
        with pytest.raises(SinkUnavailable, match="timeout expired"):
            opened.claim(lane(0))


def test_a_cancelled_statement_costs_no_row(dsn: str) -> None:
    with session_of(dsn) as opened, ThreadPoolExecutor(1) as pool:
        flying = flight(part(orders(1, 2), epoch=opened.take(0)))
        with locked(dsn, "orders"):
            flush = pool.submit(opened.session.write, flying)
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ILIKE 'copy%%'"
            wait_until(lambda: scalar(dsn, waiting), "the flush waits")
            execute(
                dsn,
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity"
                " WHERE wait_event_type = 'Lock' AND query ILIKE 'copy%%' AND datname = current_database()",
            )
            with pytest.raises(SinkUnavailable) as caught:
                flush.result(30)
        assert caught.value.sqlstate == "57014"
        assert opened.session.write(flying).rows == 2
    assert scalar(dsn, "SELECT count(*) FROM speedlayer.dead_letters") == 0


def test_a_full_server_is_waited_for(postgres: PostgresServer, dsn: str) -> None:
    name = dsn.rsplit("/", 1)[1]
    execute(dsn, f"CREATE ROLE app_{name} LOGIN PASSWORD 'secret' CONNECTION LIMIT 0")
    try:
        refused = pytest.raises(SinkUnavailable, match="too many connections")
        with session_of(postgres.dsn(name, user=f"app_{name}", password="secret")) as opened, refused:
            opened.claim(lane(0))
    finally:
        execute(dsn, f"DROP ROLE app_{name}")


def test_a_standby_is_waited_out(start_postgres: Callable[..., PostgresServer]) -> None:
    """After a fail-over the old name may lead to a server that takes no writes for a while."""
    server = start_postgres()
    server.execute(TABLE)
    with session_of(server.dsn()) as opened:
        flying = flight(part(orders(1), epoch=opened.take(0)))
        server.stop()
        (server.data / "standby.signal").touch()
        server.start()
        for _ in range(2):
            with pytest.raises(SinkUnavailable, match=r"standby|read-only"):
                opened.session.write(flying)
            with pytest.raises(SinkUnavailable, match=r"standby|read-only"):
                opened.claim(lane(0))
        server.query("SELECT pg_promote()")
        assert opened.session.write(flying).rows == 1


def test_a_deadlock_is_contention(dsn: str) -> None:
    execute(dsn, "CREATE UNIQUE INDEX ON orders (order_id); INSERT INTO orders VALUES (1), (2)")
    with (
        contextlib.closing(connect(dsn)) as other,
        session_of(dsn, mode="upsert", key="order_id") as opened,
        ThreadPoolExecutor(1) as pool,
    ):
        flying = flight(part([order(1, note="a"), order(2, note="a")], epoch=opened.take(0)))
        cursor = other.cursor()
        # Whoever finds the deadlock is its victim; the other one looks for it too late to be that.
        cursor.execute("BEGIN; SET LOCAL deadlock_timeout = '1h'; UPDATE orders SET note = 'b' WHERE order_id = 2")
        flush = pool.submit(opened.session.write, flying)
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        wait_until(lambda: scalar(dsn, waiting), "the flush waits for the second row")
        cursor.execute("UPDATE orders SET note = 'b' WHERE order_id = 1")
        with pytest.raises(SinkContended) as caught:
            flush.result(30)
        assert caught.value.sqlstate == "40P01"
        cursor.execute("COMMIT")
        assert opened.session.write(flying).rows == 2
    assert query(dsn, "SELECT DISTINCT note FROM orders") == [("a",)]


# --- somebody has to mend it ------------------------------------------------------------------------------------------


def misconfigured(opened: Opened, flying: Flight) -> SinkError:
    with pytest.raises(SinkMisconfigured) as caught:
        opened.session.write(flying)
    assert caught.value.remedy
    return caught.value


def test_a_missing_table_waits_and_goes_on_by_itself(postgres_dsn: str) -> None:
    with session_of(postgres_dsn) as opened:
        flying = flight(part(orders(1), epoch=opened.take(0)))
        assert "orders" in str(misconfigured(opened, flying))
        execute(postgres_dsn, TABLE)
        assert opened.session.write(flying).rows == 1


def test_a_column_that_disappears_waits_and_goes_on_by_itself(dsn: str) -> None:
    with session_of(dsn, unknown_fields="ignore") as opened:
        epoch = opened.take(0)
        assert opened.session.write(flight(part([order(1, note="a")], epoch=epoch))).rows == 1
        execute(dsn, "ALTER TABLE orders DROP COLUMN note")
        flying = flight(part([order(2, note="b")], epoch=epoch, start=1))
        with pytest.raises(SinkMisconfigured) as caught:
            opened.session.write(flying)
        assert caught.value.sqlstate == "42703"
        assert opened.session.write(flying).rows == 1
    assert order_ids(dsn) == [1, 2]


def test_a_privilege_that_is_taken_away_waits_and_costs_no_row(postgres: PostgresServer, dsn: str) -> None:
    name = dsn.rsplit("/", 1)[1]
    role = f"app_{name}"
    execute(dsn, f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
    execute(dsn, f"GRANT CREATE ON DATABASE {name} TO {role}; GRANT INSERT, SELECT ON orders TO {role}")
    try:
        with session_of(postgres.dsn(name, user=role, password="secret")) as opened:
            epoch = opened.take(0)
            assert opened.session.write(flight(part(orders(1), epoch=epoch))).rows == 1
            execute(dsn, f"REVOKE INSERT ON orders FROM {role}")
            for rows in (orders(2), orders(2, 3)):
                flying = flight(part(rows, epoch=epoch, start=1))
                assert misconfigured(opened, flying).sqlstate == "42501"
            execute(dsn, f"GRANT INSERT ON orders TO {role}")
            assert opened.session.write(flying).rows == 2
        assert scalar(dsn, "SELECT count(*) FROM speedlayer.dead_letters") == 0
    finally:
        execute(dsn, f"DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


@pytest.mark.parametrize(
    ("database", "change", "sqlstate"),
    [
        ("postgres", {"password": "wrong"}, "28P01"),
        ("nowhere", {}, "3D000"),
        ("postgres", {"user": "nobody"}, "28P01"),
    ],
)
def test_a_wrong_dsn_waits(postgres: PostgresServer, database: str, change: dict[str, str], sqlstate: str) -> None:
    with session_of(postgres.dsn(database, **change)) as opened, pytest.raises(SinkMisconfigured) as caught:
        opened.claim(lane(0))
    assert caught.value.sqlstate == sqlstate
    assert postgres.password not in str(caught.value)


# --- errors that explain nothing --------------------------------------------------------------------------------------

STRANGE = """
CREATE FUNCTION strange() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF NEW.amount < 0 THEN RAISE EXCEPTION 'the moon is in the wrong phase' USING ERRCODE = 'XX000'; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER strange BEFORE INSERT ON orders FOR EACH ROW EXECUTE FUNCTION strange();
"""


def test_an_unexplained_error_of_one_row_is_tried_again_and_then_blamed_on_it(dsn: str) -> None:
    execute(dsn, STRANGE)
    with session_of(dsn) as opened:
        rows = [order(1, amount=1), order(2, amount=-1), order(3, amount=1)]
        flying = flight(part(rows, epoch=opened.take(0)))
        for _ in range(UNEXPLAINED_ATTEMPTS - 1):
            with pytest.raises(SinkContended, match="wrong phase"):
                opened.session.write(flying)
        outcome = opened.session.write(flying)
    assert (outcome.rows, outcome.dead_lettered) == (2, 1)
    assert order_ids(dsn) == [1, 3]
    assert query(dsn, 'SELECT "offset", sqlstate FROM speedlayer.dead_letters') == [(1, "XX000")]


@pytest.mark.parametrize("count", [1, 5])
def test_an_unexplained_error_of_every_row_is_the_sinks(dsn: str, count: int) -> None:
    execute(dsn, STRANGE)
    with session_of(dsn) as opened:
        flying = flight(part([order(number, amount=-1) for number in range(count)], epoch=opened.take(0)))
        for _ in range(UNEXPLAINED_ATTEMPTS - 1):
            with pytest.raises(SinkContended):
                opened.session.write(flying)
        assert misconfigured(opened, flying).sqlstate == "XX000"
        execute(dsn, "DROP TRIGGER strange ON orders")
        assert opened.session.write(flying).rows == count
    assert next_offset(dsn) == count
