"""Which librdkafka properties a user may set, and why not the others (supervisor process; loads no Kafka library).

Any property is allowed except those that speedlayer sets itself and those that would break a promise. A few are turned
into settings of speedlayer: ``group.id`` and ``auto.offset.reset``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from speedlayer.supervisor.errors import InvalidSetting
from speedlayer.supervisor.settings import shown

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
    "fetch.queue.backoff.ms": (None, _BUDGET),
    "default.topic.config": (None, "topic properties stand in [kafka] directly"),
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
