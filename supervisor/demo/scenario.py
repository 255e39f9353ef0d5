"""What happens when: the phases of a run, each with its rate and with what the database is left with (pure).

The demo plays the article's Black Friday: 100 messages/s, then 300 while the database falls to 50 rows/s, then 100
again. Another ``rate`` keeps the proportions: the spike is 3 times the rate, the slow database gives half of it, and a
batch is one second of the normal rate (100 rows at the article's figures), so the same flushes are slow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

SPIKE_FACTOR = 3.0
SLOW_FACTOR = 0.5
BATCH_SECONDS_OF_RATE = 1.0

# The article's three phases, as shares of the whole. The spike needs three slow flushes and a pause to be seen.
NORMAL_SHARE = 0.2
SPIKE_SHARE = 0.4

# Below this the spike is too short for three strikes (two flushes of 4 s each by two workers) and a pause of 5 s.
MINIMUM_SECONDS = 35.0


@dataclass(frozen=True)
class Phase:
    """A stretch of the run. ``capacity`` is what a competitor leaves of the database (rows/s); None: all of it."""

    name: str
    seconds: float
    rate: float
    capacity: Optional[float] = None


@dataclass(frozen=True)
class Scenario:
    """The phases of a run, in order, and the batch size that goes with them."""

    phases: tuple[Phase, ...]
    batch_rows: int

    @property
    def seconds(self) -> float:
        """How long messages are produced."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def messages(self) -> int:
        """How many messages are produced in all."""
        return self.due(self.seconds)

    def due(self, elapsed: float) -> int:
        """How many messages are due ``elapsed`` seconds after the start."""
        total = 0.0
        for phase in self.phases:
            total += phase.rate * min(max(elapsed, 0.0), phase.seconds)
            elapsed -= phase.seconds
        # Rounded to the nearest: the sum of many small parts may miss a whole number by a hair.
        return int(total + 1e-6)

    def phase_at(self, elapsed: float) -> int:
        """The number of the phase that runs ``elapsed`` seconds after the start; the last one goes on for ever."""
        for number, phase in enumerate(self.phases):
            elapsed -= phase.seconds
            if elapsed < 0:
                return number
        return len(self.phases) - 1

    def phase_ends_at(self, number: int) -> float:
        """How many seconds after the start the phase of this number ends."""
        return sum(phase.seconds for phase in self.phases[: number + 1])

    @property
    def largest_backlog(self) -> int:
        """How many messages may wait at most, if in the worst case nothing at all is read during a slow phase."""
        return max(
            (int(phase.rate * phase.seconds) for phase in self.phases if phase.capacity is not None),
            # Without a slow phase some seconds of the highest rate may wait, while the daemon starts or hiccups.
            default=int(10.0 * max(phase.rate for phase in self.phases)),
        )


def black_friday(seconds: float, rate: float) -> Scenario:
    """The article's story in ``seconds``, around a normal rate of ``rate`` messages/s."""
    spike_seconds = SPIKE_SHARE * seconds
    normal_seconds = NORMAL_SHARE * seconds
    return Scenario(
        (
            Phase("normal", normal_seconds, rate),
            Phase("Black Friday", spike_seconds, SPIKE_FACTOR * rate, capacity=SLOW_FACTOR * rate),
            Phase("recovery", seconds - normal_seconds - spike_seconds, rate),
        ),
        batch_rows=max(1, round(BATCH_SECONDS_OF_RATE * rate)),
    )


def load_test(
    seconds: float, rate: float, spike: Optional[float], capacity: Optional[float], batch_rows: int
) -> Scenario:
    """A steady load; with ``spike``, the middle third runs at that rate; with ``capacity``, a competitor slows it."""
    if spike is None:
        return Scenario((Phase("steady", seconds, rate, capacity),), batch_rows)
    third = seconds / 3
    return Scenario(
        (Phase("steady", third, rate), Phase("spike", third, spike, capacity), Phase("after", third, rate)), batch_rows
    )
