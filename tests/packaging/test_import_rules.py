"""Who may import what: the rules that keep the core pure and librdkafka out of forks and of the workers."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures.sources import file_of, imports_of, is_in, module_of, python_files
from fixtures.workspace import REPOSITORY

# What would let the core do I/O, read a clock, or start a thread or a process.
OUTSIDE_THE_CORE = {
    "asyncio",
    "click",
    "concurrent",
    "confluent_kafka",
    "ctypes",
    "datetime",
    "fcntl",
    "http",
    "io",
    "logging",
    "mmap",
    "multiprocess",
    "multiprocessing",
    "os",
    "pathlib",
    "prometheus_client",
    "psycopg2",
    "queue",
    "resource",
    "secrets",
    "select",
    "selectors",
    "shutil",
    "signal",
    "socket",
    "socketserver",
    "ssl",
    "subprocess",
    "sys",
    "tempfile",
    "tenacity",
    "threading",
    "time",
    "urllib",
    "uuid",
}

CALLS_THAT_DO_IO = {"open", "print", "input", "breakpoint", "exec", "eval"}

KAFKA = {"confluent_kafka"}


def core_files() -> list[Path]:
    """The files of the core, and every file of ours that they import, directly or not."""
    found = set(python_files("supervisor/core"))
    waiting = list(found)
    while waiting:
        for one in imports_of(waiting.pop()):
            target = file_of(one.module)
            if target is not None and target not in found:
                found.add(target)
                waiting.append(target)
    return sorted(found)


def test_workers_import_neither_the_supervisor_nor_kafka() -> None:
    forbidden = {"speedlayer.supervisor", *KAFKA}
    assert [
        str(one) for path in python_files("workers") for one in imports_of(path) if is_in(one.module, forbidden)
    ] == []


def test_the_core_imports_no_io_no_clock_and_no_threads() -> None:
    assert [str(one) for path in core_files() for one in imports_of(path) if is_in(one.module, OUTSIDE_THE_CORE)] == []


def test_the_core_imports_nothing_else_of_the_supervisor() -> None:
    """So it can be run against simulated parts, with nothing of the shell loaded but the package's own name."""
    outside = [path for path in core_files() if path.parts[0] == "supervisor" and path.parts[1] != "core"]
    assert outside == []


@pytest.mark.parametrize("path", python_files("supervisor/core"), ids=str)
def test_the_core_calls_no_builtin_that_does_io(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse((REPOSITORY / path).read_text())) if isinstance(node, ast.Call)]
    names = {f"line {call.lineno}": call.func.id for call in calls if isinstance(call.func, ast.Name)}
    assert {line: name for line, name in names.items() if name in CALLS_THAT_DO_IO} == {}


def test_nobody_imports_the_packages_by_their_short_names() -> None:
    short = {"supervisor", "workers"}
    assert [str(one) for path in python_files() for one in imports_of(path) if is_in(one.module, short)] == []


def test_the_rules_would_notice(tmp_path: Path) -> None:
    """The reading of imports sees each form that one can be written in."""
    source = tmp_path / "offender.py"
    source.write_text(
        "import time\n"
        "from os import path\n"
        "def late():\n"
        "    import confluent_kafka.admin\n"
        "    from speedlayer.workers import PostgreSQLSink, protocol\n"
        "try:\n"
        "    import socket as s\n"
        "except ImportError:\n"
        "    pass\n"
    )
    found = {one.module: one.lazy for one in imports_of(source)}
    assert found == {
        "time": False,
        "os": False,
        "confluent_kafka.admin": True,
        "speedlayer.workers.protocol": True,
        "speedlayer.workers": True,
        "socket": False,
    }
    assert is_in("confluent_kafka.admin", KAFKA)
    assert not is_in("confluent_kafka_extras", KAFKA)


def loaded_after(statement: str) -> set[str]:
    """The names of the modules that a fresh interpreter has loaded after this statement."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_supervisor_does_not_load_kafka() -> None:
    """A worker imports its parent's __main__ again, and with it the interface that the user's file imports."""
    loaded = loaded_after("import speedlayer.supervisor, speedlayer.supervisor.cli")
    assert "speedlayer.supervisor.cli" in loaded
    assert not loaded & KAFKA


def test_importing_everything_of_the_workers_loads_neither_kafka_nor_the_supervisor() -> None:
    modules = [module_of(path) for path in python_files("workers")]
    loaded = loaded_after("\n".join(f"import {module}" for module in modules))
    assert set(modules) <= loaded
    assert not loaded & (KAFKA | {"speedlayer.supervisor"})
