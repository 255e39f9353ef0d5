"""The report at the end of a run: what was produced, what became of it, and whether that is good (pure)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Optional

from speedlayer.supervisor.demo.database import Audit
from speedlayer.supervisor.demo.recorder import BrakeEvent


@dataclass(frozen=True)
class PhaseReport:
    """One phase, measured. ``capacity`` is what the database could take (rows/s), None if nothing was flushed."""

    name: str
    began: float
    ended: float
    produced_per_second: float
    written_per_second: float
    capacity: Optional[float]


@dataclass(frozen=True)
class Report:
    """Everything that a run found out."""

    kind: str  # "demo" or "load test"
    broker: str
    database: str
    seconds: float
    workers: int
    batch_rows: int
    produced: int
    unread: int  # messages that were not written when the waiting ended
    audit: Audit
    phases: tuple[PhaseReport, ...]
    brake_events: tuple[BrakeEvent, ...]
    needs_brake: bool
    peak_lag: int
    peak_memory_bytes: Optional[int]
    daemon_exit_code: int
    plot: Optional[str]

    @property
    def problems(self) -> list[str]:
        """What keeps the run from being a success, in sentences; empty if it was one."""
        problems = []
        if self.audit.lost:
            unread = f" ({self.unread:,} of them were still unread at the end)" if self.unread else ""
            problems.append(f"{self.audit.lost:,} messages are neither row nor dead letter{unread}")
        if self.audit.surplus:
            problems.append(f"{self.audit.surplus:,} rows or dead letters are there twice, or differ from the message")
        if (
            self.produced != self.audit.rows + self.audit.dead_letters
            and not self.audit.lost
            and not self.audit.surplus
        ):
            problems.append("the counts of messages, rows and dead letters do not add up")
        if self.daemon_exit_code != 0:
            problems.append(f"the daemon's exit code was {self.daemon_exit_code}")
        if self.needs_brake and not self.brake_events:
            problems.append("the brake never tripped")
        elif self.needs_brake and not any(event.ended is not None for event in self.brake_events):
            problems.append("the brake tripped and never let go")
        return problems

    def as_json(self) -> str:
        """The report for programs."""
        values: dict[str, Any] = {**asdict(self), "problems": self.problems, "ok": not self.problems}
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

    def as_text(self) -> str:
        """The report for people."""
        lines = [
            f"speedlayer {self.kind}: {self.seconds:.0f} s, {self.workers} workers, {self.batch_rows:,} rows a batch",
            f"  {self.broker}",
            f"  {self.database}",
            "",
            *self._phase_lines(),
            "",
            *(f"  {name:<18}{value}" for name, value in self._figures()),
            "",
        ]
        if self.problems:
            lines += ["NOT GOOD:", *(f"  - {problem}" for problem in self.problems)]
        else:
            brake = ", and the brake tripped and let go by itself" if self.needs_brake else ""
            lines.append(f"GOOD: nothing was lost or written twice{brake}.")
        return "\n".join(lines)

    def _phase_lines(self) -> list[str]:
        lines = [f"  {'phase':<14}{'from':>7}{'to':>7}{'produced/s':>12}{'written/s':>11}   measured capacity"]
        for phase in self.phases:
            capacity = "nothing was written" if phase.capacity is None else f"{phase.capacity:,.0f} rows/s"
            lines.append(
                f"  {phase.name:<14}{phase.began:>6.0f}s{phase.ended:>6.0f}s{phase.produced_per_second:>12,.0f}"
                f"{phase.written_per_second:>11,.0f}   {capacity}"
            )
        lines.append("  (capacity: rows written for each second in which a flush was open)")
        return lines

    def _figures(self) -> list[tuple[str, str]]:
        figures = [
            ("messages produced", f"{self.produced:,}"),
            ("rows", f"{self.audit.rows:,}"),
            ("dead letters", f"{self.audit.dead_letters:,}"),
            ("lost", f"{self.audit.lost:,}"),
            ("duplicated", f"{self.audit.surplus:,}"),
            ("brake events", self._brake_text()),
            ("most waiting", f"{self.peak_lag:,} messages"),
        ]
        if self.audit.latency is not None:
            latency = self.audit.latency
            figures.append(
                ("produce to row", f"p50 {_duration(latency.p50_seconds)}, p99 {_duration(latency.p99_seconds)}")
            )
        memory = "not known here" if self.peak_memory_bytes is None else f"{self.peak_memory_bytes / 2**20:,.0f} MB"
        figures.append(("peak memory", f"{memory} (PSS of the supervisor and {self.workers} workers)"))
        if self.plot is not None:
            figures.append(("plot", self.plot))
        return figures

    def _brake_text(self) -> str:
        if not self.brake_events:
            return "0"
        pauses = ", ".join(
            f"{event.began:.0f}–{event.ended:.0f} s"
            if event.ended is not None
            else f"{event.began:.0f} s, never let go"
            for event in self.brake_events
        )
        return f"{len(self.brake_events)} ({pauses})"


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms" if seconds < 1 else f"{seconds:,.1f} s"
