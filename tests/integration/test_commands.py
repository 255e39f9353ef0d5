"""The commands against a running daemon, between a real Kafka and a real PostgreSQL."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from prometheus_client.parser import text_string_to_metric_families

from fixtures.daemon import Daemon, pipeline_toml
from fixtures.kafka import Broker, Message
from fixtures.ports import free_port
from fixtures.postgres import execute, locked, scalar
from fixtures.processes import Child
from fixtures.waiting import wait_until
from speedlayer.supervisor import signals
from speedlayer.supervisor.cli.main import cli
from speedlayer.supervisor.exit_codes import ExitCode

StartDaemon = Callable[..., Daemon]


@pytest.fixture(autouse=True)
def table(postgres_dsn: str) -> None:
    execute(postgres_dsn, "CREATE TABLE orders (order_id bigint, status text)")


@pytest.fixture
def source(kafka: Broker, topic: str, postgres_dsn: str) -> str:
    return source_of(kafka, topic, postgres_dsn)


def source_of(kafka: Broker, topic: str, dsn: str, **more: Any) -> str:
    return pipeline_toml(
        bootstrap_servers=kafka.bootstrap_servers,
        group_id=f"group-{topic}",
        dsn=dsn,
        topic=topic,
        table="orders",
        **more,
    )


def produce(kafka: Broker, topic: str, first: int, count: int) -> None:
    numbers = range(first, first + count)
    kafka.produce(topic, [Message(b'{"order_id": %d, "status": "NEW"}' % n, key=b"%d" % n) for n in numbers])


def run(daemon: Daemon, *arguments: str) -> Result:
    return CliRunner().invoke(cli, [*arguments, "--socket", str(daemon.socket)])


def run_json(daemon: Daemon, *arguments: str) -> Any:
    result = run(daemon, *arguments, "--json")
    assert result.exit_code == ExitCode.OK, result.output
    return json.loads(result.output)


def lag_of(daemon: Daemon) -> int | None:
    lag: int | None = run_json(daemon, "lag")["lag"]
    return lag


def rows(dsn: str) -> int:
    return int(scalar(dsn, "SELECT count(*) FROM orders"))


def test_status_and_lag_tell_what_the_daemon_does(
    start_daemon: StartDaemon, source: str, kafka: Broker, topic: str, postgres_dsn: str
) -> None:
    produce(kafka, topic, 0, 1_000)
    daemon = start_daemon(source)
    wait_until(lambda: lag_of(daemon) == 0, "the lag is 0", diagnose=daemon.tail)
    assert rows(postgres_dsn) == 1_000
    text = run(daemon, "status").output
    assert f"group group-{topic}" in text
    assert any(line.split()[:2] == [topic, "running"] for line in text.splitlines())
    shown = run(daemon, "offsets", "show").output.splitlines()
    assert sum(int(line.split()[3].replace(",", "")) for line in shown[1:]) == 1_000


def test_a_pause_holds_what_arrives_and_resume_writes_it(
    start_daemon: StartDaemon, source: str, kafka: Broker, topic: str, postgres_dsn: str
) -> None:
    daemon = start_daemon(source)
    assert run(daemon, "pause", topic).output == f"paused: {topic}\n"
    produce(kafka, topic, 0, 500)
    wait_until(lambda: lag_of(daemon) == 500, "the lag is 500", diagnose=daemon.tail)
    assert rows(postgres_dsn) == 0
    assert "an operator paused it" in run(daemon, "status").output
    assert run(daemon, "resume", topic).exit_code == ExitCode.OK
    wait_until(lambda: rows(postgres_dsn) == 500, "500 rows", diagnose=daemon.tail)


def test_a_drain_returns_when_everything_that_was_read_is_written(
    start_daemon: StartDaemon, kafka: Broker, topic: str, postgres_dsn: str
) -> None:
    """The batch would stay open for an hour: only the drain can have closed it."""
    daemon = start_daemon(source_of(kafka, topic, postgres_dsn, pipeline={"batch_seconds": 3600.0}))
    produce(kafka, topic, 0, 300)
    daemon.wait_until(
        lambda status: sum(lane["fetched_offset"] or 0 for lane in status["pipelines"][0]["lanes"]) == 300,
        "300 messages are read",
    )
    assert rows(postgres_dsn) == 0
    assert run(daemon, "drain").exit_code == ExitCode.OK
    assert rows(postgres_dsn) == 300


def test_seek_moves_one_partition_back_and_its_rows_are_written_again(
    start_daemon: StartDaemon, source: str, kafka: Broker, topic: str, postgres_dsn: str
) -> None:
    daemon = start_daemon(source)
    produce(kafka, topic, 0, 400)
    wait_until(lambda: rows(postgres_dsn) == 400, "400 rows", diagnose=daemon.tail)
    end = kafka.end_offsets(topic)[2]
    result = run(daemon, "offsets", "seek", topic, "--partition", "2", "--to", "earliest", "--yes")
    assert result.output == f"{topic} [2] goes on at offset 0\n"
    wait_until(lambda: rows(postgres_dsn) == 400 + end, "partition 2 is there twice", diagnose=daemon.tail)


def test_what_the_daemon_can_not_do_is_refused_with_a_reason(start_daemon: StartDaemon, source: str) -> None:
    daemon = start_daemon(source)
    for arguments in (("pause", "nobody"), ("offsets", "seek", "nobody", "--to", "0", "--yes")):
        result = run(daemon, *arguments)
        assert result.exit_code == ExitCode.REFUSED
        assert "there is no pipeline 'nobody'" in result.output


def test_a_second_daemon_needs_a_socket_of_its_own(
    start_daemon: StartDaemon, source: str, kafka: Broker, postgres_dsn: str
) -> None:
    first = start_daemon(source)
    other = source_of(kafka, kafka.create_topic(), postgres_dsn)
    second = start_daemon(other, wait=False, arguments=("--socket", str(first.socket)))
    assert second.wait() == ExitCode.ALREADY_RUNNING
    assert f"already listens on {first.socket}" in second.log_text()
    assert run(first, "status").exit_code == ExitCode.OK


def test_after_kill_9_the_same_socket_is_taken_again(start_daemon: StartDaemon, source: str) -> None:
    daemon = start_daemon(source)
    daemon.kill()
    assert run(daemon, "status").exit_code == ExitCode.NO_DAEMON
    daemon.start()
    assert run(daemon, "status").exit_code == ExitCode.OK


def test_a_daemon_that_is_frozen_gives_no_answer_and_says_so(start_daemon: StartDaemon, source: str) -> None:
    daemon = start_daemon(source)
    daemon.freeze()
    try:
        assert run(daemon, "status", "--timeout", "0.5").exit_code == ExitCode.NO_ANSWER
    finally:
        daemon.thaw()
    wait_until(lambda: run(daemon, "status").exit_code == ExitCode.OK, "it answers again", diagnose=daemon.tail)


# Errors of the process itself, which Python's own fault handler (on in these tests) catches to print a traceback.
OF_THE_FAULT_HANDLER = {signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS, signal.SIGILL}


def signals_of(pid: int, which: str) -> set[signal.Signals]:
    """Ask the kernel which signals a process catches (``SigCgt``) or ignores (``SigIgn``)."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(which))
    mask = int(line.split()[1], 16)
    return {
        number for number in signal.valid_signals() if isinstance(number, signal.Signals) and mask >> (number - 1) & 1
    }


