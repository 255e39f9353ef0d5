"""Kafka with TLS, SASL and ACLs: rows flow with what is right; what is wrong is named, and heals once it is mended."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fixtures.certificates import Authority
from fixtures.daemon import Daemon, pipeline_toml
from fixtures.postgres import execute, scalar
from fixtures.secure_kafka import CLIENT_NAME, PLAIN_PASSWORD, USER, SecureBroker
from fixtures.workspace import private_folder
from speedlayer.supervisor.cli.main import cli

GROUP = "secured"
SCRAM_PASSWORD = "scram-secret"


@pytest.fixture(scope="module")
def authority() -> Iterator[Authority]:
    with private_folder("ca") as folder:
        yield Authority(folder)


@pytest.fixture(scope="module")
def broker(authority: Authority) -> Iterator[SecureBroker]:
    with private_folder("kafka") as folder:
        broker = SecureBroker(folder, authority)
        try:
            broker.start()
            broker.set_password(SCRAM_PASSWORD)
            yield broker
        finally:
            broker.close()


@pytest.fixture
def topic(broker: SecureBroker) -> str:
    topic = broker.create_topic()
    for user in (USER, CLIENT_NAME):
        broker.allow(user, [topic], GROUP)
    return topic


@pytest.fixture(autouse=True)
def table(postgres_dsn: str) -> None:
    execute(postgres_dsn, "CREATE TABLE events (number bigint)")


@pytest.fixture
def settings(topic: str, postgres_dsn: str) -> Callable[[Mapping[str, Any]], str]:
    def make(kafka: Mapping[str, Any]) -> str:
        return pipeline_toml(
            bootstrap_servers=str(kafka["bootstrap.servers"]),
            group_id=GROUP,
            dsn=postgres_dsn,
            topic=topic,
            table="events",
            kafka=kafka,
        )

    return make


def by_password(broker: SecureBroker, authority: Authority, **changes: Any) -> dict[str, Any]:
    return {
        "bootstrap.servers": broker.sasl_servers,
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": USER,
        "sasl.password": SCRAM_PASSWORD,
        "ssl.ca.location": str(authority.certificate),
        **{name.replace("_", "."): value for name, value in changes.items()},
    }


def by_certificate(broker: SecureBroker, authority: Authority) -> dict[str, Any]:
    certificate = authority.client(CLIENT_NAME)
    return {
        "bootstrap.servers": broker.mutual_servers,
        "security.protocol": "SSL",
        "ssl.ca.location": str(authority.certificate),
        "ssl.certificate.location": str(certificate.chain),
        "ssl.key.location": str(certificate.key),
    }


def wait_for_rows(daemon: Daemon, dsn: str, rows: int) -> None:
    daemon.wait_until(lambda _: scalar(dsn, "SELECT count(*) FROM events") == rows, f"{rows} rows are written")


def produce(broker: SecureBroker, topic: str, first: int, count: int) -> None:
    broker.produce(topic, [json.dumps({"number": number}).encode() for number in range(first, first + count)])


def checked(folder: Path, source: str) -> dict[str, Any]:
    """What `speedlayer check` finds of the broker."""
    file = folder / "checked.toml"
    file.write_text(source)
    result = CliRunner().invoke(cli, ["check", str(file), "--timeout", "5", "--json"])
    findings = {one["what"]: one for one in json.loads(result.output)["findings"]}
    found: dict[str, Any] = findings["broker"]
    return found


@pytest.mark.parametrize("how", ["scram", "plain", "certificate"])
def test_rows_flow_to_a_client_that_is_known_and_has_the_least_privileges(
    how: str,
    broker: SecureBroker,
    authority: Authority,
    topic: str,
    settings: Callable[[Mapping[str, Any]], str],
    start_daemon: Callable[..., Daemon],
    postgres_dsn: str,
    tmp_path: Path,
) -> None:
    kafka = {
        "scram": lambda: by_password(broker, authority),
        "plain": lambda: by_password(broker, authority, sasl_mechanism="PLAIN", sasl_password=PLAIN_PASSWORD),
        "certificate": lambda: by_certificate(broker, authority),
    }[how]()
    assert checked(tmp_path, settings(kafka))["outcome"] == "ok"
    produce(broker, topic, 0, 100)
    daemon = start_daemon(settings(kafka))
    wait_for_rows(daemon, postgres_dsn, 100)
    # Commits are a courtesy, and need no more than the right to read the group.
    daemon.stop()
    assert "may not" not in daemon.log_text()


@pytest.mark.parametrize(
    ("wrong", "said", "remedy"),
    [
        ("password", "SASL", "sasl.password"),
        ("authority", "certificate verify failed", "ssl.ca.location"),
        ("no certificate", "transport", "ssl.*"),  # TLS 1.3: the broker hangs up without a word
        ("plaintext", "SASL", "security.protocol"),
    ],
)
def test_what_is_wrong_on_our_side_is_named_with_its_setting(
    wrong: str,
    said: str,
    remedy: str,
    broker: SecureBroker,
    authority: Authority,
    settings: Callable[[Mapping[str, Any]], str],
    start_daemon: Callable[..., Daemon],
    postgres_dsn: str,
    tmp_path: Path,
) -> None:
    kafka = by_password(broker, authority)
    if wrong == "password":
        kafka["sasl.password"] = "wrong-secret"
    elif wrong == "authority":
        kafka["ssl.ca.location"] = str(Authority(tmp_path, "stranger").certificate)
    elif wrong == "no certificate":
        kafka = {name: value for name, value in by_certificate(broker, authority).items() if "ssl.c" not in name}
        del kafka["ssl.key.location"]
        kafka["ssl.ca.location"] = str(authority.certificate)
    else:
        kafka["security.protocol"] = "SASL_PLAINTEXT"
    found = checked(tmp_path, settings(kafka))
    assert found["outcome"] == "failed"
    assert remedy in found["remedy"]
    daemon = start_daemon(settings(kafka), wait=False)
    daemon.wait_until_listening()
    status = daemon.wait_until(lambda status: status["consumer_trouble"], "the trouble is told")
    (told,) = status["consumer_trouble"].values()
    assert said.lower() in told.lower()
    assert remedy in told
    assert told in daemon.log_text()
    assert "wrong-secret" not in daemon.log_text()
    assert daemon.stop() == 0


def test_rows_flow_once_the_password_is_mended_on_the_server(
    broker: SecureBroker,
    authority: Authority,
    topic: str,
    settings: Callable[[Mapping[str, Any]], str],
    start_daemon: Callable[..., Daemon],
    postgres_dsn: str,
) -> None:
    produce(broker, topic, 0, 50)
    daemon = start_daemon(settings(by_password(broker, authority, sasl_password="tomorrows-secret")), wait=False)
    daemon.wait_until_listening()
    daemon.wait_until(lambda status: status["consumer_trouble"], "the trouble is told")
    broker.set_password("tomorrows-secret")
    try:
        wait_for_rows(daemon, postgres_dsn, 50)
        daemon.wait_until(lambda status: not status["consumer_trouble"], "the trouble is over", timeout_seconds=90)
    finally:
        broker.set_password(SCRAM_PASSWORD)


def test_rows_flow_once_the_servers_certificate_is_mended(
    broker: SecureBroker,
    authority: Authority,
    topic: str,
    settings: Callable[[Mapping[str, Any]], str],
    start_daemon: Callable[..., Daemon],
    postgres_dsn: str,
) -> None:
    produce(broker, topic, 0, 50)
    daemon = start_daemon(settings(by_password(broker, authority)))
    wait_for_rows(daemon, postgres_dsn, 50)
    for bad in (authority.expired(), authority.server("elsewhere.example")):
        broker.stop()
        broker.show(bad)
        broker.start()
        daemon.wait_until(
            lambda status: any("verif" in text for text in status["consumer_trouble"].values()),
            "the certificate is told to be refused",
        )
    broker.stop()
    broker.show(authority.server())
    broker.start()
    produce(broker, topic, 50, 50)
    wait_for_rows(daemon, postgres_dsn, 100)
    assert scalar(postgres_dsn, "SELECT count(DISTINCT number) FROM events") == 100
