"""The faults: what each does, how it ends, what it takes for itself, and how one knows that it struck.

Runs in the campaign's process, each fault on a thread of its own. ``begin`` and ``end`` bound what is disturbed;
``settle`` comes after and waits until what was broken is whole again (replicas in sync, say), so that two bursts never
take away together what the data needs. What shows that a fault struck is its ``evidence``.
"""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import psutil
import psycopg2

from chaos.brokers import BrokerCluster
from chaos.database import DATABASE, ReplicatedDatabase
from chaos.keeper import Keeper, Member
from chaos.nemesis import Missed
from chaos.network import Cable, Namespace
from chaos.schedule import Strike
from chaos.stage import Stage, Stream
from chaos.traffic import Lane, Traffic
from fixtures.daemon import Daemon
from fixtures.postgres import Shutdown, query
from fixtures.processes import lives
from fixtures.proxy import Proxy
from fixtures.waiting import wait_until
from speedlayer.supervisor.errors import ControlError, NoAnswer

OURS = "application_name LIKE 'speedlayer/%'"

# A topic is not given partitions without end: every one has three replicas on three brokers.
MOST_PARTITIONS = 10


@dataclass
class World:
    """What the faults can reach."""

    stage: Stage
    keeper: Keeper
    traffic: Traffic
    over: threading.Event
    forgotten: dict[Lane, int] = field(default_factory=dict)  # up to where retention took what was unread

    @property
    def cluster(self) -> BrokerCluster:
        return self.stage.cluster

    @property
    def database(self) -> ReplicatedDatabase:
        return self.stage.database

    @property
    def streams(self) -> list[Stream]:
        return self.stage.streams

    @property
    def members(self) -> list[Member]:
        return self.keeper.members

    def checkpoints(self, dsn: str, topic: str) -> dict[int, int]:
        rows = query(
            dsn,
            "SELECT partition, next_offset FROM speedlayer.checkpoints WHERE topic = %s AND next_offset IS NOT NULL",
            (topic,),
        )
        return dict(rows)


class Fault:
    """One kind of fault. An instance is one strike of it."""

    name: ClassVar[str] = ""
    part: ClassVar[str] = ""  # of the system: the bar in the report
    seconds: ClassVar[tuple[float, float]] = (4.0, 15.0)
    # Whether it lasts between `begin` and `end`; otherwise `begin` takes the time itself.
    lasting: bool = True

    def __init__(self, world: World, strike: Strike) -> None:
        self.world = world
        self.strike = strike
        self.chance = random.Random(strike.seed)
        self.evidence: str | None = None

    @classmethod
    def keys(cls, target: int) -> frozenset[Hashable]:
        """What it takes for itself: two faults that share a key are never under way together."""
        raise NotImplementedError

    @property
    def member(self) -> Member:
        return self.world.members[self.strike.target % len(self.world.members)]

    def begin(self) -> None:
        raise NotImplementedError

    def end(self) -> None:
        """Also called when `begin` failed halfway."""

    def settle(self) -> None:
        """Wait until what it broke is whole again."""


# --- supervisors and workers ------------------------------------------------------------------------------------------


class OfSupervisor(Fault):
    """Strikes the process of a supervisor."""

    part = "supervisors"

    @classmethod
    def keys(cls, target: int) -> frozenset[Hashable]:
        return frozenset({("supervisor", target)})

    def running(self) -> Member:
        if not self.member.running:
            raise Missed(f"{self.member.name} does not run")
        return self.member


class KillSupervisor(OfSupervisor):
    """kill -9 of a supervisor; its init starts it again."""

    name = "supervisor killed"
    seconds = (0.0, 0.0)

    def begin(self) -> None:
        member = self.running()
        self._starts = member.starts
        pid = member.end(signal.SIGKILL, "kill -9")
        self.evidence = f"{member.name}, pid {pid}"

    def end(self) -> None:
        if self.evidence is not None:
            self.world.keeper.wait_until_back(self.member, self._starts)


