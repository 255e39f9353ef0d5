"""The file that the demo writes is one that `speedlayer run` takes, with the article's three strikes."""

from __future__ import annotations

from pathlib import Path

from speedlayer.supervisor.demo.broker import Broker
from speedlayer.supervisor.demo.daemon import DSN_VARIABLE, DaemonPlan
from speedlayer.supervisor.settings import DaemonSettings
from speedlayer.supervisor.toml_settings import load_toml

DSN = "postgresql://speedlayer:secret@127.0.0.1:5555/postgres"


def settings_of(broker: Broker, folder: Path) -> DaemonSettings:
    plan = DaemonPlan(
        broker, DSN, "speedlayer_demo_1.orders", batch_rows=100, batch_seconds=1.0, workers=2, memory_budget_mb=64
    )
    text = plan.toml(folder / "control.sock")
    assert "secret" not in text
    file = folder / "demo.toml"
    file.write_text(text, encoding="utf-8")
    return load_toml(file, {DSN_VARIABLE: DSN})


def test_it_sets_the_articles_figures(tmp_path: Path) -> None:
    broker = Broker("demo", "demo-group", {"bootstrap.servers": "127.0.0.1:9"}, {"session.timeout.ms": "6000"}, True)
    settings = settings_of(broker, tmp_path)
    (pipeline,) = settings.pipelines
    brake = pipeline.brake
    assert (brake.mode, brake.slow_flush_threshold, brake.max_slow_flushes, brake.pause_seconds) == (
        "simple",
        2.0,
        3,
        5.0,
    )
    assert pipeline.sink.batch_size == 100
    assert (pipeline.name, pipeline.topics, pipeline.group_id) == ("orders", ("demo",), "demo-group")
    assert settings.workers.count == 2
    assert settings.control.socket == str(tmp_path / "control.sock")


def test_properties_of_a_given_broker_reach_the_daemon(tmp_path: Path) -> None:
    client = {"bootstrap.servers": "kafka:9093", "security.protocol": "SSL", "client.id": 'a "quoted"\\name'}
    settings = settings_of(Broker("demo", "demo-group", client, {}, False), tmp_path)
    assert {key: settings.kafka[key] for key in client} == client
