"""A pipeline as the core sees it: its brake, what holds it up and why, its counters (supervisor process, pure).

What holds a pipeline up is a set of holds, each with a reason that an operator can read. A pipeline reads while there
is no hold at all; it dispatches what it has read while there is none of the kind that stops dispatching, too.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field
from typing import Optional

from speedlayer.supervisor.core.brake import ThreeStrikes
from speedlayer.supervisor.core.config import PipelineConfig


class Hold(enum.Enum):
    """Why a pipeline does not read. The order is that in which they are shown: the first is the state's reason."""

    STOPPING = "stopping"  # the daemon drains
    OPERATOR = "paused"  # somebody said `pause`
    DRAINING = "draining"  # somebody said `drain`: nothing is read, what was read is written
    DEAD_LETTERS = "dead-letter limit"  # too large a part of the messages ended as dead letters
    BLOCKED = "blocked"  # the sink can not be written to
    OVERLOAD = "overloaded"  # three strikes
    MEMORY = "memory"  # its share of the memory budget is full


# These stop dispatching as well; under the others, what was read is still written.
STOPS_DISPATCH = frozenset({Hold.OPERATOR, Hold.DEAD_LETTERS, Hold.BLOCKED, Hold.OVERLOAD})


@dataclass
class DeadLetterWindow:
    """How many messages, and dead letters among them, there were in the last seconds."""

    seconds: float
    samples: deque[tuple[float, int, int]] = field(default_factory=deque)
    messages: int = 0
    dead: int = 0

    def add(self, now: float, messages: int, dead: int) -> None:
        """Count a flush."""
        self.samples.append((now, messages, dead))
        self.messages += messages
        self.dead += dead
        while self.samples[0][0] < now - self.seconds:
            _, old_messages, old_dead = self.samples.popleft()
            self.messages -= old_messages
            self.dead -= old_dead

    def clear(self) -> None:
        """Begin anew."""
        self.samples.clear()
        self.messages = self.dead = 0


@dataclass
class RateMeter:
    """Rows a second over the last few seconds, by whole seconds."""

    window_seconds: int = 5
    buckets: deque[tuple[int, int]] = field(default_factory=deque)

    def add(self, now: float, rows: int) -> None:
        """Count rows."""
        second = int(now)
        if self.buckets and self.buckets[-1][0] == second:
            rows += self.buckets.pop()[1]
        self.buckets.append((second, rows))
        while self.buckets[0][0] <= second - self.window_seconds - 1:
            self.buckets.popleft()

    def per_second(self, now: float) -> float:
        """The mean over the window, the second under way left out."""
        second = int(now)
        counted = sum(rows for at, rows in self.buckets if second - self.window_seconds <= at < second)
        return counted / self.window_seconds


@dataclass
class Counters:
    """Totals since the daemon started. The audit is in the checkpoints; these are for people."""

    rows: int = 0
    filtered: int = 0
    dead_lettered: int = 0
    flushes: int = 0
    fenced: int = 0
    retries: int = 0
    reclaims: int = 0
    suspicious_deaths: int = 0  # of workers, over messages of one of its lanes
    condemned: int = 0
    last_flush_seconds: Optional[float] = None


@dataclass
class Pipeline:
    """One pipeline's state."""

    config: PipelineConfig
    brake: ThreeStrikes
    holds: dict[Hold, str] = field(default_factory=dict)
    blocked_flights: dict[int, str] = field(default_factory=dict)
    contended_flights: dict[int, str] = field(default_factory=dict)
    dead_letters: DeadLetterWindow = field(default_factory=lambda: DeadLetterWindow(60.0))
    written: RateMeter = field(default_factory=RateMeter)
    consumed: RateMeter = field(default_factory=RateMeter)
    counters: Counters = field(default_factory=Counters)
    fenced_at: deque[float] = field(default_factory=deque)
    fenced_alarm: bool = False
    full_since: Optional[float] = None
    buffered_bytes: int = 0

    @classmethod
    def from_config(cls, config: PipelineConfig) -> Pipeline:
        """A pipeline that has seen nothing yet."""
        brake = ThreeStrikes(config.slow_flush_threshold_seconds, config.max_slow_flushes, config.pause_seconds)
        return cls(config, brake, dead_letters=DeadLetterWindow(config.dead_letter_window_seconds))

    @property
    def name(self) -> str:
        """Its name, which keys its checkpoints."""
        return self.config.name

    @property
    def may_fetch(self) -> bool:
        """Whether its partitions may be read."""
        return not self.holds

    @property
    def may_dispatch(self) -> bool:
        """Whether new flights may be sent."""
        return not STOPS_DISPATCH.intersection(self.holds)

    def hold(self, why: Hold, reason: str) -> bool:
        """Add a hold; True if it is new (an old one gets the new reason)."""
        new = why not in self.holds
        self.holds[why] = reason
        return new

    def release(self, why: Hold) -> bool:
        """Take a hold away; True if it was there."""
        return self.holds.pop(why, None) is not None

    def state(self) -> tuple[str, str]:
        """The state's name and the reason, for people."""
        for why in Hold:
            if why in self.holds:
                return why.value, self.holds[why]
        return "running", ""

    def too_many_dead_letters(self) -> bool:
        """Whether so large a part of the messages is dead that going on would drain the topic into the dead letters."""
        window = self.dead_letters
        return (
            window.dead >= self.config.dead_letter_minimum
            and window.dead > self.config.dead_letter_ratio * window.messages
        )
