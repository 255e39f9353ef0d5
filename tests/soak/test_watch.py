"""The soak's judgement: what grows is told from what jumps, and a leak of descriptors is seen."""

from __future__ import annotations

import pytest

from soak.watch import MB, Sample, courses, slope_per_hour

HOUR = 3600


def samples(
    megabytes_per_hour: float = 0.0, *, step_at: float | None = None, leak_every: int = 0, pid: int = 7
) -> list[Sample]:
    """Two hours of one process, a sample every five seconds, with a little noise."""
    found = []
    for index in range(2 * HOUR // 5):
        seconds = index * 5.0
        rss = 80.0 + megabytes_per_hour * seconds / HOUR + (index % 7) * 0.1
        if step_at is not None and seconds >= step_at:
            rss += 5.0
        descriptors = 30 + (index // leak_every if leak_every else 0)
        # A fault every two minutes, and connections that are made meanwhile.
        rest = seconds % 120 > 30
        found.append(
            Sample(seconds, "worker-0", pid, int(rss * MB), int(rss * MB), descriptors + (0 if rest else 9), 12, rest)
        )
    return found


def test_a_level_course_is_fine_whatever_faults_do_to_the_descriptors() -> None:
    (course,) = courses(samples())
    assert course.ok
    assert course.descriptors == (30, 30, 30)
    assert abs(course.slope_mb_per_hour) < 0.1


@pytest.mark.parametrize(("slope", "ok"), [(0.8, True), (1.2, False), (5.0, False)])
def test_a_slow_leak_of_memory_is_told_by_its_slope(slope: float, ok: bool) -> None:
    (course,) = courses(samples(slope))
    assert course.slope_mb_per_hour == pytest.approx(slope, abs=0.1)
    assert course.ok is ok


def test_one_step_does_not_pass_for_a_slope() -> None:
    (course,) = courses(samples(step_at=1.5 * HOUR))
    assert course.slope_mb_per_hour < 1.0


def test_a_leak_of_descriptors_is_told() -> None:
    (course,) = courses(samples(leak_every=100))
    assert not course.ok
    assert course.descriptors[2] - course.descriptors[1] > 2


def test_a_process_that_did_not_live_long_enough_is_left_out() -> None:
    late = [sample for sample in samples(pid=8) if sample.seconds > 1.5 * HOUR]
    gone = [sample for sample in samples(pid=9) if sample.seconds < 1.5 * HOUR]
    assert [course.pid for course in courses([*samples(), *late, *gone])] == [7]


def test_the_slope_of_a_line_is_its_slope() -> None:
    assert slope_per_hour([(0.0, 10.0), (1800.0, 11.0), (3600.0, 12.0)]) == pytest.approx(2.0)
