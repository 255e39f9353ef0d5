"""Three strikes: the rule that tells a hiccup from an overload (supervisor process, pure).

A flush longer than the threshold adds 1 to the slow count, any other takes 1 off, never below 0. When the count reaches
its limit the sink is overloaded: the count returns to 0 and `StreamingOverloadException` is raised, with the pause it
asks for. `Flow` handles it: consumption pauses until ``pause_until``, the worker queues drain, and it resumes by
itself. The count is one for each sink, over all its workers, in the order of their reports.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from speedlayer.workers.errors import StreamingOverloadException


@dataclass
class ThreeStrikes:
    """The brake of one sink. Times are monotonic seconds."""

    slow_flush_threshold_seconds: float
    max_slow_flushes: int
    pause_seconds: float
    slow_count: int = 0
    overload_count: int = 0
    pause_until: Optional[float] = None

    @property
    def paused(self) -> bool:
        """Whether an overload is being waited out."""
        return self.pause_until is not None

    def observe(self, flush_duration_seconds: float) -> None:
        """Count one completed flush; raises `StreamingOverloadException` when it is one strike too many.

        While paused a flush neither counts nor extends the pause: it was queued before the brake was pulled.
        """
        if self.paused:
            return
        if flush_duration_seconds <= self.slow_flush_threshold_seconds:
            self.slow_count = max(0, self.slow_count - 1)
            return
        self.slow_count += 1
        if self.slow_count >= self.max_slow_flushes:
            strikes, self.slow_count = self.slow_count, 0
            raise StreamingOverloadException(
                f"{strikes} slow flushes, the last took {flush_duration_seconds:.2f} s"
                f" (limit {self.slow_flush_threshold_seconds:g} s)",
                pause_seconds=self.pause_seconds,
            )

    def handle_overload(self, error: StreamingOverloadException, now: float) -> bool:
        """Start the pause that the error asks for; False if one is under way already."""
        if self.paused:
            return False
        self.overload_count += 1
        self.pause_until = now + error.pause_seconds
        return True

    def should_pause(self, now: float, queues_drained: bool) -> bool:
        """Whether the pause still holds; ends it once its time is over and the worker queues have drained."""
        if self.pause_until is None:
            return False
        if now < self.pause_until or not queues_drained:
            return True
        self.pause_until = None
        return False
