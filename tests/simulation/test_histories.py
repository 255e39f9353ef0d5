"""Thousands of histories in which everything goes wrong that can, and no promise is broken."""

from __future__ import annotations

import os
import sys

import pytest

from simulation.campaign import explain, run_seeds
from simulation.history import History
from simulation.plan import draw

HISTORIES = int(os.environ.get("SPEEDLAYER_HISTORIES", "10000"))


# On two idle cores it takes a minute and a half; on a busy machine it may take many.
@pytest.mark.timeout(1800)
def test_no_promise_is_broken_in_any_history(capsys: pytest.CaptureFixture[str]) -> None:
    summary = run_seeds(0, HISTORIES, processes=os.cpu_count() or 1)
    with capsys.disabled():
        print(f"\n{summary}\n{summary.coverage_table()}", file=sys.__stderr__)
    if summary.failures:
        pytest.fail(explain(min(summary.failures)) + f"\n\nall failures: {summary.failures}")
    assert summary.histories == HISTORIES
    assert summary.fewest_events >= 500
    assert summary.fewest_faults >= 5
    assert summary.fewest_supervisors >= 2


def _told(seed: int) -> list[str]:
    lines: list[str] = []
    History(draw(seed), lines.append).run()
    return lines


def test_a_seed_replays_exactly() -> None:
    first = _told(3)
    assert len(first) > 50
    assert _told(3) == first
    assert _told(4) != first


def test_listening_changes_nothing() -> None:
    for seed in range(10):
        silent = History(draw(seed)).run()
        told = History(draw(seed), lambda line: None).run()
        assert (silent.events, silent.messages, silent.seconds) == (told.events, told.messages, told.seconds)
