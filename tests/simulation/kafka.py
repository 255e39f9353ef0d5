"""A simulated Kafka: logs, a group coordinator with both rebalance protocols, and the consumer that the shell drives.

The consumer mirrors `speedlayer.supervisor.consumer.GroupConsumer` event for event; what librdkafka does below it is
reduced to what the core can notice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Optional

from simulation.world import Process, World
from speedlayer.supervisor.core import events as e
from speedlayer.supervisor.core.actions import Resume
from speedlayer.workers.protocol import Chunk

CLUSTER = "simulated"

# Positions of partitions that bring no message are looked at this often, as the shell does.
POSITION_INTERVAL_SECONDS = 0.5

SESSION_TIMEOUT_SECONDS = 3.0
HEARTBEAT_SECONDS = 0.5

# What became of a message.
PENDING, DONE, PASSED = 0, 1, 2
# How a message left the log.
COMPACTED, EXPIRED = 1, 2


class Message:
    """One message. ``fate`` is what a worker will make of it: a row, nothing, or a dead letter; or what becomes of the
    worker: "poison" kills it, "accomplice" does so where there are two of them in a flight, and is a row otherwise.

    ``bystander`` counts the deaths of other causes at which it was all that its worker looked at.
    """

    __slots__ = ("bystander", "fate", "gone", "key", "leader_epoch", "log", "offset", "size", "status")

    def __init__(self, log: Log, offset: int, key: int, size: int, fate: str, leader_epoch: int) -> None:
        self.log, self.offset, self.key, self.size, self.fate = log, offset, key, size, fate
        self.leader_epoch = leader_epoch
        self.status = PENDING
        self.gone = 0
        self.bystander = 0

    def __repr__(self) -> str:
        return f"{self.log.partition}@{self.offset}"


class SimulatedChunk(Chunk, frozen=True):
    """A chunk whose ``offsets`` are the messages themselves."""

    @property
    def size_bytes(self) -> int:
        """What counts for the memory budget."""
        return sum(message.size for message in self.offsets)  # type: ignore[attr-defined]

    def count_below(self, offset: int) -> int:
        """How many of its messages stand before the offset."""
        return sum(message.offset < offset for message in self.offsets)  # type: ignore[attr-defined]

    def offset_of(self, index: int) -> int:
        """The offset of the message at ``index``."""
        return self.offsets[index].offset  # type: ignore[attr-defined,no-any-return]

    def split(self, index: int, separator: bytes) -> tuple[Chunk, Chunk]:
        """Cut it before the message at ``index``."""
        return chunk_of(self.offsets[:index]), chunk_of(self.offsets[index:])


def chunk_of(messages: Any) -> SimulatedChunk:
    """Messages as one chunk."""
    return SimulatedChunk(len(messages), tuple(messages), b"", b"", b"", b"", b"", {})  # type: ignore[arg-type]


class Log:
    """The log of one partition. An offset without a message is a control record, or of an aborted transaction."""

    def __init__(self, partition: e.Partition, topic_id: str) -> None:
        self.partition = partition
        self.topic_id = topic_id
        self.entries: list[Optional[Message]] = []
        self.low = 0
        self.stable = 0  # readers of committed messages see nothing from here on
        self.leader_epoch = 0
        self.compacted = 0

    @property
    def end(self) -> int:
        """The offset after the last one."""
        return len(self.entries)

    def append(self, key: int, size: int, fate: str) -> None:
        """A message of the transaction under way, or of none."""
        self.entries.append(Message(self, self.end, key, size, fate, self.leader_epoch))

    def control(self) -> None:
        """A transaction's marker takes an offset."""
        self.entries.append(None)

    def abort_from(self, start: int) -> None:
        """What was written since ``start`` will never be seen."""
        for offset in range(start, self.end):
            self.entries[offset] = None

    def settle(self) -> None:
        """No transaction is open."""
        self.stable = self.end

    def expire(self, low: int) -> None:
        """Retention: everything below ``low`` is gone."""
        for message in self.entries[self.low : low]:
            if message is not None and not message.gone:
                message.gone = EXPIRED
        self.low = max(self.low, low)

    def compact(self, end: int) -> None:
        """Compaction below ``end``: of each key only the last message stays."""
        last: dict[int, int] = {}
        for message in self.entries[self.low : end]:
            if message is not None and not message.gone:
                last[message.key] = message.offset
        for message in self.entries[self.low : end]:
            if message is not None and not message.gone and last[message.key] != message.offset:
                message.gone = COMPACTED


