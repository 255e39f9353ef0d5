"""What a seed decides beforehand: the size of the world, the load, the faults. A plan is data, so it can be shrunk."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Wave:
    """Messages that come at once. ``aborted``: in a transaction that is not committed. ``deadly`` ones, at most so many
    as there are, kill their worker: each of them, or where two ``accomplices`` meet.
    """

    at: float
    topic: str
    partition: int
    count: int
    largest_bytes: int
    dead_ratio: float
    transaction_seconds: float  # 0: no transaction
    aborted: bool
    new_leader: bool  # the partition has another leader since the wave before
    deadly: int = 0
    accomplices: bool = False

    def __str__(self) -> str:
        return f"{self.at:7.2f}  {self.count} messages into {self.topic}/{self.partition}"


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong, or that an operator does, at a time, for a while."""

    at: float
    kind: str
    seconds: float
    dice: int  # the seed of what else must be chosen

    def __str__(self) -> str:
        return f"{self.at:7.2f}  {self.kind} ({self.seconds:.2f} s)"


@dataclass(frozen=True)
class Plan:
    """A history before it happens."""

    seed: int
    supervisors: int
    workers: int
    pipelines: int
    groups_apart: bool
    partitions: int
    classic: bool
    keyed: bool
    batch_rows: int
    batch_bytes: int
    buffer_bytes: int
    credit_flights: int
    credit_bytes: int
    largest_bytes: int
    slow_flush_threshold_seconds: float
    max_slow_flushes: int
    pause_seconds: float
    start: str
    on_out_of_range: str
    foreign_commits: bool
    dead_letter_minimum: int
    shutdown_deadline_seconds: float
    late_polls: bool
    ids_from_seconds: float  # when the brokers begin to tell topic ids
    transform_seconds: float
    seconds: float
    waves: tuple[Wave, ...] = field(repr=False)
    faults: tuple[Fault, ...] = field(repr=False)

    def without(self, waves: Collection[int] = (), faults: Collection[int] = ()) -> Plan:
        """The same plan with some of the load and of the faults left out."""
        return replace(
            self,
            waves=tuple(wave for index, wave in enumerate(self.waves) if index not in waves),
            faults=tuple(fault for index, fault in enumerate(self.faults) if index not in faults),
        )


# Kinds of faults and how often each is drawn, relative to the others.
KINDS: dict[str, int] = {
    "kill supervisor": 4,
    "freeze supervisor": 4,
    "freeze supervisor and workers": 4,
    "stop supervisor": 4,
    "kill worker": 8,
    "kill worker at work": 6,
    "freeze worker": 5,
    "boot trouble": 2,
    "slow reports": 3,
    "overloaded sink": 2,
    "hang in user code": 3,
    "mute worker": 3,
    "silent partition": 3,
    "deaf scout": 2,
    "cut connection": 8,
    "terminate backends": 4,
    "restart postgres": 4,
    "lose commits": 6,
    "lossy network": 5,
    "slow postgres": 6,
    "lock table": 5,
    "deadlocks": 3,
    "full disk": 2,
    "missing table": 2,
    "restart kafka": 3,
    "cut from kafka": 4,
    "cut from the coordinator": 3,
    "rebalance": 6,
    "consume raises": 5,
    "fatal consumer": 3,
    "slow scout": 2,
    "new leader": 2,
    "retention": 2,
    "compaction": 3,
    "topic made again": 2,
    "new partition": 2,
    "pause and resume": 3,
    "drain and resume": 3,
    "command and stop": 2,
    "seek": 5,
    "status": 1,
}


# Every third history has messages that kill workers, in some of its waves, but not too many: to find one takes five
# deaths and three seconds.
DEADLY_HISTORIES = 0.33
DEADLY_WAVES = 0.06
MOST_DEADLY = 4


def draw(seed: int) -> Plan:
    """Everything that the seed decides beforehand."""
    dice = random.Random(f"{seed}/plan")
    seconds = dice.choice((8.0, 10.0, 12.0))
    pipelines = dice.choice((1, 1, 2))
    partitions = dice.choice((1, 2, 2, 3, 4))
    batch_bytes = dice.choice((600, 1500, 4000))
    credit_flights = dice.choice((1, 2, 2, 3))
    largest = dice.choice((200, 400, 400, 3000))
    topics = [f"t{index}" for index in range(pipelines)]
    return Plan(
        seed=seed,
        supervisors=dice.choice((2, 2, 2, 3)),
        workers=dice.choice((1, 2, 2)),
        pipelines=pipelines,
        groups_apart=dice.random() < 0.5,
        partitions=partitions,
        classic=dice.random() < 0.5,
        keyed=dice.random() < 0.4,
        batch_rows=dice.choice((4, 10, 30)),
        batch_bytes=batch_bytes,
        buffer_bytes=dice.choice((3000, 8000, 20000)) * pipelines,
        credit_flights=credit_flights,
        credit_bytes=batch_bytes * credit_flights,
        largest_bytes=largest,
        slow_flush_threshold_seconds=dice.choice((0.1, 0.3, 2.0)),
        max_slow_flushes=dice.choice((1, 2, 3)),
        pause_seconds=dice.choice((0.5, 1.5)),
        start=dice.choice(("earliest", "earliest", "earliest", "latest", "latest", "error")),
        on_out_of_range=dice.choice(("stop", "skip")),
        foreign_commits=dice.random() < 0.2,
        dead_letter_minimum=dice.choice((10, 1000)),
        shutdown_deadline_seconds=dice.choice((1.0, 3.0, 8.0)),
        late_polls=dice.random() < 0.3,
        ids_from_seconds=dice.uniform(0.0, seconds) if dice.random() < 0.1 else 0.0,
        transform_seconds=dice.choice((0.003, 0.003, 0.1)),
        seconds=seconds,
        waves=_waves(dice, topics, partitions, seconds, largest),
        faults=_faults(dice, seconds),
    )


def _waves(dice: random.Random, topics: list[str], partitions: int, seconds: float, largest: int) -> tuple[Wave, ...]:
    waves = []
    left = MOST_DEADLY if dice.random() < DEADLY_HISTORIES else 0
    for _ in range(dice.randrange(20, 45)):
        transactional = dice.random() < 0.2
        deadly = min(left, dice.choice((1, 1, 2, 3))) if left and dice.random() < DEADLY_WAVES else 0
        left -= deadly
        waves.append(
            Wave(
                at=dice.uniform(0.0, seconds),
                topic=dice.choice(topics),
                partition=dice.randrange(partitions),
                count=dice.choice((1, 2, 5, 10, 25)),
                largest_bytes=largest if dice.random() < 0.3 else min(largest, 150),
                dead_ratio=dice.choice((0.02, 0.02, 0.02, 0.3)),
                transaction_seconds=dice.uniform(0.05, 1.0) if transactional else 0.0,
                aborted=transactional and dice.random() < 0.4,
                new_leader=dice.random() < 0.15,
                deadly=deadly,
                accomplices=dice.random() < 0.25,
            )
        )
    return tuple(sorted(waves, key=lambda wave: wave.at))


def _faults(dice: random.Random, seconds: float) -> tuple[Fault, ...]:
    kinds, weights = list(KINDS), list(KINDS.values())
    faults = []
    for kind in dice.choices(kinds, weights, k=dice.randrange(7, 15)):
        length = dice.choice((0.1, 0.5, 1.5, 4.0)) * dice.uniform(0.5, 1.5)
        faults.append(Fault(dice.uniform(0.2, seconds), kind, length, dice.getrandbits(30)))
    return tuple(sorted(faults, key=lambda fault: fault.at))
