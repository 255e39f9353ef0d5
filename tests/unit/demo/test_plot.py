"""The picture of a run."""

from __future__ import annotations

from pathlib import Path

from speedlayer.supervisor.demo.capacity import Flush
from speedlayer.supervisor.demo.plot import Picture, draw, rough
from speedlayer.supervisor.demo.recorder import Recorder, take_sample
from speedlayer.supervisor.demo.report import PhaseReport

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def recorder_of(produced: list[tuple[float, int]]) -> Recorder:
    recorder = Recorder(pause_seconds=5.0)
    for elapsed, total in produced:
        pipeline = {
            "rows": total // 2,
            "dead_lettered": 0,
            "lanes": [{"partition": 0, "next_offset": total // 2}],
            "slow_count": 0,
            "max_slow_flushes": 3,
            "overload_count": 1 if elapsed > 3 else 0,
            "state": "running",
            "reason": "",
            "holds": {"overloaded": "slow"} if 3 < elapsed < 6 else {},
            "paused_until_seconds": 5.0 if 3 < elapsed < 6 else None,
            "last_flush_seconds": None,
        }
        recorder.add(take_sample(elapsed, 0, total, {0: total}, {"pipelines": [pipeline]}, 10**8))
    return recorder


def test_a_run_becomes_a_png(tmp_path: Path) -> None:
    recorder = recorder_of([(second / 5, 20 * second) for second in range(50)])
    phases = [PhaseReport("normal", 0, 3, 100, 50, 20_000), PhaseReport("storm", 3, 10, 100, 50, 49.0)]
    flushes = [Flush(1.0, 1.1, 100), Flush(2.0, 4.0, 100), Flush(8.0, 8.1, 5000)]
    draw(Picture("a run", recorder, flushes, phases), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG_SIGNATURE)


def test_a_run_without_a_sample_or_a_flush_becomes_a_png_too(tmp_path: Path) -> None:
    draw(Picture("nothing", Recorder(pause_seconds=5.0), [], []), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG_SIGNATURE)


def test_a_high_rate_is_written_with_the_digits_it_deserves() -> None:
    assert [rough(rate) for rate in (48.6, 999.4, 1234.0, 57_169.0)] == ["49", "999", "1,200", "57,000"]
