"""The faults that a history draws from. Each does something to the world now, and mostly undoes it after a while.

A fault returns what it did in words, or None if there was nothing to do it to.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Optional

from simulation.history import History
from simulation.kafka import Log
from simulation.supervisor import SimulatedSupervisor
from simulation.worker import SimulatedWorker
from speedlayer.workers import protocol as p

Doing = Callable[[History, float, random.Random], Optional[str]]


def _some_supervisor(history: History, dice: random.Random) -> Optional[SimulatedSupervisor]:
    alive = history._alive()
    return dice.choice(alive) if alive else None


def _some_worker(history: History, dice: random.Random) -> Optional[SimulatedWorker]:
    workers = [worker for worker in history._workers() if worker.alive]
    return dice.choice(workers) if workers else None


def _some_log(history: History, dice: random.Random) -> Log:
    return dice.choice(list(history.broker.logs.values()))


def _later(history: History, seconds: float, undo: Callable[[], None]) -> None:
    history.world.after(seconds, undo)


# --- processes ------------------------------------------------------------------------------------------------------


def kill_supervisor(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    victim = _some_supervisor(history, dice)
    if victim is None:
        return None
    victim.die()
    return victim.name


def freeze_supervisor(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    victim = _some_supervisor(history, dice)
    if victim is None:
        return None
    victim.freeze()
    _later(history, seconds * 1.5, victim.thaw)
    return victim.name


def freeze_with_workers(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    victim = _some_supervisor(history, dice)
    if victim is None:
        return None
    for process in (victim, *victim.workers.values()):
        process.freeze()
        _later(history, seconds * 1.5 + dice.uniform(0.0, 0.3), process.thaw)
    return victim.name


def stop_supervisor(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    victim = _some_supervisor(history, dice)
    if victim is None:
        return None
    victim.stop()
    if dice.random() < 0.2:  # a second signal hurries it
        _later(history, seconds, victim.stop)
    return victim.name


def kill_worker(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    victim = _some_worker(history, dice)
    if victim is None:
        return None
    victim.exit(-9)
    return victim.name


def kill_at_work(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    """One worker is killed while it looks at messages, or some, one after the other, while they write."""
    victim = _some_supervisor(history, dice)
    if victim is None:
        return None
    at, times = dice.choice(((p.Phase.TRANSFORM, 1), (p.Phase.DATABASE, 3)))
    victim.strikes[at] = times

    def undo() -> None:
        victim.strikes.pop(at, None)

    _later(history, seconds * 2, undo)
    return f"{victim.name}'s next {times} in the phase {at.value}"


def freeze_worker(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    victim = _some_worker(history, dice)
    if victim is None:
        return None
    victim.freeze()
    if dice.random() < 0.3:
        _later(history, seconds, lambda: victim.exit(-9))
    else:
        _later(history, seconds, victim.thaw)
    return victim.name


def boot_trouble(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    victim = _some_supervisor(history, dice)
    if victim is None:
        return None
    victim.boot_trouble = True
    for worker in list(victim.workers.values()):
        if dice.random() < 0.5:
            worker.fail_to_boot(False)

    def undo() -> None:
        victim.boot_trouble = False

    _later(history, seconds, undo)
    return f"in {victim.name} for {seconds:.1f} s"


def slow_reports(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    victim = _some_worker(history, dice)
    if victim is None:
        return None
    victim.delay = dice.uniform(0.05, 1.0)

    def undo() -> None:
        victim.delay = 0.0

    _later(history, seconds, undo)
    return f"{victim.name}, by {victim.delay:.2f} s"


def overloaded_sink(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    victim = _some_worker(history, dice)
    if victim is None:
        return None
    victim.overload = True

    def undo() -> None:
        victim.overload = False

    _later(history, seconds, undo)
    return victim.name


def hang_in_user_code(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    """The next transform never ends, and nobody mends that."""
    victim = _some_worker(history, dice)
    if victim is None:
        return None
    victim.hang_next = True
    return victim.name


def mute_worker(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    """What the worker reports from now on is lost, its answers to claims among it, and nobody mends that."""
    victim = _some_worker(history, dice)
    if victim is None:
        return None
    victim.mute = True
    return victim.name


def silent_partition(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    """A consumer stops to deliver what it reads, until it is told to read it anew, or is itself made anew."""
    consumers = [consumer for consumer in history.consumers() if consumer.fetching]
    if not consumers:
        return None
    victim = dice.choice(consumers)
    partition = dice.choice(sorted(victim.fetching))
    times = dice.choice((1, 1, 2, 9))
    victim.silent[partition] = times
    return f"{partition} of {victim.process.name}, until it is resumed {times} times"


def deaf_scout(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    """The scout's thread hangs: the questions are never answered, and nobody mends that."""
    victim = _some_supervisor(history, dice)
    if victim is None:
        return None
    victim.scout_deaf = True
    return victim.name


# --- PostgreSQL -----------------------------------------------------------------------------------------------------


