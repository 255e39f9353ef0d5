"""The simulator can fail: faults put into the code on purpose are caught, each within a thousand seeds."""

from __future__ import annotations

import os
from typing import Optional

import pytest

from simulation.campaign import catch_all, kind_of, shrink, story
from simulation.history import History
from simulation.mutants import MUTANTS
from simulation.plan import Plan, draw

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# On these seeds the true code is clean: `test_histories` runs them all.
SEEDS = 1000


@pytest.fixture(scope="module")
def caught() -> dict[str, Optional[tuple[int, str]]]:
    return catch_all(MUTANTS, SEEDS, processes=os.cpu_count() or 1)


@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_a_mutant_is_caught(name: str, caught: dict[str, Optional[tuple[int, str]]]) -> None:
    assert caught[name] is not None, f"{name} went unnoticed in {SEEDS} histories"


def test_a_failing_history_is_shrunk_and_told() -> None:
    with MUTANTS["the_start_is_not_checked"]() as protocols:

        def fails(plan: Plan) -> Optional[str]:
            return History(plan, protocols=protocols).run().fault

        seed = next(seed for seed in range(SEEDS) if fails(draw(seed)) is not None)
        plan = draw(seed)
        first = fails(plan)
        short = shrink(plan, fails)
        again = fails(short)
        assert first is not None
        assert again is not None
        assert kind_of(again) == kind_of(first)
        assert len(short.faults) < len(plan.faults)
        assert len(short.waves) < len(plan.waves)
        told = story(short, lambda plan, say: History(plan, say, protocols=protocols).run().fault)
    assert f"BROKEN: {again}" in told
    assert "NEMESIS" in told
