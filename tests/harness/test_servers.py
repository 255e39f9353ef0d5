"""The servers of the tests do what the tests of the promises rely on."""

from __future__ import annotations

from collections.abc import Callable

import psycopg2
import pytest

from fixtures.compare import assert_table_equals, compare, last_of_each_key
from fixtures.kafka import Broker, LogRecord, Message, PacedProducer
from fixtures.postgres import PostgresServer, Shutdown, connect, execute, locked, query, scalar
from fixtures.waiting import wait_until

ROWS = [{"id": 1, "name": "a", "price": "1.10"}, {"id": 2, "name": None, "price": "2.20"}]


def test_what_is_produced_is_read_back_in_order(kafka: Broker, topic: str) -> None:
    sent = [Message(b'{"n": %d}' % n, key=b"k%d" % (n % 7), headers=[("h", b"v")]) for n in range(2_000)]
    assert kafka.produce(topic, sent) == 2_000
    log = kafka.read(topic)
    assert sorted(record.value or b"" for record in log) == sorted(message.value or b"" for message in sent)
    assert sum(kafka.end_offsets(topic).values()) == 2_000
    for key in {message.key for message in sent}:
        assert [record.value for record in log if record.key == key] == [
            message.value for message in sent if message.key == key
        ]


def test_reading_passes_a_partition_whose_records_were_deleted(kafka: Broker) -> None:
    topic = kafka.create_topic(partitions=1)
    kafka.produce(topic, [b"%d" % n for n in range(10)])
    kafka.delete_records(topic, 0, 10)
    assert kafka.start_offsets(topic) == {0: 10}
    assert kafka.read(topic) == []


def test_a_paced_producer_goes_on_until_it_is_stopped(kafka: Broker, topic: str) -> None:
    with PacedProducer(kafka, topic, lambda n: b"%d" % n, per_second=500) as producer:
        wait_until(lambda: producer.sent >= 300, "300 messages are sent")
    assert len(kafka.read(topic)) == producer.sent


def test_a_broker_keeps_its_port_and_its_messages_when_killed(start_broker: Callable[..., Broker]) -> None:
    broker = start_broker()
    topic = broker.create_topic(partitions=1)
    port = broker.port
    broker.produce(topic, [b"before"])
    broker.kill()
    broker.start()
    broker.produce(topic, [b"after"])
    assert broker.port == port
    assert [record.value for record in broker.read(topic)] == [b"before", b"after"]


def test_the_network_before_a_broker_can_be_cut(start_broker: Callable[..., Broker]) -> None:
    broker = start_broker(proxied=True)
    topic = broker.create_topic(partitions=1)
    assert broker.proxy is not None
    servers = {"bootstrap__servers": broker.proxied_bootstrap_servers}
    broker.produce(topic, [b"through the proxy"], **servers)
    assert broker.proxy.accepted > 0
    broker.proxy.refuse()
    broker.produce(topic, [b"directly"])
    with pytest.raises(AssertionError, match="not delivered"):
        broker.produce(topic, [b"lost"], **servers, message__timeout__ms=1_000)
    broker.proxy.heal()
    broker.produce(topic, [b"through again"], **servers)
    assert [record.value for record in broker.read(topic)] == [b"through the proxy", b"directly", b"through again"]


@pytest.mark.parametrize("how", Shutdown)
def test_a_server_keeps_its_rows_through_every_way_to_stop(
    postgres: PostgresServer, postgres_dsn: str, how: Shutdown
) -> None:
    execute(postgres_dsn, "CREATE TABLE kept (n int); INSERT INTO kept VALUES (1)")
    postgres.restart(how)
    assert query(postgres_dsn, "SELECT n FROM kept") == [(1,)]


def test_a_server_keeps_its_rows_when_killed(each_postgres: PostgresServer, each_postgres_dsn: str) -> None:
    execute(each_postgres_dsn, "CREATE TABLE kept (n int); INSERT INTO kept VALUES (1)")
    each_postgres.kill()
    each_postgres.start()
    assert query(each_postgres_dsn, "SELECT n FROM kept") == [(1,)]
    assert scalar(each_postgres_dsn, "SHOW server_version_num")[:2] == str(each_postgres.major_version)


