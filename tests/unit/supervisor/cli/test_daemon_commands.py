"""The commands that talk to a daemon: what they send, what they print, how they end.

The daemon is a thread behind a real control socket, which answers as the core does and remembers what it was asked.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Optional

import pytest
from click.testing import CliRunner, Result

from speedlayer.supervisor import control
from speedlayer.supervisor.cli.main import cli
from speedlayer.supervisor.control import ControlCommand, ControlServer
from speedlayer.supervisor.exit_codes import ExitCode

LANE = {
    "topic": "orders", "partition": 0, "state": "fetching", "reason": "", "worker": "worker-1", "epoch": 3,
    "next_offset": 1000, "fetched_offset": 1200, "high_watermark": 2500, "lag": 1500, "in_flight": 1,
}  # fmt: skip
STOPPED = {**LANE, "partition": 1, "state": "stopped", "reason": "offsets 5 to 9 are gone", "lag": None}
PIPELINE = {
    "name": "orders", "group": "speed-layer", "topics": ["orders"], "state": "overloaded",
    "reason": "3 slow flushes", "holds": {"overloaded": "3 slow flushes"}, "slow_count": 0, "max_slow_flushes": 3,
    "overload_count": 1, "paused_until_seconds": 3.2, "rows": 1234567, "filtered": 5, "dead_lettered": 2,
    "flushes": 10, "last_flush_seconds": 2.31, "rows_per_second": 50.0, "consumed_per_second": 300.0, "lag": 1500,
    "lanes": [LANE, STOPPED],
}  # fmt: skip
STATUS: dict[str, Any] = {
    "ok": True, "state": "running", "since_seconds": 3661.0, "stop_reason": None, "group_ids": ["speed-layer"],
    "memory": {"buffer_bytes": 200 * 1024**2, "buffered_bytes": 1024**2}, "consumer_trouble": {},
    "workers": [{"name": "worker-1", "pid": 77, "state": "ready", "flights": 2, "bytes": 2048, "restarts": 0,
                 "oldest_flight_seconds": 0.5}],
    "pipelines": [PIPELINE],
}  # fmt: skip


class Daemon:
    """Answers every command with what it was told to, and keeps what it was asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Optional[dict[str, Any]]] = {"status": STATUS, "lag": STATUS}
        self._inbox: SimpleQueue[ControlCommand] = SimpleQueue()
        self._server = ControlServer(path, self._inbox)
        self._server.start()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (item := self._inbox.get()).command != "(stop)":
            self.asked.append((item.command, item.args))
            answer = self.answers.get(item.command, {"ok": True, "pipelines": ["orders"]})
            if answer is not None:
                item.reply(answer)

    def stop(self) -> None:
        self._inbox.put(ControlCommand("(stop)", {}, lambda answer: None))
        self._thread.join(10)
        self._server.stop()

    def run(self, *arguments: str, **more: Any) -> Result:
        return CliRunner().invoke(cli, [*arguments, "--socket", str(self.path)], **more)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    running = Daemon(tmp_path / "control.sock")
    yield running
    running.stop()


def test_status_shows_state_reason_and_rates(daemon: Daemon) -> None:
    result = daemon.run("status")
    assert result.exit_code == ExitCode.OK
    lines = result.output.splitlines()
    assert lines[0] == "running for 1 h 1 min, group speed-layer, 1.0 MB of 200.0 MB buffered"
    pipeline = next(line for line in lines if line.startswith("orders"))
    assert "overloaded" in pipeline
    assert "0/3" in pipeline
    assert "1,234,567" in pipeline
    assert "3 slow flushes (resumes in 3.2 s)" in pipeline
    assert "1 of 2 partitions are stopped" in pipeline
    assert any(line.split() == ["worker-1", "77", "ready", "2", "2.0", "kB", "500", "ms", "0"] for line in lines)