def cut_connection(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    links = history.links()
    if not links:
        return None
    victim = dice.choice(links)
    victim.cut()
    return victim.backend.client


def terminate_backends(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    links = history.links()
    for link in links:
        if dice.random() < 0.7:
            link.terminate()
    return f"{len(links)} or fewer" if links else None


def restart_postgres(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    history.server.stop()

    def up() -> None:
        history.server.up = True

    _later(history, seconds, up)
    return f"for {seconds:.1f} s"


def lose_commits(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    lost = history.server.lose_commits(dice.randrange(1, 8))

    def up() -> None:
        history.server.up = True

    _later(history, seconds, up)
    return f"a fail-over loses the last {lost}"


def lossy_network(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    history.server.loss = dice.choice((0.02, 0.1, 0.3))

    def undo() -> None:
        history.server.loss = 0.0

    _later(history, seconds, undo)
    return f"{history.server.loss:.0%} of the round trips to postgres for {seconds:.1f} s"


def slow_postgres(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    history.server.slowness = dice.choice((5.0, 20.0, 60.0))

    def undo() -> None:
        history.server.slowness = 1.0

    _later(history, seconds, undo)
    return f"{history.server.slowness:g} times slower for {seconds:.1f} s"


def lock_table(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    pipeline = f"p{dice.randrange(history.plan.pipelines)}"
    history.server.lock_table(pipeline)
    _later(history, seconds, lambda: history.server.unlock_table(pipeline))
    return f"of {pipeline} for {seconds:.1f} s"


def deadlocks(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    history.server.deadlock = dice.choice((0.1, 0.5))

    def undo() -> None:
        history.server.deadlock = 0.0

    _later(history, seconds, undo)
    return f"{history.server.deadlock:.0%} for {seconds:.1f} s"


def full_disk(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    history.server.full = True

    def undo() -> None:
        history.server.full = False

    _later(history, seconds, undo)
    return f"for {seconds:.1f} s"


def missing_table(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    pipeline = f"p{dice.randrange(history.plan.pipelines)}"
    history.server.missing.add(pipeline)
    _later(history, seconds, lambda: history.server.missing.discard(pipeline))
    return f"of {pipeline} for {seconds:.1f} s"


# --- Kafka ----------------------------------------------------------------------------------------------------------


def restart_kafka(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    history.broker.up = False
    _later(history, seconds, history.broker_up)
    return f"for {seconds:.1f} s"


def cut_from_kafka(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    victim = _some_supervisor(history, dice)
    if victim is None:
        return None
    consumers = list(victim.consumers.values())
    for consumer in consumers:
        consumer.reachable = False

    def undo() -> None:
        for consumer in consumers:
            consumer.reachable = True

    _later(history, seconds * 1.5, undo)
    return f"{victim.name} for {seconds * 1.5:.1f} s"


def cut_from_coordinator(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    """Its session ends, and it goes on reading: two owners, each in good faith."""
    victim = _some_supervisor(history, dice)
    if victim is None:
        return None
    consumers = list(victim.consumers.values())
    for consumer in consumers:
        consumer.coordinated = False

    def undo() -> None:
        for consumer in consumers:
            consumer.coordinated = True

    _later(history, seconds * 2, undo)
    return f"{victim.name} for {seconds * 2:.1f} s"


def rebalance(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    for group in history.broker.groups.values():
        group.rebalance(shuffle=True)
        if seconds > 1.0:  # a storm
            for step in range(4):
                _later(history, 0.2 * (step + 1), lambda: group.rebalance(shuffle=True))  # noqa: B023
    return "a storm" if seconds > 1.0 else "once"


def consume_raises(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    consumers = history.consumers()
    if not consumers:
        return None
    victim = dice.choice(consumers)
    victim.interrupt("the callback raised")
    return victim.process.name


def fatal_consumer(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    from speedlayer.supervisor.core.events import ConsumerTrouble

    victim = _some_supervisor(history, dice)
    if victim is None:
        return None
    group = dice.choice(sorted(victim.consumers))
    trouble = ConsumerTrouble(history.world.now, group, "_FATAL", "fenced instance", fatal=True)
    if dice.random() < 0.5:  # what it was just assigned may come in the same turn
        history.broker.groups[group].rebalance(shuffle=True)
    _later(history, dice.uniform(0.0, 0.2), lambda: victim.deliver(trouble))
    return f"{victim.name} in {group}"


def slow_scout(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    victim = _some_supervisor(history, dice)
    if victim is None:
        return None
    victim.scout_delay = dice.uniform(0.2, 2.0)

    def undo() -> None:
        victim.scout_delay = 0.0

    _later(history, seconds, undo)
    return victim.name


def new_leader(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    log = _some_log(history, dice)
    log.leader_epoch += 1
    return f"of {log.partition}, in epoch {log.leader_epoch}"


def retention(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    log = _some_log(history, dice)
    if log.stable == 0:
        return None
    low = dice.randrange(log.stable) + 1
    log.expire(low)
    return f"{log.partition} below {low}"


def compaction(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    log = _some_log(history, dice)
    if log.stable < 2:
        return None
    log.compact(log.stable - 1)
    return f"{log.partition} below {log.stable - 1}"


def topic_made_again(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    if history.plan.ids_from_seconds:
        return "not where it could not be told"
    old = _some_log(history, dice).partition
    numbers = [x.partition for x in history.broker.logs if (x.group, x.topic) == (old.group, old.topic)]
    history.broker.create_topic(old.group, old.topic, len(numbers))
    for number in numbers:
        partition = old._replace(partition=number)
        history.auditor.made_again.add(partition)
        history.auditor.first_starts.pop(partition, None)
    return old.topic


def new_partition(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    old = _some_log(history, dice).partition
    new = history.broker.add_partition(old.group, old.topic)
    history._know(new)
    history.broker.groups[old.group].rebalance()
    log = history.broker.logs[new]
    for _ in range(dice.randrange(1, 10)):
        log.append(dice.randrange(12), dice.randrange(20, 150), "row")
    log.settle()
    return str(new)


# --- operators ------------------------------------------------------------------------------------------------------


def _pipeline(history: History, dice: random.Random) -> str:
    return f"p{dice.randrange(history.plan.pipelines)}"


def pause_and_resume(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    return _hold(history, seconds, dice, "pause")


def drain_and_resume(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    return _hold(history, seconds, dice, "drain")


def command_and_stop(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    victim = _some_supervisor(history, dice)
    if victim is None:
        return None
    partition = _some_log(history, dice).partition
    pipeline = history.lanes[partition].pipeline
    if dice.random() < 0.5:
        history.command(victim, "drain", pipeline=pipeline)
    else:
        history.command(victim, "seek", pipeline=pipeline, topic=partition.topic, partition=None, to="latest")
    _later(history, dice.uniform(0.0, 0.3), victim.stop)
    return victim.name


def _hold(history: History, seconds: float, dice: random.Random, verb: str) -> Optional[str]:
    victim = _some_supervisor(history, dice)
    if victim is None:
        return None
    pipeline = _pipeline(history, dice)
    history.command(victim, verb, pipeline=pipeline)
    if dice.random() < 0.7:
        _later(history, seconds, lambda: history.command(victim, "resume", pipeline=pipeline))
    return f"{verb} {pipeline} of {victim.name}"


def seek(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    victim = _some_supervisor(history, dice)
    if victim is None:
        return None
    log = _some_log(history, dice)
    somewhere = dice.randrange(log.stable + 1)
    to = dice.choice(("earliest", "latest", somewhere, somewhere, {"timestamp_ms": somewhere}))
    number = dice.choice((None, log.partition.partition))
    pipeline = history.lanes[log.partition].pipeline
    history.command(victim, "seek", pipeline=pipeline, topic=log.partition.topic, partition=number, to=to)
    return f"{log.partition} to {to} in {victim.name}"


def status(history: History, seconds: float, dice: random.Random) -> Optional[str]:
    victim = _some_supervisor(history, dice)
    if victim is None:
        return None
    verb = dice.choice(("status", "lag", "dance", "resume", "pause"))
    history.command(victim, verb, **({"pipeline": "nobody"} if verb in ("resume", "pause") else {}))
    return f"{verb} to {victim.name}"


FAULTS: dict[str, Doing] = {
    "kill supervisor": kill_supervisor,
    "freeze supervisor": freeze_supervisor,
    "freeze supervisor and workers": freeze_with_workers,
    "stop supervisor": stop_supervisor,
    "kill worker": kill_worker,
    "kill worker at work": kill_at_work,
    "freeze worker": freeze_worker,
    "boot trouble": boot_trouble,
    "slow reports": slow_reports,
    "overloaded sink": overloaded_sink,
    "hang in user code": hang_in_user_code,
    "mute worker": mute_worker,
    "silent partition": silent_partition,
    "deaf scout": deaf_scout,
    "cut connection": cut_connection,
    "terminate backends": terminate_backends,
    "restart postgres": restart_postgres,
    "lose commits": lose_commits,
    "lossy network": lossy_network,
    "slow postgres": slow_postgres,
    "lock table": lock_table,
    "deadlocks": deadlocks,
    "full disk": full_disk,
    "missing table": missing_table,
    "restart kafka": restart_kafka,
    "cut from kafka": cut_from_kafka,
    "cut from the coordinator": cut_from_coordinator,
    "rebalance": rebalance,
    "consume raises": consume_raises,
    "fatal consumer": fatal_consumer,
    "slow scout": slow_scout,
    "new leader": new_leader,
    "retention": retention,
    "compaction": compaction,
    "topic made again": topic_made_again,
    "new partition": new_partition,
    "pause and resume": pause_and_resume,
    "drain and resume": drain_and_resume,
    "command and stop": command_and_stop,
    "seek": seek,
    "status": status,
}