class FreezeSupervisor(OfSupervisor):
    """SIGSTOP of a supervisor, for less or more than its session lasts."""

    name = "supervisor frozen"
    seconds = (2.0, 15.0)

    def begin(self) -> None:
        self._process = psutil.Process(self.running().daemon.pid)
        self._process.suspend()
        wait_until(lambda: self._process.status() == psutil.STATUS_STOPPED, "it is stopped")
        self.evidence = f"{self.member.name} for {self.strike.seconds:.0f} s"

    def end(self) -> None:
        if self.evidence is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._process.resume()


class TerminateSupervisor(OfSupervisor):
    """SIGTERM, as an upgrade sends it; its init starts it again."""

    name = "supervisor restarted in order"
    seconds = (0.0, 0.0)

    def begin(self) -> None:
        member = self.running()
        self._starts = member.starts
        pid = member.end(signal.SIGTERM, "SIGTERM")
        self.evidence = f"{member.name}, pid {pid}"

    def end(self) -> None:
        if self.evidence is not None:
            self.world.keeper.wait_until_back(self.member, self._starts, timeout_seconds=90)


class RollingRestart(Fault):
    """SIGTERM to one member after the other, the next when the one before reads again (or could not, for 20 s)."""

    part = "supervisors"

    name = "rolling restart"
    seconds = (0.0, 0.0)

    @classmethod
    def keys(cls, target: int) -> frozenset[Hashable]:
        return frozenset(("supervisor", number) for number in range(16))

    def begin(self) -> None:
        done = []
        for member in self.world.members:
            if self.world.over.is_set():
                break
            if member.running:
                starts = member.starts
                member.end(signal.SIGTERM, "SIGTERM (rolling)")
                self.world.keeper.wait_until_back(member, starts, timeout_seconds=90)
                done.append(member.name)
                deadline = time.monotonic() + 20
                while not member.reads() and time.monotonic() < deadline and not self.world.over.wait(0.25):
                    pass
        self.evidence = ", ".join(done) or None


class OfWorker(Fault):
    """Strikes one worker."""

    part = "workers"

    @classmethod
    def keys(cls, target: int) -> frozenset[Hashable]:
        return frozenset({("workers", target)})

    def worker(self) -> psutil.Process:
        workers = self.member.workers()
        if not workers:
            raise Missed(f"{self.member.name} has no worker now")
        return self.chance.choice(workers)


class KillWorker(OfWorker):
    """kill -9 of a worker."""

    name = "worker killed"
    seconds = (0.0, 0.0)

    def begin(self) -> None:
        worker = self.worker()
        try:
            worker.kill()
        except psutil.NoSuchProcess:
            raise Missed("the worker had just ended") from None
        wait_until(lambda: not lives(worker), "the worker is dead")
        self.evidence = f"pid {worker.pid} of {self.member.name}"


class KillWorkersInARow(OfWorker):
    """kill -9 of whatever workers a member has, again and again."""

    name = "workers killed in a row"
    seconds = (3.0, 6.0)
    lasting = False

    def begin(self) -> None:
        self._killed = 0
        deadline = time.monotonic() + self.strike.seconds
        while time.monotonic() < deadline and not self.world.over.wait(1.0):
            for worker in self.member.workers():
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()
                    self._killed += 1
        if not self._killed:
            raise Missed(f"{self.member.name} had no worker")
        self.evidence = f"{self._killed} of {self.member.name}"


class FreezeWorker(OfWorker):
    """SIGSTOP of a worker: it holds its flights, its connections and its locks."""

    name = "worker frozen"
    seconds = (2.0, 15.0)

    def begin(self) -> None:
        self._worker = self.worker()
        try:
            self._worker.suspend()
        except psutil.NoSuchProcess:
            raise Missed("the worker had just ended") from None
        self.evidence = f"pid {self._worker.pid} of {self.member.name}"

    def end(self) -> None:
        if self.evidence is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._worker.resume()


