"""What the core needs to know, as plain values (supervisor process; the shell derives it from the settings)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PipelineConfig:
    """One pipeline: what it reads, when a batch closes, when its sink counts as overloaded."""

    name: str
    group: str
    topics: tuple[str, ...]
    batch_rows: int = 10_000
    batch_bytes: int = 4 * 1024 * 1024
    batch_seconds: float = 0.2
    slow_flush_threshold_seconds: float = 2.0
    max_slow_flushes: int = 3
    pause_seconds: float = 5.0
    start: str = "earliest"
    on_out_of_range: str = "stop"
    dead_letter_ratio: float = 0.1
    dead_letter_minimum: int = 100
    dead_letter_window_seconds: float = 60.0


@dataclass(frozen=True)
class CoreConfig:
    """The whole daemon, as the core sees it.

    ``buffer_bytes`` is the part of the memory budget for what is assembled, queued or being flushed; the rest is what
    librdkafka may prefetch. ``owner`` is this supervisor's random token, with
    which the owner token of each of its claims begins; ``pid`` is for people.
    """

    pipelines: tuple[PipelineConfig, ...]
    workers: int
    buffer_bytes: int
    owner: str
    separator: bytes
    shutdown_deadline_seconds: float = 30.0
    stall_seconds: float = 30.0
    user_code_seconds: float = 60.0
    scout_seconds: float = 30.0
    pid: int = 0

    @property
    def share_bytes(self) -> int:
        """What one pipeline may hold of the buffer: a static share, so that a stalled sink can not starve others."""
        return self.buffer_bytes // len(self.pipelines)


# A full buffer is waited out for this long before partitions are let go: most waits are shorter, and reading on costs
# nothing then.
FULL_PATIENCE_SECONDS = 1.0

# A partition that was let go for want of memory is read again when its pipeline holds less than this part of its share.
LOW_MARK = 0.5

# A lane that has been quiet for so long after a flush or a claim has its checkpoint checked, once, by a flight without
# messages. A fail-over can lose the last commits; where messages flow the next flush notices, and here nothing else
# would. It is longer than a standby that is promoted may have been behind.
QUIET_SECONDS = 15.0

# Group offsets are a courtesy to lag tools; once a second is enough for them.
COMMIT_INTERVAL_SECONDS = 1.0

# Between two claims of a lane that was fenced: two processes that both believe they own a partition would fence each
# other for ever (2 good flushes and 78 fenced ones without a back-off).
FENCED_BACKOFF_SECONDS = 0.5
FENCED_BACKOFF_LIMIT_SECONDS = 30.0

# This many fences of a pipeline's lanes within the window raise an alarm: there are probably two owners.
FENCED_ALARM_COUNT = 5
FENCED_ALARM_WINDOW_SECONDS = 60.0

# Between two starts of a worker that died.
RESTART_BACKOFF_SECONDS = 0.1
RESTART_BACKOFF_LIMIT_SECONDS = 10.0

# Deaths in a row before the first sign of life that mean "cannot boot".
BOOT_ATTEMPTS = 5

# A question to the broker (start offsets, topic id) that brought no answer is asked again after this.
INSPECT_RETRY_SECONDS = 1.0

# Between two looks at how the lanes are spread over the workers.
BALANCE_INTERVAL_SECONDS = 1.0

# A flush that lost so often to other transactions is told to the operator: by then it is more than bad luck.
CONTENDED_TOLD_ATTEMPTS = 5

# The watchdog looks so many times within `stall_seconds`.
LOOKS_PER_STALL = 8

# A worker that boots imports user code, which may load a model: it may take so many times `stall_seconds`.
BOOT_PATIENCE = 4

# After so many restarts of a worker by the watchdog without a flush in between, starting the daemon anew is what is
# left.
HANGS_TO_STOP = 3

# What the watchdog has tried for a partition is forgotten after so many times `stall_seconds` without a further try.
TRIED_PATIENCE = 20

# With no message for this long the daemon says why.
SILENCE_SECONDS = 10.0
