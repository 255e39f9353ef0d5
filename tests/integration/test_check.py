"""`speedlayer check` against real servers: it finds what would keep a pipeline from running, and changes nothing."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg2.extensions
import pytest
from click.testing import CliRunner
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    ResourcePatternType,
    ResourceType,
)

from fixtures.daemon import Daemon, pipeline_toml
from fixtures.kafka import Broker
from fixtures.ports import free_port
from fixtures.postgres import PostgresServer, execute, query, scalar
from fixtures.waiting import wait_until
from speedlayer.supervisor.cli.main import cli
from speedlayer.supervisor.exit_codes import ExitCode
from speedlayer.workers.sinks.postgres.schema import SCHEMA_VERSION, print_sql

GROUP = "check"


class Findings:
    """What one run of the command found, and how it ended."""

    def __init__(self, exit_code: int, found: list[dict[str, str]]) -> None:
        self.exit_code = exit_code
        self.found = found

    def of(self, outcome: str) -> list[str]:
        return [f"{one['what']}: {one['detail']}" for one in self.found if one["outcome"] == outcome]

    def only(self, outcome: str) -> dict[str, str]:
        chosen = [one for one in self.found if one["outcome"] == outcome]
        assert len(chosen) == 1, chosen
        return chosen[0]


Check = Callable[..., Findings]


@pytest.fixture
def check(tmp_path: Path, kafka: Broker, topic: str, postgres_dsn: str) -> Check:
    """Run the command on a pipeline that would work, but for what the test changes in its file."""

    def run(files: Mapping[str, str] | None = None, **changes: Any) -> Findings:
        for name, text in (files or {}).items():
            (tmp_path / name).write_text(text)
        settings: dict[str, Any] = {
            "bootstrap_servers": kafka.bootstrap_servers,
            "group_id": GROUP,
            "dsn": postgres_dsn,
            "topic": topic,
            "table": "orders",
            "control": {"socket": str(tmp_path / "control.sock")},
            **changes,
        }
        file = tmp_path / "speedlayer.toml"
        file.write_text(pipeline_toml(**settings))
        result = CliRunner().invoke(cli, ["check", str(file), "--timeout", "5", "--json"])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        return Findings(result.exit_code, json.loads(result.output)["findings"])

    return run


@pytest.fixture(autouse=True)
def table(postgres_dsn: str) -> None:
    execute(postgres_dsn, "CREATE TABLE orders (order_id bigint PRIMARY KEY, status text, amount numeric(10, 2))")


@contextmanager
def role(dsn: str, *grants: str) -> Iterator[str]:
    """Yield the DSN of a new role that may do nothing but what is granted to it."""
    name = f"role_{uuid.uuid4().hex[:8]}"
    execute(dsn, f"CREATE ROLE {name} LOGIN PASSWORD 'pw'")
    for grant in grants:
        execute(dsn, f"GRANT {grant} TO {name}")
    try:
        yield psycopg2.extensions.make_dsn(dsn, user=name, password="pw")
    finally:
        execute(dsn, f"DROP OWNED BY {name}; DROP ROLE {name}")


def test_a_pipeline_that_would_run_passes_every_check(check: Check, topic: str) -> None:
    found = check()
    assert found.exit_code == ExitCode.OK, found.found
    assert found.of("failed") == []
    text = "\n".join(found.of("ok"))
    assert f"topic {topic}: exists, 4 partition(s)" in text
    assert "group check: may be joined" in text or "groups: this cluster has had no consumer group yet" in text
    assert "schema speedlayer: does not exist yet; the first start makes it" in text
    assert "table orders: append into order_id bigint, status text, amount numeric(10,2)" in text


def test_nothing_is_changed_by_a_check(check: Check, kafka: Broker, postgres_dsn: str, topic: str) -> None:
    def picture() -> tuple[Any, ...]:
        relations = query(
            postgres_dsn, "SELECT nspname, relname FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace"
        )
        written = scalar(
            postgres_dsn, "SELECT xact_commit >= 0 FROM pg_stat_database WHERE datname = current_database()"
        )
        groups = kafka.admin.list_consumer_groups(request_timeout=10).result(20)
        topics = set(kafka.admin.list_topics(timeout=10).topics)
        return sorted(relations), written, sorted(group.group_id for group in groups.valid), topics

    before = picture()
    check(topic=f"{topic}-that-nobody-made", pipeline={"create_table": True}, table="not_there")
    check()
    assert picture() == before


def test_an_unreachable_broker_is_named_and_the_database_is_looked_at_all_the_same(check: Check) -> None:
    address = f"127.0.0.1:{free_port()}"
    found = check(bootstrap_servers=address)
    assert found.exit_code == ExitCode.CHECK_FAILED
    assert found.only("failed")["detail"].startswith(f"{address} does not answer")
    assert any(line.startswith("table orders: append") for line in found.of("ok"))


def test_a_missing_topic_is_named_with_the_nearest_that_is_there(check: Check, topic: str) -> None:
    found = check(topic=topic + "x").only("failed")
    assert found["what"] == f"topic {topic}x"
    assert f'did you mean "{topic}"' in found["detail"]


def test_an_unreachable_database_is_named_without_its_password(check: Check) -> None:
    found = check(dsn=f"postgresql://somebody:opensesame@127.0.0.1:{free_port()}/shop")
    assert found.only("failed")["what"] == "database"
    assert "refused" in found.only("failed")["detail"]
    assert "opensesame" not in json.dumps(found.found)


def test_a_wrong_password_is_told_from_a_database_that_is_away(check: Check, postgres_dsn: str) -> None:
    found = check(dsn=psycopg2.extensions.make_dsn(postgres_dsn, password="wrong")).only("failed")
    assert "password authentication failed" in found["detail"]
    assert found["remedy"]


def test_a_missing_table_fails_unless_it_may_be_made(check: Check) -> None:
    assert "not_there" in check(table="not_there").only("failed")["detail"]
    found = check(table="not_there", pipeline={"create_table": True})
    assert found.exit_code == ExitCode.OK
    assert "table not_there: does not exist yet; create_table makes it" in found.of("ok")


def test_an_upsert_without_its_index_fails_with_the_statement_that_makes_it(check: Check) -> None:
    found = check(pipeline={"mode": "upsert", "key": ["status"]}).only("failed")
    assert "no unique index" in found["detail"]
    assert "CREATE UNIQUE INDEX" in found["remedy"]


def test_an_upsert_by_the_primary_key_passes(check: Check) -> None:
    found = check(pipeline={"mode": "upsert", "key": ["order_id"]})
    assert found.exit_code == ExitCode.OK
    assert any(line.startswith("table orders: upsert by (order_id) into") for line in found.of("ok"))


def test_a_role_that_may_nothing_is_told_what_it_lacks(check: Check, postgres_dsn: str) -> None:
    with role(postgres_dsn) as dsn:
        found = check(dsn=dsn)
    failed = {one["what"]: one for one in found.found if one["outcome"] == "failed"}
    assert set(failed) == {"schema speedlayer", "table orders"}
    assert "init --print-sql" in failed["schema speedlayer"]["remedy"]
    assert "no INSERT privilege" in failed["table orders"]["detail"]


def test_the_printed_sql_is_all_that_a_role_needs(check: Check, postgres_dsn: str) -> None:
    with role(postgres_dsn) as dsn:
        execute(postgres_dsn, print_sql(psycopg2.extensions.parse_dsn(dsn)["user"], ["orders"]))
        found = check(dsn=dsn, pipeline={"mode": "upsert", "key": ["order_id"]})
    assert found.exit_code == ExitCode.OK, found.found
    assert f"schema speedlayer: has version {SCHEMA_VERSION}, with the privileges that it takes" in found.of("ok")


def test_a_schema_whose_privileges_are_missing_is_told_which(check: Check, postgres_dsn: str) -> None:
    execute(postgres_dsn, print_sql("postgres"))
    with role(
        postgres_dsn, "INSERT ON orders", "USAGE ON SCHEMA speedlayer", "SELECT ON speedlayer.schema_version"
    ) as dsn:
        found = check(dsn=dsn).only("failed")
    assert found["what"] == "schema speedlayer"
    assert "UPDATE on speedlayer.checkpoints" in found["detail"]


def test_a_schema_of_a_newer_speedlayer_is_refused(check: Check, postgres_dsn: str) -> None:
    execute(postgres_dsn, print_sql("postgres"))
    execute(postgres_dsn, f"INSERT INTO speedlayer.schema_version (version) VALUES ({SCHEMA_VERSION + 1})")
    found = check().only("failed")
    assert f"has version {SCHEMA_VERSION + 1}, and this speedlayer knows {SCHEMA_VERSION}" in found["detail"]


def test_a_standby_is_refused(check: Check, start_postgres: Callable[..., PostgresServer]) -> None:
    server = start_postgres()
    dsn = server.dsn()
    execute(dsn, "CREATE TABLE orders (order_id bigint)")
    server.stop()
    (server.data / "standby.signal").touch()
    server.start()
    assert "is a standby" in check(dsn=dsn).only("failed")["detail"]


def test_filters_and_maps_are_loaded_in_a_process_of_their_own(check: Check) -> None:
    files = {"steps.py": "LIMIT = 5\ndef keep(order): return order['amount'] > LIMIT\ndef same(order): return order\n"}
    found = check(files, pipeline={"filter": "steps:keep", "map": "steps:same"})
    assert found.exit_code == ExitCode.OK, found.found
    assert any("loaded in a worker process" in line and "keep" in line for line in found.of("ok"))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("ENDLESS = (n for n in range(10))\ndef keep(order): return next(ENDLESS)\n", "generator"),
        (
            "class Unloadable:\n"
            "    def __reduce__(self): return (int, ('no number',))\n"
            "THING = Unloadable()\n"
            "def keep(order): return THING\n",
            "no number",
        ),
    ],
)
def test_a_filter_that_does_not_survive_the_way_to_a_worker_is_found(check: Check, source: str, reason: str) -> None:
    found = check({"steps.py": source}, pipeline={"filter": "steps:keep"}).only("failed")
    assert found["what"].startswith("transform of")
    assert reason in found["detail"]


def test_a_worker_that_dies_while_it_loads_is_found(check: Check) -> None:
    source = (
        "import os\n"
        "class Deadly:\n"
        "    def __reduce__(self): return (os._exit, (7,))\n"
        "THING = Deadly()\n"
        "def keep(order): return THING\n"
    )
    assert "it exited with 7" in check({"steps.py": source}, pipeline={"filter": "steps:keep"}).only("failed")["detail"]


def test_a_renamed_pipeline_is_warned_of_before_it_starts(
    check: Check, kafka: Broker, topic: str, postgres_dsn: str, start_daemon: Callable[..., Daemon]
) -> None:
    settings = {"bootstrap_servers": kafka.bootstrap_servers, "group_id": GROUP, "dsn": postgres_dsn, "topic": topic}
    daemon = start_daemon(pipeline_toml(**settings, table="orders"))
    assert daemon.stop() == ExitCode.OK
    found = check(pipeline={"name": "orders-v2"})
    assert found.exit_code == ExitCode.OK
    warned = found.only("warning")
    assert warned["what"] == "pipeline orders-v2"
    assert f"under the name {topic}" in warned["detail"]
    assert "offsets seek" in warned["remedy"]
    assert check().of("warning") == []


def test_a_running_daemon_is_mentioned(
    check: Check, kafka: Broker, topic: str, postgres_dsn: str, start_daemon: Callable[..., Daemon]
) -> None:
    settings = {"bootstrap_servers": kafka.bootstrap_servers, "group_id": GROUP, "dsn": postgres_dsn, "topic": topic}
    daemon = start_daemon(pipeline_toml(**settings, table="orders"))
    found = check(control={"socket": str(daemon.socket)})
    assert "a daemon already listens on" in found.only("warning")["detail"]
    assert "group check: may be joined; it has 1 member(s) now" in found.of("ok")


def test_a_batch_that_the_budget_does_not_hold_is_warned_of(check: Check) -> None:
    found = check(memory={"budget_mb": 16}, pipeline={"batch_bytes": 8 * 1024 * 1024}).only("warning")
    assert "a batch closes at 1,677,721 bytes" in found["detail"]


def make_the_topic_of_groups(broker: Broker, topic: str) -> None:
    """Ask for the group's offsets: the first such question makes the broker create the topic in which it keeps them.

    An admin client would do, but librdkafka crashes in it while that topic loads (its issue 5040).
    """
    consumer = Consumer({"bootstrap.servers": broker.bootstrap_servers, "group.id": GROUP})

    def is_told() -> bool:
        try:
            consumer.committed([TopicPartition(topic, 0)], timeout=30)
        except KafkaException as error:  # the coordinator is being made, or has just moved
            if error.args[0].code() not in (KafkaError.NOT_COORDINATOR, KafkaError.COORDINATOR_LOAD_IN_PROGRESS):
                raise
            return False
        return True

    wait_until(is_told, "the broker tells a group's offsets", timeout_seconds=60)
    consumer.close()


def test_topics_and_groups_that_may_not_be_read_are_found(check: Check, start_broker: Callable[..., Broker]) -> None:
    broker = start_broker(
        **{
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "allow.everyone.if.no.acl.found": "true",
        }
    )
    topic = broker.create_topic()
    make_the_topic_of_groups(broker, topic)
    rules = [
        AclBinding(kind, name, ResourcePatternType.LITERAL, "User:ANONYMOUS", "*", operation, permission)
        for kind, name in ((ResourceType.TOPIC, topic), (ResourceType.GROUP, GROUP))
        for operation, permission in (
            (AclOperation.READ, AclPermissionType.DENY),
            (AclOperation.DESCRIBE, AclPermissionType.ALLOW),
        )
    ]
    for future in broker.admin.create_acls(rules).values():
        future.result(30)
    found = check(bootstrap_servers=broker.bootstrap_servers, topic=topic)
    failed = {one["what"]: one for one in found.found if one["outcome"] == "failed"}
    assert set(failed) == {f"topic {topic}", f"group {GROUP}"}
    assert failed[f"topic {topic}"]["remedy"] == f"grant this client READ on the topic {topic}"
