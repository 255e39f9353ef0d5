"""PostgreSQL or Kafka is restarted, connections are terminated: the daemon goes on, and the rows equal the log."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from fixtures.catching import COMMIT
from fixtures.compare import assert_table_equals, values_of
from fixtures.kafka import Broker, PacedProducer
from fixtures.orders import EVENT_COLUMNS, EVENTS_TABLE, event
from fixtures.postgres import Shutdown
from fixtures.stage import Stage
from fixtures.waiting import wait_until

MESSAGES_PER_SECOND = 2_000
TERMINATIONS_OF_A_KIND = 4


@contextlib.contextmanager
def same_rows_from_the_same_processes(stage: Stage) -> Iterator[None]:
    """Messages flow inside the ``with``; afterwards the table equals the log, and no process was replaced."""
    pids = (stage.daemon.pid, stage.daemon.wait_for_workers(stage.catcher.workers))
    with PacedProducer(stage.broker, stage.topic, event, per_second=MESSAGES_PER_SECOND) as producer:
        stage.wait_until_rows_flow()
        yield
        stage.wait_until_rows_flow()
    log = stage.wait_until_written()
    assert len(log) == producer.sent
    assert_table_equals(stage.dsn, "events", values_of(log), EVENT_COLUMNS)
    assert (stage.daemon.pid, stage.daemon.wait_for_workers(stage.catcher.workers)) == pids
    assert [worker["restarts"] for worker in stage.daemon.status()["workers"]] == [0] * stage.catcher.workers


def start_again_when_it_is_missed(stage: Stage) -> None:
    """Start PostgreSQL once the daemon says that it waits for it."""
    # By a flush that waits, or, where the fate of the last one is not known, by a claim that does.
    status = stage.daemon.wait_until(lambda found: found["pipelines"][0]["state"] == "blocked", "the operator is told")
    reason = status["pipelines"][0]["reason"]
    assert "unavailable" in reason or "the claim of" in reason
    stage.server.start()
    stage.wait_until_rows_flow()


@pytest.mark.slow
@pytest.mark.parametrize("how", [Shutdown.FAST, Shutdown.IMMEDIATE])
def test_postgresql_is_restarted_in_the_middle_of_flushes(start_stage: Callable[..., Stage], how: Shutdown) -> None:
    stage = start_stage("events", EVENTS_TABLE)
    with same_rows_from_the_same_processes(stage):
        pid, _ = stage.catcher.freeze_in_flush()
        stage.server.stop(how)
        stage.catcher.thaw(pid)
        start_again_when_it_is_missed(stage)

        with stage.catcher.held_at_checkpoint():
            stage.server.stop(how)
        start_again_when_it_is_missed(stage)

        stage.catcher.hold_commit()
        stage.server.stop(how)
        stage.proxy.drop_held()
        start_again_when_it_is_missed(stage)


@pytest.mark.slow
def test_connections_are_terminated_in_the_middle_of_flushes(start_stage: Callable[..., Stage]) -> None:
    stage = start_stage("events", EVENTS_TABLE)
    terminated = 0

    def terminate(pid: int) -> None:
        nonlocal terminated
        assert stage.server.terminate_backends(f"pid = {pid}") == 1
        wait_until(lambda: pid not in [one for one, _ in stage.flushes.backends()], "the backend has ended")
        terminated += 1

    with same_rows_from_the_same_processes(stage):
        for _ in range(TERMINATIONS_OF_A_KIND):
            pid, flush = stage.catcher.freeze_in_flush()
            terminate(flush.pid)
            stage.catcher.thaw(pid)

            with stage.catcher.held_at_checkpoint() as flush:
                terminate(flush.pid)

            flush = stage.catcher.hold_commit()
            terminate(flush.pid)
            stage.proxy.deliver_held()

            lost = stage.proxy.lose_answer_to(COMMIT)
            wait_until(lost.is_set, "the answer to a COMMIT is lost", diagnose=stage.daemon.tail)
            assert stage.server.terminate_backends("application_name LIKE 'speedlayer/%'") > 0
            stage.wait_until_rows_flow()
    assert terminated == 3 * TERMINATIONS_OF_A_KIND


@pytest.mark.slow
def test_kafka_is_restarted_and_killed_while_rows_flow(
    start_broker: Callable[..., Broker], start_stage: Callable[..., Stage]
) -> None:
    broker = start_broker()
    stage = start_stage("events", EVENTS_TABLE, broker=broker)
    with same_rows_from_the_same_processes(stage):
        broker.restart()
        stage.wait_until_rows_flow()
        pid, _ = stage.catcher.freeze_in_flush()
        broker.kill()
        stage.catcher.thaw(pid)
        broker.start()
