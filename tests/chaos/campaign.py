"""One campaign: real brokers, a real database with its standby, supervisors that are hurt in every way we know.

`scripts/chaos` starts it. It ends by itself: after ``--minutes`` of faults all of them end, everything must be written
within a bounded time, and the tables are compared with what the topics were given. Exit status 0: no promise broken.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from chaos.audit import Audit, audit, make_tables
from chaos.database import DATABASE
from chaos.faults import KINDS, Fault, World, named
from chaos.keeper import Exit, Keeper
from chaos.nemesis import MOST_SECONDS, Nemesis, Record
from chaos.observer import Observer
from chaos.report import PROMISED_SECONDS, Result
from chaos.rights import MissingRight
from chaos.schedule import BURST_SIZES, bursts
from chaos.stage import CLASSIC, CONSUMER, Group, Stage, Stream
from chaos.traffic import Traffic
from fixtures.workspace import REPOSITORY
from speedlayer.supervisor.exit_codes import ExitCode

GROUPS = (
    Group(
        "classic",
        CLASSIC,
        (
            Stream("events", "events", share=3, mapped=True, may_grow=True),
            Stream("orders", "orders", share=2, upserts=True),
            Stream("hints", "hints", share=0.2, partitions=2, may_skip=True),
        ),
    ),
    Group(
        "consumer",
        CONSUMER,
        (
            Stream("ticks", "ticks", share=2, may_grow=True),
            Stream("stock", "stock", share=2, upserts=True, mapped=True),
        ),
    ),
)

PROGRESS_SECONDS = 10.0

# Before the first fault everything runs; a machine that is busy with something else may take its time.
READY_SECONDS = 120.0

# After the last fault all is written within this, or something is stuck.
WRITTEN_SECONDS = 90.0

# Between two looks at who has ended.
LOOK_SECONDS = 0.1

# These no fault from outside explains.
NEVER = (ExitCode.INTERNAL_ERROR, ExitCode.USAGE, ExitCode.CONFIGURATION, ExitCode.MISSING_LIBRARY, ExitCode.FAILED)


class Campaign:
    """One run. Everything that it starts is ended when `run` returns, whatever happened."""

    def __init__(
        self,
        seconds: float,
        seed: int,
        kinds: Sequence[type[Fault]],
        out: Path,
        *,
        per_second: float,
        sizes: Sequence[int],
        bursts: int | None,
    ) -> None:
        self.seconds, self.seed, self.kinds, self.out = seconds, seed, kinds, out
        self.per_second, self.sizes, self.bursts = per_second, sizes, bursts
        self.over = threading.Event()
        self.record = Record()
        self.audit: Audit | None = None
        self.recovered_seconds: float | None = None
        self.began = time.monotonic()
        self._storm = threading.Thread(target=self._rage, name="nemesis")
        self._log = (out / "campaign.log").open("a")

    # --- the run ------------------------------------------------------------------------------------------------

    def run(self, command: str) -> Result:
        started = datetime.now(timezone.utc)
        work = Path(tempfile.mkdtemp(prefix="speedlayer-chaos-"))
        work.chmod(0o711)
        result: Result | None = None
        try:
            result = self._run(command, started, work)
        finally:
            if result is None or result.passed:
                shutil.rmtree(work, ignore_errors=True)
            else:
                self.say(f"the data of the brokers is kept in {work}")
        return result

    def _run(self, command: str, started: datetime, work: Path) -> Result:
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(self._keep_logs, work)
            stage = cleanup.enter_context(Stage(work, self.out, GROUPS))
            self.say("brokers and databases are up")
            make_tables(stage.database.dsn, stage.streams)
            self.keeper = keeper = Keeper(stage.make_members())
            cleanup.callback(keeper.close)
            self.traffic = traffic = Traffic(stage.cluster.bootstrap_servers, stage.streams, self.per_second).start()
            cleanup.callback(traffic.abandon)
            self.observer = observer = Observer(stage.database.dsn, traffic.ends).start()
            cleanup.callback(observer.stop)
            self.world = World(stage, keeper, traffic, self.over)
            try:
                self._play(stage)
            except KeyboardInterrupt:
                self.record.fail("interrupted")
            finally:
                self.over.set()
                if self._storm.is_alive():  # its faults end before what they have hurt is ended
                    self._storm.join(MOST_SECONDS)
            return self._result(command, started)

    def _play(self, stage: Stage) -> None:
        self.keeper.start()
        self._wait(self._all_read, READY_SECONDS, "every member reads", fatal=True)
        self.observer.begin_anew()
        self.began = time.monotonic()
        self.say(f"all members read; {self.seconds:.0f} s of faults begin")
        self._storm.start()
        while self._storm.is_alive():
            self._look()
        if not self.record.failures:
            self._calm(stage)

    def _rage(self) -> None:
        """Bursts of faults until their time is over (a thread of its own: this one looks after the members)."""
        nemesis = Nemesis(self.world, self.kinds, self.record, self.over, self.say)
        for burst in bursts(self.seed, self.kinds, len(self.keeper.members), sizes=self.sizes):
            nemesis.burst(burst)
            left = self.began + self.seconds - time.monotonic()
            if burst.number == self.bursts or self.over.wait(max(0.0, min(burst.calm_seconds, left))):
                return
            if left <= burst.calm_seconds:
                return

    def _calm(self, stage: Stage) -> None:
        """All faults have ended: what is sent is written, by members that run, and nothing is left behind."""
        quiet_since = time.monotonic()
        self.say("the faults are over; everything must be written now")
        self.traffic.stop()
        if self._wait(self._all_written, WRITTEN_SECONDS, "everything is written"):
            self.recovered_seconds = time.monotonic() - quiet_since
        self._wait(lambda: not self.keeper.ghosts(), PROMISED_SECONDS, "no worker outlives its supervisor")
        self.say("stopping the members")
        for name, status in self.keeper.stop().items():
            if status != ExitCode.OK:
                self.record.fail(f"{name} was asked to stop and ended with {status}")
        self.say("comparing the tables with the topics")
        self.audit = audit(stage.database.primary.dsn(DATABASE), stage.streams, self.traffic, self.world.forgotten)
        if not self.audit.clean:
            self._keep_tables(stage)

    # --- waiting ------------------------------------------------------------------------------------------------

    def _all_read(self) -> bool:
        return all(member.reads() for member in self.keeper.members)

    def _all_written(self) -> bool:
        return all(self.observer.offsets.get(lane, 0) >= end for lane, end in self.traffic.ends().items())

    def _wait(self, condition: object, most_seconds: float, what: str, *, fatal: bool = False) -> bool:
        assert callable(condition)
        deadline = time.monotonic() + most_seconds
        while not condition():
            self._look()
            if time.monotonic() > deadline:
                self.record.fail(f"after {most_seconds:.0f} s it is not yet so that {what}")
                self._tell_of_members()
                if fatal:
                    raise SystemExit(
                        f"after {most_seconds:.0f} s it is not yet so that {what}; the logs are in {self.out}"
                    )
                return False
        return True

    def _look(self) -> None:
        """Look after the members for a moment, and show where things stand now and then."""
        for ended in self.keeper.look():
            self.say(str(ended))
            self._judge(ended)
        self._progress()
        threading.Event().wait(LOOK_SECONDS)

    def _judge(self, ended: Exit) -> None:
        if ended.status in NEVER or (ended.status == ExitCode.OK and ended.asked is None):
            self.record.fail(f"no fault explains that {ended}")
        if ended.asked is None and ended.status < 0:
            self.record.fail(f"nobody sent the signal by which {ended}")

    # --- telling ------------------------------------------------------------------------------------------------

    _told_at = 0.0

    def _progress(self) -> None:
        if time.monotonic() - self._told_at < PROGRESS_SECONDS:
            return
        self._told_at = time.monotonic()
        look = self.observer.last()
        seen = (
            "the database does not answer"
            if look is None or look.written is None
            else (f"{look.written:,} written, {look.behind:,} behind")
        )
        faults = ", ".join(one.kind for one in self.record.now()) or "none"
        self.say(f"{seen}; {len(self.record.all())} faults so far, now: {faults}")

    def say(self, what: str) -> None:
        line = f"{time.monotonic() - self.began:7.1f}  {what}"
        print(line, flush=True)
        print(f"{datetime.now(timezone.utc):%H:%M:%S} {line}", file=self._log, flush=True)

    def _tell_of_members(self) -> None:
        """What the members say of themselves when something is wrong."""
        for member in self.keeper.members:
            (self.out / f"{member.name}.status.json").write_text(json.dumps(member.status, indent=1))

    def _keep_tables(self, stage: Stage) -> None:
        """The database lies on a disk that goes with the run."""
        primary = stage.database.primary
        address = ("-h", primary.host, "-p", str(primary.port), "-U", "postgres")
        (self.out / "database.sql").write_text(primary.run_program("pg_dump", *address, DATABASE, timeout_seconds=300))

    def _keep_logs(self, work: Path) -> None:
        for log in work.glob("*/*/*.log"):
            shutil.copyfile(log, self.out / f"{log.parent.name}.log")

    def _result(self, command: str, started: datetime) -> Result:
        members = self.keeper.members
        counters = {
            name: self.keeper.total(name) for name in ("fenced", "retries", "reclaims", "flushes", "worker restarts")
        }
        counters["supervisor restarts"] = sum(member.starts - 1 for member in members)
        counters["messages"] = self.traffic.total
        return Result(
            command=command,
            started=f"{started:%Y-%m-%d %H:%M} UTC",
            seconds=time.monotonic() - self.began,
            machine=f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}",
            setting=f"{len(members)} supervisors in two groups (classic and KIP-848), 3 brokers, PostgreSQL with a "
            f"synchronous standby, {self.per_second:g} messages a second.",
            began=self.began,
            injected=self.record.all(),
            audit=self.audit,
            stalls=self.observer.stalls(),
            looks=list(self.observer.looks),
            counters=counters,
            ends=self.keeper.causes(),
            recovered_seconds=self.recovered_seconds,
            failures=[*self.record.failures, *self.traffic.failures],
            folder=str(self.out),
        )


def main() -> int:
    """Exit status 0 if no promise was broken."""
    options = _options()
    out = options.out or REPOSITORY / ".cache" / "chaos" / f"seed-{options.seed}-{datetime.now():%Y%m%d-%H%M%S}"
    out.mkdir(parents=True, exist_ok=True)
    # SIGTERM ends it as Ctrl-C does: everything that was started is ended first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    command = " ".join(["scripts/chaos", *sys.argv[1:]])
    campaign = Campaign(
        options.minutes * 60,
        options.seed,
        named(*options.only) if options.only else KINDS,
        out,
        per_second=options.per_second,
        sizes=[options.at_once] if options.at_once else BURST_SIZES,
        bursts=options.bursts,
    )
    try:
        result = campaign.run(command)
    except MissingRight as missing:
        print(f"FAILED: {missing}")
        return 1
    (out / "report.md").write_text(result.markdown())
    (out / "report.json").write_text(json.dumps(result.numbers(), indent=1))
    print(result.terminal())
    return 0 if result.passed else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/chaos",
        description="Hurts supervisors, brokers and databases in every way we know, and compares tables and topics.",
        epilog="example: scripts/chaos --minutes 30 --seed 1",
    )
    parser.add_argument("--minutes", type=float, default=5.0, metavar="M", help="of faults (default: 5)")
    parser.add_argument(
        "--seed", type=int, default=1, metavar="N", help="decides which fault strikes when (default: 1)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of logs and report (default: below .cache/chaos)")
    parser.add_argument("--per-second", type=float, default=600.0, metavar="R", help="messages (default: 600)")
    parser.add_argument(
        "--only", action="append", metavar="FAULT", help="this kind of fault, and others that are named"
    )
    parser.add_argument("--at-once", type=int, metavar="K", help="faults in each burst (default: 1 to 5)")
    parser.add_argument("--bursts", type=int, metavar="B", help="end after so many bursts, if the time is not over")
    parser.add_argument("--list", action="store_true", help="list the kinds of faults")
    options = parser.parse_args()
    if options.list:
        parser.exit(0, "".join(f"{kind.name:40} {(kind.__doc__ or '').strip().splitlines()[0]}\n" for kind in KINDS))
    return options


if __name__ == "__main__":
    sys.exit(main())
