"""Filters and maps travel to the workers with everything they use, however the program was started."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fixtures
from speedlayer.workers.errors import ConfigurationError, StreamingOverloadException
from speedlayer.workers.transform import Step, Transform, TransformError, load_user_file, pack, unpack

TESTS = Path(fixtures.__path__[0]).parent


def keep_large(record: dict[str, Any]) -> bool:
    return bool(record["n"] > 1)


def double(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "n": record["n"] * 2}


# --- steps -----------------------------------------------------------------------------------------------------------


def test_steps_run_in_their_order() -> None:
    transform = Transform([Step("map", double), Step("filter", keep_large), Step("map", double)])
    assert [transform({"n": n}) for n in (0, 1, 2)] == [None, {"n": 4}, {"n": 8}]


def test_without_steps_a_record_stays_as_it_is() -> None:
    assert Transform([])({"n": 1}) == {"n": 1}


def test_what_a_step_raises_is_told_with_the_steps_name() -> None:
    transform = Transform([Step("filter", lambda record: True), Step("map", double)])
    with pytest.raises(TransformError, match=r"^map double: KeyError: 'n'$"):
        transform({})


def test_an_exception_without_a_text_is_told_by_its_type() -> None:
    def stumble(record: Any) -> Any:
        raise ValueError

    with pytest.raises(TransformError) as caught:
        Transform([Step("filter", stumble)])({})
    assert str(caught.value).endswith("stumble: ValueError")


def test_a_map_that_returns_none_is_an_error_and_never_drops_records() -> None:
    transform = Transform([Step("map", lambda record: None), Step("map", double)])
    with pytest.raises(TransformError, match="returned None instead of a record"):
        transform({"n": 1})


def test_a_filter_is_true_in_pythons_sense() -> None:
    transform = Transform([Step("filter", lambda record: record["tags"])])
    assert [transform({"tags": tags}) for tags in ([], ["a"])] == [None, {"tags": ["a"]}]


def test_an_interrupt_is_no_records_fault() -> None:
    def interrupt(record: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Transform([Step("map", interrupt)])({})


def test_a_step_that_exits_fails_for_its_record_and_does_not_stop_the_worker() -> None:
    with pytest.raises(TransformError, match="SystemExit: 3"):
        Transform([Step("map", lambda record: sys.exit(3))])({})


def test_a_cancelled_step_fails_for_its_record_and_does_not_hold_up_its_batch_for_ever() -> None:
    def cancel(record: Any) -> Any:
        raise asyncio.CancelledError  # no Exception

    with pytest.raises(TransformError, match="CancelledError"):
        Transform([Step("map", cancel)])({})


def test_an_overload_that_a_step_raises_is_no_records_fault() -> None:
    def refuse(record: Any) -> Any:
        raise StreamingOverloadException("no more", pause_seconds=1.0)

    with pytest.raises(StreamingOverloadException):
        Transform([Step("map", refuse)])({})


# --- packing ---------------------------------------------------------------------------------------------------------


def test_what_can_not_travel_is_refused_with_the_steps_name_and_a_remedy() -> None:
    numbers = (number for number in range(3))

    def numbered(record: Any) -> Any:
        return {**record, "n": next(numbers)}

    with pytest.raises(ConfigurationError, match=r"map .*numbered can not be sent to the workers: .* first call"):
        pack([Step("map", numbered)])


@pytest.mark.parametrize("step", [Step("map", 7), Step("drop", double)])  # type: ignore[arg-type]
def test_a_step_must_be_a_function_to_filter_or_map_with(step: Step) -> None:
    with pytest.raises(ConfigurationError):
        pack([step])


def test_a_module_that_the_worker_can_not_import_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").write_text("def keep(record):\n    return True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here  # type: ignore[import-not-found]

    packed = pack([Step("filter", only_here.keep)])
    monkeypatch.delitem(sys.modules, "only_here")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    with pytest.raises(ConfigurationError, match="'only_here', which the workers can not import"):
        unpack(packed)


# --- user files ------------------------------------------------------------------------------------------------------

PIPELINE = """
from __future__ import annotations

import dataclasses
import enum
import math
from typing import ClassVar

import pipeline_helper
from pipeline_helper import shift
from speedlayer.workers.transform import Step


class Colour(enum.Enum):
    RED = "red"
    CRIMSON = "red"
    BLUE = "blue"

    @property
    def other(self) -> Colour:
        return Colour.BLUE if self is Colour.RED else Colour.RED


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Size(str, enum.Enum):
    S = "small"


class Planet(enum.Enum):
    EARTH = (1, 2)

    def __init__(self, mass, radius):
        self.density = mass / radius


class Flags(enum.Flag):
    A = enum.auto()
    B = enum.auto()


