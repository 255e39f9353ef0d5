"""A worker as a real process: boots, takes orders, reports, and ends when it should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import dill
import multiprocess
import psutil
import pytest

from fixtures.file_sink import FileSink, UnopenableSink
from fixtures.flights import OWNER, flight, lane, part
from fixtures.postgres import execute, query
from fixtures.sessions import order
from fixtures.waiting import holds_for, wait_until
from speedlayer.supervisor.worker_handle import WorkerHandle
from speedlayer.workers import PostgreSQLSink
from speedlayer.workers.protocol import (
    BlockKind,
    BootFailed,
    Claim,
    Claimed,
    FailureKind,
    Finish,
    FlushBlocked,
    FlushFailed,
    FlushReport,
    Ready,
    Report,
    Seed,
    Stopped,
    WorkerLog,
)
from speedlayer.workers.settings import BootSpec
from speedlayer.workers.sinks.base import Sink
from speedlayer.workers.transform import Step, pack
from speedlayer.workers.worker import EXIT_BOOT_FAILED, EXIT_ORPHANED

TESTS = str(Path(__file__).resolve().parents[1])

R = TypeVar("R")


class Worker:
    """A worker process and everything that it has reported so far."""

    def __init__(self, handle: WorkerHandle) -> None:
        self.handle = handle
        self.reports: list[Report] = []

    def read(self) -> list[Report]:
        self.reports += self.handle.reports()
        return self.reports

    def of(self, kind: type[R]) -> list[R]:
        return [report for report in self.read() if isinstance(report, kind)]

    def wait_for(self, kind: type[R], count: int = 1) -> list[R]:
        return wait_until(
            lambda: len(self.of(kind)) >= count and self.of(kind),
            f"{count} {kind.__name__} came",
            diagnose=lambda: str(self.reports),
        )

    def wait_for_exit(self) -> int:
        def ended() -> bool:
            self.read()
            return self.handle.exited

        wait_until(ended, "the worker has ended", diagnose=lambda: str(self.reports))
        self.read()
        assert self.handle.exit_code is not None
        return self.handle.exit_code


Start = Callable[..., Worker]


@pytest.fixture(params=["spawn", "forkserver"])
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    """Starts workers by either method: ``start({"orders": sink})``."""
    context = multiprocess.get_context(request.param)
    with ExitStack() as cleanup:

        def start_worker(sinks: dict[str, Sink | bytes], transforms: dict[str, bytes] | None = None) -> Worker:
            dumped = {name: sink if isinstance(sink, bytes) else dill.dumps(sink) for name, sink in sinks.items()}
            spec = BootSpec("worker-0", dumped, transforms or {}, [TESTS], credit_flights=3, credit_bytes=1_000_000)
            handle = WorkerHandle(context, "worker-0", 1, dill.dumps(spec))
            cleanup.callback(handle.discard)
            return Worker(handle)

        yield start_worker


def message(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def lines(folder: Path, pipeline: str = "orders") -> list[dict[str, Any]]:
    path = folder / pipeline
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_worker_lives_from_ready_to_stopped(start: Start, tmp_path: Path) -> None:
    worker = start({"orders": FileSink(str(tmp_path))})
    (ready,) = worker.wait_for(Ready)
    assert ready == Ready(worker.handle.pid, 3, 1_000_000)
    worker.handle.put(Claim(1, lane(0), OWNER))
    assert worker.wait_for(Claimed) == [Claimed(1, lane(0), 1, None, None, -1)]
    worker.handle.put(Seed(2, lane(0), OWNER, 1, None, 10, "topic-id"))
    assert worker.wait_for(Claimed, 2)[1] == Claimed(2, lane(0), 1, 10, "topic-id", -1)
    worker.handle.put(flight(part([message(n=1), message(n=2)])))
    (report,) = worker.wait_for(FlushReport)
    assert (report.flight_id, report.rows, report.fenced) == (1, 2, [])
    worker.handle.put(Finish())
    assert worker.wait_for_exit() == 0
    assert worker.reports[-1] == Stopped()
    assert lines(tmp_path) == [{"n": 1}, {"n": 2}]
    assert (tmp_path / "orders.closed").exists()


def test_a_transform_travels_to_the_worker(start: Start, tmp_path: Path) -> None:
    rate = 1.2
    transform = pack([Step("map", lambda record: {"gross": record["net"] * rate})])
    worker = start({"orders": FileSink(str(tmp_path))}, {"orders": transform})
    worker.handle.put(flight(part([message(net=10)])))
    worker.wait_for(FlushReport)
    assert lines(tmp_path) == [{"gross": 12.0}]


@pytest.mark.parametrize(
    ("sinks", "transforms", "said"),
    [
        ({"orders": b"no pickle"}, {}, "UnpicklingError"),
        ({"orders": dill.dumps("a text")}, {}, "is a str, no Sink"),
        ({"orders": UnopenableSink("/")}, {}, "this sink can not be opened"),
        ({"orders": FileSink("/")}, {"orders": b"no pickle"}, "UnpicklingError"),
        ({"good": FileSink("/"), "bad": b"no pickle"}, {}, "UnpicklingError"),
    ],
    ids=["sink", "type", "open", "transform", "second pipeline"],
)
def test_what_can_not_be_loaded_fails_the_boot_with_its_reason(
    start: Start, sinks: dict[str, Any], transforms: dict[str, bytes], said: str
) -> None:
    worker = start(sinks, transforms)
    assert worker.wait_for_exit() == EXIT_BOOT_FAILED
    (failed,) = worker.of(BootFailed)
    assert said in failed.reason
    assert worker.of(Ready) == []


def test_finish_comes_after_everything_that_was_queued_before(start: Start, tmp_path: Path) -> None:
    worker = start({"orders": FileSink(str(tmp_path)), "returns": FileSink(str(tmp_path))})
    for number in range(10):
        pipeline = "orders" if number % 2 else "returns"
        worker.handle.put(flight(part([message(n=number)], pipeline=pipeline), flight_id=number))
    worker.handle.put(Finish())
    assert worker.wait_for_exit() == 0
    assert sorted(report.flight_id for report in worker.of(FlushReport)) == list(range(10))
    assert isinstance(worker.reports[-1], Stopped)
    assert [line["n"] for line in lines(tmp_path)] == [1, 3, 5, 7, 9]


def test_finish_does_not_wait_for_a_sink_that_is_away(start: Start, tmp_path: Path) -> None:
    worker = start({"orders": FileSink(str(tmp_path))})
    for number in range(2):
        worker.handle.put(flight(part([message(do="away", until="never")]), flight_id=number))
    worker.wait_for(FlushBlocked)
    worker.handle.put(Finish())
    assert worker.wait_for_exit() == 0
    assert [(report.flight_id, report.kind) for report in worker.of(FlushFailed)] == [
        (0, FailureKind.ABANDONED),
        (1, FailureKind.ABANDONED),
    ]
    assert lines(tmp_path) == []


def test_a_pipeline_that_is_stuck_holds_up_no_other_and_no_claim(start: Start, tmp_path: Path) -> None:
    worker = start({"orders": FileSink(str(tmp_path)), "returns": FileSink(str(tmp_path))})
    worker.handle.put(flight(part([message(do="wait", **{"for": "go"})])))
    wait_until((tmp_path / "waiting").exists, "the flush is stuck")
    worker.handle.put(flight(part([message(n=1)], pipeline="returns"), flight_id=2))
    worker.handle.put(Claim(7, lane(0), OWNER))
    assert [report.flight_id for report in worker.wait_for(FlushReport)] == [2]
    assert [report.claim_id for report in worker.wait_for(Claimed)] == [7]
    (tmp_path / "go").touch()
    assert [report.flight_id for report in worker.wait_for(FlushReport, 2)] == [2, 1]


def test_a_sink_that_is_away_is_tried_until_it_is_back(start: Start, tmp_path: Path) -> None:
    worker = start({"orders": FileSink(str(tmp_path))})
    worker.handle.put(flight(part([message(do="away", until="back")])))
    blocked = worker.wait_for(FlushBlocked, 2)
    assert {report.kind for report in blocked} == {BlockKind.UNAVAILABLE}
    (tmp_path / "back").touch()
    (report,) = worker.wait_for(FlushReport)
    assert report.retries == len(worker.of(FlushBlocked))


def test_a_flight_of_an_unknown_pipeline_is_given_back(start: Start, tmp_path: Path) -> None:
    worker = start({"orders": FileSink(str(tmp_path))})
    worker.handle.put(flight(part([message(n=1)], pipeline="nobody")))
    (failed,) = worker.wait_for(FlushFailed)
    assert failed.kind is FailureKind.ABANDONED
    assert "nobody" in failed.reason


def test_user_code_that_wants_to_exit_costs_its_flight_and_not_the_worker(start: Start, tmp_path: Path) -> None:
    worker = start({"orders": FileSink(str(tmp_path))})
    worker.handle.put(flight(part([message(do="exit")])))
    worker.handle.put(flight(part([message(n=1)]), flight_id=2))
    assert worker.wait_for(FlushFailed)[0].kind is FailureKind.ABANDONED
    assert worker.wait_for(FlushReport)[0].flight_id == 2


def test_what_is_logged_in_the_worker_is_reported(start: Start, tmp_path: Path) -> None:
    worker = start({"orders": FileSink(str(tmp_path))})
    worker.handle.put(flight(part([message(do="log")])))
    worker.wait_for(FlushReport)
    pid = worker.handle.pid
    assert [(log.message, log.fields) for log in worker.of(WorkerLog)] == [
        ("a line from user code", {"logger": "user"}),
        ("a line from the sink", {"pid": pid}),
    ]


def test_a_worker_loads_neither_the_supervisor_nor_a_kafka_client(start: Start, tmp_path: Path) -> None:
    worker = start({"orders": FileSink(str(tmp_path))})
    worker.handle.put(flight(part([message(do="modules")])))
    worker.wait_for(FlushReport)
    modules = set((tmp_path / "modules").read_text().split())
    assert "speedlayer.workers.worker" in modules
    assert not {name for name in modules if name.split(".")[0] == "confluent_kafka"}
    assert not {name for name in modules if name.startswith("speedlayer.supervisor")}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_from_the_terminal_are_ignored(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    worker = start({"orders": FileSink(str(tmp_path))})
    assert worker.handle.pid is not None
    for _ in range(3):  # from the first moment on
        os.kill(worker.handle.pid, number)
    worker.wait_for(Ready)
    for _ in range(3):
        os.kill(worker.handle.pid, number)
    worker.handle.put(flight(part([message(n=1)])))
    worker.wait_for(FlushReport)
    assert not worker.handle.exited


def test_the_end_of_the_lifeline_ends_a_worker_whatever_it_is_doing(start: Start, tmp_path: Path) -> None:
    worker = start({"orders": FileSink(str(tmp_path))})
    worker.handle.put(flight(part([message(do="wait", **{"for": "never"})])))
    wait_until((tmp_path / "waiting").exists, "the flush is stuck")
    holds_for(lambda: not worker.handle.exited, "the worker lives", seconds=0.3)
    worker.handle._lifeline.close()
    assert worker.wait_for_exit() == EXIT_ORPHANED


_SUPERVISOR = """
import dill, multiprocess, sys, time
from fixtures.file_sink import FileSink
from speedlayer.supervisor.worker_handle import WorkerHandle
from speedlayer.workers.protocol import Ready
from speedlayer.workers.settings import BootSpec

