"""The log: text for people or JSON lines, to standard error, without secrets (supervisor process, which alone writes).

Workers send their lines to the supervisor as reports, so one process writes and no line is torn by another.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from typing import Any, Optional, TextIO

from speedlayer.supervisor.settings import DaemonSettings, LogSettings

logger = logging.getLogger("speedlayer")
librdkafka_logger = logging.getLogger("speedlayer.librdkafka")

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

# A secret that is shorter is not searched for: hiding every "a" of the log would hide the log.
SHORTEST_SECRET = 4

HIDDEN = "***"

# Lines that may wait for whoever reads the log: some seconds of the worst chatter, about 10 MB.
BACKGROUND_LINES = 10_000

# How long the last lines may take at the end.
STOP_TIMEOUT_SECONDS = 2.0

# What librdkafka says again within this time is kept back, and counted; it remembers so many different lines.
REPEAT_SECONDS = 60.0
REPEAT_LINES = 1_000
_MILLISECONDS = re.compile(r"\d+ ?ms\b")

# The password in a URL, and in `key=value`, `"key": "value"` and `key: value` pairs whose key names a secret.
_URL_PASSWORD = re.compile(r"(?P<before>[a-z][a-z0-9+.-]*://[^\s:/@]*:)[^\s@]+(?=@)", re.IGNORECASE)
_NAMED_SECRET = re.compile(
    r"""(?P<before>\b(?:[\w.]*password|passwd|sslpassword|[\w.]*secret|[\w.]*\.pem)['"]?\s*[=:]\s*)"""
    r"""(?:'(?:\\.|[^'])*'|"(?:\\.|[^"])*"|[^\s'",;)}\]]+)""",
    re.IGNORECASE,
)
_SECRET_PROPERTY = re.compile(r"password|secret|\.pem$|sasl\.jaas|sasl\.oauthbearer\.config", re.IGNORECASE)


class Redactor:
    """Hides secrets in texts: those it was told of, and whatever looks like a password."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        # Longest first, so that a secret which is part of another does not leave the rest of it.
        known = sorted({secret for secret in secrets if len(secret) >= SHORTEST_SECRET}, key=len, reverse=True)
        self._known = re.compile("|".join(re.escape(secret) for secret in known)) if known else None

    def __call__(self, text: str) -> str:
        """Return the text without secrets."""
        if self._known is not None:
            text = self._known.sub(HIDDEN, text)
        text = _URL_PASSWORD.sub(rf"\g<before>{HIDDEN}", text)
        return _NAMED_SECRET.sub(rf"\g<before>{HIDDEN}", text)


def secrets_of(settings: DaemonSettings) -> set[str]:
    """Return the secrets among the settings: Kafka passwords and keys, and the passwords of the sinks' DSNs."""
    found = {str(value) for name, value in settings.kafka.items() if _SECRET_PROPERTY.search(name)}
    for pipeline in settings.pipelines:
        found.update(passwords_of(str(getattr(pipeline.sink, "dsn", ""))))
    return found


def passwords_of(dsn: str) -> set[str]:
    """Return the password in a DSN, as it is written there and as it is meant."""
    from urllib.parse import unquote

    written = re.findall(r"://[^\s:/@]*:([^\s@]+)@", dsn)
    written += re.findall(r"password\s*=\s*('(?:\\.|[^'])*'|[^\s&]+)", dsn)
    plain = {item.strip("'") for item in written}
    return plain | {unquote(item) for item in plain}


class TextFormatter(logging.Formatter):
    """One line for people: when, how bad, what, and the fields; a traceback below."""

    def __init__(self, redact: Redactor) -> None:
        super().__init__()
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        at = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
        line = f"{at} {record.levelname:7} {record.getMessage()}"
        shown = " ".join(f"{name}={_shown(value)}" for name, value in _fields_of(record).items())
        if shown:
            line += f"  [{shown}]"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return self._redact(line)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``at`` (UTC), ``level``, ``message``, the fields, and ``exception`` if there is one."""

    def __init__(self, redact: Redactor) -> None:
        super().__init__()
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        at = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        fields = {name: self._clean(name, value) for name, value in _fields_of(record).items()}
        line = {
            **fields,
            "at": at.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "message": self._redact(record.getMessage()),
        }
        if record.exc_info:
            line["exception"] = self._redact(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False, default=str)

    def _clean(self, name: str, value: Any) -> Any:
        if _SECRET_PROPERTY.search(name):
            return HIDDEN
        if value is None or isinstance(value, (bool, int, float)):
            return value
        return self._redact(str(value))


def _fields_of(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return fields


def _shown(value: Any) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[\s\"\]]", text) or not text else text


def configure(settings: LogSettings, secrets: Iterable[str] = (), stream: Optional[TextIO] = None) -> logging.Handler:
    """Make the log write to the stream (default: standard error) as the settings say; returns what writes."""
    redact = Redactor(secrets)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(redact) if settings.format == "json" else TextFormatter(redact))
    for old in list(logger.handlers):
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(LEVELS[settings.level])
    logger.propagate = False
    for old_filter in list(librdkafka_logger.filters):
        librdkafka_logger.removeFilter(old_filter)
    librdkafka_logger.addFilter(Sparing())
    return handler


class Sparing(logging.Filter):
    """Lets a line through that says nothing new only once in a while, with the count of those it kept back.

    While the brokers are away librdkafka tells of every attempt to connect, twenty times a second.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._seen: dict[
            str, tuple[float, int]
        ] = {}  # what a line says -> when it was last let through, kept back since

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is let through; what is debugged always is."""
        if record.levelno < logging.INFO:
            return True
        now, text = self._clock(), record.getMessage()
        key = _MILLISECONDS.sub("", text)
        told_at, kept_back = self._seen.get(key, (now - REPEAT_SECONDS, 0))
        if now - told_at < REPEAT_SECONDS:
            self._seen[key] = (told_at, kept_back + 1)
            return False
        if len(self._seen) >= REPEAT_LINES:
            self._seen.clear()
        self._seen[key] = (now, 0)
        if kept_back:
            record.msg, record.args = f"{text} (and {kept_back} more like it)", ()
        return True


class Background(logging.Handler):
    """Lets a thread do the writing: whoever reads standard error may stop reading, and the loop must turn.

    Lines wait in a bounded queue. When it is full, further ones are dropped and counted, and the count is written when
    there is room again.
    """

    def __init__(self, handler: logging.Handler, limit: int) -> None:
        super().__init__()
        self._handler = handler
        self._waiting: queue.Queue[Optional[logging.LogRecord]] = queue.Queue(limit)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record in, without waiting (any thread)."""
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def _run(self) -> None:
        while True:
            record = self._waiting.get()
            if record is None:
                return
            self._handler.handle(record)
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                message = f"{dropped} log lines were dropped: nobody read the log fast enough"
                self._handler.handle(logger.makeRecord(logger.name, logging.WARNING, "", 0, message, (), None))

    def stop(self) -> bool:
        """Write what waits; False if nobody reads it in time."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=STOP_TIMEOUT_SECONDS)
        self._thread.join(STOP_TIMEOUT_SECONDS)
        return not self._thread.is_alive()


def to_background(handler: logging.Handler, limit: int = BACKGROUND_LINES) -> Background:
    """Have a thread do what the handler did; `Background.stop` ends that."""
    background = Background(handler, limit)
    logger.removeHandler(handler)
    logger.addHandler(background)
    return background


def log(level: int, message: str, fields: Optional[Mapping[str, Any]] = None, exception: bool = False) -> None:
    """Write a line. ``level`` is one of the logging module's; ``exception`` adds the traceback of the current one."""
    logger.log(level, "%s", message, extra={"fields": dict(fields or {})}, exc_info=exception)