def test_the_signals_that_are_handled_are_those_that_are_documented(start_daemon: StartDaemon, source: str) -> None:
    daemon = start_daemon(source)
    assert signals_of(daemon.pid, "SigCgt") - OF_THE_FAULT_HANDLER == set(signals.SUPERVISOR)
    for pid in daemon.wait_for_workers(2):
        assert set(signals.WORKER) <= signals_of(pid, "SigIgn")


@pytest.mark.parametrize("number", signals.SUPERVISOR)
def test_a_stopped_daemon_exits_0_and_leaves_no_socket(
    start_daemon: StartDaemon, source: str, number: signal.Signals
) -> None:
    daemon = start_daemon(source)
    assert daemon.stop(number) == ExitCode.OK
    assert not daemon.socket.exists()
    assert run(daemon, "status").exit_code == ExitCode.NO_DAEMON


def test_a_second_signal_does_not_wait_for_the_deadline(
    start_daemon: StartDaemon, kafka: Broker, topic: str, postgres_dsn: str
) -> None:
    """With the table locked, a stop waits for the flush until its deadline; a second signal gives the flush up."""
    daemon = start_daemon(source_of(kafka, topic, postgres_dsn, shutdown={"deadline_seconds": 600.0}))
    with locked(postgres_dsn, "orders"):
        produce(kafka, topic, 0, 10)
        daemon.wait_until(lambda status: status["pipelines"][0]["flights"] > 0, "a flight waits for the lock")
        daemon.process.send(signal.SIGTERM)
        daemon.process.wait_for_log("stopping (SIGTERM)")
        assert daemon.stop(signal.SIGTERM) == ExitCode.OK
    assert rows(postgres_dsn) == 0
    daemon.start()
    wait_until(lambda: rows(postgres_dsn) == 10, "what was given up is read again", diagnose=daemon.tail)


