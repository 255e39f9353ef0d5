"""What a campaign found, as Markdown to publish, as lines for a terminal, and as numbers for a program (pure)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from chaos.audit import Audit
from chaos.nemesis import Injected
from chaos.observer import Look, Stall

COLUMNS = 100
BLOCKS = " ▁▂▃▄▅▆▇█"

# No partition may stand still for longer than this while no fault is under way.
PROMISED_SECONDS = 30.0

LONGEST_STALLS = 5


@dataclass
class Result:
    """Everything that a run found. Times are seconds since its start, but for ``started`` (a date for people)."""

    command: str
    started: str
    seconds: float
    machine: str
    setting: str
    began: float  # on the clock of `injected`, `looks` and `stalls`
    injected: Sequence[Injected]
    audit: Audit | None
    stalls: Sequence[Stall]
    looks: Sequence[Look]
    counters: Mapping[str, int]
    ends: Mapping[str, int]  # why supervisors ended, and how often
    recovered_seconds: float | None  # from the end of the last fault until all was written
    failures: list[str] = field(default_factory=list)
    folder: str = ""

    # --- verdict ----------------------------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """What breaks a promise, or makes the run worth nothing. Empty: all is well."""
        problems = list(self.failures)
        if self.audit is None:
            problems.append("the tables were not compared with the topics")
        elif not self.audit.clean:
            problems += self.audit.examples
        if self.worst is not None and self.undisturbed(self.worst) > PROMISED_SECONDS:
            seconds = self.undisturbed(self.worst)
            problems.append(f"a stall went on for {seconds:.1f} s while no fault was under way: {self.worst}")
        if not self.struck:
            problems.append("no fault struck")
        return problems

    @property
    def passed(self) -> bool:
        return not self.problems()

    @property
    def struck(self) -> list[Injected]:
        return [one for one in self.injected if one.struck is not None]

    @property
    def missed(self) -> list[Injected]:
        return [one for one in self.injected if one.struck is None]

    # --- stalls -----------------------------------------------------------------------------------------------------

    def undisturbed(self, stall: Stall) -> float:
        return stall.undisturbed([(one.began, one.ended, one.kind) for one in self.struck])

    @property
    def longest(self) -> Stall | None:
        return max(self.stalls, key=lambda stall: stall.seconds, default=None)

    @property
    def worst(self) -> Stall | None:
        """The one that went on for longest while no fault was under way."""
        return max(self.stalls, key=self.undisturbed, default=None)

    def around(self, stall: Stall) -> list[Injected]:
        return [one for one in self.struck if one.overlaps(stall.began, stall.ended)]

    # --- forms ------------------------------------------------------------------------------------------------------

    def numbers(self) -> dict[str, Any]:
        """For a program: a test, say."""
        return {
            "command": self.command,
            "passed": self.passed,
            "problems": self.problems(),
            "seconds": round(self.seconds, 1),
            "struck": self._by_kind(self.struck),
            "missed": [f"{one.kind}: {one.missed}" for one in self.missed],
            "audit": None if self.audit is None else asdict(self.audit),
            "longest_stall_seconds": 0.0 if self.longest is None else round(self.longest.seconds, 1),
            "longest_undisturbed_stall_seconds": 0.0 if self.worst is None else round(self.undisturbed(self.worst), 1),
            "recovered_seconds": None if self.recovered_seconds is None else round(self.recovered_seconds, 1),
            "counters": dict(self.counters),
            "ends": dict(self.ends),
        }

    def facts(self) -> list[tuple[str, str]]:
        audit = self.audit or Audit()
        unknown = "?" if self.audit is None else None
        return [
            ("faults that struck", f"{len(self.struck)} of {len(self._by_kind(self.struck))} kinds"),
            ("messages acknowledged by Kafka", f"{self.counters['messages']:,}"),
            ("rows compared", unknown or f"{audit.rows:,}"),
            ("lost", unknown or f"{audit.lost}"),
            ("duplicated", unknown or f"{audit.duplicated}"),
            ("altered", unknown or f"{audit.altered}"),
            ("out of order", unknown or f"{audit.disordered}"),
            ("neither row nor message explains it", unknown or f"{audit.unexplained}"),
            ("dead letters, each one expected", unknown or f"{audit.dead:,}"),
            ("taken by retention before they were read, as recorded", unknown or f"{audit.skipped:,}"),
            ("longest stall of a partition", _seconds(self.longest and self.longest.seconds)),
            ("longest stall while no fault was under way", _seconds(self.worst and self.undisturbed(self.worst))),
            ("all written after the last fault", _seconds(self.recovered_seconds)),
            ("supervisors started again", f"{self.counters['supervisor restarts']}"),
            ("workers started again by their supervisor", f"{self.counters['worker restarts']}"),
            ("flushes", f"{self.counters['flushes']:,}"),
            ("flushes that were fenced", f"{self.counters['fenced']}"),
            ("partitions claimed again in doubt", f"{self.counters['reclaims']}"),
            ("transactions tried again", f"{self.counters['retries']}"),
        ]

    def markdown(self) -> str:
        lines = [
            "# Fault campaign",
            "",
            f"**{'Passed' if self.passed else 'FAILED'}**: `{self.command}`, {self.started}, "
            f"{self.seconds / 60:.1f} minutes. {self.machine}.",
            "",
            self.setting,
            "",
            *_table(("", ""), self.facts()),
            "",
        ]
        if self.problems():
            lines += ["## What is wrong", "", *(f"- {problem}" for problem in self.problems()), ""]
        lines += ["## Faults", "", *_table(("fault", "struck"), sorted(self._by_kind(self.struck).items())), ""]
        if self.missed:
            lines += ["Found nothing to strike:", "", *(f"- {one.kind}: {one.missed}" for one in self.missed), ""]
        lines += ["## Throughput", "", "```", *self.plot(), "```", ""]
        lines += ["## Longest stalls", "", *self._stalls(), ""]
        lines += ["## Why supervisors ended", "", *_table(("cause", "times"), sorted(self.ends.items())), ""]
        lines += ["## Course of events", "", "```", *self.course(), "```", ""]
        return "\n".join(lines)

    def terminal(self) -> str:
        width = max(len(name) for name, _ in self.facts())
        lines = [*self.plot(), ""]
        lines += [f"{name:{width}}  {text}" for name, text in self.facts()]
        lines += ["", *self._stalls()]
        lines += [f"missed: {one.kind}: {one.missed}" for one in self.missed]
        lines += [f"WRONG: {problem}" for problem in self.problems()]
        lines += ["", f"{'passed' if self.passed else 'FAILED'}: {self.command}; everything is in {self.folder}"]
        return "\n".join(lines)

    def course(self) -> list[str]:
        """Every fault in the order of its beginning."""
        return [
            f"{self._at(one.began)} {'' if one.ended is None else f'{one.ended - one.began:5.1f} s'}  {one}"
            for one in sorted(self.injected, key=lambda one: one.began)
        ]

    def plot(self) -> list[str]:
        """Rows a second over time, what is behind, and below them a bar for each part of the system that was hurt."""
        columns = min(COLUMNS, max(10, int(self.seconds)))
        width = self.seconds / columns
        rates, behind = self._curves(columns, width)
        lines = [
            f"{'messages written a second':>26} {_bars(rates)} {max(rates, default=0):,.0f} at most",
            f"{'messages behind':>26} {_bars(behind)} {max(behind, default=0):,.0f} at most",
        ]
        for part in sorted({one.part for one in self.struck}):
            bar = [" "] * columns
            for one in self.struck:
                if one.part == part:
                    first = int((one.began - self.began) / width)
                    last = int(((one.ended or one.began) - self.began) / width)
                    for column in range(max(0, first), min(columns - 1, last) + 1):
                        bar[column] = "x"
            lines.append(f"{'faults: ' + part:>26} {''.join(bar)}")
        lines.append(f"{'':>26} 0{f'{self.seconds:.0f} s':>{columns - 1}}")
        return lines

    def _curves(self, columns: int, width: float) -> tuple[list[float], list[float]]:
        known = [look for look in self.looks if look.at >= self.began and look.written is not None]
        rates, behind = [0.0] * columns, [0.0] * columns
        for before, after in itertools.pairwise(known):
            column = min(columns - 1, max(0, int((after.at - self.began) / width)))
            # A fail-over that loses commits takes the count back: no rate is below zero.
            rates[column] += max(0, (after.written or 0) - (before.written or 0)) / width
            behind[column] = max(behind[column], after.behind or 0)
        return rates, behind

    def _stalls(self) -> list[str]:
        longest = sorted(self.stalls, key=lambda stall: -stall.seconds)[:LONGEST_STALLS]
        worst = sorted(self.stalls, key=lambda stall: -self.undisturbed(stall))[:LONGEST_STALLS]
        told = []
        for stall in dict.fromkeys(longest + worst):
            faults = ", ".join(dict.fromkeys(one.kind for one in self.around(stall))) or "no fault"
            told.append(
                f"- at {self._at(stall.began)}: {stall}, {self.undisturbed(stall):.1f} s of it undisturbed ({faults})"
            )
        return told or ["- none was longer than three seconds"]

    def _at(self, at: float) -> str:
        seconds = int(at - self.began)
        return f"{seconds // 60:3}:{seconds % 60:02}"

    @staticmethod
    def _by_kind(injected: Iterable[Injected]) -> dict[str, int]:
        counts: dict[str, int] = {}
        for one in injected:
            counts[one.kind] = counts.get(one.kind, 0) + 1
        return counts


def _seconds(seconds: float | None) -> str:
    return "none" if seconds is None else f"{seconds:.1f} s"


def _bars(values: Sequence[float]) -> str:
    most = max(values, default=0) or 1
    return "".join(BLOCKS[min(8, round(8 * value / most))] for value in values)


def _table(head: tuple[str, str], rows: Iterable[tuple[str, object]]) -> list[str]:
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
