"""Rules about the repository's files that no linter knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fixtures.sources import tracked_files
from fixtures.workspace import REPOSITORY

# Home folders and the like: a path of the machine that somebody happened to work on.
MACHINE_PATH = re.compile(r"(?<![\w./-])/(?:root|home|Users|work|farm|mnt|data\d*)/[\w.-]")

TOP_LEVEL = {"setup.cfg", "setup.py", "supervisor", "workers", "tests", "scripts", "docker"}

# One file may wait between two looks at a condition; every other test waits on conditions through it.
SLEEP = re.compile(r"\btime\.sleep\(|\bfrom time import sleep\b")


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


@pytest.mark.parametrize("text", ["cd /home/jo/speedlayer", "`/root/x`", "(/work/main/tests)"])
def test_the_pattern_finds_paths_of_a_machine(text: str) -> None:
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["https://example.org/home/x", "docs/work/x", "/tmp/speedlayer-1000/x.sock"])
def test_the_pattern_leaves_other_paths_alone(text: str) -> None:
    assert not MACHINE_PATH.search(text)


def test_no_test_sleeps_for_a_time_that_it_hopes_is_long_enough() -> None:
    mine = Path(__file__).relative_to(REPOSITORY)
    assert lines_matching(SLEEP, [path for path in text_files() if path.parts[0] == "tests" and path != mine]) == []


def test_every_script_is_executable_and_the_shared_parts_are_not() -> None:
    scripts = [path for path in tracked_files("scripts", ".ci") if len(path.parts) == 2 and path.suffix == ""]
    assert {Path("scripts/test"), Path("scripts/check"), Path(".ci/run")} <= set(scripts)
    assert [str(path) for path in scripts if not (REPOSITORY / path).stat().st_mode & 0o100] == []
    sourced = [path for path in tracked_files("scripts") if path.name.startswith("_")]
    assert [str(path) for path in sourced if (REPOSITORY / path).stat().st_mode & 0o111] == []