def test_the_default_socket_is_found_without_a_name(
    kafka: Broker, topic: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run` and `status` agree on the socket of a group, here below a runtime folder of the test's own."""
    # pytest's own folders are too deep for the address of a socket, and a runtime folder is short.
    runtime = Path(f"/tmp/speedlayer-test-{os.getpid()}")
    runtime.mkdir(mode=0o700)
    file = tmp_path / "pipeline.toml"
    file.write_text(source)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    command = [sys.executable, "-m", "speedlayer.supervisor", "run", str(file)]
    child = Child(command, log=tmp_path / "daemon.log", cwd=tmp_path, env=dict(os.environ))
    child.start()
    try:
        answers = lambda: CliRunner().invoke(cli, ["status"]).exit_code == ExitCode.OK  # noqa: E731
        wait_until(answers, "status finds the daemon", diagnose=child.log_tail)
        assert CliRunner().invoke(cli, ["status", "--group", f"group-{topic}"]).exit_code == ExitCode.OK
        assert CliRunner().invoke(cli, ["status", "--group", "another"]).exit_code == ExitCode.NO_DAEMON
        assert child.stop() == ExitCode.OK
        assert list((runtime / "speedlayer").iterdir()) == []
    finally:
        child.kill()
        (runtime / "speedlayer").rmdir()
        runtime.rmdir()


def test_metrics_and_health_follow_the_daemon(
    start_daemon: StartDaemon, source: str, kafka: Broker, topic: str
) -> None:
    port = free_port()
    daemon = start_daemon(source, arguments=("--http", f":{port}"))

    def get(path: str) -> tuple[int, str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()

    def metric(name: str) -> float:
        families = text_string_to_metric_families(get("/metrics")[1])
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)

    produce(kafka, topic, 0, 200)
    wait_until(lambda: metric("speedlayer_rows_total") == 200, "200 rows are counted", diagnose=daemon.tail)
    wait_until(lambda: metric("speedlayer_lag") == 0, "the lag is 0", diagnose=daemon.tail)
    assert get("/healthz")[0] == 200
    assert get("/readyz")[0] == 200
    run(daemon, "pause")
    wait_until(lambda: metric("speedlayer_held") == 1, "the pause is counted", diagnose=daemon.tail)
    assert metric("speedlayer_snapshot_age_seconds") < 5


def test_an_http_address_that_is_taken_is_a_configuration_error(start_daemon: StartDaemon, source: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        daemon = start_daemon(source, wait=False, arguments=("--http", f":{port}"))
        assert daemon.wait() == ExitCode.CONFIGURATION
    assert f"127.0.0.1:{port} can not be listened on" in daemon.log_text()


def test_the_log_is_json_lines_without_the_password(
    start_daemon: StartDaemon, source: str, kafka: Broker, topic: str, postgres_dsn: str
) -> None:
    from psycopg2.extensions import parse_dsn

    password = parse_dsn(postgres_dsn)["password"]
    daemon = start_daemon(source, arguments=("--log-format", "json", "--log-level", "debug"))
    produce(kafka, topic, 0, 10)
    wait_until(lambda: rows(postgres_dsn) == 10, "10 rows", diagnose=daemon.tail)
    daemon.stop()
    lines = [json.loads(line) for line in daemon.log_text().splitlines()]
    assert {"at", "level", "message"} <= set(lines[0])
    assert any(line["message"].startswith(f"pipeline {topic}: {topic} into ") for line in lines)
    assert password not in daemon.log_text()


def test_a_configuration_that_is_wrong_never_starts(start_daemon: StartDaemon, source: str) -> None:
    started = time.monotonic()
    daemon = start_daemon(source + "\n[worker]\ncount = 1\n", wait=False)
    assert daemon.wait() == ExitCode.CONFIGURATION
    assert 'did you mean "workers"' in daemon.log_text()
    assert "Traceback" not in daemon.log_text()
    assert time.monotonic() - started < 30
