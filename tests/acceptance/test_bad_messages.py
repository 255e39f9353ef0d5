"""A message that can not become a row becomes a dead letter with its reason, and its neighbours become rows."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path

from fixtures.compare import assert_table_equals
from fixtures.daemon import Daemon, pipeline_toml
from fixtures.kafka import Broker, Message
from fixtures.postgres import execute, query

# name -> (message, what the reason must say, SQLSTATE or None where the database was never asked)
BAD = {
    "undecodable JSON": (b'{"number": 1, ', "JSON", None),
    "an array": (b'[{"number": 1}]', "array", None),
    "a number": (b"17", "number", None),
    "an empty value": (b"", "empty", None),
    "a null value": (None, "null", None),
    "a NUL in a string": (b'{"number": 5, "text": "a\\u0000b"}', "NUL", None),
    "a number too large for its column": (b'{"number": 3000000000, "text": "x"}', "out of range", "22003"),
    "a text in a number's column": (b'{"number": "seven", "text": "x"}', "seven", "22P02"),
    "a violated check": (b'{"number": -1, "text": "x"}', "number_is_positive", "23514"),
    "a missing field without default": (b'{"number": 8}', "null value", "23502"),
    "an unknown field": (b'{"number": 9, "text": "x", "unheard": 1}', "unheard", None),
    "invalid UTF-8": (b'{"number": 10, "text": "\xff\xfe"}', "UTF-8", None),
}


def test_each_kind_of_bad_message_is_a_dead_letter_and_its_neighbours_are_rows(
    kafka: Broker, postgres_dsn: str, start_daemon: Callable[..., Daemon]
) -> None:
    execute(
        postgres_dsn,
        "CREATE TABLE events (number int CONSTRAINT number_is_positive CHECK (number >= 0), text text NOT NULL)",
    )
    topic = kafka.create_topic(partitions=1)
    good = [{"number": number, "text": f"good {number}"} for number in range(1000, 1000 + 3 * len(BAD))]
    log: list[Message] = []
    for index, (name, (value, _, _)) in enumerate(BAD.items()):
        log += [Message(json.dumps(row).encode()) for row in good[3 * index : 3 * index + 2]]
        log.append(Message(value, key=name.encode(), headers=[("kind", b"bad"), ("raw", b"\x00\xff")]))
        log.append(Message(json.dumps(good[3 * index + 2]).encode()))
    kafka.produce(topic, log)

    source = pipeline_toml(
        bootstrap_servers=kafka.bootstrap_servers,
        group_id=topic,
        dsn=postgres_dsn,
        topic=topic,
        table="events",
        pipeline={"dead_letter_ratio": 1.0},
    )
    daemon = start_daemon(source)
    daemon.wait_until_caught_up(kafka.end_offsets(topic), topic)

    assert_table_equals(postgres_dsn, "events", good, ("number", "text"))
    letters = {
        bytes(key).decode(): (value if value is None else bytes(value), reason, sqlstate, offset)
        for key, value, reason, sqlstate, offset in query(
            postgres_dsn, 'SELECT key, value, reason, sqlstate, "offset" FROM speedlayer.dead_letters'
        )
    }
    assert letters.keys() == BAD.keys()
    offsets = {record.key: record.offset for record in kafka.read(topic) if record.key is not None}
    for name, (value, reason, sqlstate) in BAD.items():
        found_value, found_reason, found_sqlstate, offset = letters[name]
        assert found_value == value, name
        assert reason in found_reason, f"{name}: {found_reason}"
        assert offset == offsets[name.encode()], name
        if sqlstate is not None:
            assert found_sqlstate == sqlstate, f"{name}: {found_reason}"
    status = daemon.pipeline()
    assert (status["rows"], status["dead_lettered"]) == (len(good), len(BAD))
    audit = query(postgres_dsn, "SELECT sum(rows), sum(filtered), sum(dead_lettered) FROM speedlayer.checkpoints")
    assert tuple(map(int, audit[0])) == (len(good), 0, len(BAD))


def test_a_stream_of_bad_messages_stops_the_pipeline_instead_of_draining_the_topic(
    kafka: Broker, postgres_dsn: str, start_daemon: Callable[..., Daemon]
) -> None:
    execute(postgres_dsn, "CREATE TABLE events (number int, text text)")
    topic = kafka.create_topic(partitions=1)
    kafka.produce(topic, [b'{"number": 1, "text": "good"}'] * 50 + [b"not JSON"] * 3000)
    source = pipeline_toml(
        bootstrap_servers=kafka.bootstrap_servers,
        group_id=topic,
        dsn=postgres_dsn,
        topic=topic,
        table="events",
        workers={"count": 1, "credit_flights": 1},
        pipeline={"batch_rows": 100, "dead_letter_minimum": 100, "dead_letter_ratio": 0.5},
    )
    daemon = start_daemon(source)
    stopped = daemon.wait_until(
        lambda s: s["pipelines"][0]["state"] == "dead-letter limit", "the pipeline stops", timeout_seconds=30
    )["pipelines"][0]
    assert "became dead letters" in stopped["reason"] and "resume" in stopped["reason"]
    assert "is stopped" in daemon.log_text()
    daemon.wait_until(lambda s: s["pipelines"][0]["flights"] == 0, "what was in flight has landed")
    letters = query(postgres_dsn, "SELECT count(*) FROM speedlayer.dead_letters")[0][0]
    assert 100 <= letters < 1000, "it stopped long before the topic was drained"
    before = daemon.lanes()[0]["next_offset"]

    # The operator looks, decides to go on, and the window begins anew: it stops again after as many.
    daemon.call("resume")
    daemon.wait_until(
        lambda s: (
            s["pipelines"][0]["lanes"][0]["next_offset"] > before and s["pipelines"][0]["state"] == "dead-letter limit"
        ),
        "it goes on and stops again",
    )


def test_a_header_whose_name_is_not_utf8_holds_nothing_up(
    kafka: Broker, postgres_dsn: str, start_daemon: Callable[..., Daemon]
) -> None:
    execute(postgres_dsn, "CREATE TABLE events (number int)")
    topic = kafka.create_topic(partitions=1)
    produce_with_header(kafka, topic, b"caf\xe9", b'{"number": 1}')
    produce_with_header(kafka, topic, b"caf\xe9", b"not JSON")
    kafka.produce(topic, [Message(b'{"number": 2}', headers=[("name", b"value")])])
    source = pipeline_toml(
        bootstrap_servers=kafka.bootstrap_servers, group_id=topic, dsn=postgres_dsn, topic=topic, table="events"
    )
    daemon = start_daemon(source)
    daemon.wait_until_caught_up({0: 3}, topic)
    assert query(postgres_dsn, "SELECT number FROM events ORDER BY number") == [(1,), (2,)]
    ((value, headers),) = query(postgres_dsn, "SELECT value, headers FROM speedlayer.dead_letters")
    assert bytes(value) == b"not JSON"
    assert "not UTF-8" in headers[0][0], "it says that there were headers"


def produce_with_header(broker: Broker, topic: str, name: bytes, value: bytes) -> None:
    """Produce as a client in another language may: confluent_kafka takes header names in UTF-8 alone."""
    (library,) = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "librdkafka" in line}
    rdkafka = ctypes.CDLL(library)
    rdkafka.rd_kafka_conf_new.restype = rdkafka.rd_kafka_new.restype = ctypes.c_void_p
    error = ctypes.create_string_buffer(512)
    conf = ctypes.c_void_p(rdkafka.rd_kafka_conf_new())
    servers = broker.bootstrap_servers.encode()
    assert rdkafka.rd_kafka_conf_set(conf, b"bootstrap.servers", servers, error, len(error)) == 0, error.value
    producer = ctypes.c_void_p(rdkafka.rd_kafka_new(0, conf, error, len(error)))
    assert producer.value, error.value
    # Pairs of a tag (rd_kafka_vtype_t) and its arguments: topic, flags (copy the value), value, header, end.
    arguments = [1, ctypes.c_char_p(topic.encode()), 7, 2, 4, ctypes.c_char_p(value), ctypes.c_size_t(len(value))]
    arguments += [9, ctypes.c_char_p(name), ctypes.c_char_p(b"x"), ctypes.c_ssize_t(1), 0]
    assert rdkafka.rd_kafka_producev(producer, *arguments) == 0
    assert rdkafka.rd_kafka_flush(producer, 30_000) == 0
    rdkafka.rd_kafka_destroy(producer)
