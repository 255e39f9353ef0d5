"""What the scout makes of the broker's answers. Its questions to a real broker are in tests/integration."""

from __future__ import annotations

from concurrent.futures import Future
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import OFFSET_INVALID

from fixtures.waiting import wait_until
from speedlayer.supervisor.core import events as e
from speedlayer.supervisor.core.actions import Inspect
from speedlayer.supervisor.scout import Scout, Survey

FIRST = e.Partition("group", "topic", 0)
SECOND = e.Partition("group", "topic", 1)


class Admin:
    """Answers as the admin client does: a future for each partition and for each topic."""

    def __init__(self, offsets: dict[int, int]) -> None:
        self._offsets = offsets

    def list_offsets(self, asked: dict[Any, Any], **_: Any) -> dict[Any, Any]:
        return {one: done(SimpleNamespace(offset=self._offsets[one.partition])) for one in asked}

    def describe_topics(self, asked: Any, **_: Any) -> dict[str, Any]:
        return {"topic": done(SimpleNamespace(topic_id="id"))}


def done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


@pytest.fixture
def inbox() -> SimpleQueue[Any]:
    return SimpleQueue()


def scout(inbox: SimpleQueue[Any], offsets: dict[int, int]) -> Scout:
    scout = Scout({"bootstrap.servers": "127.0.0.1:9"}, inbox)
    scout._admin = Admin(offsets)  # type: ignore[assignment]
    return scout


def taken(inbox: SimpleQueue[Any]) -> list[Any]:
    return [inbox.get_nowait() for _ in range(inbox.qsize())]


def test_an_offset_that_the_broker_does_not_tell_is_an_error_of_this_partition_alone(inbox: SimpleQueue[Any]) -> None:
    """Taken for the end of the log, it would stop the lane for good: its checkpoint would lie beyond the end."""
    asked = [Inspect(partition, request, want_committed=False) for request, partition in enumerate((FIRST, SECOND))]
    scout(inbox, {0: 10, 1: OFFSET_INVALID})._inspect("group", asked)
    answers = {answer.partition: answer for answer in taken(inbox)}
    assert answers[FIRST].error is None and answers[FIRST].high == 10
    assert answers[SECOND].error == "the broker tells no offset of topic/1 (its leader changes)"


def test_a_survey_leaves_out_what_the_broker_does_not_tell(inbox: SimpleQueue[Any]) -> None:
    scout(inbox, {0: OFFSET_INVALID})._survey((FIRST,))
    (answer,) = taken(inbox)
    assert isinstance(answer, e.SurveyFailed)
    assert "tells no offset of topic/0" in answer.reason
    scout(inbox, {0: 10})._survey((FIRST,))
    assert [answer.marks for answer in taken(inbox) if isinstance(answer, e.Watermarks)] == [{FIRST: (10, 10)}]


def test_what_librdkafka_tells_its_clients_does_not_pile_up(
    inbox: SimpleQueue[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing listens at the address: each attempt to connect is told, and kept in memory until somebody takes it."""
    monkeypatch.setattr(Scout, "_find_cluster", lambda self: True)
    scout = Scout({"bootstrap.servers": "127.0.0.1:9", "reconnect.backoff.ms": "10"}, inbox)
    waiting = len(scout._admin)
    wait_until(lambda: len(scout._admin) >= waiting + 5, "five attempts are told")
    reader = scout._reader("group")
    asked = iter([[Survey(())], [None]])
    monkeypatch.setattr(scout, "_pending", lambda: next(asked))
    scout._run()
    assert len(scout._admin) <= waiting + 2, "those that came just now"
    assert scout._complaints._noted == []
    assert reader.poll(0) is None
