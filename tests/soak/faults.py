"""The soak's faults: mild ones, from which the processes that are watched must come back. Runs in the soak's process.

The supervisor and one worker live through the whole run, since their memory is what is watched; the other worker is the
one that is killed.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from confluent_kafka import Consumer

from fixtures.daemon import Daemon
from fixtures.kafka import Broker
from fixtures.postgres import PostgresServer, locked
from fixtures.proxy import Proxy
from soak.load import EVENTS, ORDERS
from speedlayer.supervisor.errors import NoAnswer

VICTIM = "worker-1"
SECONDS = (3.0, 8.0)


# A resume that is not answered is asked again: a pipeline that stayed paused would never reach the end of its topic.
RESUME_ATTEMPTS = 5


class Missed(Exception):
    """The fault found nothing to strike."""


@dataclass(frozen=True)
class World:
    """What faults can strike. ``proxy`` stands between the daemon and PostgreSQL, the broker's own before Kafka."""

    broker: Broker
    server: PostgresServer
    dsn: str
    proxy: Proxy
    daemon: Daemon
    group: str
    dice: random.Random


Fault = Callable[[World, float], None]


def terminate_backends(world: World, seconds: float) -> None:
    """End every connection of the daemon's to the database."""
    if not world.server.terminate_backends("application_name LIKE 'speedlayer%'"):
        raise Missed("no backend was there")


def lock_table(world: World, seconds: float) -> None:
    """Lock a table for a while."""
    with locked(world.dsn, world.dice.choice((EVENTS, ORDERS))):
        time.sleep(seconds)


def restart_postgres(world: World, seconds: float) -> None:
    """Restart the server."""
    world.server.restart()


def cut_database(world: World, seconds: float) -> None:
    """Refuse the database's connections for a while."""
    with _until_healed(world.proxy):
        world.proxy.refuse()
        time.sleep(seconds)


def stall_database(world: World, seconds: float) -> None:
    """Let nothing through to the database or back."""
    with _until_healed(world.proxy):
        world.proxy.stall()
        time.sleep(seconds)


def cut_kafka(world: World, seconds: float) -> None:
    """Reset the connections to the broker, and refuse new ones."""
    assert world.broker.proxy is not None
    with _until_healed(world.broker.proxy):
        world.broker.proxy.refuse()
        time.sleep(seconds)


def stall_kafka(world: World, seconds: float) -> None:
    """Let nothing through to the broker or back."""
    assert world.broker.proxy is not None
    with _until_healed(world.broker.proxy):
        world.broker.proxy.stall()
        time.sleep(seconds)


def kill_worker(world: World, seconds: float) -> None:
    """Kill the one worker that may be killed."""
    for worker in world.daemon.status()["workers"]:
        if worker["name"] == VICTIM and worker["pid"] is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker["pid"], signal.SIGKILL)
                return
    raise Missed(f"{VICTIM} was not there")


def rebalance(world: World, seconds: float) -> None:
    """Have another member join the group, hold some partitions for a while, and leave."""
    visitor = Consumer(
        {
            "bootstrap.servers": world.broker.bootstrap_servers,
            "group.id": world.group,
            "partition.assignment.strategy": "cooperative-sticky",
            "enable.auto.commit": False,
            "session.timeout.ms": 6000,
            "log_level": 0,
        }
    )
    try:
        visitor.subscribe([EVENTS, ORDERS])
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            visitor.poll(0.1)
    finally:
        visitor.close()


def pause_and_resume(world: World, seconds: float) -> None:
    """Pause both pipelines by command, and resume them."""
    try:
        if not world.daemon.call("pause")["ok"]:
            raise Missed("the pause was refused")
        time.sleep(seconds)
    finally:
        _resume(world)


def _resume(world: World) -> None:
    for attempt in range(1, RESUME_ATTEMPTS + 1):
        try:
            answer = world.daemon.call("resume")
        except NoAnswer:
            if attempt == RESUME_ATTEMPTS:
                raise
        else:
            assert answer["ok"], f"the daemon does not resume: {answer}"
            return


FAULTS: dict[str, Fault] = {
    fault.__name__.replace("_", " "): fault
    for fault in (
        terminate_backends,
        lock_table,
        restart_postgres,
        cut_database,
        stall_database,
        cut_kafka,
        stall_kafka,
        kill_worker,
        rebalance,
        pause_and_resume,
    )
}


def draws(seed: int) -> Iterator[tuple[str, float]]:
    """Faults without end, each kind once before any comes again, with how long it lasts (s)."""
    dice = random.Random(seed)
    while True:
        for name in dice.sample(sorted(FAULTS), len(FAULTS)):
            yield name, dice.uniform(*SECONDS)


@contextmanager
def _until_healed(proxy: Proxy) -> Iterator[None]:
    try:
        yield
    finally:
        proxy.heal()