class RebalanceStorm(Fault):
    """Members join and leave again as soon as they have partitions, by SIGTERM or by kill -9."""

    part = "supervisors"

    name = "rebalance storm"
    seconds = (10.0, 20.0)
    lasting = False

    @classmethod
    def keys(cls, target: int) -> frozenset[Hashable]:
        return frozenset({"storm"})

    def begin(self) -> None:
        joined = 0
        deadline = time.monotonic() + self.strike.seconds
        while time.monotonic() < deadline and not self.world.over.is_set():
            daemon = self.world.stage.join(self.member)
            try:
                daemon.start(wait=False)
                joined += self._is_member(daemon, deadline)
                if self.chance.random() < 0.5 and daemon.process.running:
                    daemon.process.stop(timeout_seconds=60)
            finally:
                daemon.close()
        if not joined:
            raise Missed("no member was given partitions in time")
        self.evidence = f"{joined} beside {self.member.name}"

    def _is_member(self, daemon: Daemon, deadline: float) -> bool:
        while time.monotonic() < deadline + 10 and daemon.process.running and not self.world.over.wait(0.2):
            with contextlib.suppress(ControlError):
                if any(pipeline["lanes"] for pipeline in daemon.call("status", timeout_seconds=2)["pipelines"]):
                    return True
        return False


class ClockStep(Fault):
    """The clock of one process jumps by hours, and back."""

    part = "supervisors"

    name = "clock steps"
    seconds = (3.0, 12.0)

    @classmethod
    def keys(cls, target: int) -> frozenset[Hashable]:
        return frozenset({"clock"})

    def begin(self) -> None:
        self._clocked = self.chance.choice([member for member in self.world.members if member.clock is not None])
        assert self._clocked.clock is not None
        step = self.chance.choice((-1, 1)) * self.chance.uniform(600, 6 * 3600)
        self._clocked.clock.step(step)
        self.evidence = f"{self._clocked.name} by {step / 3600:+.1f} h"

    def end(self) -> None:
        if self.evidence is not None and self._clocked.clock is not None:
            self._clocked.clock.end()


# --- an operator's commands -------------------------------------------------------------------------------------------


class OfOperator(Fault):
    """Asks a daemon for something, and then to go on. What it holds counts as disturbed meanwhile."""

    part = "commands"

    @classmethod
    def keys(cls, target: int) -> frozenset[Hashable]:
        return frozenset({("operator", target)})

    def pipeline(self) -> str:
        status = self.member.status
        if status is None:
            raise Missed(f"{self.member.name} does not answer")
        return str(self.chance.choice(status["pipelines"])["name"])

    def ask(self, command: str, *, timeout_seconds: float = 5.0) -> dict[str, object]:
        try:
            return self.member.daemon.call(command, timeout_seconds=timeout_seconds, pipeline=self._pipeline)
        except ControlError as error:
            raise Missed(f"{command}: {error}") from None

    def end(self) -> None:
        if self.evidence is None:
            return
        # A daemon that was started anew meanwhile holds nothing; one that is frozen is asked again later.
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                self.member.daemon.call("resume", timeout_seconds=5, pipeline=self._pipeline)
                return
            except NoAnswer:
                continue
            except ControlError:
                if not self.world.over.wait(0.5):
                    continue
                return
        raise AssertionError(f"{self.member.name} could not be asked to resume\n{self.member.daemon.tail()}")


class Pause(OfOperator):
    """`pause`, and `resume` later."""

    name = "paused by command"

    def begin(self) -> None:
        self._pipeline = self.pipeline()
        if self.ask("pause")["ok"]:
            self.evidence = f"{self._pipeline} in {self.member.name}"


class Drain(OfOperator):
    """`drain`, which is answered when all that was read is written, and `resume`."""

    name = "drained by command"
    seconds = (1.0, 4.0)

    def begin(self) -> None:
        self._pipeline = self.pipeline()
        self.evidence = f"{self._pipeline} in {self.member.name}, not answered in time"
        try:
            answer = self.member.daemon.call("drain", timeout_seconds=10, pipeline=self._pipeline)
            self.evidence = f"{self._pipeline} in {self.member.name}: {answer.get('error', 'drained')}"
        except NoAnswer:
            return  # it may still drain; `end` resumes it
        except ControlError as error:
            self.evidence = None
            raise Missed(f"drain: {error}") from None


