"""librdkafka's messages as chunks: what counts for the memory budget, and messages that would end the daemon."""

from __future__ import annotations

from typing import Any, Optional

from speedlayer.supervisor.chunks import UNREADABLE_HEADERS, runs

SEPARATOR = b',"nonce",'


class FakeMessage:
    """A message as confluent_kafka gives it; ``headers`` None stands for such as it can not decode."""

    def __init__(self, offset: int, value: Optional[bytes], headers: Optional[list[Any]] = None) -> None:
        self._offset, self._value, self._headers = offset, value, headers
        self.asked_for_headers = 0

    def topic(self) -> str:
        return "orders"

    def partition(self) -> int:
        return 0

    def offset(self) -> int:
        return self._offset

    def leader_epoch(self) -> int:
        return 0

    def timestamp(self) -> tuple[int, int]:
        return (1, 1_700_000_000_000)

    def key(self) -> None:
        return None

    def value(self) -> Optional[bytes]:
        return self._value

    def headers(self) -> list[Any]:
        self.asked_for_headers += 1
        if self._headers is None:
            raise SystemError("returned a result with an exception set")
        return self._headers


def packed(*messages: FakeMessage, limit_bytes: int = 1 << 20) -> list[Any]:
    return list(runs(messages, SEPARATOR, limit_bytes))  # type: ignore[arg-type]


def test_headers_that_can_not_be_read_cost_neither_their_message_nor_its_neighbours() -> None:
    messages = [
        FakeMessage(0, b"{}", [("a", b"1")]),
        FakeMessage(1, b"[]", None),
        FakeMessage(2, b"{}", []),
        FakeMessage(3, b"[]", None),
    ]
    (run,) = packed(*messages)
    assert (run.first, run.last, run.chunk.count) == (0, 3, 4)
    assert run.chunk.values == SEPARATOR.join([b"{}", b"[]", b"{}", b"[]"])
    assert run.chunk.headers == {0: [("a", b"1")], 1: UNREADABLE_HEADERS, 3: UNREADABLE_HEADERS}
    assert [message.asked_for_headers for message in messages] == [1, 1, 1, 1], "a second answer would be a broken list"


def test_headers_count_as_the_rest_of_a_message_does() -> None:
    messages = [FakeMessage(offset, b"{}", [("trace", b"x" * 1000)]) for offset in range(4)]
    first, second = packed(*messages, limit_bytes=2500)
    assert [(run.first, run.last) for run in (first, second)] == [(0, 1), (2, 3)]
    assert first.size_bytes > 2 * 1000
    assert first.largest_bytes > 1000
