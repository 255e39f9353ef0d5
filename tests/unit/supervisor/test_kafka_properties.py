"""Which librdkafka properties are taken, which are refused, and with what words."""

from __future__ import annotations

from typing import Any

import pytest

from speedlayer.supervisor import kafka_properties
from speedlayer.supervisor.errors import InvalidSetting

BROKER = {"bootstrap.servers": "localhost:9092"}


def test_what_librdkafka_is_given_is_text_and_read_committed() -> None:
    checked = kafka_properties.check(
        {**BROKER, "group.id": "g", "session.timeout.ms": 6000, "check.crcs": True, "auto.offset.reset": "latest"}
    )
    assert checked.properties == {
        "bootstrap.servers": "localhost:9092",
        "session.timeout.ms": "6000",
        "check.crcs": "true",
        "isolation.level": "read_committed",
    }
    assert (checked.group_id, checked.start) == ("g", "latest")


def test_without_a_word_about_the_start_it_is_the_earliest_message() -> None:
    assert kafka_properties.check(BROKER).start == "earliest"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("enable.auto.commit", True, "in the transaction that writes the rows"),
        ("enable.auto.offset.store", "true", "in the transaction that writes the rows"),
        ("auto.commit.interval.ms", 5000, "in the transaction that writes the rows"),
        ("queued.max.messages.kbytes", 1, "budget_mb"),
        ("fetch.max.bytes", 1, "budget_mb"),
        ("message.max.bytes", 1_000_000, "budget_mb"),
        ("enabled_events", 16, "callbacks"),
        ("error_cb", print, "callback"),
        ("default.topic.config", {"auto.offset.reset": "latest"}, r"\[kafka\] directly"),
        ("partition.assignment.strategy", "range", "cooperative-sticky"),
        ("partition.assignment.strategy", "range,cooperative-sticky", "cooperative-sticky"),
        ("isolation.level", "read-committed", "read_committed, read_uncommitted"),
        ("auto.offset.reset", "smallest", "earliest, latest, error"),
        ("group.protocol", "share", "classic, consumer"),
        ("client.id", ["a"], "not a text"),
        ("bootstrap.servers", "", "localhost:9092"),
    ],
)
def test_what_would_break_a_promise_is_refused_with_the_reason(name: str, value: Any, reason: str) -> None:
    with pytest.raises(InvalidSetting, match=reason) as caught:
        kafka_properties.check({**BROKER, name: value})
    assert caught.value.key == name


def test_a_value_that_speedlayer_sets_anyway_is_taken() -> None:
    checked = kafka_properties.check({**BROKER, "enable.auto.commit": False, "enable.auto.offset.store": "false"})
    assert "enable.auto.commit" not in checked.properties


def test_a_token_callback_of_the_user_stays_a_callable() -> None:
    def token(config: str) -> tuple[str, float]:
        return "token", 0.0

    assert kafka_properties.check({**BROKER, "oauth_cb": token}).properties["oauth_cb"] is token


def test_the_new_protocol_leaves_no_choice_of_assignor() -> None:
    given = {**BROKER, "group.protocol": "consumer", "partition.assignment.strategy": "cooperative-sticky"}
    with pytest.raises(InvalidSetting, match="to the broker"):
        kafka_properties.check(given)


def test_a_misspelt_property_is_refused_by_librdkafka_and_the_right_one_suggested() -> None:
    with pytest.raises(InvalidSetting, match=r'did you mean "session\.timeout\.ms"') as caught:
        kafka_properties.check_with_librdkafka({**BROKER, "session.timeot.ms": "6000"})
    assert caught.value.key == "session.timeot.ms"


def test_a_value_that_librdkafka_can_not_read_is_refused_with_its_words() -> None:
    with pytest.raises(InvalidSetting, match="Invalid value") as caught:
        kafka_properties.check_with_librdkafka({**BROKER, "session.timeout.ms": "soon"})
    assert caught.value.key == "session.timeout.ms"


def test_a_conflict_between_two_properties_is_found_before_anything_starts() -> None:
    with pytest.raises(InvalidSetting, match=r"must be >=") as caught:
        kafka_properties.check_with_librdkafka({"max.poll.interval.ms": "1000", "session.timeout.ms": "6000"})
    assert caught.value.key == "max.poll.interval.ms"


def librdkafka_knows(name: str) -> bool:
    """Whether librdkafka has the property, whatever it says about the value."""
    try:
        kafka_properties.check_with_librdkafka({name: "1"})
    except InvalidSetting as error:
        return "is not a property" not in error.problem
    return True


@pytest.mark.parametrize("name", kafka_properties._COMMON)
def test_every_property_that_is_suggested_is_one_of_librdkafka(name: str) -> None:
    assert librdkafka_knows(name)
    assert not librdkafka_knows(name + "x")