# --- the network ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disturbance:
    """A way to disturb the connections through some proxies. ``again``: it happens at once, so it is repeated."""

    name: str
    meaning: str
    apply: Callable[[Proxy, random.Random], None]
    again: bool = False


def _slowly(proxy: Proxy, chance: random.Random) -> None:
    proxy.slow(bytes_per_second=chance.uniform(20_000, 200_000), latency_seconds=chance.uniform(0.02, 0.3))


DISTURBANCES = (
    Disturbance("refused", "Connections are reset, and new ones refused.", lambda proxy, _: proxy.refuse()),
    Disturbance("deaf", "Connections are reset, and new ones never answered.", lambda proxy, _: proxy.deaf()),
    Disturbance("stalled", "Nothing is forwarded; at the end all of it is.", lambda proxy, _: proxy.stall()),
    Disturbance("half-open to the server", "Only answers come.", lambda proxy, _: proxy.stall(to_client=False)),
    Disturbance("half-open to the client", "Only answers do not come.", lambda proxy, _: proxy.stall(to_server=False)),
    Disturbance("reset", "Every connection is reset, again and again.", lambda proxy, _: proxy.cut(), again=True),
    Disturbance("slow", "Few bytes a second, each of them late.", _slowly),
)

# Between two resets of all connections.
RESET_SECONDS = 0.7


class OfLink(Fault):
    """Disturbs the connections of one side to the brokers, or to the database."""

    disturbance: ClassVar[Disturbance]
    seconds = (4.0, 20.0)

    def proxies(self) -> tuple[str, Sequence[Proxy]]:
        raise NotImplementedError

    @property
    def lasting(self) -> bool:  # type: ignore[override]
        return not self.disturbance.again

    def begin(self) -> None:
        what, self._proxies = self.proxies()
        open_before = sum(proxy.connections for proxy in self._proxies)
        accepted = sum(proxy.accepted for proxy in self._proxies)
        for proxy in self._proxies:
            self.disturbance.apply(proxy, self.chance)
        until = time.monotonic() + self.strike.seconds
        while self.disturbance.again and time.monotonic() < until and not self.world.over.wait(RESET_SECONDS):
            open_before += sum(proxy.connections for proxy in self._proxies)
            for proxy in self._proxies:
                self.disturbance.apply(proxy, self.chance)
        if not open_before and sum(proxy.accepted for proxy in self._proxies) == accepted:
            raise Missed(f"no connection is open between {self.member.name} and {what}")
        self.evidence = f"{self.member.name} and {what}, {open_before} connections, {self.strike.seconds:.0f} s"

    def end(self) -> None:
        for proxy in getattr(self, "_proxies", ()):
            proxy.heal()


class OfBrokerLink(OfLink):
    """All brokers, or one of them."""

    part = "links to brokers"

    @classmethod
    def keys(cls, target: int) -> frozenset[Hashable]:
        return frozenset({("brokers' link", target)})

    def proxies(self) -> tuple[str, Sequence[Proxy]]:
        proxies = self.world.cluster.proxies[self.member.side]
        if self.chance.random() < 0.3:
            number = self.chance.randrange(len(proxies))
            return f"broker {number}", [proxies[number]]
        return "all brokers", proxies


class OfDatabaseLink(OfLink):
    """Both servers: which one is the primary may change."""

    part = "links to database"

    @classmethod
    def keys(cls, target: int) -> frozenset[Hashable]:
        return frozenset({("database's link", target)})

    def proxies(self) -> tuple[str, Sequence[Proxy]]:
        return "the database", self.world.database.proxies[self.member.side]


def _link_faults() -> list[type[OfLink]]:
    made: list[type[OfLink]] = []
    for base, peer in ((OfBrokerLink, "brokers"), (OfDatabaseLink, "database")):
        for disturbance in DISTURBANCES:
            name = f"{peer}' links {disturbance.name}" if peer == "brokers" else f"{peer}'s links {disturbance.name}"
            members = {"name": name, "disturbance": disturbance, "__doc__": disturbance.meaning}
            made.append(type(f"{base.__name__}:{disturbance.name}", (base,), members))
    return made


