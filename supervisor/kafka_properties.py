"""Which librdkafka properties a user may set, and why not the others (supervisor process; loads no Kafka library).

Any property is allowed except those that speedlayer sets itself and those that would break a promise. A few are turned
into settings of speedlayer: ``group.id`` and ``auto.offset.reset``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Optional

from speedlayer.supervisor.errors import InvalidSetting
from speedlayer.supervisor.settings import shown, suggestion

_CHECKPOINTS = "speedlayer keeps the offsets in PostgreSQL, in the transaction that writes the rows"
_BUDGET = "speedlayer derives it from [memory] budget_mb"
_CALLBACK = "speedlayer needs this callback itself"

# Properties that speedlayer sets. A value here is the one that speedlayer sets, and is accepted from a user as well.
_OWNED: dict[str, tuple[Optional[str], str]] = {
    "enable.auto.commit": ("false", _CHECKPOINTS),
    "auto.commit.enable": ("false", _CHECKPOINTS),
    "enable.auto.offset.store": ("false", _CHECKPOINTS),
    "auto.commit.interval.ms": (None, _CHECKPOINTS),
    "offset.store.method": (None, _CHECKPOINTS),
    "offset.store.path": (None, _CHECKPOINTS),
    "offset.store.sync.interval.ms": (None, _CHECKPOINTS),
    "enable.partition.eof": ("false", "speedlayer knows the end of a partition from its high watermark"),
    "queued.max.messages.kbytes": (None, _BUDGET),
    "queued.min.messages": (None, _BUDGET),
    "fetch.max.bytes": (None, _BUDGET),
    "max.partition.fetch.bytes": (None, _BUDGET),
    "fetch.message.max.bytes": (None, _BUDGET),
    "message.max.bytes": (None, _BUDGET),
    "fetch.queue.backoff.ms": (None, _BUDGET),
    "default.topic.config": (None, "topic properties stand in [kafka] directly"),
    "enabled_events": (None, "events would take the place of the callbacks that speedlayer lives by"),
    "log.queue": (None, "speedlayer logs for librdkafka"),
    "error_cb": (None, _CALLBACK),
    "stats_cb": (None, _CALLBACK),
    "throttle_cb": (None, _CALLBACK),
    "on_commit": (None, _CALLBACK),
    "logger": (None, "speedlayer logs for librdkafka"),
}

# Properties of which only some values keep the promises.
_LIMITED: dict[str, tuple[tuple[str, ...], str]] = {
    "partition.assignment.strategy": (
        ("cooperative-sticky",),
        "the other strategies take every partition away at each rebalance",
    ),
    "isolation.level": (("read_committed", "read_uncommitted"), "librdkafka knows no other"),
    "group.protocol": (("classic", "consumer"), "librdkafka knows no other"),
    "auto.offset.reset": (("earliest", "latest", "error"), "it is where a partition without a checkpoint begins"),
}


# Where librdkafka's own default would keep a partition waiting for minutes; a user's value stands above.
DEFAULTS: dict[str, tuple[int, str]] = {
    "topic.metadata.refresh.interval.ms": (
        30_000,
        "partitions that are added are found so soon; librdkafka would take up to five minutes",
    ),
    "socket.timeout.ms": (
        30_000,
        "a partition whose leader froze is read from its new one so soon; librdkafka would take a minute",
    ),
}

# Properties that people set, for "did you mean"; librdkafka alone decides which ones there are.
_COMMON = (
    "allow.auto.create.topics",
    "api.version.request",
    "auto.offset.reset",
    "bootstrap.servers",
    "broker.address.family",
    "broker.address.ttl",
    "check.crcs",
    "client.dns.lookup",
    "client.id",
    "client.rack",
    "connections.max.idle.ms",
    "coordinator.query.interval.ms",
    "debug",
    "enable.metrics.push",
    "enable.sparse.connections",
    "enable.ssl.certificate.verification",
    "fetch.error.backoff.ms",
    "fetch.min.bytes",
    "fetch.wait.max.ms",
    "group.id",
    "group.instance.id",
    "group.protocol",
    "group.remote.assignor",
    "heartbeat.interval.ms",
    "https.ca.location",
    "isolation.level",
    "log.connection.close",
    "log_level",
    "max.poll.interval.ms",
    "metadata.max.age.ms",
    "metadata.recovery.strategy",
    "partition.assignment.strategy",
    "plugin.library.paths",
    "receive.message.max.bytes",
    "reconnect.backoff.max.ms",
    "reconnect.backoff.ms",
    "retry.backoff.max.ms",
    "retry.backoff.ms",
    "sasl.kerberos.keytab",
    "sasl.kerberos.kinit.cmd",
    "sasl.kerberos.principal",
    "sasl.kerberos.service.name",
    "sasl.mechanism",
    "sasl.mechanisms",
    "sasl.oauthbearer.client.id",
    "sasl.oauthbearer.client.secret",
    "sasl.oauthbearer.config",
    "sasl.oauthbearer.extensions",
    "sasl.oauthbearer.method",
    "sasl.oauthbearer.scope",
    "sasl.oauthbearer.token.endpoint.url",
    "sasl.password",
    "sasl.username",
    "security.protocol",
    "session.timeout.ms",
    "socket.connection.setup.timeout.ms",
    "socket.keepalive.enable",
    "socket.nagle.disable",
    "socket.receive.buffer.bytes",
    "socket.send.buffer.bytes",
    "socket.timeout.ms",
    "ssl.ca.location",
    "ssl.ca.pem",
    "ssl.certificate.location",
    "ssl.certificate.pem",
    "ssl.cipher.suites",
    "ssl.crl.location",
    "ssl.endpoint.identification.algorithm",
    "ssl.key.location",
    "ssl.key.password",
    "ssl.key.pem",
    "ssl.keystore.location",
    "ssl.keystore.password",
    "statistics.interval.ms",
    "topic.blacklist",
    "topic.metadata.refresh.interval.ms",
)


@dataclass(frozen=True)
class KafkaProperties:
    """The `[kafka]` section, checked: librdkafka's properties, and what of it are settings of speedlayer."""

    properties: Mapping[str, Any]  # without group.id and auto.offset.reset; texts, but for oauth_cb
    group_id: Optional[str]
    start: str


