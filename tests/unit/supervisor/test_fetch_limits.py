"""The librdkafka properties that bound a consumer, and whether librdkafka takes them."""

from __future__ import annotations

import pytest
from confluent_kafka import Consumer

from speedlayer.supervisor.consumer import FetchLimits, consumer_properties
from speedlayer.supervisor.sections import section
from speedlayer.supervisor.settings import BYTES_PER_MB

BUDGET = section("memory").entry("budget_mb").setting


@pytest.mark.parametrize("budget_mb", [BUDGET.minimum, 256, 8192, BUDGET.maximum])
def test_librdkafka_takes_the_limits_of_every_budget_that_may_be_set(budget_mb: int) -> None:
    limits = FetchLimits(int(budget_mb) * BYTES_PER_MB, batch_rows=10_000, batch_bytes=4 * BYTES_PER_MB)
    Consumer({**consumer_properties({"log_level": "0"}, "group", limits)}).close()


LIMITS = FetchLimits(64 * BYTES_PER_MB, batch_rows=10_000, batch_bytes=4 * BYTES_PER_MB)


def test_a_users_value_stands_above_our_default() -> None:
    ours = consumer_properties({}, "group", LIMITS)
    assert (ours["socket.timeout.ms"], ours["topic.metadata.refresh.interval.ms"]) == (30_000, 30_000)
    assert consumer_properties({"socket.timeout.ms": "7000"}, "group", LIMITS)["socket.timeout.ms"] == "7000"


def test_a_long_wait_for_messages_is_taken_with_librdkafkas_own_timeout() -> None:
    kafka = {"fetch.wait.max.ms": "40000", "log_level": "0"}
    Consumer(consumer_properties(kafka, "group", LIMITS)).close()