class Vanish(Fault):
    """Packets between a member and its servers vanish without a word, in both directions."""

    seconds = (4.0, 20.0)

    def cable(self, network: Namespace) -> Cable:
        raise NotImplementedError

    def begin(self) -> None:
        self._victim = self.chance.choice([member for member in self.world.members if member.network is not None])
        assert self._victim.network is not None
        self._cable = self.cable(self._victim.network)
        self._cable.cut()
        self.evidence = f"{self._victim.name}, {self.strike.seconds:.0f} s"

    def end(self) -> None:
        if self.evidence is not None:
            self._cable.mend()


class VanishToBrokers(Vanish):
    """Packets between a member and the brokers vanish."""

    name = "brokers' packets vanish"
    part = "links to brokers"

    @classmethod
    def keys(cls, target: int) -> frozenset[Hashable]:
        return frozenset({"brokers' cables"})

    def cable(self, network: Namespace) -> Cable:
        return network.to_brokers


class VanishToDatabase(Vanish):
    """Packets between a member and both databases vanish."""

    name = "database's packets vanish"
    part = "links to database"

    @classmethod
    def keys(cls, target: int) -> frozenset[Hashable]:
        return frozenset({"databases' cables"})

    def cable(self, network: Namespace) -> Cable:
        return network.to_databases


class LostCommitAnswers(OfDatabaseLink):
    """The server commits, and the worker never learns it, again and again."""

    name = "answers to COMMIT lost"
    seconds = (4.0, 10.0)
    lasting = False

    def begin(self) -> None:
        _, self._proxies = self.proxies()
        lost = 0
        until = time.monotonic() + self.strike.seconds
        waiting = [proxy.lose_answer_to(b"COMMIT") for proxy in self._proxies]
        while time.monotonic() < until and not self.world.over.wait(0.05):
            for number, (proxy, event) in enumerate(zip(self._proxies, waiting, strict=True)):
                if event.is_set():
                    lost += 1
                    waiting[number] = proxy.lose_answer_to(b"COMMIT")
        if not lost:
            raise Missed(f"{self.member.name} committed nothing")
        self.evidence = f"{lost} of {self.member.name}"


# --- brokers ----------------------------------------------------------------------------------------------------------


class OfBroker(Fault):
    """Takes one broker away. Never two: what is acknowledged by all needs two of three replicas."""

    part = "brokers"

    @classmethod
    def keys(cls, target: int) -> frozenset[Hashable]:
        return frozenset({"brokers"})

    @property
    def broker(self) -> int:
        return self.strike.seed % len(self.world.cluster.nodes)

    def settle(self) -> None:
        self.world.cluster.wait_until_healthy()


class KillBroker(OfBroker):
    """kill -9 of a broker, and its restart."""

    name = "broker killed"

    def begin(self) -> None:
        self.world.cluster.kill(self.broker)
        self.evidence = f"broker {self.broker} for {self.strike.seconds:.0f} s"

    def end(self) -> None:
        self.world.cluster.restart(self.broker)


class RestartBroker(OfBroker):
    """A broker stops in order, and comes back."""

    name = "broker restarted in order"
    seconds = (0.0, 0.0)

    def begin(self) -> None:
        before = self.world.cluster.nodes[self.broker].pid
        self.world.cluster.restart(self.broker)
        self.evidence = f"broker {self.broker}, pid {before} to {self.world.cluster.nodes[self.broker].pid}"


class FreezeBroker(OfBroker):
    """SIGSTOP of a broker, for less or more than its session."""

    name = "broker frozen"
    seconds = (1.0, 15.0)

    def begin(self) -> None:
        self.world.cluster.stop(self.broker)
        self.evidence = f"broker {self.broker} for {self.strike.seconds:.0f} s"

    def end(self) -> None:
        self.world.cluster.cont(self.broker)


# --- topics -----------------------------------------------------------------------------------------------------------


