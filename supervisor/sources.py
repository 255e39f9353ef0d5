"""What a pipeline reads (built in the user's program; read by the supervisor process)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional

from speedlayer.supervisor.errors import InvalidSetting


@dataclass(frozen=True, init=False)
class KafkaSource:
    """One or more Kafka topics, read by one pipeline.

    ``group_id`` gives the pipeline a consumer group of its own, which two pipelines that read the same topic need.
    ``start`` is where a partition without a checkpoint begins (default: ``auto.offset.reset`` of the engine's
    configuration). ``on_out_of_range`` says what happens when Kafka no longer has the next offset.
    """

    topics: tuple[str, ...]
    group_id: Optional[str]
    start: Optional[Literal["earliest", "latest", "error"]]
    on_out_of_range: Literal["stop", "skip"]

    def __init__(
        self,
        *topics: str,
        group_id: Optional[str] = None,
        start: Optional[Literal["earliest", "latest", "error"]] = None,
        on_out_of_range: Literal["stop", "skip"] = "stop",
    ) -> None:
        given: tuple[object, ...] = topics
        if not given or not all(isinstance(topic, str) and topic for topic in given):
            raise InvalidSetting(
                "KafkaSource", f'needs the names of topics, such as KafkaSource("orders"), not {topics}'
            )
        object.__setattr__(self, "topics", topics)
        object.__setattr__(self, "group_id", group_id)
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "on_out_of_range", on_out_of_range)

    @property
    def default_name(self) -> str:
        """The name of a pipeline that was given none: its topic, or its topics joined by ``+``."""
        return "+".join(self.topics)
