"""All that the core remembers, and the actions that the current event has led to (supervisor process, pure)."""

from __future__ import annotations

import enum
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from speedlayer.supervisor.core.actions import ERROR, Action, Dispatch, Log, Pause, Resume, SendClaim, SendSeed
from speedlayer.supervisor.core.config import CoreConfig
from speedlayer.supervisor.core.ledger import Lane, LaneState, Ledger
from speedlayer.supervisor.core.pipelines import Pipeline
from speedlayer.supervisor.core.trouble import Troubles
from speedlayer.supervisor.core.workforce import Workforce


class Lifecycle(enum.Enum):
    """Where the daemon is in its life."""

    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"  # nothing is read any more; what was read is written
    LEAVING = "leaving"  # the workers finish, then the groups are left
    STOPPED = "stopped"


LIFECYCLE: dict[Lifecycle, frozenset[Lifecycle]] = {
    Lifecycle.STARTING: frozenset({Lifecycle.RUNNING, Lifecycle.DRAINING, Lifecycle.STOPPED}),
    Lifecycle.RUNNING: frozenset({Lifecycle.DRAINING, Lifecycle.STOPPED}),
    Lifecycle.DRAINING: frozenset({Lifecycle.LEAVING, Lifecycle.STOPPED}),
    Lifecycle.LEAVING: frozenset({Lifecycle.STOPPED}),
    Lifecycle.STOPPED: frozenset(),
}


@dataclass
class State:
    """The core's memory. ``random`` is seeded by the shell, and decides nothing but jitter."""

    config: CoreConfig
    random: random.Random
    ledger: Ledger
    pipelines: dict[str, Pipeline]
    workforce: Workforce
    lifecycle: Lifecycle = Lifecycle.STARTING
    lifecycle_since: float = 0.0
    started_at: float = 0.0
    now: float = 0.0
    stop_reason: str = ""
    stop_deadline: float = 0.0
    exit_code: int = 0
    last_message_at: float = 0.0
    silence_told: bool = False
    scout_heard_at: float = 0.0
    repairs: dict[str, int] = field(default_factory=dict)  # what the watchdog has done, and how often
    trouble: Troubles = field(default_factory=Troubles)
    actions: list[Action] = field(default_factory=list)
    _numbers: int = 0

    @classmethod
    def new(cls, config: CoreConfig, seed: int) -> State:
        """The memory of a daemon that has seen nothing yet."""
        return cls(
            config=config,
            random=random.Random(seed),
            ledger=Ledger(),
            pipelines={pipeline.name: Pipeline.from_config(pipeline) for pipeline in config.pipelines},
            workforce=Workforce(config.workers),
        )

    def number(self) -> int:
        """A number that was not given before: for flights, claims and questions."""
        self._numbers += 1
        return self._numbers

    def act(self, action: Action) -> None:
        """Want something done."""
        if isinstance(action, (Dispatch, SendClaim, SendSeed)):
            self.workforce[action.worker].ordered(self.now)
        self.actions.append(action)

    def log(self, level: int, message: str, **fields: Any) -> None:
        """Want the operator told."""
        self.act(Log(level, message, fields))

    def jitter(self, seconds: float) -> float:
        """Between half and all of ``seconds``, so that many who failed together do not come back together."""
        return seconds * self.random.uniform(0.5, 1.0)

    def enter(self, lifecycle: Lifecycle) -> None:
        """Change the daemon's own state."""
        if lifecycle not in LIFECYCLE[self.lifecycle]:
            raise AssertionError(f"lifecycle {self.lifecycle.value} -> {lifecycle.value}")
        self.lifecycle, self.lifecycle_since = lifecycle, self.now

    @property
    def running(self) -> bool:
        """Whether the daemon takes on new work."""
        return self.lifecycle is Lifecycle.RUNNING

    @property
    def stopping(self) -> bool:
        """Whether the daemon is on its way out."""
        return self.lifecycle not in (Lifecycle.STARTING, Lifecycle.RUNNING)

    def pipeline_of(self, lane: Lane) -> Pipeline:
        """The pipeline that reads a lane."""
        return self.pipelines[lane.key.pipeline]

    @property
    def buffered_bytes(self) -> int:
        """Bytes that are held by all pipelines: assembled, queued and being flushed."""
        return sum(pipeline.buffered_bytes for pipeline in self.pipelines.values())

    # --- reading, and not reading -------------------------------------------------------------------------------

    def fetch(self, lane: Lane) -> None:
        """Read a lane that is held, in a generation of its own."""
        lane.move(LaneState.FETCHING, self.now)
        # Never given before: a partition that comes back must not take what was read before it went.
        lane.generation = self.number()
        self.act(Resume(lane.partition, lane.expected, lane.leader_epoch, lane.generation))

    def hold(self, lane: Lane, reason: str) -> None:
        """Stop reading a lane; what it has read is kept."""
        if lane.state is LaneState.FETCHING:
            lane.move(LaneState.HELD, self.now, reason)
            self.act(Pause(lane.partition))

    def stop_lane(self, lane: Lane, reason: str, **fields: Any) -> None:
        """Stop a lane for good: an operator decides. What it holds is dropped; what is in flight may still end well."""
        if lane.state is LaneState.FETCHING:
            self.act(Pause(lane.partition))
        lane.move(LaneState.STOPPED, self.now, reason)
        lane.suspicion = None  # wherever it goes on, it begins anew
        self.drop(lane)
        self.log(ERROR, f"{lane.partition} is stopped: {reason}", **self.fields_of(lane), **fields)

    def reclaim(self, lane: Lane, reason: str, not_before: float = 0.0) -> None:
        """The fate of what was in flight is not known, or the lane was fenced: drop what it holds, and claim again."""
        if lane.state is LaneState.FETCHING:
            self.act(Pause(lane.partition))
        if lane.state is not LaneState.PENDING:
            lane.move(LaneState.PENDING, self.now, reason)
        self.drop(lane)
        lane.claim_not_before = max(lane.claim_not_before, not_before)

    def drop(self, lane: Lane) -> None:
        """Forget what a lane has read and not written, and what it was sure of."""
        self.pipeline_of(lane).buffered_bytes -= lane.forget()

    @staticmethod
    def fields_of(lane: Lane) -> Mapping[str, Any]:
        """The fields by which a log line names a lane."""
        return {"pipeline": lane.key.pipeline, "topic": lane.partition.topic, "partition": lane.partition.partition}
