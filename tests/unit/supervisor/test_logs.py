"""The log: two formats, and no secret in either."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Callable, Iterator

import pytest

from speedlayer.supervisor import logs
from speedlayer.supervisor.logs import Redactor
from speedlayer.supervisor.settings import LogSettings

Written = Callable[[], list[str]]


@pytest.fixture(autouse=True)
def the_log_as_it_was() -> Iterator[None]:
    handlers, level, propagate = list(logs.logger.handlers), logs.logger.level, logs.logger.propagate
    yield
    logs.logger.handlers[:] = handlers
    logs.logger.setLevel(level)
    logs.logger.propagate = propagate


def log_to(**settings: str) -> io.StringIO:
    stream = io.StringIO()
    logs.configure(LogSettings(**settings), secrets={"hunter2-secret"}, stream=stream)  # type: ignore[arg-type]
    return stream


def test_a_line_for_people_has_the_level_the_message_and_the_fields() -> None:
    stream = log_to()
    logs.log(logging.WARNING, "the pipeline pauses", {"pipeline": "orders", "seconds": 5.0, "why": "three strikes"})
    at, rest = stream.getvalue().split(" ", 1)
    assert at[4] == "-"
    assert at[10] == "T"
    assert rest == 'WARNING the pipeline pauses  [pipeline=orders seconds=5.000 why="three strikes"]\n'


def test_a_json_line_is_one_object_and_keeps_numbers() -> None:
    stream = log_to(format="json")
    logs.log(logging.INFO, "rows are\nwritten", {"rows": 10, "pipeline": "orders", "gap": None})
    (line,) = stream.getvalue().splitlines()
    read = json.loads(line)
    assert read.pop("at").endswith("Z")
    assert read == {"level": "info", "message": "rows are\nwritten", "rows": 10, "pipeline": "orders", "gap": None}


def test_lines_below_the_level_are_not_written() -> None:
    stream = log_to(level="warning")
    logs.log(logging.INFO, "nobody wants to know")
    logs.log(logging.ERROR, "everybody does")
    assert "nobody" not in stream.getvalue()
    assert "everybody" in stream.getvalue()


def test_other_loggers_of_speedlayer_write_to_the_same_place() -> None:
    stream = log_to()
    logging.getLogger("speedlayer.scout").warning("the broker is silent")
    assert "the broker is silent" in stream.getvalue()


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_traceback_is_written_without_the_secrets_in_it(form: str) -> None:
    stream = log_to(format=form)
    try:
        raise ValueError("could not log in with hunter2-secret at postgresql://app:opensesame@db/shop")
    except ValueError:
        logs.log(logging.ERROR, "a fault", exception=True)
    written = stream.getvalue()
    assert "ValueError" in written
    assert "hunter2-secret" not in written
    assert "opensesame" not in written
    assert (len(written.splitlines()) == 1) is (form == "json")


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("postgresql://app:opensesame@db:5432/shop", "postgresql://app:***@db:5432/shop"),
        ("postgresql://app@db/shop", "postgresql://app@db/shop"),
        ("postgresql://db:5432/shop", "postgresql://db:5432/shop"),
        ("host=db password=opensesame user=app", "host=db password=*** user=app"),
        ("host=db password='open \\' sesame' user=app", "host=db password=*** user=app"),
        ('{"sasl.password": "opensesame", "a": 1}', '{"sasl.password": ***, "a": 1}'),
        ("{'ssl.key.password': 'opensesame'}", "{'ssl.key.password': ***}"),
        ("sasl.oauthbearer.client.secret=opensesame", "sasl.oauthbearer.client.secret=***"),
        ("PGPASSWORD=opensesame", "PGPASSWORD=***"),
        ("no password was given", "no password was given"),
        ("password authentication failed for user", "password authentication failed for user"),
    ],
)
def test_what_looks_like_a_password_is_hidden(text: str, redacted: str) -> None:
    assert Redactor()(text) == redacted


def test_known_secrets_are_hidden_wherever_they_stand() -> None:
    redact = Redactor({"opensesame", "opensesame-and-more", "abc"})
    assert redact("xopensesame-and-morex abc opensesame") == "x***x abc ***"


@pytest.mark.parametrize(
    ("dsn", "passwords"),
    [
        ("postgresql://app:open%21sesame@db/shop", {"open%21sesame", "open!sesame"}),
        ("host=db password=opensesame", {"opensesame"}),
        ("host=db password='open sesame'", {"open sesame"}),
        ("postgresql://db/shop?password=opensesame&user=a", {"opensesame"}),
        ("postgresql://app@db/shop", set()),
    ],
)
def test_the_password_of_a_dsn_is_found(dsn: str, passwords: set[str]) -> None:
    assert logs.passwords_of(dsn) == passwords


def test_a_field_whose_name_says_secret_is_hidden() -> None:
    stream = log_to(format="json")
    logs.log(logging.INFO, "the configuration", {"sasl.password": "short", "client.id": "a"})
    read = json.loads(stream.getvalue())
    assert read["sasl.password"] == "***"
    assert read["client.id"] == "a"


def test_what_librdkafka_says_again_and_again_is_written_once_in_a_while_and_counted() -> None:
    stream = log_to()
    now = 0.0
    (old,) = logs.librdkafka_logger.filters
    logs.librdkafka_logger.removeFilter(old)
    sparing = logs.Sparing(lambda: now)
    logs.librdkafka_logger.addFilter(sparing)
    try:
        for attempt in range(1_200):  # an outage of a minute
            now = attempt / 20
            logs.librdkafka_logger.error("FAIL %s", f"broker-1:9092: Connection refused (after {attempt % 3}ms)")
            logs.librdkafka_logger.error("FAIL %s", f"broker-2:9092: Connection refused (after {attempt % 3}ms)")
        assert stream.getvalue().count("broker-1") == stream.getvalue().count("broker-2") == 1
        now = logs.REPEAT_SECONDS
        logs.librdkafka_logger.error("FAIL %s", "broker-1:9092: Connection refused (after 0ms)")
        assert stream.getvalue().endswith("(after 0ms) (and 1199 more like it)\n")
    finally:
        logs.librdkafka_logger.removeFilter(sparing)


def test_what_librdkafka_is_asked_to_debug_is_written_each_time() -> None:
    stream = log_to(level="debug")
    for _ in range(3):
        logs.librdkafka_logger.debug("SEND Sent Metadata request")
    assert stream.getvalue().count("SEND") == 3


class _Unread(io.StringIO):
    """A stream that nobody reads until ``readable`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.reader_came = threading.Event()
        self.handler = logs.configure(LogSettings(), stream=self)

    def write(self, text: str) -> int:
        assert self.reader_came.wait(30)
        return super().write(text)


@pytest.fixture
def unread() -> Iterator[_Unread]:
    stream = _Unread()
    yield stream
    stream.reader_came.set()


def test_a_log_that_nobody_reads_holds_nobody_up_and_counts_what_it_drops(unread: _Unread) -> None:
    background = logs.to_background(unread.handler, limit=10)
    for number in range(100):
        logs.log(logging.INFO, f"line {number}")
    assert unread.getvalue() == "", "nothing was written, and nobody waited"
    unread.reader_came.set()
    assert background.stop()
    lines = unread.getvalue().splitlines()
    written = [line for line in lines if "line " in line and "dropped" not in line]
    (dropped,) = [line for line in lines if "dropped" in line]
    assert [line.rsplit(" ", 1)[1] for line in written[:10]] == [str(number) for number in range(10)]
    assert f"{100 - len(written)} log lines were dropped" in dropped


def test_the_end_does_not_wait_for_a_reader_that_never_comes(unread: _Unread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "STOP_TIMEOUT_SECONDS", 0.05)
    background = logs.to_background(unread.handler)
    logs.log(logging.INFO, "the last words")
    assert not background.stop()