def check(given: Mapping[str, Any]) -> KafkaProperties:
    """Check the librdkafka properties of a user; raises `InvalidSetting` that names the property and the reason."""
    properties = {"isolation.level": "read_committed"}
    for name, value in given.items():
        written = _as_text(name, value)
        _refuse_owned(name, written)
        _refuse_limited(name, written)
        if name not in _OWNED:
            properties[name] = written
    group_id = properties.pop("group.id", None)
    start = properties.pop("auto.offset.reset", "earliest")
    if not properties.get("bootstrap.servers") and not properties.get("metadata.broker.list"):
        raise InvalidSetting("bootstrap.servers", 'needs a value, such as "localhost:9092"')
    if properties.get("group.protocol") == "consumer" and "partition.assignment.strategy" in properties:
        raise InvalidSetting(
            "partition.assignment.strategy", "group.protocol = consumer leaves the assignment to the broker"
        )
    return KafkaProperties(properties, group_id, start)


def with_defaults(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Add `DEFAULTS` to the properties of a reading consumer."""
    added = {name: value for name, (value, _) in DEFAULTS.items()}
    if "fetch.wait.max.ms" in properties:
        del added["socket.timeout.ms"]  # it must be the longer one; librdkafka's own is known to suit
    return {**added, **properties}


def refusals() -> Iterator[tuple[str, str, str]]:
    """Yield the properties that are not free: the name, what it may be, and why (for the reference)."""
    for name, (ours, reason) in _OWNED.items():
        yield name, "leave it out" if ours is None else ours, reason
    for name, (allowed, reason) in _LIMITED.items():
        yield name, ", ".join(allowed), reason


def check_with_librdkafka(properties: Mapping[str, Any]) -> None:
    """Let librdkafka judge the properties; raises `InvalidSetting` that names the one it refuses.

    It makes a consumer without any broker address, which connects to nobody, and closes it at once (2 ms).
    """
    from confluent_kafka import Consumer, KafkaException

    given = {name: value for name, value in properties.items() if name not in _ADDRESSES}
    try:
        # log_level 0: what librdkafka has to say of the properties, the real consumer says again.
        Consumer({**given, "group.id": "speedlayer-check", "log_level": "0"}).close()
    except KafkaException as error:
        raise _refusal(error.args[0].str().strip(), given) from error


def for_admin(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return the properties without those of a reading consumer, each of which an admin client would warn about.

    ``test.mock`` is one of them: it would give the client a mock cluster of its own.
    """
    return {name: value for name, value in properties.items() if not name.startswith(_CONSUMER_ONLY)}


_CONSUMER_ONLY = (
    "group.",
    "session.timeout",
    "heartbeat.interval",
    "max.poll.interval",
    "partition.assignment",
    "isolation.level",
    "fetch.",
    "check.crcs",
    "coordinator.query",
    "allow.auto.create",
    "test.mock",
)

_ADDRESSES = ("bootstrap.servers", "metadata.broker.list")


def _refusal(message: str, given: Mapping[str, Any]) -> InvalidSetting:
    """Turn librdkafka's message, which quotes the property's name, into an error that suggests the right one."""
    quoted = [name for name in re.findall(r'["`]([^"`]+)["`]', message) if name in given]
    name = quoted[0] if quoted else "librdkafka"
    if message.startswith("No such configuration property"):
        return InvalidSetting(name, "is not a property of librdkafka" + suggestion(name, _COMMON))
    return InvalidSetting(name, f"librdkafka refuses it: {message}")


def _as_text(name: str, value: Any) -> Any:
    """Return the value as librdkafka wants it: a text. Only ``oauth_cb`` is a callable."""
    if name == "oauth_cb" and callable(value):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (str, int, float)):
        return str(value)
    if name in _OWNED:
        return None
    raise InvalidSetting(name, f"{shown(value)} is not a text, a number, true or false")


def _refuse_owned(name: str, value: Any) -> None:
    if name not in _OWNED:
        return
    ours, reason = _OWNED[name]
    if ours is None or str(value).lower() != ours:
        raise InvalidSetting(name, f"can not be set: {reason}; leave it out")


def _refuse_limited(name: str, value: Any) -> None:
    if name in _LIMITED and value not in _LIMITED[name][0]:
        allowed, reason = _LIMITED[name]
        raise InvalidSetting(name, f"{shown(value)} is not one of {', '.join(allowed)}: {reason}")
