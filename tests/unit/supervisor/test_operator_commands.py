"""What an operator's command may hold: whatever it is, it is answered, and the daemon lives on."""

from __future__ import annotations

from typing import Any

import pytest

from speedlayer.supervisor.core import events as e
from speedlayer.supervisor.core.actions import Reply
from speedlayer.supervisor.core.config import CoreConfig, PipelineConfig
from speedlayer.supervisor.core.core import Core

STRANGE: list[Any] = [["orders"], {"name": "orders"}, 7, True, 1.5, ""]


@pytest.mark.parametrize("value", STRANGE)
@pytest.mark.parametrize("argument", ["pipeline", "topic", "partition", "to"])
@pytest.mark.parametrize("name", ["pause", "resume", "drain", "seek", "status", "no such command"])
def test_a_strange_argument_is_answered(name: str, argument: str, value: Any) -> None:
    pipeline = PipelineConfig("orders", "group", ("orders",))
    core = Core(CoreConfig((pipeline,), workers=1, buffer_bytes=1 << 20, owner="us", separator=b",", pid=1))
    core.step([e.Started(0.0)])
    actions = core.step([e.Command(1.0, 5, name, {"to": "earliest", argument: value})])
    replies = [action for action in actions if isinstance(action, Reply)]
    assert [reply.token for reply in replies] == [5]
    if argument == "pipeline" and value and name in ("pause", "resume", "drain", "seek"):
        assert not replies[0].answer["ok"] and "orders" in replies[0].answer["error"]