class Broker:
    """The cluster: logs and groups. ``reachable`` is a matter of each consumer; ``up`` of everybody."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.up = True
        self.tells_ids = True  # older brokers have no topic ids
        self.made_again: set[str] = set()  # topics that were deleted and made again
        self.logs: dict[e.Partition, Log] = {}
        self.groups: dict[str, Group] = {}
        self._ids = 0

    def create_topic(self, group: str, topic: str, partitions: int) -> None:
        """Make a topic (again); its partitions are known under the group that reads it."""
        self._ids += 1
        if e.Partition(group, topic, 0) in self.logs:
            self.made_again.add(topic)
        for number in range(partitions):
            partition = e.Partition(group, topic, number)
            self.logs[partition] = Log(partition, f"id-{self._ids}")

    def add_partition(self, group: str, topic: str) -> e.Partition:
        """One partition more."""
        numbers = [x.partition for x in self.logs if x.group == group and x.topic == topic]
        partition = e.Partition(group, topic, max(numbers) + 1)
        self.logs[partition] = Log(partition, self.logs[e.Partition(group, topic, 0)].topic_id)
        return partition

    def partitions_of(self, group: str) -> list[e.Partition]:
        """What a group's members share."""
        return [partition for partition in self.logs if partition.group == group]


class Member:
    """A member as the coordinator knows it."""

    def __init__(self, consumer: Consumer, now: float) -> None:
        self.consumer = consumer
        self.owned: set[e.Partition] = set()  # promised to it and not yet given back
        self.target: set[e.Partition] = set()
        self.revoking: set[e.Partition] = set()
        self.heard_at = now


