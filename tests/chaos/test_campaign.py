"""The fault campaign in a short form: two bursts of the gravest faults, and nothing is lost, twice, or stuck."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fixtures.workspace import REPOSITORY

# Whoever is struck, when and for how long follows from the seed: five faults at once, and five others a little later.
SEED = 1374
GRAVEST = (
    "supervisor killed",
    "supervisor frozen",
    "worker killed",
    "clock steps",
    "brokers' packets vanish",
    "answers to COMMIT lost",
    "broker killed",
    "fail-over that loses commits",
    "disk full",
    "retention takes what is not written",
)

# Three brokers, two databases and four supervisors start; ten faults strike; all of it is compared.
RUN_SECONDS = 400


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    """``run(*arguments)``: one campaign, its exit status, its report and what it printed."""

    def campaign(*arguments: str) -> tuple[int, dict[str, Any], str]:
        command = [sys.executable, "-m", "chaos.campaign", "--out", str(tmp_path), *arguments]
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": "tests"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RUN_SECONDS,
        )
        report = tmp_path / "report.json"
        assert report.exists(), done.stdout
        return done.returncode, json.loads(report.read_text()), done.stdout

    return campaign


@pytest.mark.slow
@pytest.mark.timeout(RUN_SECONDS + 60)
def test_nothing_is_lost_twice_or_stuck_while_the_gravest_faults_overlap(run: Any, tmp_path: Path) -> None:
    only = [argument for name in GRAVEST for argument in ("--only", name)]
    status, report, told = run("--seed", str(SEED), "--minutes", "5", "--bursts", "2", "--at-once", "5", *only)
    assert report["problems"] == [] and status == 0, told
    assert report["struck"].keys() | {miss.split(":")[0] for miss in report["missed"]} == set(GRAVEST), told
    # Whether there is something to strike at that moment is not the seed's to decide; most find something.
    assert len(report["struck"]) >= len(GRAVEST) - 2, told
    found = report["audit"]
    assert (found["lost"], found["duplicated"], found["altered"], found["disordered"]) == (0, 0, 0, 0), told
    assert found["rows"] > 5_000 and found["dead"] > 0, told
    assert report["longest_undisturbed_stall_seconds"] <= 30, told
    assert report["counters"]["supervisor restarts"] >= 1, told
    assert (tmp_path / "report.md").read_text().startswith("# Fault campaign")
