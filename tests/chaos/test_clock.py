"""The clock of one process steps, and everybody else's does not."""

from __future__ import annotations

import contextlib
import datetime
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chaos import clock as clock_module
from chaos.clock import SteppedClock
from fixtures.daemon import Daemon, pipeline_toml
from fixtures.kafka import Broker, Message, PacedProducer
from fixtures.postgres import execute, query
from fixtures.waiting import holds_for, wait_until
from fixtures.workspace import private_folder

HOUR = 3600.0
TELL = "import sys, time\nfor _ in sys.stdin: print(time.time(), time.monotonic(), flush=True)"

# After which a silent member loses its partitions, by both protocols (see fixtures.kafka and pipeline_toml).
SESSION_SECONDS = 6.0

# A busy machine may take this long between two looks at a clock.
SLACK_SECONDS = 30.0


class Teller:
    """A process that tells its clocks when it is asked."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", TELL],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ahead_seconds(self) -> tuple[float, float]:
        """How far its time of day and its monotonic clock are ahead of ours."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        told, monotonic = map(float, self.process.stdout.readline().split())
        return told - time.time(), monotonic - time.monotonic()


@pytest.fixture
def clock(tmp_path: Path) -> SteppedClock:
    return SteppedClock(tmp_path)


@contextlib.contextmanager
def telling(environment: dict[str, str]) -> Iterator[Teller]:
    teller = Teller(environment)
    try:
        yield teller
    finally:
        teller.process.communicate(timeout=20)


def test_the_time_of_day_steps_both_ways_and_the_monotonic_clock_does_not(clock: SteppedClock) -> None:
    with telling(clock.env) as stepped, telling({}) as other:
        seen = []
        for step in (0.0, HOUR, -2 * HOUR, 0.5 * HOUR):
            clock.step(step)
            ahead, monotonic = stepped.ahead_seconds()
            seen.append(ahead)
            assert abs(monotonic) < SLACK_SECONDS
            assert abs(other.ahead_seconds()[0]) < SLACK_SECONDS
        clock.end()
        seen.append(stepped.ahead_seconds()[0])
    assert seen == pytest.approx([0, HOUR, -HOUR, -0.5 * HOUR, 0], abs=SLACK_SECONDS)


WAIT = """
import multiprocessing, sys, threading, time
lock = multiprocessing.Lock()
lock.acquire()
threading.Timer(0.5, print, ["waiting"], {"flush": True}).start()  # said when it does
started = time.monotonic()
lock.acquire(timeout=float(sys.argv[1]))
print(time.monotonic() - started, flush=True)
"""


@pytest.mark.parametrize(("timeout_seconds", "step", "least", "most"), [(60, HOUR, 0, 30), (3, -3, 5.9, 30)])
def test_a_wait_until_a_time_of_day_follows_the_step(
    clock: SteppedClock, timeout_seconds: float, step: float, least: float, most: float
) -> None:
    """As with a real clock that is set: forwards it ends early, backwards it ends late."""
    command = [sys.executable, "-c", WAIT, str(timeout_seconds)]
    environment = {**os.environ, **clock.env}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        clock.step(step)
        told, _ = process.communicate(timeout=100)
    assert least <= float(told) <= most


def test_a_library_that_is_refused_or_missing_fails_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "libfaketime.so.1"
    broken.write_text("no library")
    with monkeypatch.context() as patched:
        patched.setattr(clock_module, "find_library", lambda: broken)
        with pytest.raises(AssertionError, match="--no-binary libfaketime"):
            SteppedClock(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AssertionError, match="speedlayer\\[test\\]"):
        SteppedClock(tmp_path)


def log_times(daemon: Daemon) -> list[datetime.datetime]:
    """The times that the daemon's own log lines bear."""
    times = []
    for line in daemon.log_text().splitlines():
        with contextlib.suppress(ValueError):  # a line that bears no time
            times.append(datetime.datetime.fromisoformat(line[:19]))
    return times


