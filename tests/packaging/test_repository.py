"""Rules about the repository's files that no linter knows."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from fixtures.sources import python_files, tracked_files
from fixtures.workspace import REPOSITORY

# Home folders and the like: a path of the machine that somebody happened to work on.
MACHINE_PATH = re.compile(r"(?<![\w./-])/(?:root|home|Users|work|farm|mnt|data\d*)/[\w.-]")

TOP_LEVEL = {"setup.cfg", "setup.py", "supervisor", "workers", "tests", "scripts", "docker"}


def text_files() -> list[Path]:
    files = []
    for path in tracked_files():
        full = REPOSITORY / path
        if full.is_symlink() or not full.is_file():
            continue
        if b"\0" not in full.read_bytes():
            files.append(path)
    assert files
    return files


def lines_matching(pattern: re.Pattern[str], files: list[Path]) -> list[str]:
    return [
        f"{path}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate((REPOSITORY / path).read_text().splitlines(), 1)
        if pattern.search(line)
    ]


def test_the_top_level_is_the_agreed_one() -> None:
    assert {path.parts[0] for path in tracked_files()} >= TOP_LEVEL


def test_pyproject_holds_the_build_system_alone() -> None:
    sections = re.findall(r"^\[(.+)\]$", (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    assert sections == ["build-system"]


def test_no_file_names_a_path_of_one_machine() -> None:
    assert (
        lines_matching(MACHINE_PATH, [path for path in text_files() if path != Path(__file__).relative_to(REPOSITORY)])
        == []
    )


@pytest.mark.parametrize("text", ["cd /home/jo/speedlayer", "`/root/x`", "(/work/app/tests)"])
def test_the_pattern_finds_paths_of_a_machine(text: str) -> None:
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["https://example.org/home/x", "docs/work/x", "/tmp/speedlayer-1000/x.sock"])
def test_the_pattern_leaves_other_paths_alone(text: str) -> None:
    assert not MACHINE_PATH.search(text)


def sleeps_in(source: str) -> list[int]:
    """The lines on which a test or a fixture sleeps. Code that is to hang may, in functions of its own."""
    return [
        call.lineno
        for function in ast.walk(ast.parse(source))
        if isinstance(function, ast.FunctionDef) and (function.name.startswith("test_") or function.decorator_list)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and ast.unparse(call.func) in {"time.sleep", "sleep"}
    ]


@pytest.mark.parametrize("path", python_files("tests"), ids=str)
def test_no_test_sleeps_for_a_time_that_it_hopes_is_long_enough(path: Path) -> None:
    assert sleeps_in((REPOSITORY / path).read_text()) == []


def test_a_sleeping_test_would_be_found() -> None:
    assert sleeps_in("import time\ndef test_x():\n    time.sleep(1)\ndef hangs():\n    time.sleep(600)\n") == [3]


def test_every_script_is_executable_and_the_shared_parts_are_not() -> None:
    scripts = [path for path in tracked_files("scripts", ".ci") if len(path.parts) == 2 and path.suffix == ""]
    assert {Path("scripts/test"), Path("scripts/check"), Path(".ci/run")} <= set(scripts)
    assert [str(path) for path in scripts if not (REPOSITORY / path).stat().st_mode & 0o100] == []
    sourced = [path for path in tracked_files("scripts") if path.name.startswith("_")]
    assert [str(path) for path in sourced if (REPOSITORY / path).stat().st_mode & 0o111] == []
