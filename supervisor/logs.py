"""The log: text for people or JSON lines, to standard error, without secrets (supervisor process, which alone writes).

Workers send their lines to the supervisor as reports, so one process writes and no line is torn by another.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any, Optional, TextIO

from speedlayer.supervisor.settings import DaemonSettings, LogSettings

logger = logging.getLogger("speedlayer")

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

# A secret that is shorter is not searched for: hiding every "a" of the log would hide the log.
SHORTEST_SECRET = 4

HIDDEN = "***"

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


def configure(settings: LogSettings, secrets: Iterable[str] = (), stream: Optional[TextIO] = None) -> None:
    """Make the log write to the stream (default: standard error) as the settings say."""
    redact = Redactor(secrets)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(redact) if settings.format == "json" else TextFormatter(redact))
    for old in list(logger.handlers):
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(LEVELS[settings.level])
    logger.propagate = False


def log(level: int, message: str, fields: Optional[Mapping[str, Any]] = None, exception: bool = False) -> None:
    """Write a line. ``level`` is one of the logging module's; ``exception`` adds the traceback of the current one."""
    logger.log(level, "%s", message, extra={"fields": dict(fields or {})}, exc_info=exception)
