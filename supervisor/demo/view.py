"""What is on the terminal while a run goes on: a live panel where there is one, plain lines where there is none.

Both show the same: rates, lag, slow count, state and reason, and the events as they come.
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Optional, Protocol

from speedlayer.supervisor.demo.recorder import Event, Sample
from speedlayer.supervisor.demo.scenario import Phase, Scenario

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

# A plain line every so often; events come at once.
LINE_SECONDS = 2.0

# How many of the latest events the panel shows.
EVENTS_SHOWN = 7

# The small curves have a column for each second. They take what the other columns leave of the panel's width.
CURVE_COLUMNS = range(8, 61)
LABEL_COLUMNS, VALUE_COLUMNS, REMARK_COLUMNS, BETWEEN_COLUMNS, FRAME_COLUMNS = 10, 11, 28, 2, 4
BLOCKS = " ▁▂▃▄▅▆▇█"

# The colours of the pipeline's states; the rest is an alarm.
STATE_STYLES = {"running": "bold green", "overloaded": "bold red", "memory": "yellow", "stopping": "dim"}
CURVE_STYLES = {"produced": "blue", "written": "green", "lag": "magenta"}


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
            name: deque(maxlen=CURVE_COLUMNS[-1]) for name in ("produced", "written", "lag")
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

        rule = Rule(style="dim")
        return Panel(
            Group(self._timeline(sample), rule, self._figures(sample), self._state(sample), rule, *self._event_lines()),
            title=f"[bold]{self._title}[/bold]",
            border_style=STATE_STYLES.get(sample.state, "bold red").split()[-1],
            padding=(0, 1),
        )

    def _timeline(self, sample: Sample) -> RenderableType:
        from rich.text import Text

        line = Text(f"{clock(sample.elapsed)} of {clock(self._scenario.seconds)}  ", no_wrap=True, overflow="ellipsis")
        for number, phase in enumerate(self._scenario.phases):
            line.append(f" {phase.name} ", style="bold reverse" if number == sample.phase else "dim")
            line.append(" ")
        line.append(f" {_phase_text(self._scenario.phases[sample.phase])}")
        return line

    def _figures(self, sample: Sample) -> RenderableType:
        from rich.table import Table

        curve = self._curve_columns()
        table = Table.grid(padding=(0, BETWEEN_COLUMNS))
        table.add_column(style="dim", width=LABEL_COLUMNS, no_wrap=True)
        table.add_column(justify="right", width=VALUE_COLUMNS, no_wrap=True)
        table.add_column(width=curve, no_wrap=True)
        table.add_column(style="dim", overflow="ellipsis", no_wrap=True)
        last = "" if sample.last_flush_seconds is None else f"last flush {sample.last_flush_seconds:.2f} s"
        memory = "" if sample.memory_bytes is None else f"{sample.memory_bytes / 2**20:,.0f} MB"
        peak = f"peak {self._peak_memory / 2**20:,.0f} MB (PSS)" if memory else ""
        trips = f"{sample.overload_count} {'trip' if sample.overload_count == 1 else 'trips'}"
        for row in (
            ("produced", f"{sample.produced_per_second:,.0f}/s", self._curve("produced"), f"{sample.produced:,}"),
            ("written", f"{sample.rows_per_second:,.0f}/s", self._curve("written"), f"{sample.rows:,} rows"),
            ("lag", f"{sample.lag:,}", self._curve("lag"), "messages wait in Kafka"),
            ("slow count", f"{sample.slow_count} of {sample.max_slow_flushes}", _strikes(sample), last),
            ("brake", trips, "", ""),
            ("memory", memory, "", peak),
        ):
            table.add_row(*row)
        return table

    def _state(self, sample: Sample) -> RenderableType:
        """The state has a line of its own: a reason may be long."""
        from rich.table import Table
        from rich.text import Text

        line = Table.grid(padding=(0, BETWEEN_COLUMNS))
        line.add_column(style="dim", width=LABEL_COLUMNS)
        line.add_column(width=VALUE_COLUMNS, justify="right", no_wrap=True)
        line.add_column(overflow="ellipsis", no_wrap=True)
        left = f"resumes in {sample.pause_left_seconds:.1f} s: " if sample.pause_left_seconds > 0 else ""
        state = Text(sample.state, style=STATE_STYLES.get(sample.state, "bold red"))
        line.add_row("state", state, f"{left}{sample.reason}")
        return line

    def _event_lines(self) -> list[RenderableType]:
        """The latest events; always as many lines, so that the panel does not jump."""
        from rich.text import Text

        lines: list[RenderableType] = []
        for event in self._events:
            text = f"{clock(event.elapsed)}  {event.text}"
            lines.append(Text(text, style=_event_style(event.text), no_wrap=True, overflow="ellipsis"))
        return lines + [Text("")] * (EVENTS_SHOWN - len(lines))

    def _curve_columns(self) -> int:
        others = LABEL_COLUMNS + VALUE_COLUMNS + REMARK_COLUMNS + 3 * BETWEEN_COLUMNS + FRAME_COLUMNS
        return min(max(self._live.console.width - others, CURVE_COLUMNS[0]), CURVE_COLUMNS[-1])

    def _curve(self, name: str) -> RenderableType:
        from rich.text import Text

        columns = self._curve_columns()
        return Text(sparkline(list(self._curves[name])[-columns:]).rjust(columns), style=CURVE_STYLES[name])


def _phase_text(phase: Phase) -> str:
    if phase.capacity is None:
        return f"{phase.rate:,.0f} messages/s"
    return f"{phase.rate:,.0f}/s, database at {phase.capacity:,.0f}/s"  # fits in 80 columns


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
