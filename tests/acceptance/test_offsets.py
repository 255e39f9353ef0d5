"""Offsets that no longer mean what they meant: the partition stops and says so, or goes on as configured."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from fixtures.compare import assert_table_equals, values_of
from fixtures.daemon import EXIT_OK, Daemon, pipeline_toml
from fixtures.kafka import Broker, Message
from fixtures.postgres import execute, query, scalar
from fixtures.waiting import wait_until

COLUMNS = ("number", "text")


def event(number: int) -> bytes:
    return json.dumps({"number": number, "text": f"event {number}"}).encode()


def events(first: int, last: int) -> list[bytes]:
    return [event(number) for number in range(first, last)]


@pytest.fixture
def start(kafka: Broker, postgres_dsn: str, start_daemon: Callable[..., Daemon]) -> Callable[..., Daemon]:
    """Starts a daemon that writes a topic into the table `events`."""
    execute(postgres_dsn, "CREATE TABLE events (number int, text text)")

    def start(topic: str, *, kafka_properties: dict[str, Any] | None = None, **pipeline: Any) -> Daemon:
        return start_daemon(
            pipeline_toml(
                bootstrap_servers=kafka.bootstrap_servers,
                group_id=topic,
                dsn=postgres_dsn,
                topic=topic,
                table="events",
                kafka=kafka_properties,
                pipeline=pipeline,
            ),
            wait=False,
        )

    return start


def stopped_lane(daemon: Daemon) -> dict[str, Any]:
    daemon.wait_until_listening()
    status = daemon.wait_until(
        lambda s: any(lane["state"] == "stopped" for lane in s["pipelines"][0]["lanes"]), "a partition stops"
    )
    return next(lane for lane in status["pipelines"][0]["lanes"] if lane["state"] == "stopped")


def wait_for_rows(dsn: str, count: int, daemon: Daemon) -> None:
    wait_until(
        lambda: scalar(dsn, "SELECT count(*) FROM events") == count, f"{count} rows are there", diagnose=daemon.tail
    )


def test_a_topic_deleted_and_made_again_stops_the_partition_and_a_seek_goes_on(
    kafka: Broker, postgres_dsn: str, start: Callable[..., Daemon]
) -> None:
    topic = kafka.create_topic(partitions=1)
    kafka.produce(topic, events(0, 100))
    daemon = start(topic)
    wait_for_rows(postgres_dsn, 100, daemon)
    daemon.stop()

    kafka.delete_topic(topic)
    kafka.create_topic(topic, partitions=1)
    # As many again and more: the old offset exists in the new topic, and only the topic's id tells them apart.
    kafka.produce(topic, events(1000, 1150))
    daemon.start(wait=False)
    lane = stopped_lane(daemon)
    assert "deleted and made again" in lane["reason"] and "offsets seek" in lane["reason"]
    assert "deleted and made again" in daemon.log_text()
    assert scalar(postgres_dsn, "SELECT count(*) FROM events") == 100, "nothing of the new topic was written"

    assert daemon.call("seek", topic=topic, to="earliest")["ok"]
    wait_for_rows(postgres_dsn, 250, daemon)
    assert_table_equals(postgres_dsn, "events", events(0, 100) + events(1000, 1150), COLUMNS)


def test_a_topic_made_again_while_the_daemon_runs_stops_the_partition(
    kafka: Broker, postgres_dsn: str, start: Callable[..., Daemon]
) -> None:
    topic = kafka.create_topic(partitions=1)
    kafka.produce(topic, events(0, 100))
    daemon = start(topic)
    wait_for_rows(postgres_dsn, 100, daemon)
    kafka.delete_topic(topic)
    kafka.create_topic(topic, partitions=1)
    lane = stopped_lane(daemon)
    assert "made again" in lane["reason"] or "beyond the end of the log" in lane["reason"], lane["reason"]
    kafka.produce(topic, events(1000, 1200))
    assert daemon.call("seek", topic=topic, to="earliest")["ok"]
    wait_for_rows(postgres_dsn, 300, daemon)


def test_offsets_that_retention_ate_stop_the_partition_with_the_exact_gap(
    kafka: Broker, postgres_dsn: str, start: Callable[..., Daemon]
) -> None:
    topic = kafka.create_topic(partitions=1)
    kafka.produce(topic, events(0, 100))
    daemon = start(topic)
    wait_for_rows(postgres_dsn, 100, daemon)
    assert daemon.stop() == EXIT_OK
    kafka.produce(topic, events(100, 300))
    kafka.delete_records(topic, 0, 250)
    daemon.start(wait=False)
    lane = stopped_lane(daemon)
    assert "offsets 100 to 249 (150 of them)" in lane["reason"]
    assert scalar(postgres_dsn, "SELECT count(*) FROM events") == 100
    assert daemon.call("seek", topic=topic, partition=0, to="earliest")["ok"]
    wait_for_rows(postgres_dsn, 150, daemon)
    assert_table_equals(postgres_dsn, "events", events(0, 100) + events(250, 300), COLUMNS)


def test_with_skip_the_gap_is_recorded_and_reading_goes_on(
    kafka: Broker, postgres_dsn: str, start: Callable[..., Daemon]
) -> None:
    topic = kafka.create_topic(partitions=1)
    kafka.produce(topic, events(0, 100))
    daemon = start(topic, on_out_of_range="skip")
    wait_for_rows(postgres_dsn, 100, daemon)
    assert daemon.stop() == EXIT_OK
    kafka.produce(topic, events(100, 300))
    kafka.delete_records(topic, 0, 250)
    daemon.start()
    wait_for_rows(postgres_dsn, 150, daemon)
    assert_table_equals(postgres_dsn, "events", events(0, 100) + events(250, 300), COLUMNS)
    gaps = query(postgres_dsn, "SELECT topic, partition, from_offset, to_offset, reason FROM speedlayer.gaps")
    assert [gap[:4] for gap in gaps] == [(topic, 0, 100, 250)]
    assert "retention" in gaps[0][4]


def test_offsets_eaten_while_the_partition_is_held_are_noticed_when_it_goes_on(
    kafka: Broker, postgres_dsn: str, start: Callable[..., Daemon]
) -> None:
    topic = kafka.create_topic(partitions=1)
    kafka.produce(topic, events(0, 100))
    daemon = start(topic, on_out_of_range="skip")
    wait_for_rows(postgres_dsn, 100, daemon)
    assert daemon.call("pause")["ok"]
    kafka.produce(topic, events(100, 300))
    kafka.delete_records(topic, 0, 250)
    assert daemon.call("resume")["ok"]
    wait_for_rows(postgres_dsn, 150, daemon)
    assert query(postgres_dsn, "SELECT from_offset, to_offset FROM speedlayer.gaps") == [(100, 250)]


def test_a_checkpoint_that_was_lost_stops_the_partition_instead_of_skipping_or_repeating(
    kafka: Broker, postgres_dsn: str, start: Callable[..., Daemon]
) -> None:
    topic = kafka.create_topic(partitions=1)
    kafka.produce(topic, events(0, 100))
    daemon = start(topic)
    wait_for_rows(postgres_dsn, 100, daemon)
    daemon.stop()  # commits the group's offset, with our mark
    execute(postgres_dsn, "DROP SCHEMA speedlayer CASCADE")
    kafka.produce(topic, events(100, 200))
    daemon.start(wait=False)
    lane = stopped_lane(daemon)
    assert "there is no checkpoint" in lane["reason"] and "100" in lane["reason"]
    assert scalar(postgres_dsn, "SELECT count(*) FROM events") == 100
    assert daemon.call("seek", topic=topic, to=100)["ok"]
    wait_for_rows(postgres_dsn, 200, daemon)
    assert_table_equals(postgres_dsn, "events", values_of(kafka.read(topic)), COLUMNS)


def test_a_group_that_another_consumer_left_goes_on_where_that_one_stopped(
    kafka: Broker, postgres_dsn: str, start: Callable[..., Daemon]
) -> None:
    topic = kafka.create_topic(partitions=1)
    kafka.produce(topic, events(0, 100))
    other = Consumer({"bootstrap.servers": kafka.bootstrap_servers, "group.id": topic})
    other.commit(offsets=[TopicPartition(topic, 0, 60)], asynchronous=False)
    other.close()
    daemon = start(topic)
    wait_for_rows(postgres_dsn, 40, daemon)
    assert_table_equals(postgres_dsn, "events", events(60, 100), COLUMNS)


def test_latest_is_fixed_at_the_first_claim_even_if_nothing_is_flushed_before_a_crash(
    kafka: Broker, postgres_dsn: str, start: Callable[..., Daemon]
) -> None:
    topic = kafka.create_topic(partitions=1)
    kafka.produce(topic, events(0, 100))
    daemon = start(topic, kafka_properties={"auto.offset.reset": "latest"})
    daemon.wait_until_reading()
    daemon.kill()
    kafka.produce(topic, events(100, 150))
    daemon.start()
    wait_for_rows(postgres_dsn, 50, daemon)
    assert_table_equals(postgres_dsn, "events", events(100, 150), COLUMNS)


def test_control_records_and_aborted_transactions_are_passed_and_the_lag_reaches_0(
    kafka: Broker, postgres_dsn: str, start: Callable[..., Daemon]
) -> None:
    topic = kafka.create_topic(partitions=1)
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "transactional.id": topic})
    producer.init_transactions(30)
    for first, keep in ((0, True), (10, False), (20, True), (30, False)):
        producer.begin_transaction()
        for number in range(first, first + 10):
            producer.produce(topic, event(number), partition=0)
        if keep:
            producer.commit_transaction(30)
        else:
            producer.flush(30)
            producer.abort_transaction(30)
    daemon = start(topic)
    daemon.wait_until_listening()
    daemon.wait_until_caught_up(kafka.end_offsets(topic), topic)
    daemon.wait_until(lambda s: s["pipelines"][0]["lag"] == 0, "the lag is 0")
    assert_table_equals(postgres_dsn, "events", events(0, 10) + events(20, 30), COLUMNS)
    # The checkpoint itself has passed the aborted tail: a restart does not begin inside it.
    assert scalar(postgres_dsn, "SELECT next_offset FROM speedlayer.checkpoints") == kafka.end_offsets(topic)[0]


def test_a_seek_to_a_timestamp_and_back_writes_exactly_the_range_again(
    kafka: Broker, postgres_dsn: str, start: Callable[..., Daemon]
) -> None:
    topic = kafka.create_topic(partitions=1, retention_ms=-1)
    begin = 1_700_000_000_000
    kafka.produce(topic, [Message(event(number), timestamp_ms=begin + number * 1000) for number in range(100)])
    daemon = start(topic)
    wait_for_rows(postgres_dsn, 100, daemon)
    answer = daemon.call("seek", topic=topic, to={"timestamp_ms": begin + 90_000})
    assert answer["offsets"] == [{"topic": topic, "partition": 0, "offset": 90}]
    wait_for_rows(postgres_dsn, 110, daemon)
    assert_table_equals(postgres_dsn, "events", events(0, 100) + events(90, 100), COLUMNS)
    refused = daemon.call("seek", topic="elsewhere", to="earliest")
    assert not refused["ok"] and "no such partition" in refused["error"]


def test_with_start_error_a_partition_without_checkpoint_waits_for_a_seek(
    kafka: Broker, postgres_dsn: str, start: Callable[..., Daemon]
) -> None:
    topic = kafka.create_topic(partitions=1)
    kafka.produce(topic, events(0, 100))
    daemon = start(topic, start="error")
    lane = stopped_lane(daemon)
    assert "there is no checkpoint" in lane["reason"] and "offsets seek" in lane["reason"]
    assert daemon.call("seek", topic=topic, to=40)["ok"]
    wait_for_rows(postgres_dsn, 60, daemon)
    assert_table_equals(postgres_dsn, "events", events(40, 100), COLUMNS)