def test_status_of_a_running_pipeline_gives_its_stopped_partitions_as_the_only_reason(daemon: Daemon) -> None:
    running = {**PIPELINE, "state": "running", "reason": "", "paused_until_seconds": None}
    daemon.answers["status"] = {**STATUS, "pipelines": [running]}
    assert "  1 of 2 partitions are stopped: see `speedlayer lag`" in daemon.run("status").output


def test_status_shows_what_troubles_the_consumer(daemon: Daemon) -> None:
    daemon.answers["status"] = {**STATUS, "consumer_trouble": {"speed-layer": "all brokers are down"}}
    assert "! group speed-layer: all brokers are down" in daemon.run("status").output


def test_status_as_json_is_the_answer_itself(daemon: Daemon) -> None:
    assert json.loads(daemon.run("status", "--json").output) == STATUS


def test_lag_shows_each_partition_and_the_sum(daemon: Daemon) -> None:
    output = daemon.run("lag").output
    assert "1,500 behind in all, and 1 of 2 partitions stopped" in output
    assert "offsets 5 to 9 are gone" in output


def test_status_and_lag_show_a_partition_in_quarantine(daemon: Daemon) -> None:
    searched = {"first_offset": 7, "last_offset": 9, "deaths": 3, "how": "signal 11 (SIGSEGV), in the phase decode"}
    pipeline = {**PIPELINE, "lanes": [{**LANE, "quarantine": searched}, {**LANE, "partition": 1, "quarantine": None}]}
    daemon.answers["status"] = daemon.answers["lag"] = {**STATUS, "pipelines": [pipeline]}
    said = "in quarantine: offsets 7 to 9 are searched for what has killed 3 workers (signal 11 (SIGSEGV), in the"
    assert f"orders/0 is {said}" in daemon.run("status").output
    output = daemon.run("lag").output
    assert output.count(said) == 1


def test_lag_as_json_has_the_sum_and_the_partitions(daemon: Daemon) -> None:
    read = json.loads(daemon.run("lag", "orders", "--json").output)
    assert read["lag"] == 1500
    assert [(lane["pipeline"], lane["partition"]) for lane in read["lanes"]] == [("orders", 0), ("orders", 1)]


def test_lag_of_an_unknown_pipeline_is_refused_as_by_the_other_commands_and_lists_the_known(daemon: Daemon) -> None:
    result = daemon.run("lag", "oders")
    assert result.exit_code == ExitCode.REFUSED
    assert "there are orders" in result.output


@pytest.mark.parametrize(("command", "word"), [("pause", "paused"), ("resume", "resumed"), ("drain", "drained")])
def test_the_flow_commands_name_the_pipeline_and_say_what_was_done(daemon: Daemon, command: str, word: str) -> None:
    result = daemon.run(command, "orders")
    assert result.exit_code == ExitCode.OK
    assert result.output.startswith(f"{word}: orders")
    assert daemon.run(command).exit_code == ExitCode.OK
    assert daemon.asked == [(command, {"pipeline": "orders"}), (command, {})]


def test_resume_says_what_still_holds_the_pipeline(daemon: Daemon) -> None:
    daemon.answers["resume"] = {"ok": True, "pipelines": ["orders"], "still_held": {"orders": "the table is missing"}}
    assert "orders does not read yet: the table is missing" in daemon.run("resume").output


def test_what_the_daemon_refuses_ends_with_its_reason_and_a_named_code(daemon: Daemon) -> None:
    daemon.answers["pause"] = {"ok": False, "error": "there is no pipeline 'oders'"}
    result = daemon.run("pause", "oders")
    assert result.exit_code == ExitCode.REFUSED
    assert "error: there is no pipeline 'oders'" in result.output


def test_a_daemon_that_does_not_answer_in_time_is_a_named_code(daemon: Daemon) -> None:
    daemon.answers["drain"] = None
    result = daemon.run("drain", "--timeout", "0.2")
    assert result.exit_code == ExitCode.NO_ANSWER
    assert "may still happen" in result.output


