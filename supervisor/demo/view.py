"""What is on the terminal while a run goes on: a live panel where there is one, plain lines where there is none.

Both show the same: rates, lag, slow count, state and reason, and the events as they come.
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Optional, Protocol

from speedlayer.supervisor.demo.recorder import Event, Sample
from speedlayer.supervisor.demo.scenario import Phase, Scenario

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

# A plain line every so often; events come at once.
LINE_SECONDS = 2.0

# How many of the latest events the panel shows.
EVENTS_SHOWN = 7

# What the small curves show: so many seconds, one column each.
CURVE_COLUMNS = 40
BLOCKS = " ▁▂▃▄▅▆▇█"

# The colours of the pipeline's states; the rest is an alarm.
STATE_STYLES = {"running": "bold green", "overloaded": "bold red", "memory": "yellow", "stopping": "dim"}


class View(Protocol):
    """Where a run shows itself."""

    def say(self, text: str) -> None:
        """Tell what is being done, before and after the phases."""

    def show(self, sample: Sample) -> None:
        """Show the latest state."""

    def tell(self, event: Event) -> None:
        """Show an event."""


@contextlib.contextmanager
def open_view(title: str, scenario: Scenario) -> Iterator[View]:
    """Provide the view that fits the terminal for the length of the block."""
    if not sys.stdout.isatty():
        yield PlainView(scenario)
        return
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        yield PlainView(scenario)
        return
    console = Console()
    if console.is_dumb_terminal:
        yield PlainView(scenario)
        return
    # The panel stays on the screen at the end; what was said before it stands above it.
    with Live(console=console, refresh_per_second=5, transient=False) as live:
        yield LiveView(title, scenario, live)


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


def state_text(sample: Sample) -> str:
    """The state and its reason on one line."""
    left = f", resumes in {sample.pause_left_seconds:.0f} s" if sample.pause_left_seconds > 0 else ""
    return f"{sample.state} ({sample.reason}{left})" if sample.reason else sample.state


class PlainView:
    """Lines, for logs and pipes."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._next_line = 0.0

    def say(self, text: str) -> None:
        """Tell what is being done, before and after the phases."""
        print(text, flush=True)

    def show(self, sample: Sample) -> None:
        """Print a line every few seconds."""
        if sample.elapsed < self._next_line:
            return
        self._next_line = sample.elapsed + LINE_SECONDS
        print(
            f"{clock(sample.elapsed)}  {self._scenario.phases[sample.phase].name:<13}"
            f" produced {sample.produced_per_second:>5,.0f}/s  written {sample.rows_per_second:>6,.0f}/s"
            f"  lag {sample.lag:>6,}  slow {sample.slow_count}/{sample.max_slow_flushes}  {state_text(sample)}",
            flush=True,
        )

    def tell(self, event: Event) -> None:
        """Print an event."""
        print(f"{clock(event.elapsed)}  * {event.text}", flush=True)


