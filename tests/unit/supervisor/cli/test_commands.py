"""The command line as a whole: help, configuration, and how errors end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from speedlayer.supervisor import reference
from speedlayer.supervisor.cli.main import COMMANDS, cli
from speedlayer.supervisor.exit_codes import ExitCode
from speedlayer.supervisor.sections import sections
from speedlayer.supervisor.toml_settings import load_toml
from speedlayer.workers import PostgreSQLSink


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


def all_commands() -> list[tuple[str, ...]]:
    paths: list[tuple[str, ...]] = []
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)  # type: ignore[attr-defined]
        if isinstance(command, click.Group):
            paths += [(name, below) for below in command.commands]
        else:
            paths.append((name,))
    return paths


@pytest.mark.parametrize("path", all_commands(), ids=" ".join)
def test_every_commands_help_has_an_example(path: tuple[str, ...]) -> None:
    result = invoke(*path, "--help")
    assert result.exit_code == ExitCode.OK
    assert "Example" in result.output
    assert f"speedlayer {' '.join(path)}" in result.output


def test_the_help_lists_every_command_without_loading_any() -> None:
    listed = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys\n"
            "from speedlayer.supervisor.cli.main import cli\n"
            "cli(['--help'], standalone_mode=False)\n"
            "print(sorted(name for name in sys.modules if name.startswith('speedlayer.supervisor.cli.')))\n",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert listed.splitlines()[-1] == "['speedlayer.supervisor.cli.main']"
    assert all(f"  {name}" in listed for name in COMMANDS)


def test_an_unknown_command_is_a_usage_error() -> None:
    assert invoke("stauts").exit_code == ExitCode.USAGE


def test_the_module_is_the_command() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "speedlayer.supervisor", "--version"], capture_output=True, text=True, check=True
    )
    assert ended.stdout.startswith("speedlayer, version ")


def test_config_lists_every_setting() -> None:
    output = invoke("config").output
    for section in sections():
        assert section.title in output
        for entry in section.entries:
            assert f"  {entry.key} = {reference.default_shown(entry)}" in output


def test_config_of_one_section_leaves_out_the_others() -> None:
    output = invoke("config", "brake").output
    assert "slow_flush_threshold = 2.0" in output
    assert "budget_mb" not in output
    assert invoke("config", "brakes").exit_code == ExitCode.USAGE


def test_config_as_json_and_as_markdown() -> None:
    rows = json.loads(invoke("config", "--json").output)
    assert {"section", "key", "required", "default", "range", "meaning"} == set(rows[0])
    assert invoke("config", "--markdown").output == reference.configuration()


def test_what_init_writes_is_read_and_says_what_it_was_told(tmp_path: Path) -> None:
    file = tmp_path / "speedlayer.toml"
    told = ["--bootstrap-servers", "kafka:1", "--group", "g", "--topic", "payments", "--table", 'public."Pay"']
    assert invoke("init", str(file), *told, "--key", "id", "--key", "day").exit_code == ExitCode.OK
    settings = load_toml(file, {"SPEEDLAYER_DSN": "host=db"})
    (pipeline,) = settings.pipelines
    assert settings.kafka["bootstrap.servers"] == "kafka:1"
    assert (pipeline.group_id, pipeline.name, pipeline.topics) == ("g", "payments", ("payments",))
    sink = pipeline.sink
    assert isinstance(sink, PostgreSQLSink)
    assert (sink.dsn, sink.table, sink.mode, tuple(sink.key)) == ("host=db", 'public."Pay"', "upsert", ("id", "day"))


def test_every_setting_stands_in_what_init_writes_and_a_default_may_be_uncommented(tmp_path: Path) -> None:
    file = tmp_path / "speedlayer.toml"
    invoke("init", str(file))
    text = file.read_text()
    for section in sections():
        for entry in section.entries:
            assert f"{entry.key} = " in text or f'"{entry.key}" = ' in text
    plain = load_toml(file, {"SPEEDLAYER_DSN": "host=db"})
    uncommented = "\n".join(
        line[2:] if line.startswith("# ") and " = " in line and "…" not in line else line for line in text.splitlines()
    )
    file.write_text(uncommented)
    assert load_toml(file, {"SPEEDLAYER_DSN": "host=db"}) == plain


def test_init_never_overwrites_a_file_unless_it_is_told_to(tmp_path: Path) -> None:
    file = tmp_path / "speedlayer.toml"
    file.write_text("mine")
    result = invoke("init", str(file))
    assert result.exit_code == ExitCode.CONFIGURATION
    assert "--force overwrites" in result.output
    assert file.read_text() == "mine"
    assert invoke("init", str(file), "--force").exit_code == ExitCode.OK


def test_init_prints_the_sql_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = invoke("init", "--print-sql", "--role", "loader", "--table", "public.orders").output
    assert "CREATE SCHEMA IF NOT EXISTS speedlayer" in output
    assert "ON public.orders TO" in output
    assert "loader" in output
    assert list(tmp_path.iterdir()) == []


def test_running_a_file_that_is_not_there_is_a_configuration_error(tmp_path: Path) -> None:
    result = invoke("run", str(tmp_path / "absent.toml"))
    assert result.exit_code == ExitCode.CONFIGURATION
    assert "no such file" in result.output


def test_init_writes_only_what_run_will_take(tmp_path: Path) -> None:
    result = invoke("init", str(tmp_path / "speedlayer.yaml"))
    assert result.exit_code == ExitCode.CONFIGURATION
    assert "must end in .toml" in result.output


def test_an_error_in_a_python_file_is_told_with_its_line_and_not_as_a_traceback(tmp_path: Path) -> None:
    file = tmp_path / "orders.py"
    file.write_text("\nimport no_such_module\n")
    result = invoke("run", str(file))
    assert result.exit_code == ExitCode.CONFIGURATION
    assert f"{file}, line 2: ModuleNotFoundError: No module named 'no_such_module'" in result.output


def test_an_empty_setting_is_called_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEEDLAYER_DSN", "")
    file = tmp_path / "speedlayer.toml"
    assert invoke("init", str(file)).exit_code == ExitCode.OK
    assert "postgres.dsn: is empty" in invoke("run", str(file)).output


def test_checking_a_wrong_file_fails_the_check_and_names_the_key(tmp_path: Path) -> None:
    file = tmp_path / "speedlayer.toml"
    file.write_text("[worker]\ncount = 1\n")
    result = invoke("check", str(file))
    assert result.exit_code == ExitCode.CHECK_FAILED
    assert 'did you mean "workers"' in result.output
    read = json.loads(invoke("check", str(file), "--json").output)
    assert read["ok"] is False
    assert read["findings"][0]["what"] == "configuration"