def test_a_daemon_writes_on_and_once_while_its_clock_steps_an_hour_both_ways(
    clock: SteppedClock, kafka: Broker, postgres_dsn: str, topic: str
) -> None:
    execute(postgres_dsn, "CREATE TABLE kept (n int)")
    source = pipeline_toml(
        bootstrap_servers=kafka.bootstrap_servers,
        group_id=f"stepped-{topic}",
        dsn=postgres_dsn,
        topic=topic,
        table="kept",
    )
    with private_folder("daemon") as folder, contextlib.ExitStack() as cleanup:
        daemon = Daemon(folder, source, env=clock.env)
        cleanup.callback(daemon.close)
        daemon.start()
        workers = sorted(daemon.worker_pids())
        producer = cleanup.enter_context(PacedProducer(kafka, topic, message, per_second=200))
        for step in (HOUR, -2 * HOUR, HOUR):
            clock.step(step)
            before = rows(daemon)
            # Each stretch is longer than a session of the group, so that a member that fell silent would be out of it.
            holds_for(lambda: daemon.process.running, "the daemon runs", seconds=7)
            wait_until(
                lambda before=before: rows(daemon) > before, f"it writes after {step:+g} s", diagnose=daemon.tail
            )
        sent = producer.stop()
        daemon.wait_until_caught_up(kafka.end_offsets(topic), topic)
        assert sorted(daemon.worker_pids()) == workers, "no worker was taken for dead"
        assert daemon.log_text().count("assigned 4 partitions") == 1, "the group did not take it for dead"
        assert daemon.stop() == 0
    assert sorted(query(postgres_dsn, "SELECT n FROM kept")) == [(n,) for n in range(sent)]


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_an_idle_daemon_answers_and_keeps_its_partitions_when_its_clock_is_set_back(
    clock: SteppedClock, kafka: Broker, postgres_dsn: str, topic: str, protocol: str
) -> None:
    """Left alone, librdkafka would wait until its clock is where it was: no heartbeat, no answer, no stop."""
    execute(postgres_dsn, "CREATE TABLE kept (n int)")
    source = pipeline_toml(
        bootstrap_servers=kafka.bootstrap_servers,
        group_id=f"stepped-{topic}",
        dsn=postgres_dsn,
        topic=topic,
        table="kept",
        kafka={"group.protocol": protocol},
    )
    with private_folder("daemon") as folder, contextlib.ExitStack() as cleanup:
        daemon = Daemon(folder, source, env=clock.env)
        cleanup.callback(daemon.close)
        daemon.start()
        clock.step(-HOUR)
        holds_for(lambda: daemon.call("status", timeout_seconds=5), "it answers", seconds=2 * SESSION_SECONDS)
        kafka.produce(topic, map(message, range(100)))
        daemon.wait_until_caught_up(kafka.end_offsets(topic), topic, timeout_seconds=10)
        assert daemon.stop(timeout_seconds=10) == 0
        assert daemon.log_text().count("assigned 4 partitions") == 1
        assert "lost" not in daemon.log_text()
    assert sorted(query(postgres_dsn, "SELECT n FROM kept")) == [(n,) for n in range(100)]


def message(number: int) -> Message:
    return Message(b'{"n": %d}' % number, partition=number % 4)


def rows(daemon: Daemon) -> Any:
    return daemon.pipeline()["rows"]


def test_the_daemons_workers_see_the_step_too(
    clock: SteppedClock, kafka: Broker, postgres_dsn: str, topic: str
) -> None:
    """The fault of the test above did strike: its log bears the stepped time."""
    execute(postgres_dsn, "CREATE TABLE kept (n int)")
    source = pipeline_toml(
        bootstrap_servers=kafka.bootstrap_servers,
        group_id=f"stepped-{topic}",
        dsn=postgres_dsn,
        topic=topic,
        table="kept",
    )
    with private_folder("daemon") as folder, contextlib.ExitStack() as cleanup:
        daemon = Daemon(folder, source, env=clock.env)
        cleanup.callback(daemon.close)
        daemon.start()
        [worker, *_] = daemon.worker_pids()
        loaded = Path(f"/proc/{worker}/maps").read_text()
        assert "libfaketime" in loaded and "clock_waits" in loaded
        clock.step(400 * 24 * HOUR)
        assert daemon.stop() == 0
        assert max(log_times(daemon)) - min(log_times(daemon)) > datetime.timedelta(days=399)
