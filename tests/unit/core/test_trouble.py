"""Trouble with Kafka is told once in a while, shown while it lasts, and no longer."""

from __future__ import annotations

import logging

from speedlayer.supervisor.core import events as e
from speedlayer.supervisor.core.actions import Action, Log
from speedlayer.supervisor.core.config import CoreConfig, PipelineConfig
from speedlayer.supervisor.core.core import Core
from speedlayer.supervisor.core.trouble import OVER_SECONDS, REPEAT_SECONDS

GROUP = "speed-layer"
PARTITION = e.Partition(GROUP, "orders", 0)


class Story:
    """A core that is told what happens at which time."""

    def __init__(self) -> None:
        pipeline = PipelineConfig("orders", GROUP, ("orders",))
        self._core = Core(CoreConfig((pipeline,), workers=1, buffer_bytes=1 << 20, owner="us", separator=b",", pid=1))
        self.actions: list[Action] = []
        self.tell(e.Started(0.0))

    def tell(self, event: e.AnyEvent) -> None:
        self.actions += self._core.step([event])

    def complain(self, at: float, code: str, message: str) -> None:
        self.tell(e.ConsumerTrouble(at, GROUP, code, message))

    def answer(self, at: float) -> None:
        self.tell(e.Watermarks(at, {PARTITION: (0, 10)}))

    def lines(self, level: int, text: str) -> list[str]:
        logged = [action for action in self.actions if isinstance(action, Log)]
        return [line.message for line in logged if line.level == level and text in line.message]

    @property
    def shown(self) -> object:
        return self._core.snapshot()["consumer_trouble"]


def test_codes_that_take_turns_are_each_told_once_in_a_while() -> None:
    story = Story()
    for attempt in range(int(REPEAT_SECONDS * 2)):
        story.complain(attempt / 2, "_ALL_BROKERS_DOWN", "1/1 brokers are down")
        story.complain(attempt / 2, "_TRANSPORT", "connection refused")
    assert len(story.lines(logging.WARNING, "brokers are down")) == 1
    assert len(story.lines(logging.WARNING, "connection refused")) == 1
    story.complain(REPEAT_SECONDS, "_ALL_BROKERS_DOWN", "1/1 brokers are down")
    assert len(story.lines(logging.WARNING, "brokers are down")) == 2


def test_trouble_that_is_over_is_shown_no_more_and_its_return_is_told_at_once() -> None:
    story = Story()
    story.complain(1.0, "_ALL_BROKERS_DOWN", "1/1 brokers are down")
    story.answer(2.0)
    assert story.shown == {GROUP: "1/1 brokers are down"}, "another broker may have answered"
    story.answer(1.0 + OVER_SECONDS)
    assert story.shown == {}
    assert len(story.lines(logging.INFO, "Kafka answers again")) == 1
    story.complain(20.0, "_ALL_BROKERS_DOWN", "1/1 brokers are down")
    assert len(story.lines(logging.WARNING, "brokers are down")) == 2


def test_trouble_without_an_answer_stays() -> None:
    story = Story()
    story.complain(1.0, "_ALL_BROKERS_DOWN", "1/1 brokers are down")
    story.tell(e.Tick(1.0 + 10 * OVER_SECONDS))
    story.tell(e.Polled(1.0 + 10 * OVER_SECONDS, GROUP, ()))
    assert story.shown == {GROUP: "1/1 brokers are down"}


def test_a_topic_that_may_not_be_read_is_shown_although_others_are_read() -> None:
    story = Story()
    story.complain(1.0, "TOPIC_AUTHORIZATION_FAILED", "payments: not authorised")
    story.answer(1.0 + 10 * OVER_SECONDS)
    assert story.shown == {GROUP: "payments: not authorised"}
    assert story.lines(logging.INFO, "Kafka answers again") == []


def test_a_cause_is_not_hidden_by_what_follows_from_it() -> None:
    story = Story()
    story.complain(1.0, "_SSL", "certificate verify failed")
    story.complain(1.1, "_ALL_BROKERS_DOWN", "1/1 brokers are down")
    assert story.shown == {GROUP: "certificate verify failed"}
    story.complain(1.2, "TOPIC_AUTHORIZATION_FAILED", "payments: not authorised")
    assert story.shown == {GROUP: "payments: not authorised"}, "that is another cause"


def test_a_cause_that_is_not_complained_of_any_more_gives_way() -> None:
    story = Story()
    story.complain(1.0, "_SSL", "certificate verify failed")
    for second in range(1, int(OVER_SECONDS)):
        story.complain(1.0 + second, "_TRANSPORT", "connection refused")
        assert story.shown == {GROUP: "certificate verify failed"}
    story.complain(1.0 + OVER_SECONDS, "_TRANSPORT", "connection refused")
    assert story.shown == {GROUP: "connection refused"}, "the certificate was mended, and the broker is down"
