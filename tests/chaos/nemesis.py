"""Carries out the bursts of a schedule: begins and ends the faults, and keeps the record of what struck when.

Runs in the campaign's process, each fault on a thread of its own. A fault that finds nothing to strike says so
(`Missed`) and is reported as one that missed; one that can not be carried out, for want of a right say, fails the
campaign. The faults themselves are in `chaos.faults`.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chaos.schedule import Burst, Strike

if TYPE_CHECKING:
    from chaos.faults import Fault, World

# A thread that carries out a fault ends within this time after the fault's planned end, or something hangs: as long as
# a broker or a supervisor may take to start on a busy machine, twice.
MOST_SECONDS = 240.0


class Missed(Exception):
    """There was nothing to strike; the message says what was missing."""


@dataclass(eq=False)
class Injected:
    """A fault that was or is under way; times are those of `time.monotonic`."""

    kind: str
    part: str
    seed: int
    began: float
    ended: float | None = None
    struck: str | None = None
    missed: str | None = None

    def seconds(self, now: float) -> float:
        return (self.ended or now) - self.began

    def overlaps(self, start: float, end: float) -> bool:
        return self.struck is not None and self.began <= end and (self.ended is None or self.ended >= start)

    def __str__(self) -> str:
        return f"{self.kind}: {self.struck or self.missed or 'under way'}"


@dataclass
class Record:
    """Everything that was injected so far. Written by the faults' threads, read by whoever reports."""

    injected: list[Injected] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, one: Injected) -> None:
        with self._lock:
            self.injected.append(one)

    def fail(self, what: str) -> None:
        with self._lock:
            self.failures.append(what)

    def all(self) -> list[Injected]:
        with self._lock:
            return list(self.injected)

    def now(self) -> list[Injected]:
        return [one for one in self.all() if one.ended is None]

    def windows(self) -> list[tuple[float, float | None, str]]:
        """When something was disturbed: what the stalls are measured against."""
        return [(one.began, one.ended, one.kind) for one in self.all() if one.missed is None]

    def counts(self) -> Counter[str]:
        return Counter(one.kind for one in self.all() if one.struck is not None)

    def misses(self) -> list[Injected]:
        return [one for one in self.all() if one.missed is not None]


class Nemesis:
    """Carries out one burst after the other. ``over`` ends whatever is under way."""

    def __init__(
        self,
        world: World,
        kinds: Iterable[type[Fault]],
        record: Record,
        over: threading.Event,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._world, self._record, self._over, self._tell = world, record, over, tell
        self._kinds: Mapping[str, type[Fault]] = {kind.name: kind for kind in kinds}

    def burst(self, burst: Burst) -> None:
        """Carry out a burst; returns when its last fault has ended and what it broke is whole again."""
        self._settle([self._begin(strike) for strike in burst.strikes])

    def _begin(self, strike: Strike) -> tuple[Fault, threading.Thread]:
        fault = self._kinds[strike.kind](self._world, strike)
        thread = threading.Thread(target=self._carry_out, args=(fault, strike), name=f"fault {strike.kind}")
        thread.start()
        return fault, thread

    def _settle(self, begun: Sequence[tuple[Fault, threading.Thread]]) -> None:
        deadline = time.monotonic() + MOST_SECONDS
        for fault, thread in begun:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                self._record.fail(f"the fault {fault.name} does not end")
                self._over.set()

    def _carry_out(self, fault: Fault, strike: Strike) -> None:
        try:
            if not self._over.wait(strike.after_seconds):
                self._strike(fault, strike)
        except BaseException:
            self._record.fail(f"the fault {fault.name} could not be carried out:\n{traceback.format_exc()}")
            self._over.set()

    def _strike(self, fault: Fault, strike: Strike) -> None:
        injected = Injected(fault.name, fault.part, strike.seed, time.monotonic())
        self._record.add(injected)
        try:
            try:
                self._tell(f"{fault.name} begins")
                fault.begin()
                if fault.lasting:
                    self._over.wait(strike.seconds)
            finally:
                fault.end()
            injected.struck = fault.evidence
            if injected.struck is None:
                injected.missed = "nothing shows that it struck"
        except Missed as missed:
            injected.missed = str(missed)
        finally:
            injected.ended = time.monotonic()
        self._tell(f"{'missed' if injected.missed else 'ended'}: {injected}")
        fault.settle()