class OfTopic(Fault):
    """Changes a topic while it is written and read; nothing is disturbed longer than the change takes."""

    part = "topics"

    seconds = (0.0, 0.0)

    @classmethod
    def keys(cls, target: int) -> frozenset[Hashable]:
        return frozenset({"topics", "brokers"})

    def stream(self, of: Callable[[Stream], bool]) -> Stream:
        return self.chance.choice([stream for stream in self.world.streams if of(stream)])


class AddPartitions(OfTopic):
    """A topic gets one more partition."""

    name = "partitions added"

    def begin(self) -> None:
        stream = self.stream(lambda one: one.may_grow)
        count = len(self.world.cluster.partitions(stream.topic))
        if count >= MOST_PARTITIONS:
            raise Missed(f"{stream.topic} has {count} partitions already")
        self.world.cluster.add_partitions(stream.topic, count + 1)
        self.world.traffic.grown(stream.topic, count + 1)
        self.evidence = f"{stream.topic} has {count + 1}"


class RetentionBehind(OfTopic):
    """Retention takes what is written: up to the checkpoints, also those that the standby has."""

    name = "retention takes what is written"

    def begin(self) -> None:
        stream = self.stream(lambda one: True)
        database = self.world.database
        try:
            # A fail-over may lose commits, and what was written by those is read again.
            known = self.world.checkpoints(database.standby.dsn(DATABASE), stream.topic)
            here = self.world.checkpoints(database.primary.dsn(DATABASE), stream.topic)
        except psycopg2.OperationalError as error:
            raise Missed(f"the checkpoints can not be read: {error}") from None
        starts = self.world.cluster.start_offsets(stream.topic)
        ends, taken = self.world.traffic.ends(), 0
        for partition, start in starts.items():
            least = min(known.get(partition, 0), here.get(partition, 0))
            offset = min(least, ends.get((stream.topic, partition), 0))
            if offset > start:
                self.world.cluster.delete_records(stream.topic, partition, offset)
                taken += offset - start
        if not taken:
            raise Missed(f"nothing of {stream.topic} is written that is not gone already")
        self.evidence = f"{taken} messages of {stream.topic}"


class RetentionAhead(OfTopic):
    """Retention takes what is not written yet, of a topic whose pipeline skips: the gap must be recorded."""

    name = "retention takes what is not written"
    seconds = (0.0, 0.0)

    @classmethod
    def keys(cls, target: int) -> frozenset[Hashable]:
        return super().keys(target) | {("operator", number) for number in range(16)}

    def begin(self) -> None:
        self._stream = self.stream(lambda one: one.may_skip)
        self._paused = [member for member in self.world.members if self._ask(member, "pause")]
        topic = self._stream.topic
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not self.world.over.wait(0.5):
            behind = self._behind()
            if behind:
                partition, offset, end = self.chance.choice(behind)
                to = self.chance.randint(offset + 1, end)
                # Noted first: a gap that is recorded is right as soon as the log may begin there.
                self.world.forgotten[topic, partition] = max(to, self.world.forgotten.get((topic, partition), 0))
                self.world.cluster.delete_records(topic, partition, to)
                self.evidence = f"{topic} {partition} up to {to}, written up to {offset}"
                return
        raise Missed(f"{topic} was written up to its end all the time")

    def end(self) -> None:
        for member in getattr(self, "_paused", ()):
            deadline = time.monotonic() + 60
            while member.running and not self._ask(member, "resume") and time.monotonic() < deadline:
                if self.world.over.wait(0.5):
                    break

    def _behind(self) -> list[tuple[int, int, int]]:
        try:
            written = self.world.checkpoints(self.world.database.primary.dsn(DATABASE), self._stream.topic)
        except psycopg2.OperationalError as error:
            raise Missed(f"the checkpoints can not be read: {error}") from None
        ends = self.world.cluster.end_offsets(self._stream.topic)
        return [
            (partition, written[partition], end) for partition, end in ends.items() if written.get(partition, end) < end
        ]

    def _ask(self, member: Member, command: str) -> bool:
        try:
            return bool(member.daemon.call(command, timeout_seconds=3, pipeline=self._stream.pipeline)["ok"])
        except ControlError:
            return False


