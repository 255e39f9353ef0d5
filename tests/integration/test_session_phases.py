"""Before each phase of a flight its session says so: what a worker dies of is told by the last word that it wrote."""

from __future__ import annotations

import ctypes
import signal
from pathlib import Path
from typing import Any

import dill
import msgspec
import multiprocess
import pytest

from fixtures.flights import OWNER, flight, lane, part
from fixtures.postgres import execute, locked, query
from fixtures.sessions import Opened, counters, next_offset, order, orders, session_of
from fixtures.waiting import wait_until
from speedlayer.supervisor.worker_handle import WorkerHandle
from speedlayer.workers import PostgreSQLSink
from speedlayer.workers.errors import SinkContended
from speedlayer.workers.protocol import Claim, Claimed, Phase, PhaseEntered, Report, Seed
from speedlayer.workers.settings import BootSpec
from speedlayer.workers.transform import Step, pack

DECODE, TRANSFORM, DATABASE = Phase.DECODE, Phase.TRANSFORM, Phase.DATABASE


@pytest.fixture
def dsn(postgres_dsn: str) -> str:
    execute(postgres_dsn, "CREATE TABLE orders (order_id bigint)")
    return postgres_dsn


def write(opened: Opened, *order_ids: int) -> None:
    opened.session.write(flight(part(list(orders(*order_ids)), epoch=opened.take(0))))


def test_messages_are_decoded_before_the_database_is_asked(dsn: str) -> None:
    with session_of(dsn) as opened:
        write(opened, 1, 2)
        assert opened.phases == [DECODE, DATABASE]


def test_the_transform_is_announced_before_it_sees_a_record(dsn: str) -> None:
    seen: list[list[Phase]] = []

    def look(record: Any) -> Any:
        seen.append(list(opened.phases))
        return record

    with session_of(dsn, transform=look) as opened:
        write(opened, 1, 2)
        assert opened.phases == [DECODE, TRANSFORM, DATABASE]
    assert seen == [[DECODE, TRANSFORM]] * 2


def test_every_attempt_begins_anew(dsn: str) -> None:
    with session_of(dsn, lock_timeout_seconds=0.1) as opened:
        epoch = opened.take(0)
        with locked(dsn, "orders"), pytest.raises(SinkContended):
            opened.session.write(flight(part(list(orders(1)), epoch=epoch)))
        opened.session.write(flight(part(list(orders(1)), epoch=epoch)))
        assert opened.phases == [DECODE, DATABASE] * 2


def test_a_table_is_made_in_the_database_s_phase(dsn: str) -> None:
    with session_of(dsn, table="made", create_table=True, transform=lambda record: record) as opened:
        write(opened, 1)
        assert opened.phases == [DECODE, TRANSFORM, DATABASE] * 2


def test_without_a_table_to_make_there_are_dead_letters_in_the_same_phases(dsn: str) -> None:
    with session_of(dsn, table="made", create_table=True) as opened:
        opened.session.write(flight(part([b"?"], epoch=opened.take(0))))
        assert opened.phases == [DECODE, DATABASE] * 2


def test_the_last_word_of_a_worker_survives_its_crash(dsn: str) -> None:
    """The whole way: a map reads from where nothing is, and what was said before is in the pipe."""
    transform = pack([Step("map", lambda record: ctypes.string_at(0))])
    boot = BootSpec(
        "worker-0",
        {"orders": dill.dumps(PostgreSQLSink(dsn, table="orders"))},
        {"orders": transform},
        [str(Path(__file__).resolve().parents[1])],
    )
    reports: list[Report] = []
    handle = WorkerHandle(multiprocess.get_context("spawn"), "worker-0", 1, dill.dumps(boot))

    def claimed(next_offset: int | None) -> Claimed:
        def found() -> Claimed | None:
            reports.extend(handle.reports())
            return next((x for x in reports if isinstance(x, Claimed) and x.next_offset == next_offset), None)

        return wait_until(found, "the lane is claimed", diagnose=lambda: str(reports))

    def ended() -> bool:
        gone = handle.exited
        reports.extend(handle.reports())
        return gone

    try:
        handle.put(Claim(1, lane(0), OWNER))
        epoch = claimed(None).epoch
        handle.put(Seed(2, lane(0), OWNER, epoch, None, 0, None))
        claimed(0)
        handle.put(flight(part(list(orders(1)), epoch=epoch), flight_id=7))
        wait_until(ended, "the worker has died", diagnose=lambda: str(reports))
    finally:
        handle.discard()
    assert handle.exit_code == -signal.SIGSEGV
    assert [x for x in reports if isinstance(x, PhaseEntered)] == [
        PhaseEntered(7, "orders", DECODE),
        PhaseEntered(7, "orders", TRANSFORM),
    ]


def test_a_condemned_message_is_dead_without_being_looked_at(dsn: str) -> None:
    def look(record: Any) -> Any:
        raise AssertionError("the transform sees it")

    with session_of(dsn, transform=look) as opened:
        parts = flight(part(list(orders(1)), epoch=opened.take(0)))
        outcome = opened.session.write(msgspec.structs.replace(parts, condemned="killed its worker twice: signal 11"))
        assert (outcome.rows, outcome.dead_lettered) == (0, 1)
        assert opened.phases == [DATABASE]
    assert next_offset(dsn) == 1
    assert counters(dsn) == (0, 0, 1)
    assert query(dsn, """SELECT "offset", encode(value, 'escape'), reason FROM speedlayer.dead_letters""") == [
        (0, order(1).decode(), "killed its worker twice: signal 11")
    ]
