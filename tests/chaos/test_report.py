"""A report passes only if every promise was kept, something was struck, and all of it was compared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from chaos.audit import Audit
from chaos.nemesis import Injected
from chaos.observer import Look, Stall
from chaos.report import Result

LANE = ("orders", 0)
BEGAN = 1000.0


def result(**changed: Any) -> Result:
    fault = Injected("broker killed", "brokers", 1, BEGAN + 10, BEGAN + 20, struck="broker 1")
    looks = [Look(BEGAN + second, 100 * second, 5) for second in range(60)]
    whole = Result(
        command="scripts/chaos --seed 1",
        started="2026-01-01",
        seconds=60.0,
        machine="2 cores",
        setting="4 supervisors",
        began=BEGAN,
        injected=[fault],
        audit=Audit(messages=6000, rows=6000),
        stalls=[Stall(LANE, BEGAN + 9, BEGAN + 40)],
        looks=looks,
        counters=dict.fromkeys(
            ("messages", "fenced", "retries", "reclaims", "flushes", "worker restarts", "supervisor restarts"), 7
        ),
        ends={"kill -9": 1},
        recovered_seconds=1.0,
    )
    return replace(whole, **changed)


def test_a_run_in_which_all_is_well_passes() -> None:
    whole = result()
    assert whole.passed and whole.problems() == []
    assert "**Passed**" in whole.markdown()
    assert whole.terminal().rstrip().splitlines()[-1].startswith("passed")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"audit": None}, "not compared"),
        ({"audit": Audit(lost=1, examples=["lost: orders 0 17"])}, "orders 0 17"),
        ({"audit": Audit(duplicated=1, examples=["duplicated: orders 0 17"])}, "orders 0 17"),
        ({"audit": Audit(disordered=1, examples=["disordered: orders 0 17"])}, "orders 0 17"),
        ({"audit": Audit(unexplained=1, examples=["unexplained: a row"])}, "a row"),
        ({"stalls": [Stall(LANE, BEGAN + 20, BEGAN + 51)]}, "31.0 s while no fault was under way"),
        ({"failures": ["a member ended with INTERNAL_ERROR"]}, "INTERNAL_ERROR"),
        ({"injected": [Injected("broker killed", "brokers", 1, BEGAN, BEGAN, missed="none")]}, "no fault struck"),
    ],
)
def test_whatever_is_wrong_fails_it_and_is_told(changed: dict[str, Any], told: str) -> None:
    broken = result(**changed)
    assert not broken.passed
    assert told in broken.markdown() and told in broken.terminal()
    assert any(told in problem for problem in broken.numbers()["problems"])


def test_the_plot_shows_where_the_faults_were() -> None:
    lines = result().plot()
    bar = next(line for line in lines if "faults: brokers" in line)[27:]
    assert [second for second, mark in enumerate(bar) if mark == "x"] == list(range(10, 21))
    assert "100 at most" in lines[0]


def test_a_stall_is_told_with_the_faults_around_it() -> None:
    assert "orders 0 for 31.0 s, 20.0 s of it undisturbed (broker killed)" in result().markdown()
