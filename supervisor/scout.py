"""Questions to the broker that may take their time, asked on a thread of their own (supervisor process).

The loop never waits for the broker: it hands a question to the scout, which asks with a bound, and the answer comes
back as an event. Questions that have piled up are asked together.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout  # the built-in one only since Python 3.11
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Optional, Union

from confluent_kafka import (
    OFFSET_INVALID,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from speedlayer.supervisor import kafka_properties
from speedlayer.supervisor.consumer import COMMIT_METADATA
from speedlayer.supervisor.core import events as e
from speedlayer.supervisor.core.actions import Inspect
from speedlayer.supervisor.kafka_errors import Complaints, explain

logger = logging.getLogger("speedlayer.scout")

# The longest that one question may take; the broker answers in milliseconds when it is there.
QUESTION_TIMEOUT_SECONDS = 5.0

# Between two looks at the watermarks and topic ids of everything that is assigned. A topic that is deleted and made
# again is noticed within this time.
SURVEY_INTERVAL_SECONDS = 2.0

# librdkafka's embedded mock cluster can not tell topic ids: it has no controller to ask.
_MOCK_CLUSTER = "mockCluster"


@dataclass(frozen=True)
class ClusterFound:
    """The id of the cluster: the first answer that the scout brings."""

    cluster: str


@dataclass(frozen=True)
class Survey:
    """Look at the watermarks and topic ids of these partitions."""

    partitions: tuple[e.Partition, ...]


class NoOffset(Exception):
    """The broker was asked for an offset and told none; the text names the partition."""


Question = Union[Inspect, Survey, None]
Answer = Union[e.AnyEvent, ClusterFound]


class Scout:
    """Asks the broker, and puts the answers into ``inbox``."""

    def __init__(self, kafka: Mapping[str, Any], inbox: SimpleQueue[Answer]) -> None:
        self._brokers = kafka.get("bootstrap.servers") or kafka.get("metadata.broker.list")
        # What these clients would log, the group's consumer says, too.
        self._properties: dict[str, Any] = {**kafka_properties.for_admin(kafka), "log_level": "0"}
        self._readers: dict[str, Consumer] = {}  # one for each group, never subscribed
        self._complaints = Complaints()
        properties: dict[str, Any] = {**self._properties, "error_cb": self._complaints.note}
        self._admin = AdminClient(properties)
        committed = kafka.get("isolation.level", "read_committed") == "read_committed"
        self._isolation = IsolationLevel.READ_COMMITTED if committed else IsolationLevel.READ_UNCOMMITTED
        self._inbox = inbox
        self._questions: SimpleQueue[Question] = SimpleQueue()
        self._cluster = ""
        self._thread = threading.Thread(target=self._run, name="scout", daemon=True)

    def start(self) -> None:
        """Begin with the question for the cluster's id, repeated until it is answered."""
        self._thread.start()

    def ask(self, question: Union[Inspect, Survey]) -> None:
        """Ask; the answer comes through the inbox, with an error in it if the broker gives none."""
        self._questions.put(question)

    def stop(self) -> None:
        """Ask nothing more; the thread ends by itself after the question under way."""
        self._questions.put(None)

    # --- the scout's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        if not self._find_cluster():
            return
        while True:
            questions = self._pending()
            if None in questions:
                return
            inspections = [question for question in questions if isinstance(question, Inspect)]
            surveys = [question for question in questions if isinstance(question, Survey)]
            for group, asked in _by_group(inspections).items():
                self._inspect(group, asked)
            if surveys:
                self._survey(surveys[-1].partitions)
            self._serve_callbacks()

    def _serve_callbacks(self) -> None:
        """Take what librdkafka has to tell these clients: untaken, it piles up in memory while an outage lasts."""
        self._admin.poll(0)
        self._complaints.forget()
        for reader in self._readers.values():
            while reader.poll(0) is not None:
                pass

    def _pending(self) -> list[Question]:
        """Wait for a question, and take all that have piled up."""
        questions = [self._questions.get()]
        while True:
            try:
                questions.append(self._questions.get_nowait())
            except Empty:
                return questions

    def _find_cluster(self) -> bool:
        while True:
            try:
                cluster = str(self._admin.list_topics(timeout=QUESTION_TIMEOUT_SECONDS).cluster_id)
            except KafkaException as error:
                found = self._complaints.cause_of(error.args[0], self._admin)
                message = f"no broker answers at {self._brokers}: {explain(found)}"
                self._inbox.put(e.ConsumerTrouble(time.monotonic(), "", found.name(), message))
            else:
                self._cluster = cluster
                self._inbox.put(ClusterFound(cluster))
                return True
            try:
                if self._questions.get(timeout=1.0) is None:
                    return False
            except Empty:
                pass

    def _inspect(self, group: str, asked: list[Inspect]) -> None:
        partitions = [question.partition for question in asked]
        stamps = {q.partition: q.timestamp_ms for q in asked if q.timestamp_ms is not None}
        try:
            ids = self._topic_ids({partition.topic for partition in partitions})
            marks = self._watermarks(partitions)
            committed = self._committed(group, [q.partition for q in asked if q.want_committed])
            targets = self._offsets({partition: OffsetSpec.for_timestamp(stamp) for partition, stamp in stamps.items()})
        except Exception as error:  # whatever it is: an answer is owed, and the thread must live
            self._fail(asked, _text_of(error))
            return
        for question in asked:
            partition = question.partition
            low, high = marks[partition]
            offset, by_us = committed.get(partition, (None, False))
            target = targets.get(partition)
            answer = e.Inspected(
                time.monotonic(),
                partition,
                question.request,
                ids[partition.topic],
                low,
                high,
                offset,
                by_us,
                target if target is not None and target >= 0 else None,
            )
            self._inbox.put(answer)

    def _fail(self, asked: list[Inspect], reason: str) -> None:
        """One bad partition spoils a common question: ask alone, then say what is wrong."""
        if len(asked) > 1:
            for question in asked:
                self._inspect(question.partition.group, [question])
            return
        now = time.monotonic()
        self._inbox.put(e.Inspected(now, asked[0].partition, asked[0].request, error=reason))

    def _survey(self, partitions: tuple[e.Partition, ...]) -> None:
        topics = {partition.topic for partition in partitions}
        if not topics:
            return
        try:
            marks = self._watermarks(partitions)
            ids = self._topic_ids(topics)
        except Exception as error:  # the next survey comes by itself, and the thread must live
            logger.debug("the survey brought no answer: %s", _text_of(error))
            self._inbox.put(e.SurveyFailed(time.monotonic(), _text_of(error)))
            if len(topics) > 1:  # one topic that is gone must not hide the others
                for topic in sorted(topics):
                    self._survey(tuple(partition for partition in partitions if partition.topic == topic))
            return
        now = time.monotonic()
        self._inbox.put(e.Watermarks(now, marks))
        for group in {partition.group for partition in partitions}:
            self._inbox.put(e.TopicIds(now, group, ids))

    # --- single questions; each raises KafkaException ---------------------------------------------------------------

    def _topic_ids(self, topics: set[str]) -> dict[str, Optional[str]]:
        if self._cluster.startswith(_MOCK_CLUSTER):
            return dict.fromkeys(topics)
        names = sorted(topics)
        futures = self._admin.describe_topics(TopicCollection(names), request_timeout=QUESTION_TIMEOUT_SECONDS)
        return {name: str(_answer(futures[name]).topic_id) for name in names}

    def _watermarks(self, partitions: Iterable[e.Partition]) -> dict[e.Partition, tuple[int, int]]:
        wanted = list(partitions)
        earliest: OffsetSpec = OffsetSpec.earliest()  # type: ignore[no-untyped-call]
        latest: OffsetSpec = OffsetSpec.latest()  # type: ignore[no-untyped-call]
        lows = self._offsets(dict.fromkeys(wanted, earliest))
        highs = self._offsets(dict.fromkeys(wanted, latest))
        return {partition: (lows[partition], highs[partition]) for partition in wanted}

    def _offsets(self, wanted: Mapping[e.Partition, OffsetSpec]) -> dict[e.Partition, int]:
        if not wanted:
            return {}
        asked = {TopicPartition(x.topic, x.partition): spec for x, spec in wanted.items()}
        futures = self._admin.list_offsets(
            asked, isolation_level=self._isolation, request_timeout=QUESTION_TIMEOUT_SECONDS
        )
        found = {(x.topic, x.partition): _answer(future).offset for x, future in futures.items()}
        # While a partition's leader changes, librdkafka may answer without an error and without an offset.
        unknown = [f"{topic}/{partition}" for (topic, partition), offset in found.items() if offset == OFFSET_INVALID]
        if unknown:
            raise NoOffset(f"the broker tells no offset of {', '.join(unknown)} (its leader changes)")
        return {partition: found[partition.topic, partition.partition] for partition in wanted}

    def _committed(self, group: str, wanted: list[e.Partition]) -> dict[e.Partition, tuple[int, bool]]:
        if not wanted:
            return {}
        asked = [TopicPartition(x.topic, x.partition) for x in wanted]
        found = self._reader(group).committed(asked, timeout=QUESTION_TIMEOUT_SECONDS)
        for one in found:
            if one.error is not None:
                raise KafkaException(one.error)
        return {
            e.Partition(group, x.topic, x.partition): (x.offset, x.metadata == COMMIT_METADATA)
            for x in found
            if x.offset >= 0
        }

    def _reader(self, group: str) -> Consumer:
        """A consumer that asks for the group's commits, and never joins it.

        Not the admin client: its list_consumer_group_offsets crashes the process while the group's coordinator is
        loading or has moved (librdkafka issue 5040).
        """
        if group not in self._readers:
            properties = {**self._properties, "group.id": group, "enable.auto.commit": False}
            self._readers[group] = Consumer(properties)
        return self._readers[group]


def _by_group(asked: list[Inspect]) -> dict[str, list[Inspect]]:
    groups: defaultdict[str, list[Inspect]] = defaultdict(list)
    for question in asked:
        groups[question.partition.group].append(question)
    return groups


def _text_of(error: Exception) -> str:
    if isinstance(error, KafkaException):
        return str(error.args[0].str())
    return str(error) if isinstance(error, NoOffset) else repr(error)


def _answer(future: Future[Any]) -> Any:
    # The request is bounded by librdkafka; the second bound is for the case that librdkafka forgets it.
    try:
        return future.result(timeout=QUESTION_TIMEOUT_SECONDS * 2)
    except FutureTimeout as error:
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "no answer")) from error
