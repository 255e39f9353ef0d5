"""The embedded Kafka serves clients of other processes: produce, groups, offsets, and its limit is told beforehand."""

from __future__ import annotations

import json
import subprocess
import sys
import time

from confluent_kafka import Producer

from speedlayer.supervisor.demo.embedded_kafka import PARTITIONS, EmbeddedKafka, embedded_kafka

# Another process: reads what is there with a consumer group, commits, and prints what it saw.
READER = """
import json, sys, time
from confluent_kafka import Consumer, TopicPartition
servers, topic, expected, properties = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
consumer = Consumer({"bootstrap.servers": servers, "group.id": "readers", "auto.offset.reset": "earliest",
                     "enable.auto.commit": False, "partition.assignment.strategy": "cooperative-sticky", **properties})
consumer.subscribe([topic])
values, deadline = [], time.monotonic() + 30
while len(values) < expected and time.monotonic() < deadline:
    for message in consumer.consume(100, 0.1):
        assert message.error() is None, message.error()
        values.append(message.value().decode())
partitions = [TopicPartition(topic, number) for number in range(4)]
ends = [consumer.get_watermark_offsets(partition, timeout=5)[1] for partition in partitions]
consumer.commit(offsets=[TopicPartition(topic, n, end) for n, end in enumerate(ends)], asynchronous=False)
committed = [partition.offset for partition in consumer.committed(partitions, timeout=5)]
consumer.close()
print(json.dumps({"values": values, "ends": ends, "committed": committed}))
"""


def produce(kafka: EmbeddedKafka, topic: str, count: int, size: int = 0) -> None:
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "linger.ms": 5})
    for number in range(count):
        producer.produce(topic, value=str(number).encode().ljust(size, b" "), partition=number % PARTITIONS)
    assert producer.flush(20) == 0


def read_in_another_process(kafka: EmbeddedKafka, topic: str, count: int) -> dict[str, list[str]]:
    arguments = [kafka.bootstrap_servers, topic, str(count), json.dumps(kafka.consumer_properties)]
    done = subprocess.run([sys.executable, "-c", READER, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    seen: dict[str, list[str]] = json.loads(done.stdout)
    return seen


def test_another_process_reads_and_commits_all_that_was_produced() -> None:
    with embedded_kafka("orders") as kafka:
        produce(kafka, "orders", 400)
        seen = read_in_another_process(kafka, "orders", 400)
    assert sorted(map(int, seen["values"])) == list(range(400))
    assert seen["ends"] == seen["committed"] == [100] * PARTITIONS


def test_it_listens_on_loopback_alone() -> None:
    with embedded_kafka("orders") as kafka:
        hosts = {server.rpartition(":")[0] for server in kafka.bootstrap_servers.split(",")}
    assert hosts == {"127.0.0.1"}


def test_a_backlog_at_the_limit_that_the_demo_enforces_is_kept_whole() -> None:
    size = 50_000
    count = 4 * 1024 * 1024 // (size + 100) * PARTITIONS
    with embedded_kafka("orders") as kafka:
        produce(kafka, "orders", count, size)
        seen = read_in_another_process(kafka, "orders", count)
    assert sorted(map(int, seen["values"])) == list(range(count))


def test_it_is_gone_when_the_block_ends() -> None:
    with embedded_kafka("orders") as kafka:
        assert Producer({"bootstrap.servers": kafka.bootstrap_servers}).list_topics(timeout=10).topics
    deadline = time.monotonic() + 10
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "log_level": 0})
    problems: list[object] = []
    producer.produce("orders", b"x", on_delivery=lambda error, _: problems.append(error))
    while producer.flush(0.2) and time.monotonic() < deadline and not problems:
        producer.purge()
    assert problems[0] is not None
