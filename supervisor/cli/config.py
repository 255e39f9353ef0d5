"""`speedlayer config`: every setting with its default, range and meaning."""

from __future__ import annotations

import textwrap
from typing import Optional

import click

from speedlayer.supervisor.cli.daemon import example, json_option
from speedlayer.supervisor.cli.output import print_json

_WIDTH = 100


@click.command(epilog=example("speedlayer config", "speedlayer config pipelines", "speedlayer config --json"))
@click.argument("section", required=False)
@json_option
@click.option("--markdown", is_flag=True, help="Print docs/configuration.md.")
def config(section: Optional[str], as_json: bool, markdown: bool) -> None:
    """List every setting: default, range and meaning. With SECTION, those of one section."""
    from speedlayer.supervisor import reference
    from speedlayer.supervisor.sections import sections

    chosen = [item for item in sections() if section in (None, item.name)]
    if not chosen:
        raise click.UsageError(f"there is no section {section!r}; there are {', '.join(s.name for s in sections())}")
    if markdown:
        click.echo(reference.configuration(), nl=False)
    elif as_json:
        names = {item.name for item in chosen}
        print_json([row for row in reference.as_data() if row["section"] in names])
    else:
        for item in chosen:
            click.echo(f"{item.title}  {item.meaning}")
            for entry in item.entries:
                click.echo(f"  {entry.key} = {reference.default_shown(entry)}   ({entry.setting.range})")
                click.echo(textwrap.indent(textwrap.fill(entry.setting.meaning, _WIDTH - 6), " " * 6))
            click.echo()
