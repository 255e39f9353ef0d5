"""Kill -9, again and again, while messages flow into a table without a key: nothing is lost, nothing is there twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fixtures.compare import assert_table_equals, values_of
from fixtures.kafka import PacedProducer
from fixtures.killing import Fate
from fixtures.orders import EVENT_COLUMNS, EVENTS_TABLE, event
from fixtures.stage import Stage
from fixtures.waiting import wait_until

MESSAGES_PER_SECOND = 2_000


@pytest.mark.slow
def test_rows_equal_the_log_although_workers_and_supervisor_are_killed_in_the_middle_of_flushes(
    start_stage: Callable[..., Stage],
) -> None:
    stage = start_stage("events", EVENTS_TABLE)
    killer = stage.killer
    with PacedProducer(stage.broker, stage.topic, event, per_second=MESSAGES_PER_SECOND) as producer:
        stage.wait_until_rows_flow()
        for _ in range(2):
            killer.worker_in_flush()
            killer.worker_at_checkpoint()
            killer.supervisor_in_flush()
            killer.worker_in_flush()
            killer.worker_at_commit(Fate.DELIVERED)
            killer.worker_in_flush()
            killer.worker_at_checkpoint()
            killer.supervisor_at_checkpoint()
            killer.worker_at_commit(Fate.SILENT)
            killer.worker_in_flush()
        killer.supervisor_leaving_a_ghost()
        killer.worker_while_it_boots()
        killer.worker_at_commit(Fate.DROPPED)
        killer.everything_in_flush()
        killer.supervisor_at_commit(Fate.DELIVERED)
        produced_before_the_last_crash = producer.sent
        wait_until(lambda: producer.sent > produced_before_the_last_crash, "messages outlast the crashes")

    assert killer.count("worker") + killer.count("supervisor") >= 20
    assert killer.count("supervisor") >= 5
    assert killer.with_open_flush >= 10
    assert killer.between_rows_and_commit >= 3
    log = stage.wait_until_written()
    assert len(log) == producer.sent
    assert_table_equals(stage.dsn, "events", values_of(log), EVENT_COLUMNS)
    assert "an old owner's that was stopped in a transaction" in stage.daemon.log_text(), "silent backends are ended"