def test_no_daemon_is_a_named_code_and_a_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["status", "--socket", str(tmp_path / "nobody.sock")])
    assert result.exit_code == ExitCode.NO_DAEMON
    assert "start one with `speedlayer run FILE`" in result.output


def test_offsets_show_has_what_is_written_and_what_is_read(daemon: Daemon) -> None:
    lines = daemon.run("offsets", "show").output.splitlines()
    assert lines[1].split() == ["orders", "orders", "0", "1,000", "1,200", "2,500", "3", "worker-1", "fetching"]


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("120000", 120000),
        ("earliest", "earliest"),
        ("latest", "latest"),
        ("2026-11-27T00:00:00Z", {"timestamp_ms": 1795737600000}),
        ("2026-11-27T00:00:00", {"timestamp_ms": 1795737600000}),
        ("2026-11-27T01:00:00+01:00", {"timestamp_ms": 1795737600000}),
        ("2026-11-27", {"timestamp_ms": 1795737600000}),
    ],
)
def test_seek_goes_to_an_offset_an_end_or_a_time(daemon: Daemon, given: str, sent: Any) -> None:
    daemon.answers["seek"] = {"ok": True, "offsets": [{"topic": "orders", "partition": 3, "offset": 7}]}
    result = daemon.run("offsets", "seek", "orders", "--topic", "orders", "--partition", "3", "--to", given, "--yes")
    assert result.output.startswith("orders [3] goes on at offset 7")
    assert daemon.asked == [("seek", {"pipeline": "orders", "topic": "orders", "partition": 3, "to": sent})]


@pytest.mark.parametrize("given", ["-5", "soon", "1.5", "²"])
def test_seek_to_nowhere_is_a_usage_error(daemon: Daemon, given: str) -> None:
    result = daemon.run("offsets", "seek", "orders", "--to", given, "--yes")
    assert result.exit_code == ExitCode.USAGE
    assert daemon.asked == []


@pytest.mark.parametrize(
    ("to", "end"), [("7", "at offset 7\n"), ("90", "at offset 7, the nearest to 90 that there is\n")]
)
def test_seek_says_where_it_went_instead_of_an_offset_that_the_log_does_not_have(
    daemon: Daemon, to: str, end: str
) -> None:
    daemon.answers["seek"] = {"ok": True, "offsets": [{"topic": "orders", "partition": 3, "offset": 7}]}
    assert daemon.run("offsets", "seek", "orders", "--to", to, "--yes").output.endswith(end)


def test_seek_is_never_done_without_a_yes(daemon: Daemon) -> None:
    result = daemon.run("offsets", "seek", "orders", "--to", "0")
    assert result.exit_code == ExitCode.USAGE
    assert "--yes" in result.output
    assert daemon.asked == []


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the default sockets into a folder of the test's own."""
    monkeypatch.setattr(control, "default_directory", lambda: tmp_path / "private")


def status_without_socket(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["status", *arguments])


@pytest.mark.usefixtures("private")
def test_the_only_daemon_needs_no_name() -> None:
    running = Daemon(control.default_path("speed-layer"))
    try:
        assert status_without_socket().exit_code == ExitCode.OK
    finally:
        running.stop()
    result = status_without_socket()
    assert result.exit_code == ExitCode.NO_DAEMON
    assert "no daemon of this user" in result.output


@pytest.mark.usefixtures("private")
def test_of_two_daemons_one_must_be_named() -> None:
    first, second = Daemon(control.default_path("first")), Daemon(control.default_path("second"))
    try:
        result = status_without_socket()
        assert result.exit_code == ExitCode.USAGE
        assert str(first.path) in result.output
        assert str(second.path) in result.output
        assert status_without_socket("--group", "second").exit_code == ExitCode.OK
        assert (len(first.asked), len(second.asked)) == (0, 1)
    finally:
        first.stop()
        second.stop()
