"""The soak's report, in Markdown."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence

from soak.watch import DESCRIPTORS_LIMIT, SLOPE_LIMIT_MB_PER_HOUR, Course, Sample, plot

WATCHED = ("supervisor", "worker-0")


def make(
    options: argparse.Namespace,
    findings: Sequence[tuple[str, int, bool]],
    courses: Sequence[Course],
    struck: Counter[str],
    samples: Sequence[Sample],
) -> tuple[str, bool]:
    """The report, and whether every target was met."""
    watched = [course for course in courses if course.role in WATCHED]
    ok = all(fine for _, _, fine in findings) and all(course.ok for course in watched)
    ok = ok and {course.role for course in watched} == set(WATCHED)
    lines = [
        "# Soak",
        "",
        f"`scripts/soak --minutes {options.minutes:g} --rate {options.rate:g} --seed {options.seed}`",
        "",
        f"{sum(struck.values())} faults: " + ", ".join(f"{count} × {name}" for name, count in sorted(struck.items())),
        "",
        *(f"- {name}: {figure}{'' if fine else '  **NOT AS IT MUST BE**'}" for name, figure, fine in findings),
        "",
        f"Limits: slope < {SLOPE_LIMIT_MB_PER_HOUR:g} MB/h, descriptors ± {DESCRIPTORS_LIMIT} at rest.",
        "",
        *(f"- {course}{'' if course.ok else '  **OVER THE LIMIT**'}" for course in courses),
        "",
        "```",
        *(plot(samples, role) for role in WATCHED),
        "```",
        "",
        "All targets met." if ok else "NOT all targets met.",
    ]
    return "\n".join(lines), ok
