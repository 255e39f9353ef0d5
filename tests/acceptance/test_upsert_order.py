"""An upsert of interleaved keys ends with each key's last record, and no record ever replaces a newer one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fixtures.compare import assert_table_equals, last_of_each_key
from fixtures.kafka import LogRecord, PacedProducer
from fixtures.killing import Fate
from fixtures.orders import ORDER_COLUMNS, ORDER_KEY, ORDERS_TABLE, SETBACKS, OrderUpdates
from fixtures.postgres import query
from fixtures.stage import Stage

ORDERS = 200
UPSERT = {"mode": "upsert", "key": list(ORDER_KEY)}


def assert_last_of_each_key(stage: Stage, log: list[LogRecord]) -> None:
    expected = last_of_each_key(log, ORDER_KEY)
    assert len(log) > 10 * len(expected), "the keys interleave"
    assert_table_equals(stage.dsn, "orders", expected, ORDER_COLUMNS)
    assert query(stage.dsn, "SELECT * FROM setbacks") == [], "no record has replaced a newer one, or itself"


@pytest.mark.parametrize("batch_rows", [7, 1_000])
def test_each_key_ends_with_its_last_record(start_stage: Callable[..., Stage], batch_rows: int) -> None:
    stage = start_stage("orders", ORDERS_TABLE + ";" + SETBACKS, pipeline={**UPSERT, "batch_rows": batch_rows})
    stage.broker.produce(stage.topic, map(OrderUpdates(ORDERS), range(3_000)))
    assert_last_of_each_key(stage, stage.wait_until_written())


@pytest.mark.slow
def test_each_key_ends_with_its_last_record_through_crashes(start_stage: Callable[..., Stage]) -> None:
    stage = start_stage("orders", ORDERS_TABLE + ";" + SETBACKS, pipeline=UPSERT)
    killer = stage.killer
    with PacedProducer(stage.broker, stage.topic, OrderUpdates(ORDERS), per_second=1_500):
        stage.wait_until_rows_flow()
        killer.worker_in_flush()
        killer.worker_at_checkpoint()
        killer.worker_at_commit(Fate.SILENT)
        killer.supervisor_in_flush()
        killer.worker_at_commit(Fate.DELIVERED)
        killer.worker_in_flush()
        killer.supervisor_at_commit(Fate.DROPPED)
        killer.supervisor_leaving_a_ghost()
        killer.worker_at_checkpoint()
        killer.everything_in_flush()
        stage.wait_until_rows_flow()
    assert killer.count("worker") >= 6
    assert killer.count("supervisor") >= 4
    assert killer.with_open_flush >= 10
    assert killer.between_rows_and_commit >= 5
    assert_last_of_each_key(stage, stage.wait_until_written())
