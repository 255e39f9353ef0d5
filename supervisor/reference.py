"""Writes the reference from the code: settings, exit codes, metrics (a process of its own).

    python -m speedlayer.supervisor.reference docs

writes configuration.md, exit-codes.md, metrics.md and signals.md there. A test compares them with the code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from speedlayer.supervisor import kafka_properties, signals
from speedlayer.supervisor.exit_codes import ExitCode
from speedlayer.supervisor.metrics import GROUPS
from speedlayer.supervisor.sections import Entry, Section, sections
from speedlayer.supervisor.settings import shown

_NOTE = "<!-- Written by `python -m speedlayer.supervisor.reference docs`; do not edit. -->"

_CONFIGURATION = """# Configuration

{note}

`speedlayer run FILE.toml` reads these sections and keys. An unknown key, a wrong type or a missing variable is an error
that names the file, the key and the nearest valid key. `speedlayer init` writes a commented file to start from, and
`speedlayer config` prints this list.

`${{NAME}}` in any text is replaced by the environment variable `NAME`, `${{NAME:-default}}` by the default where it is
not set or empty; `$${{` stands for `${{` itself. A text that holds a variable may stand for a number or for `true` and
`false`.

In Python, `SimpleStreamingEngine` and `PostgreSQLSink` take the same settings as arguments:
{arguments}
"""

# Where the Python interface has another name for a setting.
PYTHON_NAMES: dict[tuple[str, str], str] = {
    ("postgres", "dsn"): "PostgreSQLSink(dsn, …)",
    ("workers", "count"): "SimpleStreamingEngine(workers=…)",
    ("memory", "budget_mb"): "SimpleStreamingEngine(memory_budget_mb=…)",
    ("shutdown", "deadline_seconds"): "SimpleStreamingEngine(shutdown_deadline_seconds=…)",
    ("watchdog", "stall_seconds"): "SimpleStreamingEngine(stall_seconds=…)",
    ("watchdog", "user_code_seconds"): "SimpleStreamingEngine(user_code_seconds=…)",
    ("control", "socket"): "SimpleStreamingEngine(control_socket=…)",
    ("http", "listen"): "SimpleStreamingEngine(http_listen=…)",
    ("log", "level"): "SimpleStreamingEngine(log_level=…)",
    ("log", "format"): "SimpleStreamingEngine(log_format=…)",
    ("pipelines", "name"): "engine.dataframe(source, name=…)",
    ("pipelines", "topics"): "KafkaSource(*topics)",
    ("pipelines", "group_id"): "KafkaSource(…, group_id=…)",
    ("pipelines", "start"): "KafkaSource(…, start=…)",
    ("pipelines", "on_out_of_range"): "KafkaSource(…, on_out_of_range=…)",
    ("pipelines", "batch_rows"): "PostgreSQLSink(…, batch_size=…)",
    ("pipelines", "batch_seconds"): "PostgreSQLSink(…, flush_interval_seconds=…)",
    ("pipelines", "filter"): "dataframe.filter(function)",
    ("pipelines", "map"): "dataframe.map(function)",
    ("pipelines", "dead_letter_ratio"): "dataframe.sink(sink, dead_letter_ratio=…)",
    ("pipelines", "dead_letter_minimum"): "dataframe.sink(sink, dead_letter_minimum=…)",
    ("pipelines", "dead_letter_window_seconds"): "dataframe.sink(sink, dead_letter_window_seconds=…)",
}


def default_shown(entry: Entry) -> str:
    """Show the default of a setting as TOML writes it."""
    if entry.required:
        return "required"
    return "none" if entry.default is None else shown(entry.default)


def as_data() -> list[dict[str, Any]]:
    """Return every setting as plain values, for `speedlayer config --json`."""
    return [
        {
            "section": section.name,
            "key": entry.key,
            "required": entry.required,
            "default": None if entry.required else entry.default,
            "range": entry.setting.range,
            "meaning": entry.setting.meaning,
        }
        for section in sections()
        for entry in section.entries
    ]


def configuration() -> str:
    """Write docs/configuration.md."""
    names = [f"| `[{section}]` `{key}` | `{python}` |" for (section, key), python in PYTHON_NAMES.items()]
    arguments = "\n".join(["", "| in the file | in Python |", "|---|---|", *names])
    parts = [_CONFIGURATION.format(note=_NOTE, arguments=arguments)]
    parts += [_section(section) for section in sections()]
    return "\n".join(parts)


def _section(section: Section) -> str:
    rows = (
        (f"`{entry.key}`", f"`{default_shown(entry)}`", _cell(entry.setting.range), _cell(entry.setting.meaning))
        for entry in section.entries
    )
    text = f"## `{section.title}`\n\n{section.meaning}\n\n" + _table(("key", "default", "range", "meaning"), rows)
    return text + _default_properties() + _refused_properties() if section.open else text


def _default_properties() -> str:
    rows = ((f"`{name}`", str(value), _cell(why)) for name, (value, why) in kafka_properties.DEFAULTS.items())
    return "\nThese have another default than librdkafka's own:\n\n" + _table(("property", "default", "why"), rows)


def _refused_properties() -> str:
    rows = ((f"`{name}`", _cell(allowed), _cell(reason)) for name, allowed, reason in kafka_properties.refusals())
    return "\nThese properties are speedlayer's own, or keep its promises with these values alone:\n\n" + _table(
        ("property", "allowed", "why"), rows
    )


def exit_codes() -> str:
    """Write docs/exit-codes.md."""
    rows = ((str(code.value), f"`{code.name}`", _cell(code.meaning)) for code in ExitCode)
    text = "Every command of `speedlayer`, the daemon (`run`, `engine.run()`) among them, ends with one of these.\n"
    return f"# Exit codes\n\n{_NOTE}\n\n{text}\n" + _table(("code", "name", "meaning"), rows)


def metrics() -> str:
    """Write docs/metrics.md."""
    text = (
        "With `[http]` `listen` (or `speedlayer run --http`), the daemon serves Prometheus metrics on `/metrics`.\n"
        "`/healthz` answers 200 while the supervisor's loop turns, `/readyz` while partitions are assigned and a\n"
        "worker takes flights; otherwise both answer 503 with the reason.\n"
    )
    parts = [f"# Metrics\n\n{_NOTE}\n\n{text}"]
    for group in GROUPS:
        labels = f"Labels: {', '.join(f'`{label}`' for label in group.labels)}.\n\n" if group.labels else ""
        rows = ((f"`{metric.full_name}`", metric.kind, _cell(metric.meaning)) for metric in group.metrics)
        parts.append(f"## {group.title}\n\n{labels}" + _table(("metric", "kind", "meaning"), rows))
    return "\n".join(parts)


def handled_signals() -> str:
    """Write docs/signals.md."""
    parts = [f"# Signals\n\n{_NOTE}\n"]
    for title, table in (("The daemon (supervisor process)", signals.SUPERVISOR), ("A worker process", signals.WORKER)):
        rows = ((f"`{number.name}`", _cell(meaning)) for number, meaning in table.items())
        parts.append(f"## {title}\n\n" + _table(("signal", "what it does"), rows))
    return "\n".join(parts)


FILES = {
    "configuration.md": configuration,
    "exit-codes.md": exit_codes,
    "metrics.md": metrics,
    "signals.md": handled_signals,
}


def _table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def write(folder: Path) -> None:
    """Write the files of the reference into the folder."""
    for name, make in FILES.items():
        (folder / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
