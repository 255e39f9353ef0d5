"""A second supervisor of the same group comes and goes while messages flow: every message is a row, once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fixtures.compare import assert_table_equals, values_of
from fixtures.daemon import EXIT_OK
from fixtures.group import PARTITIONS, PROTOCOLS, Group
from fixtures.history import WRITTEN_BY
from fixtures.kafka import PacedProducer
from fixtures.orders import EVENT_COLUMNS, EVENTS_TABLE, event

MESSAGES_PER_SECOND = 1_500
TIMES = 10


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_rows_equal_the_log_although_a_second_supervisor_joins_and_leaves_ten_times(
    make_group: Callable[..., Group], protocol: str
) -> None:
    group = make_group(protocol, "events", EVENTS_TABLE + f"; ALTER TABLE events ADD COLUMN {WRITTEN_BY}")
    with PacedProducer(
        group.broker, group.topic, lambda n: event(n, partitions=PARTITIONS), per_second=MESSAGES_PER_SECOND
    ) as producer:
        second = group.join()
        for time in range(TIMES):
            if time:
                second.start()
            group.wait_until_shared(group.first, second)
            group.wait_until_it_writes(second)
            assert second.stop() == EXIT_OK
            group.wait_until_shared(group.first)
        group.wait_until_it_writes(group.first)

    log = group.wait_until_written(group.first)
    assert len(log) == producer.sent
    assert_table_equals(group.dsn, "events", values_of(log), EVENT_COLUMNS)
    group.history.assert_each_step_was_taken_under_the_last_epoch()
    group.history.assert_each_row_came_with_a_step()
    moves = 2 * TIMES * PARTITIONS  # at most
    assert TIMES * 2 <= len(group.history.claims()) <= moves, "a partition that moves is claimed once"
    assert group.first.pipeline()["fenced"] <= TIMES, "what was in flight may be fenced, and no more"