class Group:
    """A group's coordinator. ``classic``: in rounds, and everybody is told; else each member for itself (KIP-848)."""

    def __init__(self, world: World, broker: Broker, name: str, classic: bool) -> None:
        self.world, self.broker, self.name, self.classic = world, broker, name, classic
        self.random = world.stream(f"group {name}")
        self.members: list[Member] = []
        self.committed: dict[e.Partition, tuple[int, bool]] = {}
        self._round_due = False
        broker.groups[name] = self

    # --- membership -----------------------------------------------------------------------------------------------

    def join(self, consumer: Consumer) -> Member:
        """A new member."""
        member = Member(consumer, self.world.now)
        self.members.append(member)
        self.rebalance()
        return member

    def leave(self, member: Member) -> None:
        """The member goes, or is expelled."""
        if member in self.members:
            self.members.remove(member)
            self.rebalance()

    def expire(self) -> None:
        """Expel those that were silent for too long."""
        for member in list(self.members):
            if self.world.now - member.heard_at > SESSION_TIMEOUT_SECONDS:
                self.world.say("kafka", f"{member.consumer.process.name} is expelled from {self.name}: no heartbeat")
                self.leave(member)

    def rebalance(self, shuffle: bool = False) -> None:
        """Compute who shall have what; members keep what they have where it is fair."""
        partitions = sorted(self.broker.partitions_of(self.name))
        if not self.members:
            return
        members = list(self.members)
        self.random.shuffle(members)
        fair = -(-len(partitions) // len(members))
        for member in members:
            kept = [] if shuffle else sorted(member.target.intersection(partitions))[:fair]
            member.target = set(kept)
        taken = set().union(*(member.target for member in members))
        for partition in partitions:
            if partition not in taken:
                min(members, key=lambda member: len(member.target)).target.add(partition)
        self.reconcile()

    def reconcile(self) -> None:
        """Bring the members nearer to their targets; in rounds for the classic protocol."""
        if not self.classic:
            self._reconcile()
        elif not self._round_due:
            self._round_due = True
            self.world.after(self.random.uniform(0.02, 0.4), self._end_round)

    def _end_round(self) -> None:
        self._round_due = False
        self._reconcile()

    def _reconcile(self) -> None:
        owned = set().union(*(member.owned for member in self.members)) if self.members else set()
        for member in self.members:
            extra = member.owned - member.target - member.revoking
            if extra:
                member.revoking |= extra
                self._tell(member, "revoke", extra)
        for member in self.members:
            new = member.target - owned
            if new or (self.classic and not member.revoking):
                member.owned |= new
                owned |= new
                self._tell(member, "assign", new)

    def _tell(self, member: Member, what: str, partitions: set[e.Partition]) -> None:
        self.world.after(self.random.uniform(0.001, 0.1), member.consumer.told, member, what, tuple(sorted(partitions)))

    def gave_back(self, member: Member, partitions: tuple[e.Partition, ...]) -> None:
        """A member acknowledges a revocation."""
        if member in self.members:
            member.owned.difference_update(partitions)
            member.revoking.difference_update(partitions)
            self.reconcile()


class Consumer:
    """What `GroupConsumer` and librdkafka are together: a member of the group that reads what it is told to read."""

    def __init__(self, process: Process, broker: Broker, group: Group, name: str, late: bool) -> None:
        self.process, self.broker, self.group = process, broker, group
        self.world = process.world
        self.random = self.world.stream(f"consumer {name}")
        self.late = late  # what is read may come a turn later, as from a thread of its own
        self.reachable = True
        self.coordinated = True  # whether the coordinator, too, is in reach: the leaders serve whoever asks
        self.closed = False
        self.assigned: set[e.Partition] = set()
        self.fetching: dict[e.Partition, int] = {}
        self.positions: dict[e.Partition, int] = {}
        self._ends: dict[e.Partition, int] = {}
        self._refused: set[e.Partition] = set()
        self.silent: dict[e.Partition, int] = {}  # which is not delivered, until it is resumed so many times
        self._callbacks: deque[tuple[str, tuple[e.Partition, ...]]] = deque()
        self._interrupted: Optional[str] = None
        self._positions_at = 0.0
        self._held_back: list[e.AnyEvent] = []
        self._held_until = 0.0
        self._troubled = False
        self._member: Optional[Member] = None
        self._heartbeat()

    # --- the group ------------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether the broker answers us."""
        return self.reachable and self.broker.up

    def _heartbeat(self) -> None:
        if self.closed or not self.process.alive:
            return
        self.process.later(HEARTBEAT_SECONDS * self.random.uniform(0.5, 1.0), self._heartbeat)
        if not (self.connected and self.coordinated):
            return
        member = self._member
        if member is None or member not in self.group.members:
            if member is not None:
                self._callbacks.clear()
                self._callbacks.append(("lost", ()))
            self._member = self.group.join(self)
        else:
            member.heard_at = self.world.now

    def told(self, member: Member, what: str, partitions: tuple[e.Partition, ...]) -> None:
        """The coordinator's word has arrived; the callback runs inside the next poll."""
        if self.closed or member is not self._member:
            return
        if not (self.connected and self.coordinated):
            self.world.after(0.3, self.told, member, what, partitions)
            return
        self._callbacks.append((what, partitions))

    def close(self) -> None:
        """Leave the group."""
        self.closed = True
        self.fetching.clear()
        if self._member is not None and self.connected:
            self.group.leave(self._member)

    # --- reading --------------------------------------------------------------------------------------------------

    def poll(self, allowance_bytes: int) -> list[e.AnyEvent]:
        """One `GroupConsumer.poll`: callbacks, messages, moved positions."""
        generations = dict(self.fetching)
        events = self._run_callbacks()
        if self._held_back:
            if self.world.now < self._held_until:
                return events
            held, self._held_back = self._held_back, []
            return [*events, *held]
        messages = self._consume(allowance_bytes) if self.connected else {}
        if not self.connected and not self._troubled:
            self._troubled = True
            events.append(e.ConsumerTrouble(self.world.now, self.group.name, "_ALL_BROKERS_DOWN", "all brokers down"))
        elif self.connected:
            self._troubled = False
        if self._interrupted is not None:
            # consume() raised: librdkafka has moved past these messages, and nobody has them.
            reason, self._interrupted = self._interrupted, None
            return [*events, e.PositionsUnknown(self.world.now, self.group.name, reason)]
        read = self._refusals(generations)
        read.append(e.Polled(self.world.now, self.group.name, tuple(self._slices(messages, generations))))
        read.extend(self._moved_positions(generations))
        if self.late and self.random.random() < 0.3:
            self._held_back, self._held_until = read, self.world.now + self.random.choice((0.0, 0.1, 0.5))
            return events
        return [*events, *read]

    def _run_callbacks(self) -> list[e.AnyEvent]:
        events: list[e.AnyEvent] = []
        now = self.world.now
        while self._callbacks:
            what, partitions = self._callbacks.popleft()
            if what == "assign":
                self.assigned.update(partitions)
                events.append(e.Assigned(now, CLUSTER, partitions))
                continue
            if what == "lost":
                partitions = tuple(sorted(self.assigned))
            for partition in partitions:
                self.fetching.pop(partition, None)
            self.assigned.difference_update(partitions)
            events.append(e.Revoked(now, partitions, what == "lost"))
            if what == "revoke" and self._member is not None:
                self.world.after(self.random.uniform(0.001, 0.1), self.group.gave_back, self._member, partitions)
        return events

    def _consume(self, allowance_bytes: int) -> dict[e.Partition, list[Message]]:
        random = self.random
        found: dict[e.Partition, list[Message]] = {}
        room = allowance_bytes
        limit = random.choice((1, 3, 10, 50)) if allowance_bytes else 1
        partitions = list(self.fetching)
        random.shuffle(partitions)
        for partition in partitions:
            log = self.broker.logs.get(partition)
            position = self.positions[partition]
            if log is None or partition in self._refused or self.silent.get(partition):
                continue
            if position < log.low or position > log.end:
                self._refused.add(partition)
                continue
            run: list[Message] = []
            while position < log.stable and limit > 0:
                message = log.entries[position]
                position += 1
                if message is None or message.gone:
                    continue
                run.append(message)
                limit -= 1
                room -= message.size
                if room <= 0:
                    limit = 0
            # Whether the position passes a tail without messages at once, or a little later, is not ours to know.
            while position < log.stable and (log.entries[position] is None or log.entries[position].gone):  # type: ignore[union-attr]
                if random.random() < 0.2:
                    break
                position += 1
            self.positions[partition] = position
            if run:
                found[partition] = run
            if limit <= 0:
                break
        return found

    def _refusals(self, generations: Mapping[e.Partition, int]) -> list[e.AnyEvent]:
        events: list[e.AnyEvent] = []
        for partition in sorted(self._refused):
            if partition in self.fetching and self.positions[partition] >= 0:
                self.positions[partition] = -1
                generation = generations.get(partition, -1)
                problem = e.FetchProblem.OUT_OF_RANGE
                events.append(e.FetchFailed(self.world.now, partition, generation, problem, "no such offset"))
        return events

    def _slices(
        self, messages: Mapping[e.Partition, list[Message]], generations: Mapping[e.Partition, int]
    ) -> list[e.Slice]:
        slices = []
        for partition, run in messages.items():
            generation = generations.get(partition)
            if generation is None:
                continue
            cuts = [run]
            if len(run) > 4 and self.random.random() < 0.3:  # over the batch's bytes: cut in two
                middle = self.random.randrange(1, len(run))
                cuts = [run[:middle], run[middle:]]
            for piece in cuts:
                last = piece[-1].offset
                end = last + 1
                if piece is cuts[-1] and self.fetching.get(partition) == generation:
                    end = max(end, self.positions[partition])
                self._ends[partition] = end
                size = sum(message.size for message in piece)
                slices.append(
                    e.Slice(
                        partition,
                        generation,
                        piece[0].offset,
                        last,
                        end,
                        len(piece),
                        size,
                        piece[-1].leader_epoch,
                        chunk_of(piece),
                    )
                )
        return slices

    def _moved_positions(self, generations: Mapping[e.Partition, int]) -> list[e.AnyEvent]:
        now = self.world.now
        if now - self._positions_at < POSITION_INTERVAL_SECONDS:
            return []
        self._positions_at = now
        moved: list[e.AnyEvent] = []
        for partition, generation in self.fetching.items():
            end = self.positions[partition]
            if generations.get(partition) == generation and end > self._ends.get(partition, -1):
                self._ends[partition] = end
                moved.append(e.PositionMoved(now, partition, generation, end))
        return moved

    def interrupt(self, reason: str) -> None:
        """The next consume() raises."""
        self._interrupted = reason

    # --- what the core wants --------------------------------------------------------------------------------------

    def resume(self, action: Resume) -> None:
        """Read a partition from an offset on."""
        if action.partition not in self.assigned:
            self._interrupted = f"{action.partition} could not be assigned"
            return
        self.fetching[action.partition] = action.generation
        if self.silent.get(action.partition):
            self.silent[action.partition] -= 1
        self.positions[action.partition] = self._ends[action.partition] = action.offset
        self._refused.discard(action.partition)

    def pause(self, partition: e.Partition) -> None:
        """Stop reading it."""
        self.fetching.pop(partition, None)

    def commit(self, offsets: Mapping[e.Partition, int]) -> None:
        """Tell the group, some time."""
        self.world.after(self.random.uniform(0.0, 0.2), self._committed, self._member, dict(offsets))

    def _committed(self, member: Optional[Member], offsets: Mapping[e.Partition, int]) -> None:
        if self.connected and self.coordinated and member in self.group.members:
            self.group.committed.update({partition: (offset, True) for partition, offset in offsets.items()})
