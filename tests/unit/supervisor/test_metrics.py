"""Metrics and health: what Prometheus and a probe see of a snapshot."""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from speedlayer.supervisor import metrics
from speedlayer.supervisor.errors import ConfigurationError, InvalidSetting, MissingLibrary
from speedlayer.supervisor.metrics import HttpServer


def snapshot(**changes: Any) -> dict[str, Any]:
    lane = {
        "topic": "orders", "partition": 3, "state": "fetching", "next_offset": 120, "high_watermark": 150, "lag": 30,
    }  # fmt: skip
    stopped = {**lane, "partition": 4, "state": "stopped", "next_offset": None, "lag": None}
    pipeline = {
        "name": "orders", "holds": {"overloaded": "three strikes"}, "slow_count": 2, "overload_count": 1,
        "rows": 1000, "filtered": 5, "dead_lettered": 2, "condemned": 1, "quarantined_lanes": 1,
        "suspicious_deaths": 9, "stalled_lanes": 1, "flushes": 10, "retries": 1, "fenced": 0, "reclaims": 0,
        "last_flush_seconds": 0.25, "buffered_bytes": 4096, "in_flight_rows": 7, "rows_per_second": 50.5,
        "consumed_per_second": 60.0, "lag": 30, "lanes": [lane, stopped],
    }  # fmt: skip
    worker = {
        "name": "worker-1", "pid": 7, "state": "ready", "flights": 1, "bytes": 2048, "restarts": 3, "long_flushes": 0,
        "oldest_flight_seconds": None,
    }  # fmt: skip
    return {
        "state": "running", "at": time.time(), "uptime_seconds": 12.5, "pipelines": [pipeline], "workers": [worker],
        "memory": {"buffer_bytes": 1000, "buffered_bytes": 400}, "repairs": {"re-seek": 2}, **changes,
    }  # fmt: skip


class Daemon:
    """A snapshot that a test can change, behind a real HTTP server."""

    def __init__(self) -> None:
        self.picture: Mapping[str, Any] = snapshot()
        self.server = HttpServer("127.0.0.1:0", lambda: self.picture)
        self.server.start()

    def get(self, path: str) -> tuple[int, str]:
        host, port = self.server.address
        try:
            with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metrics(self) -> dict[tuple[str, tuple[str, ...]], float]:
        families = text_string_to_metric_families(self.get("/metrics")[1])
        return {(s.name, tuple(sorted(s.labels.values()))): s.value for family in families for s in family.samples}


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    served = Daemon()
    yield served
    served.server.stop()


def test_the_figures_of_the_snapshot_are_metrics_with_their_labels(daemon: Daemon) -> None:
    seen = daemon.metrics()
    assert seen["speedlayer_rows_total", ("orders",)] == 1000
    assert seen["speedlayer_dead_lettered_total", ("orders",)] == 2
    assert seen["speedlayer_overloads_total", ("orders",)] == 1
    assert seen["speedlayer_held", ("orders",)] == 1
    assert seen["speedlayer_buffered_bytes", ()] == 400
    assert seen["speedlayer_worker_ready", ("worker-1",)] == 1
    assert seen["speedlayer_worker_restarts_total", ("worker-1",)] == 3
    assert seen["speedlayer_lane_next_offset", ("3", "orders", "orders")] == 120
    assert seen["speedlayer_lane_stopped", ("4", "orders", "orders")] == 1


def test_a_figure_that_is_not_known_is_absent_rather_than_zero(daemon: Daemon) -> None:
    seen = daemon.metrics()
    assert ("speedlayer_lane_next_offset", ("4", "orders", "orders")) not in seen
    assert ("speedlayer_lane_lag", ("4", "orders", "orders")) not in seen
    assert ("speedlayer_worker_oldest_flight_seconds", ("worker-1",)) not in seen


def test_every_declared_metric_has_a_help_text_and_a_sample_somewhere(daemon: Daemon) -> None:
    worker = {**snapshot()["workers"][0], "oldest_flight_seconds": 1.5}
    daemon.picture = snapshot(workers=[worker])
    text = daemon.get("/metrics")[1]
    names = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    declared = [metric for group in metrics.GROUPS for metric in group.metrics]
    assert {metric.full_name for metric in declared} == names
    assert all(f"# HELP {metric.full_name} " in text for metric in declared)


def test_metrics_before_the_first_turn_of_the_loop_are_an_answer_too(daemon: Daemon) -> None:
    daemon.picture = {}
    status, text = daemon.get("/metrics")
    assert status == 200
    assert "speedlayer_uptime_seconds " not in text.replace("# HELP speedlayer_uptime_seconds ", "").replace(
        "# TYPE speedlayer_uptime_seconds ", ""
    )


def test_a_daemon_whose_loop_turns_is_healthy(daemon: Daemon) -> None:
    assert daemon.get("/healthz")[0] == 200


def test_a_daemon_whose_loop_hangs_is_not_and_says_for_how_long(daemon: Daemon) -> None:
    daemon.picture = snapshot(at=time.time() - 45)
    status, body = daemon.get("/healthz")
    assert status == 503
    assert json.loads(body) == {"ok": False, "reason": "the loop has not turned for 45 s"}


@pytest.mark.parametrize(
    ("age", "well"), [(0.0, True), (metrics.STUCK_SECONDS - 1, True), (metrics.STUCK_SECONDS + 1, False)]
)
def test_a_daemon_that_never_turned_is_healthy_only_for_a_while(age: float, well: bool) -> None:
    assert metrics.health_of({}, age)[0] is well


@pytest.mark.parametrize(
    ("changes", "ready", "reason"),
    [
        ({}, True, "assigned"),
        ({"state": "starting"}, False, "starting"),
        ({"state": "draining"}, False, "draining"),
        ({"workers": [{"name": "w", "state": "starting"}]}, False, "no worker is ready"),
        ({"pipelines": [{"name": "p", "lanes": []}]}, False, "no partition is assigned"),
        ({"at": 1.0}, False, "has not turned"),
    ],
)
def test_ready_means_running_assigned_and_a_worker_ready(
    daemon: Daemon, changes: dict[str, Any], ready: bool, reason: str
) -> None:
    daemon.picture = snapshot(**changes)
    status, body = daemon.get("/readyz")
    assert status == (200 if ready else 503)
    assert reason in json.loads(body)["reason"]


def test_another_path_is_not_found(daemon: Daemon) -> None:
    assert daemon.get("/etc/passwd")[0] == 404


def test_an_address_that_is_taken_is_a_configuration_error(daemon: Daemon) -> None:
    host, port = daemon.server.address
    with pytest.raises(ConfigurationError, match=rf"{host}:{port} can not be listened on"):
        HttpServer(f"{host}:{port}", dict).start()


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        (":9187", ("127.0.0.1", 9187)),
        ("9187", ("127.0.0.1", 9187)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        ("[::1]:80", ("::1", 80)),
    ],
)
def test_without_a_host_the_address_is_loopback(listen: str, address: tuple[str, int]) -> None:
    assert metrics.address_of(listen) == address


@pytest.mark.parametrize("listen", ["localhost", "localhost:", "localhost:http", "localhost:70000", "a:-1"])
def test_what_is_no_address_is_refused(listen: str) -> None:
    with pytest.raises(InvalidSetting, match="host:port"):
        metrics.address_of(listen)


def test_without_the_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client.registry", None)
    with pytest.raises(MissingLibrary, match=r"speedlayer\[metrics\]"):
        HttpServer("127.0.0.1:0", dict)
