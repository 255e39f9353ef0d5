"""How long a worker waits before it tries again, and when it stops trying."""

from __future__ import annotations

import gc
import weakref

import pytest

from speedlayer.workers.errors import (
    FateUnknown,
    SinkContended,
    SinkMisconfigured,
    SinkUnavailable,
    StreamingOverloadException,
)
from speedlayer.workers.protocol import BlockKind
from speedlayer.workers.retry import (
    FINISHING_ATTEMPTS,
    FINISHING_WAIT_SECONDS,
    INTERNAL_ATTEMPTS,
    WAIT_SECONDS,
    Backoff,
    Block,
    block_of,
    let_go_of_frames,
    with_patience,
)


def longest(_low: float, high: float) -> float:
    return high


class Attempts:
    """Fails with each error in turn, then succeeds; remembers what was reported and slept."""

    def __init__(self, *errors: BaseException, finishing_after: int | None = None) -> None:
        self._errors = list(errors)
        self._finishing_after = finishing_after
        self.count = 0
        self.blocks: list[Block] = []
        self.waits: list[float] = []
        self.slept: list[float] = []

    def __call__(self) -> str:
        self.count += 1
        if self._errors:
            raise self._errors.pop(0)
        return "written"

    def run(self) -> str:
        return with_patience(
            self,
            on_blocked=self._note,
            sleep=self.slept.append,
            finishing=lambda: self._finishing_after is not None and self.count >= self._finishing_after,
            backoff=Backoff(longest),
        )

    def _note(self, block: Block, retry_seconds: float, attempt: int) -> None:
        assert attempt == self.count
        self.blocks.append(block)
        self.waits.append(retry_seconds)


def test_a_server_that_is_away_is_probed_ever_more_slowly_and_for_ever() -> None:
    attempts = Attempts(*[SinkUnavailable("away", sqlstate="57P03", remedy="wait")] * 100)
    assert attempts.run() == "written"
    assert attempts.waits[:7] == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0])
    assert set(attempts.waits[7:]) == {10.0}
    assert attempts.slept == attempts.waits
    assert attempts.blocks[0] == Block(BlockKind.UNAVAILABLE, "away", "wait", "57P03")


def test_the_wait_starts_anew_when_something_else_stands_in_the_way() -> None:
    attempts = Attempts(
        SinkContended("deadlock"), SinkContended("deadlock"), SinkMisconfigured("no table"), SinkContended("deadlock")
    )
    attempts.run()
    assert attempts.waits == pytest.approx([0.05, 0.1, 1.0, 0.05])


def test_an_overloaded_sink_is_left_alone_for_exactly_as_long_as_it_asks() -> None:
    attempts = Attempts(StreamingOverloadException("too much", pause_seconds=7.5))
    attempts.run()
    assert attempts.waits == [7.5]
    assert attempts.blocks[0].kind is BlockKind.OVERLOADED


@pytest.mark.parametrize("kind", list(WAIT_SECONDS))
def test_jitter_takes_off_half_at_most(kind: BlockKind) -> None:
    first, limit = WAIT_SECONDS[kind]
    for _ in range(50):
        backoff = Backoff()
        waits = [backoff.wait_seconds(Block(kind, "")) for _ in range(30)]
        assert first / 2 <= waits[0] <= first
        assert limit / 2 <= waits[-1] <= limit


def test_an_unknown_fate_is_not_tried_again() -> None:
    attempts = Attempts(FateUnknown("no answer"))
    with pytest.raises(FateUnknown):
        attempts.run()
    assert attempts.count == 1
    assert attempts.blocks == []


def test_a_fault_in_the_code_is_tried_a_few_times_and_then_comes_through() -> None:
    attempts = Attempts(*[ZeroDivisionError("oops")] * 10)
    with pytest.raises(ZeroDivisionError):
        attempts.run()
    assert attempts.count == INTERNAL_ATTEMPTS
    assert "ZeroDivisionError: oops" in attempts.blocks[0].reason
    assert attempts.blocks[0].internal


def test_only_faults_in_a_row_count() -> None:
    errors = [ZeroDivisionError("oops"), SinkContended("deadlock")] * INTERNAL_ATTEMPTS
    assert Attempts(*errors).run() == "written"


def test_an_exit_is_not_tried_again() -> None:
    attempts = Attempts(SystemExit(1))
    with pytest.raises(SystemExit):
        attempts.run()
    assert attempts.count == 1


def test_a_request_to_finish_leaves_a_few_short_attempts() -> None:
    attempts = Attempts(*[SinkUnavailable("away")] * 100, finishing_after=5)
    with pytest.raises(SinkUnavailable):
        attempts.run()
    assert attempts.count == 5 + FINISHING_ATTEMPTS
    assert max(attempts.waits[4:]) <= FINISHING_WAIT_SECONDS


def test_a_lost_connection_while_finishing_is_mended() -> None:
    attempts = Attempts(SinkUnavailable("cut"), finishing_after=0)
    assert attempts.run() == "written"


def test_an_overloaded_sink_has_the_last_word_when_we_finish() -> None:
    attempts = Attempts(StreamingOverloadException("too much"), finishing_after=0)
    with pytest.raises(StreamingOverloadException):
        attempts.run()


def test_a_fault_is_described_with_its_place() -> None:
    try:
        raise KeyError("customer")
    except KeyError as error:
        block = block_of(error)
    assert "KeyError: 'customer' at test_retry.py:" in block.reason


def test_a_batch_that_waits_is_not_held_twice() -> None:
    """The error of a failed attempt is kept until the next one, and what its frames hold with it."""

    class Decoded:
        pass

    alive: weakref.WeakSet[Decoded] = weakref.WeakSet()
    while_waiting: list[int] = []

    def attempt() -> str:
        if while_waiting:
            return "written"
        decoded = Decoded()
        alive.add(decoded)
        try:
            raise OSError("cut")
        except OSError as error:
            raise SinkUnavailable("away") from error

    result = with_patience(
        attempt,
        on_blocked=lambda *_: None,
        sleep=lambda _: while_waiting.append(len(alive)),
        finishing=lambda: False,
    )
    assert result == "written"
    assert while_waiting == [0]


@pytest.mark.parametrize("errors", [[], [SinkUnavailable("away")], [FateUnknown("cut")]], ids=["none", "one", "final"])
def test_a_batch_is_given_back_when_its_attempts_are_over_and_not_when_the_collector_comes_by(
    errors: list[Exception],
) -> None:
    class Batch:
        pass

    def write(batch: Batch) -> None:
        def attempt() -> str:
            assert batch is not None
            if errors:
                raise errors.pop()
            return "written"

        try:
            with_patience(
                attempt,
                on_blocked=lambda *_: alive.add(batch),
                sleep=lambda _: None,
                finishing=lambda: False,
            )
        except FateUnknown as error:
            let_go_of_frames(error)

    gc.collect()
    gc.disable()
    try:
        batch = Batch()
        alive = weakref.WeakSet([batch])
        write(batch)
        del batch
        assert not alive
    finally:
        gc.enable()
