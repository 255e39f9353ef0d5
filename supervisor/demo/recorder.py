"""What was seen of the run: samples several times a second, and the events between them (pure).

A `Sample` is taken from the daemon's status and from what was produced. The recorder keeps them all, since the plot is
drawn from them, and turns the differences between neighbours into events that a person wants to read.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Optional

# Rates are means over this time: longer than a slow flush, so that its rows look like a rate and not like a jump.
RATE_WINDOW_SECONDS = 5.0

# The hold that the three strikes put on a pipeline; see `speedlayer.supervisor.core.pipelines`.
OVERLOAD_HOLD = "overloaded"


@dataclass(frozen=True)
class Sample:
    """One look at the run. Times are seconds since the first message, totals count from there."""

    elapsed: float
    phase: int
    produced: int
    rows: int
    dead_letters: int
    lag: int
    slow_count: int
    max_slow_flushes: int
    overload_count: int
    state: str
    reason: str
    overload_reason: Optional[str]  # None: the brake is not on
    pause_left_seconds: float
    last_flush_seconds: Optional[float]
    memory_bytes: Optional[int]
    produced_per_second: float = 0.0
    rows_per_second: float = 0.0


@dataclass(frozen=True)
class Event:
    """Something worth a line."""

    elapsed: float
    text: str


@dataclass
class BrakeEvent:
    """One time that the brake was pulled."""

    began: float
    reason: str
    ended: Optional[float] = None


def take_sample(
    elapsed: float,
    phase: int,
    produced: int,
    ends: Mapping[int, int],
    status: Mapping[str, Any],
    memory_bytes: Optional[int],
) -> Sample:
    """Make a sample from the daemon's status. ``ends``: for each partition, the offset after the last message."""
    (pipeline,) = status["pipelines"]
    return Sample(
        elapsed=elapsed,
        phase=phase,
        produced=produced,
        rows=pipeline["rows"],
        dead_letters=pipeline["dead_lettered"],
        lag=lag_of(ends, pipeline["lanes"]),
        slow_count=pipeline["slow_count"],
        max_slow_flushes=pipeline["max_slow_flushes"],
        overload_count=pipeline["overload_count"],
        state=pipeline["state"],
        reason=pipeline["reason"],
        overload_reason=pipeline["holds"].get(OVERLOAD_HOLD),
        pause_left_seconds=pipeline["paused_until_seconds"] or 0.0,
        last_flush_seconds=pipeline["last_flush_seconds"],
        memory_bytes=memory_bytes,
    )


def lag_of(ends: Mapping[int, int], lanes: list[Mapping[str, Any]]) -> int:
    """How many messages are in Kafka and not in the database.

    Counted from what was acknowledged to us: a paused consumer does not hear of new messages.
    """
    written = {lane["partition"]: lane["next_offset"] or 0 for lane in lanes}
    return sum(max(0, end - written.get(partition, 0)) for partition, end in ends.items())


@dataclass
class Recorder:
    """All samples, events and brake events of a run. ``pause_seconds`` is how long the brake pauses."""

    pause_seconds: float
    samples: list[Sample] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    brake_events: list[BrakeEvent] = field(default_factory=list)
    _next_dead_letters: int = 1

    def add(self, sample: Sample) -> list[Event]:
        """Keep a sample, with its rates, and return the events that it brings."""
        sample = self._with_rates(sample)
        before = self.samples[-1] if self.samples else None
        self.samples.append(sample)
        new = [Event(sample.elapsed, text) for text in self._news(before, sample)]
        self.events += new
        return new

    def note(self, elapsed: float, text: str) -> Event:
        """Keep an event that comes from elsewhere."""
        event = Event(elapsed, text)
        self.events.append(event)
        return event

    @property
    def latest(self) -> Optional[Sample]:
        """The last sample."""
        return self.samples[-1] if self.samples else None

    def produced_at(self, elapsed: float) -> float:
        """How many messages had been produced by then, read off the line between the neighbouring looks."""
        after = bisect.bisect_left(self.samples, elapsed, key=lambda sample: sample.elapsed)
        early = self.samples[after - 1] if after > 0 else None
        if after == len(self.samples):
            return float(early.produced) if early is not None else 0.0
        late = self.samples[after]
        began, total = (early.elapsed, early.produced) if early is not None else (0.0, 0)
        if late.elapsed <= began:
            return float(late.produced)
        return total + (late.produced - total) * (elapsed - began) / (late.elapsed - began)

    @property
    def peak_memory_bytes(self) -> Optional[int]:
        """The most memory that was seen."""
        return max((sample.memory_bytes for sample in self.samples if sample.memory_bytes is not None), default=None)

    @property
    def peak_lag(self) -> int:
        """The most messages that waited."""
        return max((sample.lag for sample in self.samples), default=0)

    @property
    def resumes(self) -> int:
        """How often the brake let go again."""
        return sum(event.ended is not None for event in self.brake_events)

    def _with_rates(self, sample: Sample) -> Sample:
        base = next(iter(self._recent(sample.elapsed)), None)
        if base is None or sample.elapsed <= base.elapsed:
            return sample
        seconds = sample.elapsed - base.elapsed
        return replace(
            sample,
            produced_per_second=(sample.produced - base.produced) / seconds,
            rows_per_second=(sample.rows - base.rows) / seconds,
        )

    def _recent(self, now: float) -> list[Sample]:
        """The samples of the last few seconds, the oldest first."""
        count = 0
        for old in reversed(self.samples):
            if old.elapsed < now - RATE_WINDOW_SECONDS:
                break
            count += 1
        return self.samples[len(self.samples) - count :]

    def _news(self, before: Optional[Sample], sample: Sample) -> list[str]:
        news = []
        if before is not None and sample.slow_count > before.slow_count and sample.last_flush_seconds is not None:
            news.append(
                f"a flush took {sample.last_flush_seconds:.1f} s: slow count {sample.slow_count} of"
                f" {sample.max_slow_flushes}"
            )
        if sample.overload_count > (before.overload_count if before is not None else 0):
            reason = sample.overload_reason or (self.brake_events[-1].reason if self.brake_events else "overloaded")
            # The trip lies a little before the look: what is left of the pause tells how much.
            ago = max(0.0, self.pause_seconds - sample.pause_left_seconds) if sample.overload_reason else 0.0
            self.brake_events.append(BrakeEvent(sample.elapsed - ago, reason))
            news.append(f"BRAKE: {reason}")
        elif self.brake_events and self.brake_events[-1].ended is None and sample.overload_reason is None:
            self.brake_events[-1].ended = sample.elapsed
            seconds = sample.elapsed - self.brake_events[-1].began
            news.append(f"resumed by itself after {seconds:.1f} s; {sample.lag:,} messages wait in Kafka")
        if sample.dead_letters >= self._next_dead_letters:
            # At 1, 2, 4, 8, …: a long run would tell of nothing else.
            self._next_dead_letters = 2 * sample.dead_letters
            one = sample.dead_letters == 1
            news.append(
                f"{sample.dead_letters:,} broken {'order is a dead letter' if one else 'orders are dead letters'}"
            )
        return news
