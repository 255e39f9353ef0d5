"""Checks of Kafka: the broker, the topics, what we are allowed (the process of `speedlayer check`).

Only questions are asked that create no topic and join no group.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import TimeoutError as FutureTimeout  # the built-in one only since Python 3.11
from typing import Any, Optional

from speedlayer.supervisor import kafka_properties
from speedlayer.supervisor.check.findings import Finding, failed, ok, warning
from speedlayer.supervisor.kafka_errors import Complaints, remedy_of
from speedlayer.supervisor.settings import DaemonSettings, suggestion

# Where a broker keeps its groups; it makes the topic when the first one is asked for.
_OFFSETS_TOPIC = "__consumer_offsets"

# An embedded mock cluster has no controller that could be asked for privileges.
_MOCK_CLUSTER = "mockCluster"


def check(settings: DaemonSettings, timeout_seconds: float) -> tuple[Optional[str], list[Finding]]:
    """Return the cluster's id, if it could be asked, and what was found."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    # The log of librdkafka would stand between the findings, and says nothing that they do not say.
    complaints = Complaints()
    properties = {**kafka_properties.for_admin(settings.kafka), "log_level": "0", "error_cb": complaints.note}
    client = AdminClient(properties)
    servers = settings.kafka.get("bootstrap.servers") or settings.kafka.get("metadata.broker.list")
    try:
        metadata = client.list_topics(timeout=timeout_seconds)
    except KafkaException as error:
        cause = complaints.cause_of(error.args[0], client)
        return None, [failed("broker", f"{servers} does not answer: {cause.str()}", remedy_of(cause))]
    cluster = str(metadata.cluster_id)
    found = [ok("broker", f"{servers} answers: cluster {cluster}, {len(metadata.brokers)} broker(s)")]
    found += _topics(settings, metadata)
    if not cluster.startswith(_MOCK_CLUSTER):
        found += _privileges(settings, client, metadata, timeout_seconds)
    return cluster, found


def _topics(settings: DaemonSettings, metadata: Any) -> Iterator[Finding]:
    for topic in dict.fromkeys(topic for pipeline in settings.pipelines for topic in pipeline.topics):
        described = metadata.topics.get(topic)
        if described is None:
            near = suggestion(topic, metadata.topics)
            yield failed(
                f"topic {topic}", f"does not exist, or may not be seen{near}", "create it, or correct its name"
            )
        elif described.error is not None:
            yield failed(f"topic {topic}", described.error.str())
        else:
            yield ok(f"topic {topic}", f"exists, {len(described.partitions)} partition(s)")


def _privileges(settings: DaemonSettings, client: Any, metadata: Any, timeout_seconds: float) -> Iterator[Finding]:
    from confluent_kafka import KafkaException, TopicCollection
    from confluent_kafka.admin import AclOperation  # type: ignore[attr-defined]

    topics = [t for t in dict.fromkeys(t for p in settings.pipelines for t in p.topics) if t in metadata.topics]
    asked = {"include_authorized_operations": True, "request_timeout": timeout_seconds}
    if topics:
        for topic, future in client.describe_topics(TopicCollection(topics), **asked).items():
            try:
                operations = future.result(timeout_seconds * 2).authorized_operations
            except (KafkaException, FutureTimeout) as error:
                yield warning(f"topic {topic}", f"its privileges could not be asked for: {error}")
                continue
            if operations is not None and AclOperation.READ not in operations:
                yield failed(f"topic {topic}", "may not be read", f"grant this client READ on the topic {topic}")
    if _OFFSETS_TOPIC not in metadata.topics:
        # To ask for a group would make the broker create that topic.
        yield ok("groups", "this cluster has had no consumer group yet")
        return
    for group, future in client.describe_consumer_groups(list(settings.group_ids), **asked).items():
        yield _group(group, future, timeout_seconds)


def _group(group: str, future: Any, timeout_seconds: float) -> Finding:
    from confluent_kafka import KafkaError, KafkaException
    from confluent_kafka.admin import AclOperation  # type: ignore[attr-defined]

    what = f"group {group}"
    try:
        described = future.result(timeout_seconds * 2)
    except KafkaException as error:
        code = error.args[0].code()
        if code == KafkaError.GROUP_ID_NOT_FOUND:
            return ok(what, "does not exist yet; the first start makes it")
        if code == KafkaError.GROUP_AUTHORIZATION_FAILED:
            return failed(what, "may not be joined", f"grant this client READ on the group {group}")
        return warning(what, f"could not be asked for: {error.args[0].str()}")
    except FutureTimeout:
        return warning(what, "could not be asked for in time")
    operations = described.authorized_operations
    if operations is not None and AclOperation.READ not in operations:
        return failed(what, "may not be joined", f"grant this client READ on the group {group}")
    return ok(what, f"may be joined; it has {len(described.members)} member(s) now")
