"""A table that is locked while a great many messages wait: memory keeps its budget, and the daemon its membership."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fixtures.daemon import Daemon, pipeline_toml
from fixtures.kafka import Broker, Message
from fixtures.memory import MemoryWatch
from fixtures.postgres import execute, locked, query, scalar
from fixtures.waiting import holds_for

BYTES_PER_MB = 1024 * 1024
BUDGET_MB = 32
MB_A_PROCESS = 70
WORKERS = 2
LIMIT_MB = BUDGET_MB + MB_A_PROCESS * (1 + WORKERS)  # Python's own helper process is measured too, and gets nothing

PARTITIONS = 4
MAX_POLL_INTERVAL_MS = 10_000

# The texts of messages by their number n, and the same in SQL.
TEXTS: dict[str, tuple[Callable[[int], str], str]] = {
    "unlike": (lambda n: hashlib.md5(b"%d" % n).hexdigest() * 5, "repeat(md5(n::text), 5)"),
    "alike": (
        lambda n: hashlib.md5(b"%d" % n).hexdigest() + hashlib.md5(b"%d" % (n % 100)).hexdigest() * 9,
        "md5(n::text) || repeat(md5((n % 100)::text), 9)",
    ),
}


def test_a_million_messages_wait_for_a_minute_within_the_budget_and_are_written_once(
    kafka: Broker, postgres_dsn: str, start_daemon: Callable[..., Daemon]
) -> None:
    backlog = Backlog(kafka, postgres_dsn, start_daemon, count=1_000_000, texts="unlike")
    backlog.wait_out_a_lock(seconds=60)
    backlog.assert_written_once()
    backlog.assert_memory_was_kept(seconds=60)


def test_messages_that_grow_when_they_are_decompressed_wait_within_the_budget_too(
    kafka: Broker, postgres_dsn: str, start_daemon: Callable[..., Daemon]
) -> None:
    backlog = Backlog(
        kafka, postgres_dsn, start_daemon, count=300_000, texts="alike", compression__type="zstd", linger__ms=100
    )
    backlog.wait_out_a_lock(seconds=8, protocol="consumer")
    stored = sum(file.stat().st_size for file in kafka.folder.glob(f"data/{backlog.topic}-*/*.log"))
    assert stored < sum(len(message.value or b"") for message in backlog.messages()) / 10, f"{stored} bytes are stored"
    backlog.assert_written_once()
    backlog.assert_memory_was_kept(seconds=8)


@dataclass(frozen=True)
class Membership:
    """What changes when a member is thrown out of its group, or a partition is taken away and claimed again."""

    members: tuple[str, ...]
    epochs: tuple[tuple[int, int], ...]


class Backlog:
    """A daemon with a small budget, and a table that is locked while messages pile up."""

    def __init__(
        self,
        kafka: Broker,
        dsn: str,
        start_daemon: Callable[..., Daemon],
        *,
        count: int,
        texts: str,
        **producer: object,
    ) -> None:
        self._kafka, self._dsn, self._start_daemon = kafka, dsn, start_daemon
        self._count, self._texts, self._producer = count, texts, producer
        self._watch: MemoryWatch | None = None
        self.topic = kafka.create_topic(partitions=PARTITIONS)
        execute(dsn, "CREATE TABLE events (number int, text text)")

    def messages(self) -> Iterator[Message]:
        """Messages of 190 bytes ("unlike") or 350 ("alike"), in all partitions alike."""
        text_of, _ = TEXTS[self._texts]
        for number in range(self._count):
            value = f'{{"number": {number}, "text": "{text_of(number)}"}}'.encode()
            yield Message(value, partition=number % PARTITIONS)

    def wait_out_a_lock(self, *, seconds: float, protocol: str = "classic") -> None:
        """Lock the table, produce, wait so long with everything produced, release, until everything is written."""
        daemon = self._start_daemon(
            pipeline_toml(
                bootstrap_servers=self._kafka.bootstrap_servers,
                group_id=self.topic,
                dsn=self._dsn,
                topic=self.topic,
                table="events",
                kafka={"group.protocol": protocol, "max.poll.interval.ms": MAX_POLL_INTERVAL_MS},
                workers={"count": WORKERS},
                memory={"budget_mb": BUDGET_MB},
                # One strike: a second may not stand beside it, since the flushes that follow take one off.
                brake={"slow_flush_threshold": 2.0, "max_slow_flushes": 1, "pause_seconds": 1.0},
            )
        )
        daemon.wait_for_workers(WORKERS)
        before = self._membership()
        assert len(before.members) == 1
        assert before.epochs == tuple((partition, 1) for partition in range(PARTITIONS)), "each was claimed once"
        with MemoryWatch(daemon.pid) as self._watch, contextlib.ExitStack() as lock:
            lock.enter_context(locked(self._dsn, "events"))
            self._kafka.produce(self.topic, self.messages(), **self._producer)
            daemon.wait_until(self._stands_still, "everything waits for the lock")
            holds_for(
                lambda: self._stands_still(daemon.status()),
                "everything waits for the lock",
                seconds=seconds,
                interval_seconds=0.5,
            )
            lock.close()
            strike = daemon.process.wait_for_log("is overloaded (no. 1)")
            duration = re.search(r"the last took ([\d.]+) s", strike)
            assert duration is not None and float(duration.group(1)) > seconds, "the flush that waited is the strike"
            daemon.wait_until_caught_up(self._kafka.end_offsets(self.topic), self.topic)
        assert self._membership() == before, "no member was thrown out, and no partition claimed again"
        log = daemon.log_text()
        assert log.count(f"assigned {PARTITIONS} partitions") == 1 and "revoked" not in log and "lost" not in log

    def _stands_still(self, status: dict[str, Any]) -> bool:
        """Whether each worker's flush waits for the lock, all that may be read is read, and nothing counts yet."""
        pipeline = status["pipelines"][0]
        waiting = scalar(
            self._dsn,
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            " AND application_name LIKE 'speedlayer/%%'",
        )
        counted = pipeline["rows"] + pipeline["slow_count"] + pipeline["overload_count"]
        return waiting == WORKERS and pipeline["state"] == "memory" and counted == 0

    def _membership(self) -> Membership:
        group = self._kafka.admin.describe_consumer_groups([self.topic])[self.topic].result(10)
        epochs = query(self._dsn, "SELECT partition, epoch FROM speedlayer.checkpoints ORDER BY partition")
        return Membership(tuple(member.member_id for member in group.members), tuple(epochs))

    def assert_written_once(self) -> None:
        """Compare the table with the log both ways, where a million rows are a small matter: in the database."""
        assert sum(self._kafka.end_offsets(self.topic).values()) == self._count
        log = f"SELECT n::int, {TEXTS[self._texts][1]} FROM generate_series(0, {self._count - 1}) AS n"
        table = "SELECT number, text FROM events"
        for left, right in ((log, table), (table, log)):
            statement = f"SELECT count(*), min(n) FROM ({left} EXCEPT ALL {right}) AS difference (n)"
            assert query(self._dsn, statement.replace("%", "%%"), ()) == [(0, None)], f"in: {left}; not in: {right}"

    def assert_memory_was_kept(self, *, seconds: float) -> None:
        """All processes together took no more than the budget and a fixed amount each, at every look."""
        assert self._watch is not None
        assert len(self._watch.samples) > seconds * 5, "there was a look every 100 ms, or every 200 on a busy machine"
        peak = self._watch.peak
        print(f"at most {peak.pss_bytes / BYTES_PER_MB:.0f} MB in {peak.processes} processes, of {LIMIT_MB} MB")
        assert peak.processes > WORKERS
        assert peak.pss_bytes <= LIMIT_MB * BYTES_PER_MB
