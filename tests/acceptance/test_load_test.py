"""The load test, played as a user plays it; and that it finds what it is there to find."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fixtures.kafka import Broker
from fixtures.postgres import execute, query
from fixtures.waiting import wait_until
from fixtures.workspace import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "loadtest" / "load_test.py"
VERIFICATION_FAILED = 12


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--report-dir", str(folder / "report"), *arguments]


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report" / "report.json").read_text())
    return report


def test_a_rate_a_spike_and_a_duration_against_embedded_servers(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path, "--rate", "200", "--spike", "800", "--duration", "12", "--batch-rows", "100"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = report_of(tmp_path)
    assert [phase["name"] for phase in report["phases"]] == ["steady", "spike", "after"]
    assert report["phases"][1]["produced_per_second"] == pytest.approx(800, rel=0.15)
    assert report["produced"] == 4 * 200 + 4 * 800 + 4 * 200
    assert report["audit"]["lost"] == report["audit"]["surplus"] == 0
    assert "produce to row" in done.stdout
    assert (tmp_path / "report" / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("DELETE FROM {t} WHERE order_id = 7", "1 messages are neither row nor dead letter"),
        ("INSERT INTO {t} SELECT * FROM {t} WHERE order_id = 7", "1 rows or dead letters are there twice"),
    ],
)
def test_a_row_that_vanishes_or_doubles_is_found(
    tmp_path: Path, kafka: Broker, postgres_dsn: str, harm: str, said: str
) -> None:
    arguments = ("--rate", "100", "--duration", "8", "--broker", kafka.bootstrap_servers, "--dsn", postgres_dsn)
    process = subprocess.Popen(command(tmp_path, *arguments), stdout=subprocess.PIPE, text=True)

    def table_with_order_7() -> str | None:
        found = query(postgres_dsn, "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'speedlayer\\_demo%%'")
        if not found or not query(postgres_dsn, "SELECT to_regclass(%s)", (f"{found[0][0]}.orders",))[0][0]:
            return None
        table = f"{found[0][0]}.orders"
        return table if query(postgres_dsn, f"SELECT 1 FROM {table} WHERE order_id = 7") else None

    try:
        table = wait_until(table_with_order_7, "the first rows are there", timeout_seconds=60)
        execute(postgres_dsn, harm.format(t=table))
        output, _ = process.communicate(timeout=120)
    finally:
        process.terminate()
        process.wait(60)
    assert process.returncode == VERIFICATION_FAILED, output
    assert said in output
    assert report_of(tmp_path)["ok"] is False


def test_a_server_that_refuses_is_told_in_a_sentence(tmp_path: Path, postgres_dsn: str) -> None:
    execute(postgres_dsn, "CREATE ROLE poor LOGIN PASSWORD 'poor'")
    try:
        poor = postgres_dsn + ("&" if "?" in postgres_dsn else "?") + "options=-crole%3Dpoor"
        done = subprocess.run(command(tmp_path, "--dsn", poor), capture_output=True, text=True, timeout=60)
    finally:
        execute(postgres_dsn, "DROP ROLE poor")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "permission denied" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_property_that_librdkafka_does_not_know_is_told_in_a_sentence(tmp_path: Path, kafka: Broker) -> None:
    arguments = ("--broker", kafka.bootstrap_servers, "--kafka", "no.such=1")
    done = subprocess.run(command(tmp_path, *arguments), capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "no.such" in done.stderr
    assert "Traceback" not in done.stderr
