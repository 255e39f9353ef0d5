"""Prometheus metrics and health over HTTP (supervisor process, on threads of its own).

Everything is read from the daemon's snapshot when somebody asks; nothing here counts. `/metrics` is for Prometheus,
`/healthz` says whether the supervisor's loop turns, `/readyz` whether this daemon moves messages.
"""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Optional

from speedlayer.supervisor.errors import ConfigurationError, InvalidSetting, MissingLibrary

if TYPE_CHECKING:
    from prometheus_client.registry import CollectorRegistry

# A loop that has not turned for this long is stuck: the longest thing it waits for is a consumer that closes (5 s).
STUCK_SECONDS = 30.0

# A client that sends its request slower than this is let go.
REQUEST_TIMEOUT_SECONDS = 10.0

# How often the server looks whether it is to stop.
STOP_POLL_SECONDS = 0.05

DEFAULT_HOST = "127.0.0.1"

Snapshot = Callable[[], Mapping[str, Any]]


# --- Which metrics there are --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """One metric: its name without the prefix, where the snapshot has its value, and what it means."""

    name: str
    key: str
    kind: Literal["counter", "gauge"]
    meaning: str

    @property
    def full_name(self) -> str:
        """The name that Prometheus sees."""
        return f"speedlayer_{self.name}" + ("_total" if self.kind == "counter" else "")


@dataclass(frozen=True)
class Group:
    """The metrics of one kind of thing, and the labels that tell two such things apart."""

    title: str
    labels: tuple[str, ...]
    metrics: tuple[Metric, ...]


DAEMON = Group(
    "The daemon",
    (),
    (
        Metric("uptime_seconds", "uptime_seconds", "gauge", "Seconds since the daemon started."),
        Metric(
            "snapshot_age_seconds",
            "age",
            "gauge",
            "Seconds since the loop last renewed these figures; rises if it hangs.",
        ),
        Metric("buffer_bytes", "buffer_bytes", "gauge", "Bytes that may be assembled, queued and being flushed."),
        Metric("buffered_bytes", "buffered_bytes", "gauge", "Bytes that are."),
    ),
)

REPAIRS = Group(
    "Each remedy of the watchdog",
    ("remedy",),
    (Metric("repairs", "count", "counter", "How often the watchdog has applied the remedy to what stood still."),),
)

WORKERS = Group(
    "Each worker",
    ("worker",),
    (
        Metric("worker_ready", "ready", "gauge", "1 while the worker takes flights."),
        Metric("worker_flights", "flights", "gauge", "Flights in the worker's hands."),
        Metric("worker_bytes", "bytes", "gauge", "Bytes in the worker's hands."),
        Metric("worker_restarts", "restarts", "counter", "How often the worker was started again."),
        Metric("worker_long_flushes", "long_flushes", "gauge", "Its flushes that wait for the database for too long."),
        Metric(
            "worker_oldest_flight_seconds",
            "oldest_flight_seconds",
            "gauge",
            "Age of its oldest flight; absent without one.",
        ),
    ),
)

PIPELINES = Group(
    "Each pipeline",
    ("pipeline",),
    (
        Metric("rows", "rows", "counter", "Rows written since the daemon started."),
        Metric("filtered", "filtered", "counter", "Messages that a filter left out."),
        Metric("dead_lettered", "dead_lettered", "counter", "Messages that became dead letters."),
        Metric("condemned", "condemned", "counter", "Messages among them that had killed workers."),
        Metric("quarantined_lanes", "quarantined_lanes", "gauge", "Lanes in which a message is searched that kills."),
        Metric("suspicious_deaths", "suspicious_deaths", "counter", "Deaths of workers over messages of a lane."),
        Metric("stalled_lanes", "stalled_lanes", "gauge", "Lanes that stand still, and are being repaired."),
        Metric("flushes", "flushes", "counter", "Flushes that were committed."),
        Metric("retries", "retries", "counter", "Flushes that were tried again."),
        Metric("fenced", "fenced", "counter", "Parts left out because another owner had claimed their lane."),
        Metric("reclaims", "reclaims", "counter", "Lanes that were claimed again."),
        Metric("overloads", "overload_count", "counter", "How often three strikes paused the pipeline."),
        Metric("slow_count", "slow_count", "gauge", "The slow count; at `max_slow_flushes` the pipeline pauses."),
        Metric("held", "held", "gauge", "1 while the pipeline does not read, for whatever reason."),
        Metric("last_flush_seconds", "last_flush_seconds", "gauge", "Duration of the last flush."),
        Metric(
            "pipeline_buffered_bytes",
            "buffered_bytes",
            "gauge",
            "Bytes of the pipeline that are read and not yet written.",
        ),
        Metric("in_flight_rows", "in_flight_rows", "gauge", "Rows in the workers' hands."),
        Metric("rows_per_second", "rows_per_second", "gauge", "Rows written a second, over the last few."),
        Metric("consumed_per_second", "consumed_per_second", "gauge", "Messages read a second, over the last few."),
        Metric("lag", "lag", "gauge", "Messages that are not yet rows, of this daemon's partitions."),
    ),
)

