"""SQL names: parsing ``schema."Mixed Case"`` and quoting whatever comes. Used in both processes.

Names are parsed once, when a sink is built, and only quoted names ever reach a statement: what a name contains
(quotes, spaces, semicolons, reserved words) is never looked at again.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Optional

from speedlayer.workers.errors import ConfigurationError

# NAMEDATALEN - 1: PostgreSQL cuts longer names with a mere notice, so two long names may become one.
NAME_LIMIT_BYTES = 63

_PART = re.compile(
    r"""\s*(?:
        "(?P<quoted>(?:[^"]|"")*)"              # anything, with " doubled
      | (?P<bare>[A-Za-z_\u0080-\U0010ffff][\w$\u0080-\U0010ffff]*)
    )\s*""",
    re.VERBOSE,
)
_EXAMPLES = 'write orders, public.orders or public."Mixed Case"'


class TableName(NamedTuple):
    """A parsed table name; ``schema`` is None when the search path decides."""

    schema: Optional[str]
    name: str

    @property
    def sql(self) -> str:
        """The name, quoted, for a statement."""
        parts = (self.name,) if self.schema is None else (self.schema, self.name)
        return ".".join(map(quote_identifier, parts))

    def __str__(self) -> str:
        return self.sql


def parse_table_name(text: str) -> TableName:
    """Parse a table name as PostgreSQL would: parts without quotes fold to lower case."""
    if not isinstance(text, str):
        raise ConfigurationError(f"table must be a text, not {text!r}; {_EXAMPLES}")
    parts, position = [], 0
    while True:
        match = _PART.match(text, position)
        if match is None:
            raise ConfigurationError(f"table: {text!r} is not an SQL name at character {position + 1}; {_EXAMPLES}")
        parts.append(_part_name(match, text))
        position = match.end()
        if position == len(text):
            break
        if text[position] != ".":
            raise ConfigurationError(
                f"table: {text!r} is not an SQL name at character {position + 1}; "
                f"a part with spaces or other signs needs double quotes; {_EXAMPLES}"
            )
        position += 1
    if len(parts) > 2:
        raise ConfigurationError(
            f"table: {text!r} has {len(parts)} parts; the database is named by the dsn; {_EXAMPLES}"
        )
    return TableName(*parts) if len(parts) == 2 else TableName(None, parts[0])


def _part_name(match: re.Match[str], text: str) -> str:
    quoted = match["quoted"]
    # PostgreSQL folds ASCII letters alone in a UTF-8 database.
    name = quoted.replace('""', '"') if quoted is not None else re.sub("[A-Z]+", _lower, match["bare"])
    check_identifier(name, f"table: {text!r}")
    return name


def _lower(match: re.Match[str]) -> str:
    return match[0].lower()


def check_identifier(name: str, what: str) -> None:
    """Refuse a name that PostgreSQL can not have; ``what`` begins the message."""
    if not name:
        raise ConfigurationError(f"{what}: a name can not be empty")
    if "\0" in name:
        raise ConfigurationError(f"{what}: a name can not contain a NUL character")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ConfigurationError(f"{what}: a name must be valid Unicode") from None
    if size > NAME_LIMIT_BYTES:
        raise ConfigurationError(
            f"{what}: {name!r} has {size} bytes; PostgreSQL's names have at most {NAME_LIMIT_BYTES}"
        )


def quote_identifier(name: str) -> str:
    """Quote any identifier (a NUL or an empty name, which no quoting can help, was refused before)."""
    return '"' + name.replace('"', '""') + '"'


def quote_literal(text: str) -> str:
    """Quote a text as an SQL string; the E form is read alike whatever ``standard_conforming_strings`` says."""
    return "E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"
