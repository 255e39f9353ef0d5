"""A message that can not become a row becomes a dead letter with its reason, and its neighbours become rows."""

from __future__ import annotations

import json
from collections.abc import Callable

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