LANES = Group(
    "Each lane (partition of a pipeline)",
    ("pipeline", "topic", "partition"),
    (
        Metric("lane_next_offset", "next_offset", "gauge", "The offset up to which everything is in PostgreSQL."),
        Metric("lane_high_watermark", "high_watermark", "gauge", "The offset at which the partition ends."),
        Metric("lane_lag", "lag", "gauge", "Messages of the partition that are not yet rows."),
        Metric("lane_stopped", "stopped", "gauge", "1 while the partition is stopped and waits for an operator."),
    ),
)

GROUPS = (DAEMON, REPAIRS, WORKERS, PIPELINES, LANES)


def samples(snapshot: Mapping[str, Any]) -> Iterator[tuple[Group, tuple[str, ...], Mapping[str, Any]]]:
    """Yield every thing of the snapshot that has metrics: its group, its labels, its values."""
    yield DAEMON, (), {**snapshot, **snapshot.get("memory", {}), "age": age_of(snapshot)}
    for remedy, count in snapshot.get("repairs", {}).items():
        yield REPAIRS, (remedy,), {"count": count}
    for worker in snapshot.get("workers", ()):
        yield WORKERS, (worker["name"],), {**worker, "ready": worker["state"] == "ready"}
    for pipeline in snapshot.get("pipelines", ()):
        yield PIPELINES, (pipeline["name"],), {**pipeline, "held": bool(pipeline.get("holds"))}
        for lane in pipeline.get("lanes", ()):
            labels = (pipeline["name"], lane["topic"], str(lane["partition"]))
            yield LANES, labels, {**lane, "stopped": lane["state"] == "stopped"}


def age_of(snapshot: Mapping[str, Any]) -> Optional[float]:
    """Return how old the snapshot is in seconds, None if there is none yet."""
    at = snapshot.get("at")
    return None if at is None else max(0.0, time.time() - at)


class SnapshotCollector:
    """Hands the snapshot's figures to prometheus_client."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Any]:
        """Yield the metric families, from one snapshot."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        makers = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}
        families = {
            metric: makers[metric.kind](f"speedlayer_{metric.name}", metric.meaning, labels=group.labels)
            for group in GROUPS
            for metric in group.metrics
        }
        for group, labels, values in samples(self._snapshot()):
            for metric in group.metrics:
                if values.get(metric.key) is not None:
                    families[metric].add_metric(labels, float(values[metric.key]))
        yield from families.values()


def registry_of(snapshot: Snapshot) -> CollectorRegistry:
    """Make the registry of the daemon's metrics; raises `MissingLibrary` where prometheus_client is not installed."""
    try:
        from prometheus_client.registry import CollectorRegistry
    except ImportError as error:
        raise MissingLibrary(
            "[http] listen needs the library prometheus_client: pip install 'speedlayer[metrics]'"
        ) from error
    registry = CollectorRegistry(auto_describe=False)
    registry.register(SnapshotCollector(snapshot))
    return registry


# --- Health -------------------------------------------------------------------------------------------------------


