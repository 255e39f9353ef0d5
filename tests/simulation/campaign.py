"""Many histories, on several processes; and what to tell about one that failed: its story, shrunk."""

from __future__ import annotations

import multiprocessing
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Optional

from simulation.history import History, Outcome
from simulation.mutants import MUTANTS
from simulation.plan import Plan, draw
from simulation.supervisor import Coverage

# Seeds that one process takes at a time: long enough to make handing them out cheap.
SHARE = 50

# Attempts at a shorter history; each takes some 20 ms.
SHRINK_ATTEMPTS = 400


@dataclass
class Summary:
    """What many histories came to."""

    histories: int = 0
    events: int = 0
    fewest_events: int = 1_000_000
    fewest_faults: int = 1_000_000
    fewest_supervisors: int = 1_000_000
    faults: int = 0
    messages: int = 0
    virtual_seconds: float = 0.0
    wall_seconds: float = 0.0
    failures: dict[int, str] = field(default_factory=dict)
    coverage: Coverage = field(default_factory=set)

    def add(self, outcome: Outcome) -> None:
        """Count one history."""
        self.histories += 1
        self.events += outcome.events
        self.fewest_events = min(self.fewest_events, outcome.events)
        self.fewest_faults = min(self.fewest_faults, outcome.faults)
        self.fewest_supervisors = min(self.fewest_supervisors, outcome.plan.supervisors)
        self.faults += outcome.faults
        self.messages += outcome.messages
        self.virtual_seconds += outcome.seconds
        self.coverage |= outcome.coverage
        if outcome.fault is not None:
            self.failures[outcome.plan.seed] = outcome.fault

    def merge(self, other: Summary) -> None:
        """Count what another process has counted."""
        self.histories += other.histories
        self.events += other.events
        self.fewest_events = min(self.fewest_events, other.fewest_events)
        self.fewest_faults = min(self.fewest_faults, other.fewest_faults)
        self.fewest_supervisors = min(self.fewest_supervisors, other.fewest_supervisors)
        self.faults += other.faults
        self.messages += other.messages
        self.virtual_seconds += other.virtual_seconds
        self.coverage |= other.coverage
        self.failures.update(other.failures)

    def __str__(self) -> str:
        per_minute = 60 * self.histories / max(self.wall_seconds, 0.001)
        return (
            f"{self.histories} histories ({per_minute:.0f} a minute), {self.events} events, {self.faults} faults,"
            f" {self.messages} messages, {self.virtual_seconds / 3600:.1f} h of virtual time,"
            f" {len(self.coverage)} (state, event) pairs; each history had at least {self.fewest_events} events,"
            f" {self.fewest_faults} faults, {self.fewest_supervisors} supervisors; {len(self.failures)} failed"
        )

    def coverage_table(self) -> str:
        """The pairs of state and event that have met, by state."""
        states: dict[str, list[str]] = {}
        for state, event in sorted(self.coverage):
            states.setdefault(state, []).append(event)
        return "\n".join(f"{state:22} {', '.join(events)}" for state, events in states.items())


def run_seed(seed: int) -> Outcome:
    """One history of the true code."""
    history = History(draw(seed))
    history.record_coverage()
    return history.run()


def _run_share(seeds: range) -> Summary:
    summary = Summary()
    for seed in seeds:
        summary.add(run_seed(seed))
    return summary


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))


def run_seeds(start: int, count: int, processes: int) -> Summary:
    """Run the histories of ``count`` seeds from ``start`` on."""
    begun, total = time.monotonic(), Summary()
    shares = [range(first, min(first + SHARE, start + count)) for first in range(start, start + count, SHARE)]
    with _pool(processes) as pool:
        for summary in pool.map(_run_share, shares):
            total.merge(summary)
    total.wall_seconds = time.monotonic() - begun
    return total


def run_for(start: int, seconds: float, processes: int) -> Iterator[Summary]:
    """Run histories for so long; yields the sum now and then."""
    begun, total = time.monotonic(), Summary()
    shares = processes * 4
    with _pool(processes) as pool:
        while time.monotonic() - begun < seconds:
            block = [range(start + SHARE * index, start + SHARE * (index + 1)) for index in range(shares)]
            start += SHARE * shares
            for summary in pool.map(_run_share, block):
                total.merge(summary)
            total.wall_seconds = time.monotonic() - begun
            yield total


# --- mutants --------------------------------------------------------------------------------------------------------


def catch(name: str, seeds: int) -> Optional[tuple[int, str]]:
    """The first seed whose history goes wrong with a mutant, and how; None if none does."""
    with MUTANTS[name]() as protocols:
        for seed in range(seeds):
            fault = History(draw(seed), protocols=protocols).run().fault
            if fault is not None:
                return seed, fault
    return None


def catch_all(names: Iterable[str], seeds: int, processes: int) -> dict[str, Optional[tuple[int, str]]]:
    """`catch` for each of the mutants."""
    listed = list(names)
    with _pool(processes) as pool:
        return dict(zip(listed, pool.map(catch, listed, [seeds] * len(listed)), strict=True))


# --- a history that failed ------------------------------------------------------------------------------------------


def kind_of(fault: str) -> str:
    """What sort of fault it is: its words without the numbers."""
    return re.sub(r"[ABC]?\d+(\.\d+)?", "#", fault)[:60]


def shrink(plan: Plan, fails: Callable[[Plan], Optional[str]]) -> Plan:
    """Leave out faults and load, as long as the history still fails in the same way."""
    first = fails(plan)
    if first is None:
        return plan
    kind, attempts = kind_of(first), 0
    for what in ("faults", "waves", "faults"):
        size = max(1, len(getattr(plan, what)) // 2)
        while size and attempts < SHRINK_ATTEMPTS:
            index, shorter = 0, False
            while index < len(getattr(plan, what)) and attempts < SHRINK_ATTEMPTS:
                gone = set(range(index, index + size))
                candidate = plan.without(**{what: gone})
                attempts += 1
                fault = fails(candidate)
                if fault is not None and kind_of(fault) == kind:
                    plan, shorter = candidate, True
                else:
                    index += size
            if not shorter or size > 1:
                size //= 2
    return plan


def story(plan: Plan, fails: Callable[[Plan, Callable[[str], None]], Optional[str]]) -> str:
    """A history in words."""
    lines: list[str] = []
    fault = fails(plan, lines.append)
    told = [f"seed {plan.seed}: {fault}", "", repr(plan), "", *lines, "", f"BROKEN: {fault}"]
    return "\n".join(told)


def explain(seed: int) -> str:
    """The story of a seed that fails, shrunk."""

    def fails(plan: Plan) -> Optional[str]:
        return History(plan).run().fault

    def tell(plan: Plan, say: Callable[[str], None]) -> Optional[str]:
        return History(plan, say).run().fault

    plan = draw(seed)
    short = shrink(plan, fails)
    left = (
        f"{len(short.faults)} of {len(plan.faults)} faults and {len(short.waves)} of {len(plan.waves)} waves are left"
    )
    return f"{story(short, tell)}\n\n({left}; replay: scripts/simulate --seed {seed} --story)"