# --- the database -----------------------------------------------------------------------------------------------------


class OfDatabase(Fault):
    """Disturbs the primary. One at a time: two may make every success impossible."""

    part = "database"

    @classmethod
    def keys(cls, target: int) -> frozenset[Hashable]:
        return frozenset({"database"})

    @property
    def database(self) -> ReplicatedDatabase:
        return self.world.database

    def dsn(self) -> str:
        return self.database.primary.dsn(DATABASE)

    def settle(self) -> None:
        wait_until(self.database.replicates, "the standby replicates", timeout_seconds=60)


class RestartPostgres(OfDatabase):
    """The primary restarts: in order, or by a crash and recovery."""

    name = "PostgreSQL restarted"
    seconds = (0.0, 0.0)

    def begin(self) -> None:
        how = self.chance.choice((Shutdown.FAST, Shutdown.IMMEDIATE))
        before = self.database.primary.process.pid
        self.database.restart(how)
        self.evidence = f"{how.name.lower()}, pid {before} to {self.database.primary.process.pid}"


class CrashPostgres(OfDatabase):
    """kill -9 of the primary's first process, and its restart."""

    name = "PostgreSQL killed"
    seconds = (0.0, 0.0)

    def begin(self) -> None:
        before = self.database.primary.process.pid
        self.database.crash()
        self.evidence = f"pid {before} to {self.database.primary.process.pid}"


class FailOver(OfDatabase):
    """The primary is killed and the standby promoted; what was committed was waited for by the standby."""

    name = "fail-over"
    seconds = (0.0, 0.0)

    def begin(self) -> None:
        wait_until(self.database.replicates, "the standby replicates", timeout_seconds=60)
        seconds = self.database.fail_over(rebuild=False)
        self.evidence = f"{seconds:.1f} s without a primary"

    def settle(self) -> None:
        if self.evidence is not None:
            self.database.rebuild_standby()
        super().settle()


class LossyFailOver(OfDatabase):
    """The standby is behind, and nobody waits for it: the last commits are lost, rows and checkpoints together."""

    name = "fail-over that loses commits"
    seconds = (0.0, 0.0)

    # For so long the replication stands still while rows are committed.
    BEHIND_SECONDS = (0.5, 4.0)

    def begin(self) -> None:
        database = self.database
        wait_until(database.replicates, "the standby replicates", timeout_seconds=60)
        database.synchronous = False
        try:
            database.primary.reload(synchronous_standby_names="")
            node = next(node for node in database.nodes if node.server is database.primary)
            node.replication.stall()
            self.world.over.wait(self.chance.uniform(*self.BEHIND_SECONDS))
            committed = self._written(self.dsn())
            seconds = database.fail_over(rebuild=False)
            kept = self._written(self.dsn())
        finally:
            database.synchronous = True
        # Rows of other flushes may have come since; a loss that they hide is one more that went unnoticed here alone.
        self.evidence = f"{max(0, committed - kept)} committed messages lost, {seconds:.1f} s without a primary"

    def settle(self) -> None:
        if self.evidence is not None:
            self.database.rebuild_standby()
        super().settle()

    @staticmethod
    def _written(dsn: str) -> int:
        ((count,),) = query(dsn, "SELECT coalesce(sum(rows + dead_lettered + filtered), 0) FROM speedlayer.checkpoints")
        return int(count)


class TerminateBackends(OfDatabase):
    """An administrator ends connections, some or all, again and again."""

    name = "backends terminated"
    seconds = (2.0, 8.0)
    lasting = False

    def begin(self) -> None:
        ended = 0
        until = time.monotonic() + self.strike.seconds
        while True:
            part = self.chance.choice(("true", "pid % 2 = 0", "xact_start IS NOT NULL"))
            ended += self.database.terminate_backends(f"{OURS} AND {part}")
            if time.monotonic() > until or self.world.over.wait(self.chance.uniform(0.2, 2.0)):
                break
        if not ended:
            raise Missed("no backend was there")
        self.evidence = f"{ended} of them"


