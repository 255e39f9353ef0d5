"""What a user installs is the tree: the wheel holds every file of the packages, and nothing else."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fixtures.sources import PACKAGES, tracked_files
from fixtures.workspace import REPOSITORY

BUILD_SECONDS = 240


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files alone: a build in the work tree would bring back what an older one left in ``build``."""
    target = tmp_path_factory.mktemp("export")
    for path in tracked_files():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / path, target / path, follow_symlinks=False)
    return target


@pytest.fixture(scope="module")
def wheel(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(target), str(export)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's contents, to be put first on an interpreter's path."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def setup_cfg() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser


def test_the_wheel_equals_the_tree(wheel: Path) -> None:
    in_tree = {f"speedlayer/{path}" for path in tracked_files(*PACKAGES.values())}
    in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert in_wheel == in_tree


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for path in tracked_files(*PACKAGES.values()) if path.suffix == ".py"}
    assert [str(folder) for folder in sorted(folders) if not (REPOSITORY / folder / "__init__.py").exists()] == []


def test_both_packages_are_marked_as_typed(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"speedlayer/supervisor/py.typed", "speedlayer/workers/py.typed"} <= set(names)


def test_the_namespace_root_is_no_package(wheel: Path) -> None:
    """An ``__init__.py`` there would hide what other distributions put into the namespace."""
    assert "speedlayer/__init__.py" not in zipfile.ZipFile(wheel).namelist()


def test_the_wheel_carries_the_licence(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("LICENSE")]
    assert archive.read(name) == (REPOSITORY / "LICENSE").read_bytes()


def test_the_five_packages_are_required_and_the_rest_is_extra(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    lines = archive.read(name).decode().splitlines()
    required = {line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")}
    plain = {requirement.split(">")[0] for requirement in required if "extra ==" not in requirement}
    fixed = {"confluent-kafka", "psycopg2-binary", "multiprocess", "tenacity", "click"}
    assert plain == fixed | {"msgspec", "tomli"}
    assert [requirement for requirement in required if requirement.startswith("tomli") and "3.11" in requirement]


def run_installed(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=installed, env=environment, capture_output=True, text=True, timeout=60
    )


def test_the_installed_command_runs(installed: Path) -> None:
    done = run_installed(installed, str(installed / "bin" / "speedlayer"), "--help")
    assert done.returncode == 0, done.stderr
    assert "run" in done.stdout


def test_the_module_runs_as_the_command_does(installed: Path) -> None:
    done = run_installed(installed, "-m", "speedlayer.supervisor", "--version")
    assert done.returncode == 0, done.stderr
    assert setup_cfg()["metadata"]["version"] in done.stdout


def test_the_version_stands_in_one_place(installed: Path) -> None:
    code = (
        "import importlib.metadata, speedlayer.supervisor, speedlayer.workers\n"
        "print(importlib.metadata.version('speedlayer'))\n"
        "print(speedlayer.supervisor.__file__)\n"
    )
    done = run_installed(installed, "-c", code)
    assert done.returncode == 0, done.stderr
    version, file = done.stdout.splitlines()
    assert version == setup_cfg()["metadata"]["version"]
    assert Path(file).is_relative_to(installed), "the wheel's package is the one that was imported"
    written_twice = [
        str(path) for path in tracked_files(*PACKAGES.values()) if b"__version__ =" in (REPOSITORY / path).read_bytes()
    ]
    assert written_twice == []


def test_the_links_for_type_checkers_lead_to_the_packages() -> None:
    for package, folder in PACKAGES.items():
        link = REPOSITORY / "scripts" / "typing" / Path(*package.split("."))
        assert link.is_symlink()
        assert not link.readlink().is_absolute()
        assert link.resolve() == REPOSITORY / folder