class LiveView:
    """A panel that is drawn anew several times a second."""

    def __init__(self, title: str, scenario: Scenario, live: Live) -> None:
        self._title = title
        self._scenario = scenario
        self._live = live
        self._sample: Optional[Sample] = None
        self._peak_memory = 0
        self._events: deque[Event] = deque(maxlen=EVENTS_SHOWN)
        self._curves: dict[str, deque[float]] = {
            name: deque([0.0] * CURVE_COLUMNS, maxlen=CURVE_COLUMNS) for name in ("produced", "written", "lag")
        }
        self._drawn_second = -1

    def say(self, text: str) -> None:
        """Tell what is being done, before and after the phases."""
        self._live.console.print(text, highlight=False)

    def show(self, sample: Sample) -> None:
        """Draw the latest state."""
        self._sample = sample
        self._peak_memory = max(self._peak_memory, sample.memory_bytes or 0)
        if int(sample.elapsed) != self._drawn_second:
            self._drawn_second = int(sample.elapsed)
            self._curves["produced"].append(sample.produced_per_second)
            self._curves["written"].append(sample.rows_per_second)
            self._curves["lag"].append(float(sample.lag))
        self._live.update(self._panel(sample))

    def tell(self, event: Event) -> None:
        """Show an event."""
        self._events.append(event)
        if self._sample is not None:
            self._live.update(self._panel(self._sample))

    def _panel(self, sample: Sample) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.rule import Rule
        from rich.text import Text

        events: list[Any] = [
            Text(f"{clock(event.elapsed)}  {event.text}", style=_event_style(event.text)) for event in self._events
        ]
        # As many lines as there can be, so that the panel does not jump.
        events += [Text("")] * (EVENTS_SHOWN - len(events))
        return Panel(
            Group(self._timeline(sample), Text(""), self._figures(sample), Rule(style="dim"), *events),
            title=f"[bold]{self._title}[/bold]",
            border_style=STATE_STYLES.get(sample.state, "bold red").split()[-1],
            padding=(0, 1),
        )

    def _timeline(self, sample: Sample) -> RenderableType:
        from rich.text import Text

        line = Text()
        for number, phase in enumerate(self._scenario.phases):
            style = "bold reverse" if number == sample.phase else "dim"
            line.append(f" {phase.name}: {_phase_text(phase)} ", style=style)
            line.append("  ")
        line.append(f"{clock(sample.elapsed)} of {clock(self._scenario.seconds)}")
        return line

    def _figures(self, sample: Sample) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", width=10)
        table.add_column(justify="right", min_width=12)
        table.add_column(width=CURVE_COLUMNS)
        table.add_column(style="dim", overflow="ellipsis", no_wrap=True)
        table.add_row(
            "produced", f"{sample.produced_per_second:,.0f}/s", self._curve("produced", "blue"), f"{sample.produced:,}"
        )
        table.add_row(
            "written", f"{sample.rows_per_second:,.0f}/s", self._curve("written", "green"), f"{sample.rows:,} rows"
        )
        table.add_row("lag", f"{sample.lag:,}", self._curve("lag", "magenta"), "messages wait in Kafka")
        last = "" if sample.last_flush_seconds is None else f"the last flush took {sample.last_flush_seconds:.2f} s"
        table.add_row("slow count", f"{sample.slow_count} of {sample.max_slow_flushes}", _strikes(sample), last)
        memory = "" if sample.memory_bytes is None else f"{sample.memory_bytes / 2**20:,.0f} MB"
        table.add_row("memory", memory, "", f"peak {self._peak_memory / 2**20:,.0f} MB" if memory else "")
        state = Text(sample.state, style=STATE_STYLES.get(sample.state, "bold red"))
        table.add_row("brake", f"{sample.overload_count} {'trip' if sample.overload_count == 1 else 'trips'}", "", "")
        return _stacked(table, state, sample)

    def _curve(self, name: str, style: str) -> RenderableType:
        from rich.text import Text

        return Text(sparkline(list(self._curves[name])), style=style)


def _stacked(table: RenderableType, state: RenderableType, sample: Sample) -> RenderableType:
    """Put the state below the figures, on a line of its own: a reason may be long."""
    from rich.console import Group
    from rich.table import Table

    line = Table.grid(padding=(0, 2))
    line.add_column(style="dim", width=10)
    line.add_column(min_width=12, justify="right")
    line.add_column(overflow="ellipsis", no_wrap=True)
    left = f" (resumes in {sample.pause_left_seconds:.1f} s)" if sample.pause_left_seconds > 0 else ""
    line.add_row("state", state, f"{sample.reason}{left}")
    return Group(table, line)


def _phase_text(phase: Phase) -> str:
    text = f"{phase.rate:,.0f}/s"
    return text if phase.capacity is None else f"{text}, database at {phase.capacity:,.0f} rows/s"


def _strikes(sample: Sample) -> RenderableType:
    from rich.text import Text

    text = Text()
    text.append("● " * sample.slow_count, style="bold red")
    text.append("○ " * (sample.max_slow_flushes - sample.slow_count), style="dim")
    return text


def _event_style(text: str) -> str:
    if text.startswith("BRAKE"):
        return "bold red"
    return "green" if text.startswith("resumed") else ""


def sparkline(values: Sequence[float]) -> str:
    """A small curve of block characters; the highest value is a full block."""
    top = max(max(values, default=0.0), 1.0)
    return "".join(BLOCKS[min(len(BLOCKS) - 1, round(value / top * (len(BLOCKS) - 1)))] for value in values)
