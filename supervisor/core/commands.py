"""What an operator can ask of the running daemon (supervisor process, pure): pause, resume, drain, seek, status.

A command is answered once, at once or when it is done. An answer is a JSON-able mapping with ``ok``, and ``error``
where it is false. (`stop` is no command here but a `StopRequested`, like a signal.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional, Union

from speedlayer.supervisor.core.actions import INFO, Reply
from speedlayer.supervisor.core.events import Command, Partition
from speedlayer.supervisor.core.flow import Flow
from speedlayer.supervisor.core.ledger import Lane, SeekTarget
from speedlayer.supervisor.core.pipelines import Hold, Pipeline
from speedlayer.supervisor.core.snapshot import snapshot
from speedlayer.supervisor.core.state import State


class Refused(Exception):
    """The command can not be carried out; the message says why and what would help."""


@dataclass(frozen=True)
class WaitingDrain:
    """A `drain` that is answered when everything is written."""

    token: int
    pipelines: tuple[str, ...]


@dataclass(frozen=True)
class WaitingSeek:
    """A `seek` that is answered when every lane has its new offset."""

    token: int
    partitions: tuple[Partition, ...]


class Commands:
    """Carries out commands, and remembers those that still wait for an answer."""

    def __init__(self, state: State, flow: Flow) -> None:
        self._state = state
        self._flow = flow
        self._waiting: list[Union[WaitingDrain, WaitingSeek]] = []
        self._verbs = {
            "status": self._status,
            "lag": self._status,
            "pause": self._pause,
            "resume": self._resume,
            "drain": self._drain,
            "seek": self._seek,
        }

    def handle(self, command: Command) -> None:
        """Carry out a command; what it can not do is answered with the reason."""
        verb = self._verbs.get(command.name)
        try:
            if verb is None:
                raise Refused(f"there is no command {command.name!r}; there are {', '.join(sorted(self._verbs))}")
            if self._state.stopping and verb != self._status:
                raise Refused("the daemon stops")
            answer = verb(command)
        except Refused as refusal:
            answer = {"ok": False, "error": str(refusal)}
        if answer is not None:
            self._reply(command.token, answer)

    def answer_waiting(self) -> None:
        """Answer what has come true since."""
        for waiting in list(self._waiting):
            answer = self._drained(waiting) if isinstance(waiting, WaitingDrain) else self._sought(waiting)
            if answer is not None:
                self._waiting.remove(waiting)
                self._reply(waiting.token, answer)

    def refuse_waiting(self, reason: str) -> None:
        """The daemon stops: nothing more will come true."""
        for waiting in self._waiting:
            self._reply(waiting.token, {"ok": False, "error": reason})
        self._waiting.clear()

    def _reply(self, token: int, answer: Mapping[str, Any]) -> None:
        self._state.act(Reply(token, answer))

    def _chosen(self, command: Command) -> list[Pipeline]:
        name = command.arguments.get("pipeline")
        if name is None:
            return list(self._state.pipelines.values())
        if not isinstance(name, str) or name not in self._state.pipelines:
            raise Refused(f"there is no pipeline {name!r}; there are {', '.join(sorted(self._state.pipelines))}")
        return [self._state.pipelines[name]]

    def _status(self, command: Command) -> Mapping[str, Any]:
        return {"ok": True, **snapshot(self._state)}

    def _pause(self, command: Command) -> Mapping[str, Any]:
        chosen = self._chosen(command)
        for pipeline in chosen:
            pipeline.hold(Hold.OPERATOR, "an operator paused it; speedlayer resume goes on")
            self._state.log(INFO, f"pipeline {pipeline.name} is paused by an operator", pipeline=pipeline.name)
        return {"ok": True, "pipelines": [pipeline.name for pipeline in chosen]}

    def _resume(self, command: Command) -> Mapping[str, Any]:
        chosen = self._chosen(command)
        for pipeline in chosen:
            for why in (Hold.OPERATOR, Hold.DRAINING):
                pipeline.release(why)
            if pipeline.release(Hold.DEAD_LETTERS):
                pipeline.dead_letters.clear()
            self._state.log(INFO, f"pipeline {pipeline.name} is resumed by an operator", pipeline=pipeline.name)
        still = {pipeline.name: pipeline.state()[1] for pipeline in chosen if pipeline.holds}
        return {"ok": True, "pipelines": [pipeline.name for pipeline in chosen], "still_held": still}

    def _drain(self, command: Command) -> Optional[Mapping[str, Any]]:
        chosen = self._chosen(command)
        for pipeline in chosen:
            pipeline.hold(Hold.DRAINING, "an operator drains it; speedlayer resume goes on")
        waiting = WaitingDrain(command.token, tuple(pipeline.name for pipeline in chosen))
        self._waiting.append(waiting)
        return None

    def _drained(self, waiting: WaitingDrain) -> Optional[Mapping[str, Any]]:
        pipelines = [self._state.pipelines[name] for name in waiting.pipelines]
        if any(Hold.DRAINING not in pipeline.holds for pipeline in pipelines):
            return {"ok": False, "error": "resumed before it was drained"}
        if all(self._flow.is_drained(pipeline) for pipeline in pipelines):
            for pipeline in pipelines:
                reason = "drained: everything that was read is written; speedlayer resume goes on"
                pipeline.hold(Hold.DRAINING, reason)
                self._state.log(INFO, f"pipeline {pipeline.name} is drained", pipeline=pipeline.name)
            return {"ok": True, "pipelines": list(waiting.pipelines)}
        return None

    def _seek(self, command: Command) -> Optional[Mapping[str, Any]]:
        target = _target(command.arguments.get("to"))
        lanes = self._lanes(command)
        for lane in lanes:
            lane.seek, lane.suspicion = target, None
            lane.reason = f"an operator seeks {target}"
            self._state.reclaim(lane, f"an operator seeks {target}")
        self._waiting.append(WaitingSeek(command.token, tuple(lane.partition for lane in lanes)))
        return None

    def _lanes(self, command: Command) -> list[Lane]:
        (pipeline,) = self._chosen(command) if command.arguments.get("pipeline") else self._only_pipeline()
        topic, number = command.arguments.get("topic"), command.arguments.get("partition")
        lanes = [
            lane
            for lane in self._state.ledger.of_pipeline(pipeline.name)
            if topic in (None, lane.partition.topic) and number in (None, lane.partition.partition)
        ]
        if not lanes:
            what = f"topic {topic or 'any'}, partition {'any' if number is None else number}"
            raise Refused(f"pipeline {pipeline.name} has no such partition in this daemon ({what}); see speedlayer lag")
        return lanes

    def _only_pipeline(self) -> list[Pipeline]:
        pipelines = list(self._state.pipelines.values())
        if len(pipelines) != 1:
            raise Refused(f"name one pipeline of {', '.join(sorted(self._state.pipelines))}")
        return pipelines

    def _sought(self, waiting: WaitingSeek) -> Optional[Mapping[str, Any]]:
        lanes = {partition: self._state.ledger.get(partition) for partition in waiting.partitions}
        gone = [str(partition) for partition, lane in lanes.items() if lane is None]
        if gone:
            return {"ok": False, "error": f"revoked before the seek was done: {', '.join(gone)}; ask their new owner"}
        ours = [lane for lane in lanes.values() if lane is not None]
        if any(lane.seek is not None for lane in ours):
            return None
        offsets = [{"topic": x.partition.topic, "partition": x.partition.partition, "offset": x.flushed} for x in ours]
        return {"ok": True, "offsets": offsets}


def _target(to: Any) -> SeekTarget:
    if isinstance(to, bool) or to is None:
        raise Refused('say where to: an offset, "earliest", "latest" or {"timestamp_ms": …}')
    if isinstance(to, int) and to >= 0:
        return SeekTarget(offset=to)
    if to in ("earliest", "latest"):
        return SeekTarget(edge=to)
    timestamp_ms = to.get("timestamp_ms") if isinstance(to, dict) else None
    # Kafka would take a negative time for one of its edges.
    if isinstance(timestamp_ms, int) and not isinstance(timestamp_ms, bool) and timestamp_ms >= 0:
        return SeekTarget(timestamp_ms=timestamp_ms)
    raise Refused(f'{to!r} is no offset, "earliest", "latest" or timestamp')
