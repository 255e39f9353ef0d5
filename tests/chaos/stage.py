"""The stage of the campaign: brokers, databases, and the supervisors of two consumer groups.

One group speaks the classic protocol, the other one KIP-848's. Each member reaches brokers and databases through
proxies of its own (a *side*). The first of each group runs under a clock that can be stepped, the others in network
namespaces of their own. Runs in the campaign's process.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos.brokers import BrokerCluster
from chaos.clock import SteppedClock
from chaos.database import ReplicatedDatabase
from chaos.keeper import Member
from chaos.network import Namespace
from fixtures.daemon import Daemon, toml
from fixtures.ports import HOST

# A member that is killed or cut off is noticed after this. The other protocol's session is the broker's (QUICK).
CLASSIC = {"session.timeout.ms": 6000, "heartbeat.interval.ms": 500}
CONSUMER = {"group.protocol": "consumer"}

# A tmpfs takes no memory before it is written to; this is enough for the rows of an hour.
DISK_BYTES = 4 * 1024**3

MEMBERS = 2  # of each group
WORKERS = 2  # of each member

# Of the superuser, of the checker, and of replication.
OTHER_CONNECTIONS = 12

# The order in which a member's pipelines end a stop is theirs; what is read by then is little.
SHUTDOWN_SECONDS = 20.0

# A message that is mapped in the workers: what a user's function may be, and no more.
MAP_MODULE = """
def mapped(record):
    record["mapped"] = True
    return record
"""


@dataclass(frozen=True)
class Stream:
    """One topic, the pipeline that reads it, and the table that it becomes."""

    topic: str
    table: str
    share: float = 1.0  # of the messages of the campaign
    partitions: int = 4
    upserts: bool = False
    mapped: bool = False
    may_grow: bool = False  # partitions may be added: the order of its keys does not depend on their number
    may_skip: bool = False  # retention may take what was not read: the pipeline skips, and records the gap

    @property
    def pipeline(self) -> str:
        return self.topic

    def settings(self) -> dict[str, Any]:
        """The pipeline's part of the TOML file."""
        return {
            "name": self.pipeline,
            "topics": [self.topic],
            "table": self.table,
            "batch_bytes": 1024 * 1024,
            **({"mode": "upsert", "key": ["key"]} if self.upserts else {}),
            **({"map": "chaos_map:mapped"} if self.mapped else {}),
            **({"on_out_of_range": "skip"} if self.may_skip else {}),
        }


@dataclass(frozen=True)
class Group:
    """A consumer group: its protocol's properties, and what its members read."""

    name: str
    kafka: Mapping[str, Any]
    streams: tuple[Stream, ...]


class Stage:
    """Servers and members. A context manager: whatever happens in it, everything is ended."""

    def __init__(self, work: Path, out: Path, groups: Sequence[Group], *, members: int = MEMBERS) -> None:
        self.work, self.out, self.groups = work, out, groups
        self.members: list[Member] = []
        self._visitors = itertools.count(1)
        self._cleanup = contextlib.ExitStack()
        self._places = [(group, number) for group in groups for number in range(1, members + 1)]
        with contextlib.ExitStack() as cleanup:
            self.networks = [
                None if number == 1 else cleanup.enter_context(Namespace(side))
                for side, (_, number) in enumerate(self._places)
            ]
            for name in ("kafka", "postgres"):
                (work / name).mkdir()
            brokers = [HOST if network is None else network.to_brokers.host for network in self.networks]
            databases = [HOST if network is None else network.to_databases.host for network in self.networks]
            self.cluster = BrokerCluster(work / "kafka", sides=brokers)
            cleanup.callback(self.cluster.close)
            self.database = ReplicatedDatabase(
                work / "postgres",
                sides=databases,
                disk_bytes=DISK_BYTES,
                settings={"max_connections": self._connections()},
            )
            cleanup.callback(self.database.close)
            self._cleanup = cleanup.pop_all()

    @property
    def streams(self) -> list[Stream]:
        return [stream for group in self.groups for stream in group.streams]

    def __enter__(self) -> Stage:
        try:
            with ThreadPoolExecutor(2) as starting:
                for started in [starting.submit(self.cluster.start), starting.submit(self.database.start)]:
                    started.result()
            for stream in self.streams:
                self.cluster.create_topic(stream.topic, partitions=stream.partitions)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._cleanup.close()

    def _connections(self) -> int:
        """What all members need, and as much again: what outlives a member that was killed, and visitors."""
        return OTHER_CONNECTIONS + 2 * sum(2 * WORKERS * len(group.streams) for group, _ in self._places)

    # --- members ------------------------------------------------------------------------------------------------

    def make_members(self) -> list[Member]:
        """The members of all groups, not started yet. The tables must be there."""
        for side, (group, number) in enumerate(self._places):
            name = f"{group.name}-{number}"
            folder = self._folder(name)
            clock = SteppedClock(folder) if number == 1 else None
            daemon = self._daemon(folder, group, side, clock)
            self.members.append(Member(name, group.name, daemon, side, clock=clock, network=self.networks[side]))
        return self.members

    def join(self, beside: Member) -> Daemon:
        """One more member of a member's group, on its side; not started yet."""
        group = self._places[beside.side][0]
        folder = self._folder(f"{group.name}-visitor-{next(self._visitors)}")
        return self._daemon(folder, group, beside.side, None)

    def _folder(self, name: str) -> Path:
        folder = self.work / name
        folder.mkdir()
        (folder / "chaos_map.py").write_text(MAP_MODULE)
        return folder

    def _daemon(self, folder: Path, group: Group, side: int, clock: SteppedClock | None) -> Daemon:
        network = self.networks[side]
        daemon = Daemon(
            folder,
            self._settings(group, side),
            env=clock.env if clock else {},
            prefix=network.command_prefix if network else (),
        )
        daemon.process.log = self.out / f"{folder.name}.log"
        return daemon

    def _settings(self, group: Group, side: int) -> str:
        return toml(
            {
                "kafka": {
                    "bootstrap.servers": self.cluster.bootstrap_servers_of(side),
                    "group.id": group.name,
                    "reconnect.backoff.max.ms": 1000,
                    # A partition that was added is read after this; by default, after five minutes.
                    "topic.metadata.refresh.interval.ms": 3000,
                    **group.kafka,
                },
                "postgres": {"dsn": self.database.dsn_of(side), "connect_timeout_seconds": 5},
                "workers": {"count": WORKERS},
                "memory": {"budget_mb": 64},
                "shutdown": {"deadline_seconds": SHUTDOWN_SECONDS},
                "pipelines": [stream.settings() for stream in group.streams],
            }
        )