class FreezeBackend(OfDatabase):
    """SIGSTOP of one backend: its client waits, and so does whoever waits for its locks."""

    name = "backend frozen"
    seconds = (2.0, 12.0)

    def begin(self) -> None:
        backends = self.database.primary.backends(OURS)
        if not backends:
            raise Missed("no backend is there")
        # One in a transaction, if there is any: it holds locks.
        busy = [backend for backend in backends if backend["xact_start"] is not None]
        chosen = self.chance.choice(busy or backends)
        self._process = psutil.Process(chosen["pid"])
        self._process.suspend()
        self.evidence = f"pid {chosen['pid']}, {'in a transaction' if busy else 'idle'}"

    def end(self) -> None:
        if self.evidence is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._process.resume()


class LockTable(OfDatabase):
    """Somebody locks a table that is written to, or the checkpoints."""

    name = "table locked"
    seconds = (2.0, 15.0)
    lasting = False

    def begin(self) -> None:
        table = self.chance.choice([*(stream.table for stream in self.world.streams), "speedlayer.checkpoints"])
        mode = self.chance.choice(("ACCESS EXCLUSIVE", "EXCLUSIVE", "SHARE"))
        self.database.begin_lock(table, mode=mode)
        self._what = f"{table} in {mode} mode"
        until = time.monotonic() + self.strike.seconds
        waiting = 0
        while time.monotonic() < until and not self.world.over.wait(0.2):
            waiting = max(waiting, len(self.database.primary.backends(f"{OURS} AND wait_event_type = 'Lock'")))
        if not waiting:
            raise Missed(f"nobody waited for {self._what}")
        self.evidence = f"{self._what}, {waiting} waited"

    def end(self) -> None:
        self.database.end_lock()


class ExhaustConnections(OfDatabase):
    """Somebody takes every connection, and the next that becomes free; ours are ended, and find no new one."""

    name = "connections exhausted"
    seconds = (3.0, 12.0)

    def begin(self) -> None:
        taken = self.database.begin_exhaustion()
        ended = self.database.terminate_backends(OURS)
        self.evidence = f"{taken} taken, {ended} of ours ended"

    def end(self) -> None:
        self.database.end_exhaustion()


class FullDisk(OfDatabase):
    """The disk of the primary's data is full."""

    name = "disk full"
    seconds = (3.0, 15.0)
    lasting = False

    def begin(self) -> None:
        log = self.database.primary.process.log
        before = log.stat().st_size
        self.database.fill_disk()
        until = time.monotonic() + self.strike.seconds
        while time.monotonic() < until and not self.world.over.wait(0.2):
            pass
        with log.open("rb") as lines:
            lines.seek(before)
            refused = lines.read().count(b"No space left on device")
        if not refused:
            raise Missed("nothing asked for more room")
        self.evidence = f"{refused} writes refused"

    def end(self) -> None:
        self.database.free_disk()


KINDS: tuple[type[Fault], ...] = (
    KillSupervisor,
    FreezeSupervisor,
    TerminateSupervisor,
    RollingRestart,
    KillWorker,
    KillWorkersInARow,
    FreezeWorker,
    RebalanceStorm,
    ClockStep,
    Pause,
    Drain,
    *_link_faults(),
    VanishToBrokers,
    VanishToDatabase,
    LostCommitAnswers,
    KillBroker,
    RestartBroker,
    FreezeBroker,
    AddPartitions,
    RetentionBehind,
    RetentionAhead,
    RestartPostgres,
    CrashPostgres,
    FailOver,
    LossyFailOver,
    TerminateBackends,
    FreezeBackend,
    LockTable,
    ExhaustConnections,
    FullDisk,
)


def named(*names: str) -> tuple[type[Fault], ...]:
    """The kinds of these names; an unknown name is an error that lists what there is."""
    known: Mapping[str, type[Fault]] = {kind.name: kind for kind in KINDS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"there is no fault {unknown[0]!r}; there are: {', '.join(sorted(known))}")
    return tuple(known[name] for name in names)
