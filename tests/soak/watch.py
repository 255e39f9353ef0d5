"""Watches the memory, descriptors and threads of a daemon's processes, and judges their course. Runs in the soak."""

from __future__ import annotations

import csv
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import psutil

SAMPLE_SECONDS = 5.0

# What a process takes in its first minutes says nothing about the rest of its life.
SETTLING_SECONDS = 15 * 60.0

# Descriptors are compared at rest: no fault is under way, and for so long none was. Connections are made anew by then.
REST_SECONDS = 20.0

SLOPE_LIMIT_MB_PER_HOUR = 1.0
DESCRIPTORS_LIMIT = 2

MB = 1024 * 1024


@dataclass(frozen=True)
class Sample:
    """One look at one process. ``seconds`` is since the start; ``rest`` says that no fault was near."""

    seconds: float
    role: str
    pid: int
    rss_bytes: int
    uss_bytes: int
    descriptors: int
    threads: int
    rest: bool


@dataclass(frozen=True)
class Course:
    """What became of one process after it had settled."""

    role: str
    pid: int
    minutes: float
    rss_mb: tuple[float, float]  # the first and the last minute's median
    slope_mb_per_hour: float
    uss_slope_mb_per_hour: float
    descriptors: tuple[int, int, int]  # least, median and most at rest

    @property
    def ok(self) -> bool:
        """Whether it grows slowly enough, and keeps its descriptors."""
        least, median, most = self.descriptors
        return (
            self.slope_mb_per_hour < SLOPE_LIMIT_MB_PER_HOUR
            and median - least <= DESCRIPTORS_LIMIT
            and most - median <= DESCRIPTORS_LIMIT
        )

    def __str__(self) -> str:
        least, median, most = self.descriptors
        return (
            f"{self.role} (pid {self.pid}, {self.minutes:.0f} min after it settled): RSS {self.rss_mb[0]:.1f} → "
            f"{self.rss_mb[1]:.1f} MB, slope {self.slope_mb_per_hour:+.2f} MB/h (of what is its own alone "
            f"{self.uss_slope_mb_per_hour:+.2f}), descriptors at rest {least}–{most}, median {median}"
        )


class Watch:
    """Samples until the ``with`` ends, into a CSV file. ``roles`` names the processes that are there now."""

    def __init__(self, path: Path, roles: Callable[[], dict[str, int]], at_rest: Callable[[], bool]) -> None:
        self._roles, self._at_rest = roles, at_rest
        self._file = path.open("w", newline="")
        self._csv = csv.writer(self._file)
        self._csv.writerow([declared.name for declared in fields(Sample)])
        self._over = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._began = time.monotonic()
        self.samples: list[Sample] = []

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(30)
        self._file.close()
        if self._failure is not None:
            raise self._failure

    def latest(self) -> dict[str, Sample]:
        """The last sample of each role."""
        return {sample.role: sample for sample in self.samples[-20:]}

    def _run(self) -> None:
        try:
            while not self._over.wait(SAMPLE_SECONDS):
                self._look()
        except BaseException as failure:  # handed on at the end of the `with`
            self._failure = failure

    def _look(self) -> None:
        now, rest = time.monotonic() - self._began, self._at_rest()
        for role, pid in self._roles().items():
            try:
                process = psutil.Process(pid)
                memory = process.memory_full_info()
                sample = Sample(
                    round(now, 1), role, pid, memory.rss, memory.uss, process.num_fds(), process.num_threads(), rest
                )
            except psutil.NoSuchProcess:
                continue  # it was killed just now
            self.samples.append(sample)
            self._csv.writerow(astuple(sample))
        self._file.flush()


def courses(samples: Sequence[Sample], settling_seconds: float = SETTLING_SECONDS) -> list[Course]:
    """The course of each process that was there at the end and had settled long before."""
    end = max(sample.seconds for sample in samples)
    by_process: dict[tuple[str, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        by_process[sample.role, sample.pid].append(sample)
    found = []
    for (role, pid), taken in sorted(by_process.items()):
        settled = [sample for sample in taken if sample.seconds - taken[0].seconds >= settling_seconds]
        if len(settled) < 3 or settled[-1].seconds < end - 60 or settled[-1].seconds - settled[0].seconds < end / 3:
            continue
        found.append(_course(role, pid, settled))
    return found


def _course(role: str, pid: int, settled: Sequence[Sample]) -> Course:
    rss = by_minute([(sample.seconds, sample.rss_bytes / MB) for sample in settled])
    uss = by_minute([(sample.seconds, sample.uss_bytes / MB) for sample in settled])
    descriptors = [sample.descriptors for sample in settled if sample.rest]
    return Course(
        role,
        pid,
        (settled[-1].seconds - settled[0].seconds) / 60,
        (rss[0][1], rss[-1][1]),
        slope_per_hour(rss),
        slope_per_hour(uss),
        (min(descriptors), int(statistics.median(descriptors)), max(descriptors)),
    )


def by_minute(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The median of each minute: (s, value)."""
    minutes: dict[int, list[float]] = defaultdict(list)
    for seconds, value in points:
        minutes[int(seconds // 60)].append(value)
    return [(minute * 60.0, statistics.median(values)) for minute, values in sorted(minutes.items())]


def slope_per_hour(points: Sequence[tuple[float, float]]) -> float:
    """The slope by Theil and Sen: the median of the slopes of all pairs. One step up or down does not bend it."""
    slopes = [
        (later[1] - earlier[1]) / (later[0] - earlier[0]) * 3600
        for index, earlier in enumerate(points)
        for later in points[index + 1 :]
    ]
    return statistics.median(slopes) if slopes else 0.0


def plot(samples: Sequence[Sample], role: str, width: int = 72, height: int = 10) -> str:
    """RSS over time as text, one column for each share of the time."""
    points = [(sample.seconds, sample.rss_bytes / MB) for sample in samples if sample.role == role]
    end = points[-1][0] or 1.0
    columns: dict[int, list[float]] = defaultdict(list)
    for seconds, value in points:
        columns[min(width - 1, int(seconds / end * width))].append(value)
    tops = {column: statistics.median(values) for column, values in columns.items()}
    highest = max(tops.values()) * 1.05
    lines = []
    for row in range(height, 0, -1):
        mark = "".join("█" if tops.get(column, 0) >= highest * (row - 0.5) / height else " " for column in range(width))
        lines.append(f"{highest * row / height:7.1f} MB │{mark}")
    lines.append(f"{'':10} └{'─' * width}\n{'':12}0{end / 60:>{width - 4}.0f} min")
    return f"{role}\n" + "\n".join(lines)
