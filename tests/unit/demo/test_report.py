"""The report says what is wrong, and is good only when nothing is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from speedlayer.supervisor.demo.database import Audit, Latency
from speedlayer.supervisor.demo.recorder import BrakeEvent
from speedlayer.supervisor.demo.report import PhaseReport, Report

GOOD = Report(
    kind="demo",
    broker="embedded Kafka",
    database="PostgreSQL 18.6",
    seconds=90,
    workers=2,
    batch_rows=100,
    produced=1000,
    unread=0,
    audit=Audit(rows=998, dead_letters=2, lost=0, surplus=0, latency=Latency(0.5, 20.0, 25.0)),
    phases=(PhaseReport("normal", 0, 18, 100, 99, 21_234.5), PhaseReport("Black Friday", 18, 54, 300, 40, 49.4)),
    brake_events=(BrakeEvent(26.2, "3 slow flushes", 31.4),),
    needs_brake=True,
    peak_lag=800,
    peak_memory_bytes=150 * 2**20,
    daemon_exit_code=0,
    plot="demo-report/plot.png",
)


def test_a_good_run_is_good() -> None:
    assert GOOD.problems == []
    text = GOOD.as_text()
    for figure in ("1,000", "998", "26–31 s", "150 MB", "21,234 rows/s", "49 rows/s", "GOOD: nothing was lost"):
        assert figure in text
    assert json.loads(GOOD.as_json())["ok"] is True


@pytest.mark.parametrize(
    ("report", "problem"),
    [
        (replace(GOOD, audit=replace(GOOD.audit, lost=3, rows=995), unread=2), "3 messages are neither"),
        (replace(GOOD, audit=replace(GOOD.audit, surplus=1, rows=999)), "1 rows or dead letters are there twice"),
        (replace(GOOD, produced=1001), "do not add up"),
        (replace(GOOD, daemon_exit_code=1), "exit code was 1"),
        (replace(GOOD, brake_events=()), "never tripped"),
        (replace(GOOD, brake_events=(BrakeEvent(26.2, "slow"),)), "never let go"),
    ],
)
def test_everything_that_is_wrong_is_said(report: Report, problem: str) -> None:
    (said,) = report.problems
    assert problem in said
    assert "NOT GOOD" in report.as_text()
    assert said in report.as_text()
    assert json.loads(report.as_json())["ok"] is False


def test_a_load_test_needs_no_brake() -> None:
    assert replace(GOOD, needs_brake=False, brake_events=()).problems == []
