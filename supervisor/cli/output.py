"""How commands print: tables, durations and sizes for people, JSON for programs (any process of the user)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Optional

import click

NOTHING = "–"


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def duration(seconds: Optional[float]) -> str:
    """Show a duration with its two largest units: ``2 h 5 min``, ``1.4 s``, ``12 ms``."""
    if seconds is None:
        return NOTHING
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    units = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))
    parts = []
    for name, length in units:
        count, whole = divmod(whole, length)
        if count:
            parts.append(f"{count} {name}")
        elif parts:
            break
    return " ".join(parts[:2])


def size(count: Optional[float]) -> str:
    """Show a number of bytes: ``512 B``, ``1.5 MB``."""
    if count is None:
        return NOTHING
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TB"


def amount(value: Optional[float]) -> str:
    """Show a count or a rate: thousands set apart, broken numbers only when they are small."""
    if value is None:
        return NOTHING
    if value < 10 and value != int(value):
        return f"{value:.1f}"
    return f"{value:,.0f}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Lay out rows below headings; the columns named in ``right`` are aligned to the right."""
    widths = [max(len(row[index]) for row in (headings, *rows)) for index in range(len(headings))]
    lines = []
    for row in (headings, *rows):
        cells = [
            cell.rjust(width) if heading in right else cell.ljust(width)
            for heading, cell, width in zip(headings, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
