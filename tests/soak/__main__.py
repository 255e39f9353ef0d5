"""The soak: a daemon under a steady load for hours, with faults; its memory and descriptors must keep their level.

`scripts/soak` starts it. Everything it needs it starts itself, on loopback, and ends by itself.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from fixtures.daemon import Daemon, toml
from fixtures.kafka import Broker, PacedProducer
from fixtures.postgres import PostgresServer, find_installations
from fixtures.processes import unprivileged_account
from fixtures.proxy import Proxy
from fixtures.workspace import private_folder
from soak import load, report
from soak.faults import FAULTS, Missed, World, draws
from soak.watch import REST_SECONDS, Watch, courses
from speedlayer.supervisor.errors import NoAnswer, SpeedlayerError

GROUP = "soak"
PROGRESS_SECONDS = 60.0
CATCH_UP_SECONDS = 120.0


class Soak:
    """One run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._out: Path = options.out
        self._out.mkdir(parents=True, exist_ok=True)
        self._fault: str | None = None
        self._quiet_since = time.monotonic()
        self.struck: Counter[str] = Counter()

    def run(self) -> int:
        """Run it; returns the exit status."""
        with ExitStack() as cleanup:
            world = self._start(cleanup)
            with Watch(self._out / "samples.csv", lambda: self._roles(world), self._at_rest) as watch:
                self._under_load(world, watch)
                for topic in (load.EVENTS, load.ORDERS):
                    ends = world.broker.end_offsets(topic)
                    world.daemon.wait_until_caught_up(ends, topic, timeout_seconds=CATCH_UP_SECONDS)
            self._say("everything is written; the tables are compared with the topics")
            findings = list(load.verdict(world.broker, world.dsn))
            world.daemon.stop()
        found = courses(watch.samples, self._options.settling_minutes * 60)
        text, ok = report.make(self._options, findings, found, self.struck, watch.samples)
        (self._out / "report.md").write_text(text)
        print(text)
        return 0 if ok else 1

    # --- the stage ----------------------------------------------------------------------------------------------

    def _start(self, cleanup: ExitStack) -> World:
        broker = Broker(cleanup.enter_context(private_folder("kafka")), proxied=True)
        cleanup.callback(broker.close)
        broker.start()
        folder = cleanup.enter_context(private_folder("postgres", unprivileged_account()))
        server = PostgresServer(find_installations()[0], folder)
        cleanup.callback(server.close)
        server.start()
        dsn = server.dsn(server.create_database())
        load.make_tables(dsn)
        for topic in (load.EVENTS, load.ORDERS):
            broker.create_topic(topic, partitions=load.PARTITIONS)
        proxy = Proxy((server.host, server.port)).start()
        cleanup.callback(proxy.close)
        daemon = Daemon(
            cleanup.enter_context(private_folder("daemon")),
            _settings(broker, dsn.replace(f":{server.port}/", f":{proxy.port}/")),
        )
        daemon.process.log = self._out / "daemon.log"
        cleanup.callback(daemon.close)
        daemon.start()
        return World(broker, server, dsn, proxy, daemon, GROUP, random.Random(self._options.seed))

    # --- the run ------------------------------------------------------------------------------------------------

    def _under_load(self, world: World, watch: Watch) -> None:
        options = self._options
        began = told = time.monotonic()
        end, next_fault = began + options.minutes * 60, began + options.fault_seconds
        faults = draws(options.seed)
        updates = load.order_updates(options.seed)
        with (
            PacedProducer(world.broker, load.EVENTS, load.event, per_second=options.rate / 2),
            PacedProducer(world.broker, load.ORDERS, updates, per_second=options.rate / 2),
        ):
            while time.monotonic() < end:
                time.sleep(1.0)
                now = time.monotonic()
                if now >= next_fault and now < end - 2 * REST_SECONDS:
                    self._strike(world, *next(faults))
                    next_fault = time.monotonic() + options.fault_seconds
                if now - told >= PROGRESS_SECONDS:
                    told = now
                    self._progress(world, watch, (now - began) / 60)

    def _strike(self, world: World, name: str, seconds: float) -> None:
        self._fault = name
        self._say(f"fault: {name}")
        try:
            FAULTS[name](world, seconds)
            self.struck[name] += 1
        except (Missed, NoAnswer) as error:
            # A busy machine: no reason to end a run of hours, and no fault that counts. A daemon that is gone is one.
            self._say(f"fault missed: {name}: {error}")
        finally:
            self._fault, self._quiet_since = None, time.monotonic()

    def _at_rest(self) -> bool:
        return self._fault is None and time.monotonic() - self._quiet_since >= REST_SECONDS

    def _roles(self, world: World) -> dict[str, int]:
        roles = {"supervisor": world.daemon.pid}
        try:
            status = world.daemon.status()
        except SpeedlayerError:
            return roles  # too busy to answer just now; its workers are looked at the next time
        return {**roles, **{worker["name"]: worker["pid"] for worker in status["workers"] if worker["pid"]}}

    def _progress(self, world: World, watch: Watch, minutes: float) -> None:
        memory = ", ".join(f"{role} {one.rss_bytes / 2**20:.1f} MB" for role, one in watch.latest().items())
        try:
            pipelines = world.daemon.status()["pipelines"]
        except NoAnswer as error:
            self._say(f"{minutes:.0f} of {self._options.minutes:g} min: {error}; {memory}")
            return
        rows = sum(pipeline["rows"] for pipeline in pipelines)
        lag = sum(lane["lag"] or 0 for pipeline in pipelines for lane in pipeline["lanes"])
        self._say(f"{minutes:.0f} of {self._options.minutes:g} min: {rows} rows, lag {lag}; {memory}")

    @staticmethod
    def _say(line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def _settings(broker: Broker, dsn: str) -> str:
    return toml(
        {
            "kafka": {
                "bootstrap.servers": broker.proxied_bootstrap_servers,
                "group.id": GROUP,
                "session.timeout.ms": 10_000,
                "reconnect.backoff.max.ms": 1000,
            },
            "postgres": {"dsn": dsn},
            "workers": {"count": 2},
            "memory": {"budget_mb": 64},
            "pipelines": [
                {"name": load.EVENTS, "topics": [load.EVENTS], "table": load.EVENTS},
                {
                    "name": load.ORDERS,
                    "topics": [load.ORDERS],
                    "table": load.ORDERS,
                    "mode": "upsert",
                    "key": ["shop", "order_id"],
                },
            ],
        }
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/soak",
        description="Runs a daemon under a steady load with faults, and watches its memory and descriptors.",
        epilog="example: scripts/soak --minutes 120 --seed 1 --out soak-report",
    )
    parser.add_argument("--minutes", type=float, default=120.0, metavar="M", help="how long (default: 120)")
    parser.add_argument("--rate", type=float, default=300.0, metavar="R", help="messages a second (default: 300)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="decides the faults (default: 1)")
    parser.add_argument(
        "--fault-seconds", type=float, default=75.0, metavar="F", help="between two faults (default: 75)"
    )
    parser.add_argument(
        "--settling-minutes", type=float, default=15.0, metavar="M", help="left out of the slopes (default: 15)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(".cache/soak"), metavar="FOLDER", help="samples, log and report go here"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(Soak(_options()).run())
