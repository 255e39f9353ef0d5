"""`speedlayer init`: a commented configuration to start from, and the SQL for the database's administrator."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Optional

import click

from speedlayer.supervisor.cli.daemon import example
from speedlayer.supervisor.errors import ConfigurationError
from speedlayer.supervisor.sections import Entry, Section, sections
from speedlayer.supervisor.settings import shown

_WIDTH = 100

_HEAD = """\
# speedlayer: Kafka topics into PostgreSQL tables. Each setting with its default; what is commented out is the default.
#
#     speedlayer check {name}      looks for what would keep it from running
#     speedlayer run {name}        runs it
#
# ${{NAME}} in a text is the environment variable NAME; ${{NAME:-default}} has a default.
"""


@click.command(
    epilog=example(
        "speedlayer init --topic orders --table public.orders",
        "speedlayer init --print-sql --role speedlayer --table public.orders | psql shop",
    )
)
@click.argument("file", type=click.Path(path_type=Path), default=Path("speedlayer.toml"))
@click.option("--bootstrap-servers", default="localhost:9092", show_default=True, help="The Kafka brokers.")
@click.option("--group", "group_id", default="speed-layer", show_default=True, help="The consumer group.")
@click.option("--topic", default="orders", show_default=True, help="The topic to read.")
@click.option("--table", help="The table to write to, as SQL names it.  [default: public.TOPIC]")
@click.option("--key", multiple=True, help="A column of the key, for upserts (may be repeated).")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@click.option("--print-sql", is_flag=True, help="Print the schema and the least privileges as SQL, and write nothing.")
@click.option("--role", default="speedlayer", show_default=True, help="The role that is granted them.")
def init(
    file: Path,
    bootstrap_servers: str,
    group_id: str,
    topic: str,
    table: Optional[str],
    key: tuple[str, ...],
    force: bool,
    print_sql: bool,
    role: str,
) -> None:
    """Write a commented configuration to FILE, or print the SQL that prepares the database."""
    if print_sql:
        from speedlayer.workers.sinks.postgres import schema

        click.echo(schema.print_sql(role, [table] if table else []), nl=False)
        return
    if file.suffix != ".toml":
        raise ConfigurationError(f"{file}: its name must end in .toml")
    if file.exists() and not force:
        raise ConfigurationError(f"{file} exists; --force overwrites it")
    text = template(
        file.name,
        bootstrap_servers=bootstrap_servers,
        group_id=group_id,
        topic=topic,
        table=table or f"public.{topic}",
        key=key,
    )
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{file} can not be written: {error.strerror}") from error
    click.echo(f"wrote {file}; set SPEEDLAYER_DSN, then: speedlayer check {file}")


def template(name: str, *, bootstrap_servers: str, group_id: str, topic: str, table: str, key: tuple[str, ...]) -> str:
    """Return a configuration with every setting in it; those that are given stand uncommented."""
    given: dict[str, dict[str, object]] = {
        "kafka": {"bootstrap.servers": bootstrap_servers, "group.id": group_id},
        "postgres": {"dsn": "${SPEEDLAYER_DSN}"},
        "pipelines": {
            "name": topic,
            "topics": [topic],
            "table": table,
            "mode": "upsert" if key else "append",
            **({"key": list(key)} if key else {}),
        },
    }
    parts = [_HEAD.format(name=name)]
    parts += [_section(section, given.get(section.name, {})) for section in sections()]
    return "\n".join(parts)


def _section(section: Section, given: Mapping[str, object]) -> str:
    lines = [_comment(section.meaning)]
    # A table of its own would hide the keys below it from the pipeline, so it stays a comment until it is used.
    lines.append(f"# {section.title}" if section.name == "pipelines.brake" else section.title)
    return "\n".join(lines) + "\n" + "\n".join(_entry(entry, given) for entry in section.entries)


def _entry(entry: Entry, given: Mapping[str, object]) -> str:
    setting = entry.setting
    bounded = setting.choices or setting.minimum is not None or setting.kind == "boolean"
    comment = _comment(f"{setting.meaning} ({setting.range})" if bounded else setting.meaning)
    key = shown(entry.key) if "." in entry.key else entry.key
    if entry.key in given:
        return f"{comment}\n{key} = {shown(given[entry.key])}\n"
    default = "…" if entry.default is None else shown(entry.default)
    return f"{comment}\n# {key} = {default}\n"


def _comment(text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent="# ", subsequent_indent="# ")
