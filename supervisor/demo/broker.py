"""The broker of a run: the embedded one, or a topic of the run's own on a given one (demo process)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Optional

from speedlayer.supervisor.demo.embedded_kafka import PARTITIONS, embedded_kafka
from speedlayer.supervisor.errors import ConfigurationError, Unreachable

# A broker that has not answered by then is taken as out of reach.
REQUEST_TIMEOUT_SECONDS = 15.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Broker:
    """Where the run's topic is. ``client`` is for every client, ``consumer`` for consumers only."""

    topic: str
    group: str
    client: Mapping[str, str]
    consumer: Mapping[str, str]
    embedded: bool

    @property
    def description(self) -> str:
        """For people."""
        servers = self.client["bootstrap.servers"]
        return f"embedded Kafka (librdkafka's mock cluster) on {servers}" if self.embedded else f"Kafka on {servers}"


@contextlib.contextmanager
def open_broker(servers: Optional[str], properties: Mapping[str, str], topic: str, group: str) -> Iterator[Broker]:
    """Provide a broker with the topic for the length of the block: the given one, else an embedded one."""
    if servers is None:
        with embedded_kafka(topic) as kafka:
            client = {"bootstrap.servers": kafka.bootstrap_servers}
            yield Broker(topic, group, client, kafka.consumer_properties, embedded=True)
        return
    client = {**properties, "bootstrap.servers": servers}
    _create_topic(client, topic)
    try:
        yield Broker(topic, group, client, {}, embedded=False)
    finally:
        _forget(client, topic, group)


def _admin(client: Mapping[str, str]) -> Any:
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    try:
        return AdminClient(dict(client), logger=_log)
    except KafkaException as error:
        raise ConfigurationError(f"--kafka: {error.args[0].str()}") from error


def _create_topic(client: Mapping[str, str], topic: str) -> None:
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import NewTopic  # type: ignore[attr-defined]

    admin = _admin(client)
    try:
        wanted = NewTopic(topic, PARTITIONS)
        admin.create_topics([wanted], request_timeout=REQUEST_TIMEOUT_SECONDS)[topic].result()
        # The topic is known to the controller first; a producer that asks too soon would not find it.
        admin.list_topics(topic, timeout=REQUEST_TIMEOUT_SECONDS)
    except KafkaException as error:
        raise Unreachable(
            f"the topic {topic} could not be made on {client['bootstrap.servers']}: {error.args[0].str()}"
        ) from error


def _forget(client: Mapping[str, str], topic: str, group: str) -> None:
    """Delete what the run made on a given broker; what can not be deleted is told, and does not spoil the run."""
    from confluent_kafka import KafkaError, KafkaException

    # A run that was broken off early has no group yet.
    absent = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.GROUP_ID_NOT_FOUND)
    admin = _admin(client)
    for what, answers in (
        (f"topic {topic}", admin.delete_topics([topic], request_timeout=REQUEST_TIMEOUT_SECONDS)),
        (f"group {group}", admin.delete_consumer_groups([group], request_timeout=REQUEST_TIMEOUT_SECONDS)),
    ):
        for answer in answers.values():
            try:
                answer.result()
            except KafkaException as error:
                if error.args[0].code() not in absent:
                    _log.warning("the %s was left behind: %s", what, error.args[0].str())
