"""The Kafka consumer of one group (supervisor process; the only place that calls `consume()`).

Partitions are not read when the group assigns them but when the core says so, and reading is stopped and resumed by
unassigning and assigning at the ledger's offset: librdkafka's own pause throws away what it has prefetched too, and
takes about a second to resume, where a new assignment takes a few milliseconds. So there is no set of paused partitions
that could be forgotten, and no seek.

librdkafka waits until a time of day: after a step back of the clock its waits end that much later, and its main thread
sends no heartbeats meanwhile (its issue 2145). So it is never asked to wait here, and its main thread is woken now and
then.

Callbacks never raise: an exception out of `consume()` destroys messages that librdkafka has already moved past.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from speedlayer.supervisor import kafka_properties
from speedlayer.supervisor.chunks import Run, runs
from speedlayer.supervisor.core import events as e
from speedlayer.supervisor.core.actions import Resume
from speedlayer.supervisor.kafka_errors import explain

if TYPE_CHECKING:
    from confluent_kafka import Message

logger = logging.getLogger("speedlayer.consumer")

# The metadata of our own group commits: such a commit without a checkpoint means that the checkpoints were lost.
COMMIT_METADATA = "speedlayer"

# One consume() call returns at most this many messages; more do not make it cheaper.
CONSUME_LIMIT = 10_000

# While fewer messages are there than may be read, we look so often. More often costs an idle daemon more of a core (now
# about 1 %), and less often delays a reader whose prefetch is small.
LOOK_INTERVAL_SECONDS = 0.005

# librdkafka's main thread is given something to do at least this often: less than a heartbeat's interval is not needed,
# since only a session that times out does harm.
WAKE_INTERVAL_SECONDS = 1.0

# Before the first message nothing is known of their size, and a first call must not blow the budget.
FIRST_GUESS_BYTES = 64 * 1024

# A message that sits in a Python object takes about this much on top of its payload.
MESSAGE_OVERHEAD_BYTES = 200

# Positions of partitions that bring no message are looked at this often.
POSITION_INTERVAL_SECONDS = 0.5

# With the default of 1,000 ms a small prefetch falls from 1.2 million messages a second to 44,000.
FETCH_QUEUE_BACKOFF_MS = 10

# Only so much of the prefetch may come in one response, for what a response holds is counted compressed: it may grow
# this many times before it alone is as large as the prefetch. Smaller shares were no slower on one machine.
FETCH_SHARE = 32
SMALLEST_FETCH_BYTES = 256 * 1024

# librdkafka takes no larger queued.max.messages.kbytes; the other limits that derive from the prefetch stay within
# their ranges below it. So from a budget of 8 GB on the prefetch takes 2 GB, whatever its share.
PREFETCH_LIMIT_BYTES = 2_097_151 * 1024

# librdkafka counts values, and takes some 300 bytes a message on top. So the prefetch is bounded in messages too, or
# one of many small messages would take ten times its bytes.
PREFETCHED_MESSAGE_BYTES = 256

# Keys and headers are not counted either. When they turn out to be so many times what the bound in messages allows for,
# the consumer is made anew with a lower bound: it can not be changed in a running one.
PREFETCH_EXCESS = 2.0

_PROBLEMS = {
    KafkaError._AUTO_OFFSET_RESET: e.FetchProblem.OUT_OF_RANGE,
    KafkaError.OFFSET_OUT_OF_RANGE: e.FetchProblem.OUT_OF_RANGE,
    KafkaError._LOG_TRUNCATION: e.FetchProblem.LOG_TRUNCATED,
}


@dataclass(frozen=True)
class FetchLimits:
    """What one group's consumer may hold: ``prefetch_bytes`` are what librdkafka fetches ahead, ``batch_rows`` bounds
    what one call returns, and ``batch_bytes`` one slice.
    """

    prefetch_bytes: int
    batch_rows: int
    batch_bytes: int
    message_bytes: int = PREFETCHED_MESSAGE_BYTES  # of one message, what librdkafka does not count

    def properties(self) -> dict[str, Any]:
        """The librdkafka properties that keep the limit."""
        prefetch_bytes = min(self.prefetch_bytes, PREFETCH_LIMIT_BYTES)
        response_bytes = max(SMALLEST_FETCH_BYTES, prefetch_bytes // FETCH_SHARE)
        return {
            "queued.max.messages.kbytes": max(1024, prefetch_bytes // 1024),
            "queued.min.messages": max(1, prefetch_bytes // self.message_bytes),
            "fetch.max.bytes": response_bytes,
            "message.max.bytes": response_bytes,  # the least that fetch.max.bytes may be; a larger message comes alone
            "max.partition.fetch.bytes": response_bytes,
            "fetch.queue.backoff.ms": FETCH_QUEUE_BACKOFF_MS,
        }


def consumer_properties(kafka: Mapping[str, Any], group: str, limits: FetchLimits) -> dict[str, Any]:
    """All properties of a group's consumer: the user's, and above them those that the promises need."""
    properties = {
        **kafka_properties.with_defaults(kafka),
        **limits.properties(),
        "group.id": group,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "error",  # librdkafka's own reset is silent; ours is not
    }
    if properties.get("group.protocol") != "consumer":
        properties["partition.assignment.strategy"] = "cooperative-sticky"
    return properties


def never_raises(callback: Callable[..., None]) -> Callable[..., None]:
    """Turn an exception in a librdkafka callback into an event; raised, it would destroy messages."""

    @functools.wraps(callback)
    def guarded(self: GroupConsumer, *arguments: Any) -> None:
        try:
            callback(self, *arguments)
        except Exception as error:
            logger.exception("a librdkafka callback failed")
            self._interrupted = f"{callback.__name__} failed: {error!r}"

    return guarded


class GroupConsumer:
    """Reads the topics of one group; `poll` returns what happened as events."""

    def __init__(
        self,
        kafka: Mapping[str, Any],
        group: str,
        topics: tuple[str, ...],
        limits: FetchLimits,
        separator: bytes,
        cluster: str,
    ) -> None:
        self.group = group
        self._topics = topics
        self._limits = limits
        self._separator = separator
        self._cluster = cluster
        self._events: list[e.AnyEvent] = []
        self._fetching: dict[e.Partition, int] = {}  # partition -> generation
        self._ends: dict[e.Partition, int] = {}  # where the last event said that a partition stands
        self._largest_bytes = float(FIRST_GUESS_BYTES)
        self._positions_at = 0.0
        self._woken_at = 0.0
        self.message_bytes = limits.message_bytes  # of one message, what librdkafka does not count: seen lately
        self._interrupted: Optional[str] = None
        properties = consumer_properties(kafka, group, limits)
        properties["error_cb"] = self._on_error
        properties["on_commit"] = self._on_commit
        self._consumer = Consumer(properties, logger=logging.getLogger("speedlayer.librdkafka"))
        self._consumer.subscribe(
            list(topics), on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )

    # --- librdkafka's callbacks: inside consume(), on the main thread ---------------------------------------------

    @never_raises
    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        consumer.incremental_assign([])
        self._events.append(e.Assigned(time.monotonic(), self._cluster, tuple(map(self._partition, partitions))))

    @never_raises
    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._take_away(consumer, partitions, lost=False)

    @never_raises
    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._take_away(consumer, partitions, lost=True)

    def _take_away(self, consumer: Consumer, partitions: list[TopicPartition], lost: bool) -> None:
        gone = tuple(map(self._partition, partitions))
        really = [TopicPartition(x.topic, x.partition) for x in gone if self._fetching.pop(x, None) is not None]
        # Said first: whatever librdkafka thinks of the unassignment, the partitions are no longer ours.
        self._events.append(e.Revoked(time.monotonic(), gone, lost))
        consumer.incremental_unassign(really)

    @never_raises
    def _on_error(self, error: KafkaError) -> None:
        self._events.append(
            e.ConsumerTrouble(time.monotonic(), self.group, error.name(), explain(error), bool(error.fatal()))
        )

    @never_raises
    def _on_commit(self, error: Optional[KafkaError], partitions: list[TopicPartition]) -> None:
        if error is not None and error.code() != KafkaError._NO_OFFSET:
            logger.debug("the group's offsets were not committed (lag tools are behind): %s", error.str())

    def _partition(self, found: TopicPartition) -> e.Partition:
        return e.Partition(self.group, found.topic, found.partition)

    # --- reading --------------------------------------------------------------------------------------------------

    def poll(self, allowance_bytes: int, timeout_seconds: float) -> list[e.AnyEvent]:
        """Read at most about ``allowance_bytes`` of messages and serve the callbacks; never raises."""
        generations = dict(self._fetching)
        wanted = int(allowance_bytes / (self._largest_bytes + MESSAGE_OVERHEAD_BYTES))
        number = max(1, min(wanted, CONSUME_LIMIT, self._limits.batch_rows))
        try:
            messages = self._consume(number, timeout_seconds)
        except Exception as error:  # whatever it is: messages may be lost inside librdkafka
            self._interrupted = repr(error)
            messages = []
        events, self._events = self._events, []
        if self._interrupted is not None:
            reason, self._interrupted = self._interrupted, None
            return [*events, e.PositionsUnknown(time.monotonic(), self.group, reason)]
        errors, slices = self._sorted_out(messages, generations)
        events.extend(errors)
        events.append(e.Polled(time.monotonic(), self.group, tuple(slices)))
        events.extend(self._moved_positions(generations))
        return events

    def _consume(self, number: int, timeout_seconds: float) -> list[Message]:
        """`consume()` with a timeout on the monotonic clock."""
        now = time.monotonic()
        deadline = now + timeout_seconds
        if now - self._woken_at >= WAKE_INTERVAL_SECONDS:
            self._woken_at = now
            self._consumer.memberid()  # changes nothing, and is answered by the main thread
        messages: list[Message] = self._consumer.consume(number, 0)
        while len(messages) < number and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, LOOK_INTERVAL_SECONDS))
            messages += self._consumer.consume(number - len(messages), 0)
        return messages

    def _sorted_out(
        self, messages: list[Message], generations: dict[e.Partition, int]
    ) -> tuple[list[e.AnyEvent], list[e.Slice]]:
        """Errors come among the messages: return them as events, and the messages as slices."""
        if not messages:
            return [], []
        errors: list[e.AnyEvent] = []
        if any(map(type(messages[0]).error, messages)):
            errors = [self._trouble(message, generations) for message in messages if message.error() is not None]
            messages = [message for message in messages if message.error() is None]
        return errors, self._packed(messages, generations) if messages else []

    def _packed(self, messages: list[Message], generations: dict[e.Partition, int]) -> list[e.Slice]:
        packed = list(runs(messages, self._separator, self._limits.batch_bytes))
        last_of = {e.Partition(self.group, run.topic, run.partition): run for run in packed}
        ends = self._positions([partition for partition in last_of if partition in self._fetching])
        slices = []
        for run in packed:
            partition = e.Partition(self.group, run.topic, run.partition)
            generation = generations.get(partition)
            if generation is None:
                continue  # of a partition that was not being read when the call began
            end = run.last + 1
            if last_of[partition] is run and self._fetching.get(partition) == generation:
                end = max(end, ends.get(partition, -1))
            self._ends[partition] = end
            slices.append(
                e.Slice(
                    partition,
                    generation,
                    run.first,
                    run.last,
                    end,
                    run.chunk.count,
                    run.size_bytes,
                    run.leader_epoch,
                    run.chunk,
                )
            )
            self._learn_message_bytes(run)
            # Forgotten slowly: a call that expects small messages and gets large ones overshoots the budget.
            self._largest_bytes = max(float(run.largest_bytes), self._largest_bytes * 0.9)
        return slices

    def _learn_message_bytes(self, run: Run) -> None:
        """Have the consumer made anew once keys and headers make the prefetch larger than it may be."""
        uncounted_bytes = PREFETCHED_MESSAGE_BYTES + (run.size_bytes - len(run.chunk.values)) // run.chunk.count
        if uncounted_bytes <= self.message_bytes * PREFETCH_EXCESS:
            return
        self.message_bytes = uncounted_bytes
        message = f"keys and headers take {uncounted_bytes} bytes a message: fewer messages are prefetched from now on"
        self._events.append(e.ConsumerTrouble(time.monotonic(), self.group, "PREFETCH_TOO_DEEP", message, fatal=True))

    def _positions(self, partitions: list[e.Partition]) -> dict[e.Partition, int]:
        """Where librdkafka stands; a partition that has brought nothing yet has no position (-1001)."""
        if not partitions:
            return {}
        try:
            found = self._consumer.position([TopicPartition(x.topic, x.partition) for x in partitions])
        except KafkaException as error:  # no reason to lose the messages of this call: they say where they end
            logger.debug("the positions could not be asked for: %s", error)
            return {}
        return {self._partition(x): x.offset for x in found if x.error is None and x.offset >= 0}

    def _moved_positions(self, generations: dict[e.Partition, int]) -> list[e.AnyEvent]:
        """Partitions whose position moved without a message: control records, aborted transactions, compaction."""
        now = time.monotonic()
        if now - self._positions_at < POSITION_INTERVAL_SECONDS:
            return []
        self._positions_at = now
        still = [x for x, generation in self._fetching.items() if generations.get(x) == generation]
        moved: list[e.AnyEvent] = []
        for partition, end in self._positions(still).items():
            if end > self._ends.get(partition, -1):
                self._ends[partition] = end
                moved.append(e.PositionMoved(now, partition, self._fetching[partition], end))
        return moved

    def _trouble(self, message: Message, generations: dict[e.Partition, int]) -> e.AnyEvent:
        error = message.error()
        assert error is not None
        now, topic, number = time.monotonic(), message.topic(), message.partition()
        problem = _PROBLEMS.get(error.code())
        if problem is not None and topic is not None and number is not None and number >= 0:
            partition = e.Partition(self.group, topic, number)
            return e.FetchFailed(now, partition, generations.get(partition, -1), problem, error.str())
        where = f"{topic}: " if topic else ""
        return e.ConsumerTrouble(now, self.group, error.name(), where + explain(error), bool(error.fatal()))

    # --- what the core wants ----------------------------------------------------------------------------------------

    def resume(self, action: Resume) -> None:
        """Read a partition from the given offset on."""
        start = TopicPartition(action.partition.topic, action.partition.partition, action.offset)
        if action.leader_epoch >= 0:
            start = TopicPartition(start.topic, start.partition, start.offset, leader_epoch=action.leader_epoch)
        self._fetching[action.partition] = action.generation
        self._ends[action.partition] = action.offset
        try:
            self._consumer.incremental_assign([start])
        except KafkaException as error:
            del self._fetching[action.partition]
            self._interrupted = f"{action.partition} could not be assigned: {error}"

    def pause(self, partition: e.Partition) -> None:
        """Stop reading a partition and drop what is prefetched of it."""
        if self._fetching.pop(partition, None) is None:
            return
        try:
            self._consumer.incremental_unassign([TopicPartition(partition.topic, partition.partition)])
        except KafkaException as error:
            self._interrupted = f"{partition} could not be unassigned: {error}"

    def commit(self, offsets: Mapping[e.Partition, int]) -> None:
        """Tell the group how far the rows are. Nothing depends on it, so nothing waits for it."""
        wanted = [
            TopicPartition(partition.topic, partition.partition, offset, COMMIT_METADATA)
            for partition, offset in offsets.items()
        ]
        try:
            self._consumer.commit(offsets=wanted, asynchronous=True)
        except KafkaException as error:
            logger.debug("the group's offsets were not committed (lag tools are behind): %s", error)

    def close(self, timeout_seconds: float) -> bool:
        """Leave the group; False if librdkafka did not manage to in time (it can hang for minutes with no broker)."""
        thread = threading.Thread(target=self._close, name=f"close-{self.group}", daemon=True)
        thread.start()
        thread.join(timeout_seconds)
        return not thread.is_alive()

    def _close(self) -> None:
        try:
            self._consumer.close()
        except (KafkaException, RuntimeError) as error:
            logger.debug("the consumer did not close cleanly: %s", error)
