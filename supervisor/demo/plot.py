"""The picture of a run: rates, lag, slow count and memory over time, the brake's pauses as bands (demo process)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from speedlayer.supervisor.demo.capacity import Flush, rows_per_step
from speedlayer.supervisor.demo.recorder import Recorder
from speedlayer.supervisor.demo.report import PhaseReport
from speedlayer.supervisor.errors import MissingLibrary

# Colours that people with colour blindness can tell apart (Okabe and Ito).
PRODUCED, WRITTEN, LAG, BRAKE, SLOW, MEMORY = "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#E69F00", "#56B4E9"
QUIET = "#666666"

# The rates' axis ends here, above the highest production: the catch-up after the storm is many times higher.
HEADROOM = 1.35

WIDTH_INCHES, HEIGHT_INCHES, DOTS_PER_INCH = 11.0, 8.5, 110


@dataclass(frozen=True)
class Picture:
    """What is drawn. Times of flushes are seconds since the first message, like all others."""

    title: str
    recorder: Recorder
    flushes: Sequence[Flush]
    phases: Sequence[PhaseReport]
    step_seconds: float = 1.0


def draw(picture: Picture, path: Path) -> None:
    """Draw the run into a PNG file."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingLibrary("the plot needs matplotlib: pip install 'speedlayer[demo]'") from error

    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(picture.title, fontsize=13, fontweight="bold")
    axes = figure.subplots(4, 1, sharex=True, gridspec_kw={"height_ratios": [4, 2.2, 1.2, 1.2]})
    end = picture.recorder.samples[-1].elapsed if picture.recorder.samples else 1.0
    _draw_rates(axes[0], picture, end)
    _draw_lag(axes[1], picture)
    _draw_slow_count(axes[2], picture)
    _draw_memory(axes[3], picture)
    for axis in axes:
        _draw_brake(axis, picture, end)
        for phase in picture.phases[1:]:
            axis.axvline(phase.began, color=QUIET, linewidth=0.8, linestyle=":")
        axis.grid(axis="y", alpha=0.25)
        axis.margins(x=0)
        axis.set_xlim(0, end)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[-1].set_xlabel("seconds since the first message")
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _draw_rates(axis: Any, picture: Picture, end: float) -> None:
    samples = picture.recorder.samples
    step = picture.step_seconds
    steps = max(1, int(end / step))
    written = rows_per_step(picture.flushes, 0.0, steps, step)
    top = HEADROOM * max([phase.produced_per_second for phase in picture.phases] + [1.0])
    axis.plot(
        [s.elapsed for s in samples],
        [s.produced_per_second for s in samples],
        color=PRODUCED,
        linewidth=1.8,
        label="produced/s",
    )
    edges = [number * step for number in range(steps + 1)]
    axis.stairs(written, edges, color=WRITTEN, fill=True, alpha=0.35)
    axis.stairs(written, edges, color=WRITTEN, linewidth=1.2, label="written/s (rows visible in each second)")
    axis.set_ylim(0, top)
    axis.set_ylabel("messages/s, rows/s")
    for phase in picture.phases:
        _draw_capacity(axis, phase, top)
    highest = max(written, default=0.0)
    if highest > top:
        at = edges[written.index(highest)] + step / 2
        axis.annotate(
            f"catching up: {highest:,.0f} rows/s",
            xy=(at, top * 0.995),
            xytext=(12, -40),
            textcoords="offset points",
            fontsize=9,
            color=WRITTEN,
            arrowprops={"arrowstyle": "->", "color": WRITTEN},
        )
    handles, labels = axis.get_legend_handles_labels()
    from matplotlib.patches import Patch

    handles.append(Patch(color=BRAKE, alpha=0.15))
    labels.append("brake: reading paused")
    axis.legend(handles, labels, loc="upper right", fontsize=9, framealpha=0.9)


def _draw_capacity(axis: Any, phase: PhaseReport, top: float) -> None:
    """Write the capacity of a phase under its name, and draw it where it fits."""
    text = "no flush" if phase.capacity is None else f"the database takes {_rough(phase.capacity)} rows/s"
    axis.text(phase.began + 0.4, top * 0.975, f"{phase.name}\n{text}", va="top", fontsize=9, color="#222222")
    if phase.capacity is not None and phase.capacity < top:
        axis.hlines(
            phase.capacity,
            phase.began,
            phase.ended,
            color=QUIET,
            linestyle="--",
            linewidth=1.2,
            label="measured capacity",
        )


def _draw_lag(axis: Any, picture: Picture) -> None:
    samples = picture.recorder.samples
    axis.fill_between([s.elapsed for s in samples], [s.lag for s in samples], color=LAG, alpha=0.3)
    axis.plot([s.elapsed for s in samples], [s.lag for s in samples], color=LAG, linewidth=1.5)
    axis.set_ylabel("lag, messages")
    axis.set_ylim(bottom=0)


def _draw_slow_count(axis: Any, picture: Picture) -> None:
    samples = picture.recorder.samples
    limit = max((s.max_slow_flushes for s in samples), default=3)
    axis.step([s.elapsed for s in samples], [s.slow_count for s in samples], where="post", color=SLOW, linewidth=1.8)
    # The strike that trips the brake sets the count back to 0 at once, so no sample ever shows it.
    trips = [event.began for event in picture.recorder.brake_events]
    axis.plot(trips, [limit] * len(trips), "v", color=BRAKE, markersize=7)
    axis.set_ylabel("slow count")
    axis.set_ylim(0, limit + 0.4)
    axis.set_yticks(range(limit + 1))


def _draw_memory(axis: Any, picture: Picture) -> None:
    known = [(s.elapsed, s.memory_bytes / 2**20) for s in picture.recorder.samples if s.memory_bytes is not None]
    axis.plot([at for at, _ in known], [size for _, size in known], color=MEMORY, linewidth=1.5)
    axis.set_ylabel("memory, MB")
    axis.set_ylim(0, 1.25 * max((size for _, size in known), default=1.0))


def _draw_brake(axis: Any, picture: Picture, end: float) -> None:
    for event in picture.recorder.brake_events:
        ended: Optional[float] = event.ended
        axis.axvspan(event.began, end if ended is None else ended, color=BRAKE, alpha=0.12, linewidth=0)


def _rough(rows_per_second: float) -> str:
    """Two digits are meant, where there are many: such a rate is measured from a few milliseconds."""
    if rows_per_second < 1000:
        return f"{rows_per_second:.0f}"
    digits = len(str(int(rows_per_second))) - 2
    return f"{round(rows_per_second / 10**digits) * 10**digits:,.0f}"