if __name__ == "__main__":
    spec = BootSpec("worker-0", {"orders": dill.dumps(FileSink(sys.argv[2]))}, python_path=[sys.argv[3]])
    handles = [WorkerHandle(multiprocess.get_context(sys.argv[1]), f"worker-{n}", 1, dill.dumps(spec)) for n in (0, 1)]
    waiting = set(handles)
    while waiting:
        waiting -= {handle for handle in waiting for report in handle.reports() if isinstance(report, Ready)}
        time.sleep(0.01)
    print(*[handle.pid for handle in handles], flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_supervisor_that_is_killed_takes_its_workers_along(tmp_path: Path, method: str) -> None:
    script = tmp_path / "supervisor.py"
    script.write_text(_SUPERVISOR)
    supervisor = subprocess.Popen(
        [sys.executable, script, method, tmp_path, TESTS],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": TESTS},
    )
    try:
        assert supervisor.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in supervisor.stdout.readline().split()]
        assert len(workers) == 2
    finally:
        supervisor.kill()
        supervisor.wait()
    wait_until(lambda: not any(worker.is_running() for worker in workers), "the workers have ended")


def test_from_messages_to_rows(start: Start, postgres_dsn: str) -> None:
    execute(postgres_dsn, "CREATE TABLE orders (order_id bigint PRIMARY KEY, total numeric)")
    steps = [
        Step("filter", lambda record: record["order_id"] != 2),
        Step("map", lambda record: {"order_id": record["order_id"], "total": record["net"] * 2}),
    ]
    sink = PostgreSQLSink(postgres_dsn, table="orders", mode="upsert")
    worker = start({"orders": sink}, {"orders": pack(steps)})
    worker.handle.put(Claim(1, lane(0), OWNER))
    (claimed,) = worker.wait_for(Claimed)
    worker.handle.put(Seed(2, lane(0), OWNER, claimed.epoch, None, 100, None))
    worker.wait_for(Claimed, 2)
    values = [order(1, net=5), order(2, net=6), b"nonsense", order(3, net=7)]
    worker.handle.put(flight(part(values, start=100, epoch=claimed.epoch)))
    (report,) = worker.wait_for(FlushReport)
    assert (report.rows, report.filtered, report.dead_lettered) == (2, 1, 1)
    worker.handle.put(Finish())
    assert worker.wait_for_exit() == 0
    assert query(postgres_dsn, "SELECT order_id, total FROM orders ORDER BY 1") == [(1, 10), (3, 14)]
    ours = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'speedl%/%'"
    wait_until(lambda: query(postgres_dsn, ours) == [], "the worker's connections are gone")
