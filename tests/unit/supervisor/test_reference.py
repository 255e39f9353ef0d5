"""The documents that say what the code does are those that the code writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from speedlayer.supervisor import reference
from speedlayer.supervisor.exit_codes import ExitCode
from speedlayer.supervisor.sections import sections
from speedlayer.workers import PostgreSQLSink

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize("name", reference.FILES)
def test_the_document_is_what_the_code_says(name: str) -> None:
    remedy = f"docs/{name} is out of date: python -m speedlayer.supervisor.reference docs"
    assert (DOCS / name).read_text(encoding="utf-8") == reference.FILES[name](), remedy


def test_every_setting_is_in_the_document_with_a_meaning() -> None:
    text = reference.configuration()
    for section in sections():
        for entry in section.entries:
            assert f"| `{entry.key}` |" in text
            assert entry.setting.meaning.endswith(".")


def test_every_python_name_belongs_to_a_setting() -> None:
    keys = {(section.name, entry.key) for section in sections() for entry in section.entries}
    assert set(reference.PYTHON_NAMES) <= keys


def test_every_exit_code_has_a_number_of_its_own_and_a_meaning() -> None:
    numbers = [code.value for code in ExitCode]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number <= 255 for number in numbers)
    assert all(code.meaning.endswith(".") for code in ExitCode)
    assert ExitCode(3) is ExitCode.CONFIGURATION


def test_every_argument_of_the_sink_can_be_set_in_a_file() -> None:
    """But for the three strikes, which a file sets in `[brake]` and `[pipelines.brake]`."""
    strikes = {"slow_flush_threshold", "max_slow_flushes", "pause_seconds"}
    targets = {entry.target for section in sections() for entry in section.entries}
    assert {field.name for field in dataclasses.fields(PostgreSQLSink)} - strikes <= targets
