"""When which fault strikes: bursts of overlapping faults with calm between them, all of it from one seed.

Whatever takes longer than planned (a broker's restart, say) moves what comes after it; the order, the targets and the
durations stay those of the seed.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

# How many faults one burst has, as often as they stand here.
BURST_SIZES = (1, 2, 2, 3, 3, 4, 4, 5)

# The faults of a burst begin within so many seconds, so that most of them overlap.
SPREAD_SECONDS = 10.0

# Most calms are as short as they are in life. Every third is so long that whatever is not written again within 30 s,
# which is what is promised, shows.
SHORT_CALM_SECONDS = (4.0, 12.0)
LONG_CALM_SECONDS = 35.0
LONG_CALM_EVERY = 3


class Kind(Protocol):
    """A kind of fault, as far as the schedule must know it."""

    name: str
    seconds: tuple[float, float]

    @classmethod
    def keys(cls, target: int) -> frozenset[Hashable]:
        """What the fault takes for itself: two faults that share a key are never in one burst."""


@dataclass(frozen=True)
class Strike:
    """One fault to come: ``target`` picks whom it meets, ``seed`` decides whatever else is left to chance."""

    kind: str
    target: int
    after_seconds: float
    seconds: float
    seed: int


@dataclass(frozen=True)
class Burst:
    """Faults that overlap, and the calm after the last of them."""

    number: int
    strikes: tuple[Strike, ...]
    calm_seconds: float


def bursts(
    seed: int, kinds: Sequence[type[Kind]], members: int, *, sizes: Sequence[int] = BURST_SIZES
) -> Iterator[Burst]:
    """Bursts without end. The kinds come like cards from a shuffled deck: each once before any comes again."""
    chance = random.Random(seed)
    deck: list[type[Kind]] = []
    number = 0
    while True:
        number += 1
        strikes: list[Strike] = []
        taken: set[Hashable] = set()
        passed: list[type[Kind]] = []
        size = chance.choice(sizes)
        while len(strikes) < size and len(passed) < len(kinds):
            if not deck:
                deck = chance.sample(kinds, len(kinds))
            kind = deck.pop(0)
            target = chance.randrange(members)
            if kind.keys(target) & taken:
                passed.append(kind)
                continue
            taken |= kind.keys(target)
            after = 0.0 if not strikes else chance.uniform(0, SPREAD_SECONDS)
            strikes.append(Strike(kind.name, target, after, chance.uniform(*kind.seconds), chance.getrandbits(32)))
        deck = passed + deck
        long = number % LONG_CALM_EVERY == 0
        yield Burst(number, tuple(strikes), LONG_CALM_SECONDS if long else chance.uniform(*SHORT_CALM_SECONDS))
