"""What is on the terminal: plain lines, and the live panel."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console
from rich.live import Live

from speedlayer.supervisor.demo.recorder import Event, Sample
from speedlayer.supervisor.demo.scenario import black_friday
from speedlayer.supervisor.demo.view import LiveView, PlainView, open_view, sparkline

SAMPLE = Sample(
    elapsed=26.0,
    phase=1,
    produced=4200,
    rows=2100,
    dead_letters=1,
    lag=2099,
    slow_count=2,
    max_slow_flushes=3,
    overload_count=1,
    state="overloaded",
    reason="3 slow flushes, the last took 4.02 s (limit 2 s)",
    overload_reason="3 slow flushes",
    pause_left_seconds=3.4,
    last_flush_seconds=4.02,
    memory_bytes=120 * 2**20,
    produced_per_second=300.0,
    rows_per_second=48.0,
)
EXPECTED = ("300/s", "48/s", "2,099", "overloaded", "3 slow flushes, the last took 4.02 s", "Black Friday")


def test_without_a_terminal_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with open_view("the demo", black_friday(90, 100)) as view:
        assert isinstance(view, PlainView)
        view.show(SAMPLE)
        view.show(replace(SAMPLE, elapsed=26.2))
        view.tell(Event(27.0, "BRAKE: 3 slow flushes"))
        view.show(replace(SAMPLE, elapsed=28.0))
    first, event, second = capsys.readouterr().out.splitlines()
    assert all(text in first for text in (*EXPECTED, "slow 2/3", "resumes in 3 s", "00:26"))
    assert event == "00:27  * BRAKE: 3 slow flushes"
    assert second.startswith("00:28")


def test_the_panel_shows_rates_lag_slow_count_state_and_reason() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, height=40, color_system=None)
    with Live(console=console, auto_refresh=False) as live:
        view = LiveView("the demo", black_friday(90, 100), live)
        view.tell(Event(25.0, "BRAKE: 3 slow flushes"))
        view.show(SAMPLE)
        live.refresh()
    text = screen.getvalue()
    for expected in (*EXPECTED, "2 of 3", "● ● ○", "resumes in 3.4 s", "00:26 of 01:30", "BRAKE: 3 slow", "120 MB"):
        assert expected in text, expected


def test_a_curve_rises_to_a_full_block() -> None:
    assert sparkline([0, 4, 8]) == " ▄█"
    assert sparkline([0, 0]) == "  "
    assert sparkline([]) == ""