def test_a_server_asks_for_its_password(postgres: PostgresServer) -> None:
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        connect(postgres.dsn(password="wrong"))


def test_backends_can_be_terminated_by_what_they_do(postgres: PostgresServer, postgres_dsn: str) -> None:
    victim = connect(postgres_dsn + "?application_name=victim")
    assert [one["application_name"] for one in postgres.backends("application_name = 'speedlayer tests'")]
    assert postgres.terminate_backends("application_name = 'speedlayer tests'") == 1
    with pytest.raises(psycopg2.OperationalError), victim.cursor() as cursor:
        cursor.execute("SELECT 1")


def test_settings_of_a_server_of_ones_own(start_postgres: Callable[..., PostgresServer]) -> None:
    server = start_postgres(max_connections=7)
    assert server.query("SHOW max_connections") == [("7",)]
    server.restart(max_connections=9)
    assert server.query("SHOW max_connections") == [("9",)]


def test_a_locked_table_is_locked(postgres_dsn: str) -> None:
    execute(postgres_dsn, "CREATE TABLE held (n int)")
    with locked(postgres_dsn, "held"), pytest.raises(psycopg2.errors.LockNotAvailable):
        execute(postgres_dsn, "SET lock_timeout = 100; INSERT INTO held VALUES (1)")
    execute(postgres_dsn, "INSERT INTO held VALUES (1)")


class TestComparing:
    """A comparison that overlooked a difference would make every promise look kept."""

    COLUMNS = ("id", "name", "price")

    @pytest.fixture
    def dsn(self, each_postgres_dsn: str) -> str:
        execute(each_postgres_dsn, 'CREATE TABLE "Mixed Case" (id bigint, name text, price numeric, extra json)')
        execute(each_postgres_dsn, """INSERT INTO "Mixed Case" VALUES (1, 'a', 1.10, '{}'), (2, NULL, 2.20, '{}')""")
        return each_postgres_dsn

    def test_equal(self, dsn: str) -> None:
        assert_table_equals(dsn, '"Mixed Case"', ROWS, self.COLUMNS)
        assert_table_equals(dsn, '"Mixed Case"', [{**row, "extra": {}} for row in ROWS], (*self.COLUMNS, "extra"))

    def test_a_missing_row(self, dsn: str) -> None:
        difference = compare(dsn, '"Mixed Case"', [*ROWS, {"id": 3}], self.COLUMNS)
        assert (difference.missing, difference.surplus) == (1, 0)
        assert difference.missing_rows == [(3, None, None)]

    def test_a_row_written_twice(self, dsn: str) -> None:
        execute(dsn, 'INSERT INTO "Mixed Case" SELECT * FROM "Mixed Case" WHERE id = 2')
        with pytest.raises(AssertionError, match=r"missing 0: .*surplus 1: .*2\.20"):
            assert_table_equals(dsn, '"Mixed Case"', ROWS, self.COLUMNS)

    def test_a_changed_value(self, dsn: str) -> None:
        execute(dsn, 'UPDATE "Mixed Case" SET price = price + 0.01 WHERE id = 1')
        difference = compare(dsn, '"Mixed Case"', ROWS, self.COLUMNS)
        assert (difference.missing, difference.surplus) == (1, 1)

    def test_a_text_that_copy_would_read_otherwise(self, dsn: str) -> None:
        execute(dsn, 'UPDATE "Mixed Case" SET name = %s WHERE id = 1', ("\\N \\. \t\n\x01é",))
        assert_table_equals(dsn, '"Mixed Case"', [{**ROWS[0], "name": "\\N \\. \t\n\x01é"}, ROWS[1]], self.COLUMNS)


def test_the_last_record_of_each_key_is_by_offset() -> None:
    log = [
        LogRecord(0, 1, b"a", b'{"id": 1, "v": "new"}'),
        LogRecord(0, 0, b"a", b'{"id": 1, "v": "old"}'),
        LogRecord(1, 0, b"b", b'{"id": 2, "v": "only"}'),
    ]
    assert last_of_each_key(log, "id") == [{"id": 1, "v": "new"}, {"id": 2, "v": "only"}]
    with pytest.raises(AssertionError, match="partitions"):
        last_of_each_key([*log, LogRecord(1, 1, b"a", b'{"id": 1}')], "id")
