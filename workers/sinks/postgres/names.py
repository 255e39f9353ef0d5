"""SQL names: parsing `schema."Mixed Case"` and quoting. Runs in both processes."""

from __future__ import annotations

from typing import NamedTuple, Optional


class TableName(NamedTuple):
    """A parsed table name; ``schema`` is None when the search path decides."""

    schema: Optional[str]
    name: str

    @property
    def sql(self) -> str:
        """The name, quoted, for a statement."""
        raise NotImplementedError


def parse_table_name(text: str) -> TableName:
    """Parse a table name as PostgreSQL would (unquoted parts fold to lower case); raises `ConfigurationError`."""
    raise NotImplementedError


def quote_identifier(name: str) -> str:
    """Quote any identifier."""
    raise NotImplementedError
