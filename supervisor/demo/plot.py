"""The picture of a run: rates, lag, slow count and memory over time, the brake's pauses as bands (demo process)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speedlayer.supervisor.demo.capacity import Flush, rows_per_step
from speedlayer.supervisor.demo.recorder import Recorder
from speedlayer.supervisor.demo.report import PhaseReport
from speedlayer.supervisor.errors import MissingLibrary

# Colours that people with colour blindness can tell apart (Okabe and Ito).
PRODUCED, WRITTEN, LAG, BRAKE, SLOW, MEMORY = "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#E69F00", "#56B4E9"
INK, QUIET = "#222222", "#666666"

# The rates' axis ends here, above the highest production: the catch-up after the storm is many times higher.
HEADROOM = 1.2

WIDTH_INCHES, HEIGHT_INCHES, DOTS_PER_INCH = 11.0, 8.5, 110

# The written rows are drawn in steps of this length. More steps than there are dots would be a blur.
SHORTEST_STEP_SECONDS = 1.0
MOST_STEPS = 400

# A phase that is shorter than this share of the picture has no room for words.
WORDS_SHARE = 0.08


@dataclass(frozen=True)
class Picture:
    """What is drawn. Times of flushes are seconds since the first message, like all others."""

    title: str
    recorder: Recorder
    flushes: Sequence[Flush]
    phases: Sequence[PhaseReport]

    @property
    def end(self) -> float:
        """Where the time ends."""
        latest = self.recorder.latest
        return 1.0 if latest is None else max(1.0, latest.elapsed)


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
    for axis, draw_one in zip(axes, (_draw_rates, _draw_lag, _draw_slow_count, _draw_memory), strict=True):
        _prepare(axis, picture)
        draw_one(axis, picture)
    _draw_phases(axes[0], picture)
    axes[-1].set_xlabel("seconds since the first message")
    _draw_legend(figure, axes)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _prepare(axis: Any, picture: Picture) -> None:
    """Draw what all parts share: the brake's bands and the borders between the phases."""
    for event in picture.recorder.brake_events:
        ended = picture.end if event.ended is None else event.ended
        axis.axvspan(event.began, ended, color=BRAKE, alpha=0.14, linewidth=0, label="brake: reading is paused")
    for phase in picture.phases[1:]:
        axis.axvline(phase.began, color=QUIET, linewidth=0.8, linestyle=":")
    axis.grid(axis="y", alpha=0.25)
    axis.set_xlim(0, picture.end)
    axis.yaxis.set_major_formatter("{x:,.0f}")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _draw_rates(axis: Any, picture: Picture) -> None:
    step = max(SHORTEST_STEP_SECONDS, picture.end / MOST_STEPS)
    steps = max(1, int(picture.end / step))
    edges = [number * step for number in range(steps + 1)]
    totals = [picture.recorder.produced_at(edge) for edge in edges]
    produced = [(late - early) / step for early, late in itertools.pairwise(totals)]
    written = rows_per_step(picture.flushes, 0.0, steps, step)
    top = HEADROOM * max(*produced, 1.0)
    axis.stairs(written, edges, color=WRITTEN, fill=True, alpha=0.4, label="rows that became visible, each second")
    axis.stairs(produced, edges, color=PRODUCED, linewidth=1.8, label="messages produced/s")
    for phase in picture.phases:
        if phase.capacity is not None and phase.capacity < top:
            axis.hlines(
                phase.capacity,
                phase.began,
                phase.ended,
                color=INK,
                linestyle="--",
                linewidth=1.3,
                label="measured capacity of the database, rows/s",
            )
    highest = max(written)
    if highest > top:
        at = written.index(highest)
        axis.text(
            edges[at + 1] + 0.006 * picture.end,
            0.97 * top,
            f"↑ catching up: {highest:,.0f} rows/s",
            va="top",
            fontsize=9,
            color=WRITTEN,
        )
    axis.set_ylim(0, top)
    axis.set_ylabel("messages/s, rows/s")


def _draw_lag(axis: Any, picture: Picture) -> None:
    samples = picture.recorder.samples
    axis.fill_between([s.elapsed for s in samples], [s.lag for s in samples], color=LAG, alpha=0.3, linewidth=0)
    axis.plot([s.elapsed for s in samples], [s.lag for s in samples], color=LAG, linewidth=1.5)
    axis.set_ylabel("lag, messages")
    axis.set_ylim(bottom=0)


def _draw_slow_count(axis: Any, picture: Picture) -> None:
    samples = picture.recorder.samples
    limit = max((s.max_slow_flushes for s in samples), default=3)
    axis.step([s.elapsed for s in samples], [s.slow_count for s in samples], where="post", color=SLOW, linewidth=1.8)
    # The strike that trips the brake sets the count back to 0 at once, so no sample ever shows it.
    trips = [event.began for event in picture.recorder.brake_events]
    if trips:
        label = "the strike that trips the brake"
        axis.plot(trips, [limit] * len(trips), "v", color=BRAKE, markersize=8, label=label, clip_on=False)
    axis.set_ylabel("slow count")
    axis.set_ylim(0, limit + 0.3)
    axis.set_yticks(range(limit + 1))


def _draw_memory(axis: Any, picture: Picture) -> None:
    known = [(s.elapsed, s.memory_bytes / 2**20) for s in picture.recorder.samples if s.memory_bytes is not None]
    axis.plot([at for at, _ in known], [size for _, size in known], color=MEMORY, linewidth=1.8)
    axis.set_ylabel("memory, MB")
    axis.set_ylim(0, 1.3 * max((size for _, size in known), default=1.0))


def _draw_phases(axis: Any, picture: Picture) -> None:
    """Write above each phase what it was, and what the database could take in it."""
    for phase in picture.phases:
        if phase.ended - phase.began < WORDS_SHARE * picture.end:
            continue
        took = "no flush" if phase.capacity is None else f"database takes {rough(phase.capacity)} rows/s"
        axis.annotate(
            f"{phase.name}\n{took}",
            xy=((phase.began + phase.ended) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9,
            color=INK,
        )


def _draw_legend(figure: Any, axes: Sequence[Any]) -> None:
    """One legend for all parts, below them, each thing once."""
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=3, fontsize=9, frameon=False)


def rough(rows_per_second: float) -> str:
    """Write a rate with two digits, where it has many: such a rate is measured from a few milliseconds."""
    if rows_per_second < 1000:
        return f"{rows_per_second:.0f}"
    unit = 10 ** (len(str(int(rows_per_second))) - 2)
    return f"{round(rows_per_second / unit) * unit:,}"