def health_of(snapshot: Mapping[str, Any], started_seconds_ago: float) -> tuple[bool, str]:
    """Tell whether the supervisor's loop turns, and what makes us think so."""
    age = age_of(snapshot)
    if age is None:
        return (
            started_seconds_ago < STUCK_SECONDS,
            f"no turn of the loop yet, {started_seconds_ago:.0f} s after the start",
        )
    if age > STUCK_SECONDS:
        return False, f"the loop has not turned for {age:.0f} s"
    return True, "the loop turns"


def readiness_of(snapshot: Mapping[str, Any], started_seconds_ago: float) -> tuple[bool, str]:
    """Tell whether the daemon is assigned partitions and has a worker that takes them, and what is missing."""
    healthy, reason = health_of(snapshot, started_seconds_ago)
    if not healthy or not snapshot:
        return False, reason
    if snapshot.get("state") != "running":
        return False, f"the daemon is {snapshot.get('state')}"
    workers: Sequence[Mapping[str, Any]] = snapshot.get("workers", ())
    if not any(worker["state"] == "ready" for worker in workers):
        return False, "no worker is ready"
    pipelines: Sequence[Mapping[str, Any]] = snapshot.get("pipelines", ())
    if not any(pipeline["lanes"] for pipeline in pipelines):
        return False, "no partition is assigned"
    return True, "assigned, and workers are ready"


# --- The server ---------------------------------------------------------------------------------------------------


class HttpServer:
    """Serves metrics and health until it is stopped. ``listen`` is ``host:port``; without a host, loopback."""

    def __init__(self, listen: str, snapshot: Snapshot) -> None:
        self._address = address_of(listen)
        self._snapshot = snapshot
        self._registry = registry_of(snapshot)
        self._server: Optional[http.server.ThreadingHTTPServer] = None

    def start(self) -> None:
        """Bind in the caller's thread, so that an address that is taken is an error there, and begin to serve."""
        handler = _handler_of(self._snapshot, self._registry, time.monotonic())
        family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
        kind = type("_Server", (_Server,), {"address_family": family})
        try:
            self._server = kind(self._address, handler)
        except OSError as error:
            host, port = self._address
            raise ConfigurationError(
                f"[http] listen: {host}:{port} can not be listened on: {error.strerror}"
            ) from error
        threading.Thread(
            target=self._server.serve_forever, args=(STOP_POLL_SECONDS,), name="speedlayer-http", daemon=True
        ).start()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens; the port that was chosen if 0 was asked for."""
        assert self._server is not None
        host, port = self._server.server_address[:2]
        return str(host), int(port)

    def stop(self) -> None:
        """Stop to listen."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


def address_of(listen: str) -> tuple[str, int]:
    """Read ``host:port``, ``[v6]:port``, ``:port`` or ``port``; raises `InvalidSetting`."""
    host, _, port = listen.rpartition(":")
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise InvalidSetting("http.listen", f'"{listen}" is not host:port, such as "127.0.0.1:9187"')
    return host.strip("[]") or DEFAULT_HOST, int(port)


def _handler_of(
    snapshot: Snapshot, registry: CollectorRegistry, started_at: float
) -> type[http.server.BaseHTTPRequestHandler]:
    from prometheus_client.exposition import choose_encoder

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = REQUEST_TIMEOUT_SECONDS
        server_version = "speedlayer"
        sys_version = ""

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                encoder, content_type = choose_encoder(self.headers.get("Accept", ""))
                self._answer(200, content_type, encoder(registry))
            elif path == "/healthz":
                self._answer_whether(health_of)
            elif path == "/readyz":
                self._answer_whether(readiness_of)
            else:
                self._answer(404, "text/plain", b"there are /metrics, /healthz and /readyz\n")

        do_HEAD = do_GET

        def _answer_whether(self, ask: Callable[[Mapping[str, Any], float], tuple[bool, str]]) -> None:
            well, reason = ask(snapshot(), time.monotonic() - started_at)
            body = json.dumps({"ok": well, "reason": reason}) + "\n"
            self._answer(200 if well else 503, "application/json", body.encode())

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Stay silent: a probe every few seconds is no news."""

    return Handler