@dataclasses.dataclass
class Order:
    kind: ClassVar[str] = "order"
    n: int

    def larger(self) -> Order:
        return Order(self.n + LATE)


class Adder:
    def __init__(self, amount):
        self.amount = amount

    def __call__(self, record):
        return {**record, "adder": record["n"] + self.amount + LATE}

    def method(self, record):
        return {**record, "method": isinstance(Order(1), Order) and self.amount}


def named(record):
    return {**record, "named": math.floor(record["n"] + 0.5) + inner(record)}


def inner(record):
    return sum(LATE for _ in range(2))  # a global that only a nested function uses


def closure(amount):
    def add(record):
        return {**record, "closure": record["n"] + amount}

    return add


def classes(record):
    return {**record, "larger": Order(record["n"]).larger().n}


def enums(record):
    return {
        **record,
        "enums": [
            Colour("red").other.value,
            Colour.CRIMSON is Colour.RED,
            Level.HIGH > Level.LOW and Level.HIGH + 1,
            Size.S.upper(),
            Planet.EARTH.density,
            Planet((1, 2)).name,
            (Flags.A | Flags.B).value,
            [colour.name for colour in Colour],
        ],
    }


def counted(record):
    global SEEN
    SEEN += 1
    return {**record, "seen": SEEN}


def helped(record):
    return {**record, "helper": pipeline_helper.scale(record["n"])}


def steps():
    return [
        Step("filter", lambda record: record["n"] != SKIPPED),
        Step("map", named),
        Step("map", closure(100)),
        Step("map", Adder(7)),
        Step("map", Adder(9).method),
        Step("map", classes),
        Step("map", enums),
        Step("map", counted),
        Step("map", helped),
        Step("map", shift),
    ]


SKIPPED = 2
SEEN = 0
LATE = 5
"""

HELPER = """
FACTOR = 10

def scale(n):
    return n * FACTOR

def shift(record):
    return {**record, "shifted": record["n"] + FACTOR}
"""

MAIN = """
if __name__ == "__main__":
    import json, sys
    from fixtures.transforms import try_in_worker
    LATE = 6  # what counts is the value when the steps are packed
    print(json.dumps(try_in_worker(steps(), sys.argv[1], [{"n": 1}, {"n": 2}, {"n": 3}])))
"""

RUN = """
if __name__ == "__main__":
    import json, sys
    from fixtures.transforms import try_in_worker
    from speedlayer.workers.transform import load_user_file
    module = load_user_file(sys.argv[2])
    module.LATE = 6
    print(json.dumps(try_in_worker(module.steps(), sys.argv[1], [{"n": 1}, {"n": 2}, {"n": 3}])))
"""


def expected(n: int, seen: int) -> dict[str, Any]:
    return {
        "n": n,
        "named": n + 12,
        "closure": n + 100,
        "adder": n + 13,
        "method": 9,
        "larger": n + 6,
        "enums": ["blue", True, 3, "SMALL", 0.5, "EARTH", 3, ["RED", "BLUE"]],
        "seen": seen,
        "helper": n * 10,
        "shifted": n + 10,
    }


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("launch", ["file", "module", "run"])
def test_lambdas_closures_classes_globals_and_helpers_reach_the_worker(
    launch: str, method: str, tmp_path: Path
) -> None:
    folder = tmp_path / "pipelines"
    folder.mkdir()
    pipeline = folder / "pipeline.py"
    pipeline.write_text(PIPELINE + MAIN)
    (folder / "pipeline_helper.py").write_text(HELPER)
    runner = tmp_path / "runner.py"
    runner.write_text(RUN)
    command = {
        "file": [str(pipeline), method],
        "module": ["-m", "pipeline", method],
        "run": [str(runner), method, str(pipeline)],
    }[launch]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder if launch == "module" else tmp_path,
        env={"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [expected(1, 1), None, expected(3, 2)]


def test_a_user_file_is_found_by_no_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "pipeline.py").write_text("def keep(record):\n    return LIMIT\nLIMIT = 3\n")
    before = set(sys.modules)
    module = load_user_file(tmp_path / "pipeline.py")
    assert set(sys.modules) == before
    assert module.keep({}) == 3
    assert sys.path[0] == str(tmp_path)


def test_a_user_file_that_fails_shows_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "broken.py").write_text("1 / 0\n")
    before = set(sys.modules)
    with pytest.raises(ZeroDivisionError):
        load_user_file(tmp_path / "broken.py")
    assert set(sys.modules) == before


@pytest.mark.parametrize(("name", "says"), [("nowhere.py", "no such file"), ("pipeline.toml", "must end in .py")])
def test_what_is_no_python_file_is_refused(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "pipeline.toml").write_text("")
    with pytest.raises(ConfigurationError, match=says):
        load_user_file(tmp_path / name)
