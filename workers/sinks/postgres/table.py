"""The plan of a target table, read from the catalog; and making the table when asked.

Runs in the worker, before a session's first flight (and in `speedlayer check`). The plan is a value: the session loads
it again when the table may have changed, and then makes a new `TableWriter`.
"""

from __future__ import annotations

import decimal
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Optional

from speedlayer.workers.errors import ConfigurationError, SinkMisconfigured
from speedlayer.workers.sinks.postgres.kinds import Kind, without_key
from speedlayer.workers.sinks.postgres.names import (
    TableName,
    check_identifier,
    parse_table_name,
    quote_identifier,
    quote_literal,
)
from speedlayer.workers.sinks.postgres.rules import DEFAULT_RULES, ValueRules
from speedlayer.workers.sinks.postgres.type_kinds import load_kinds

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection
    from psycopg2.extensions import cursor as Cursor

    from speedlayer.workers.sinks.postgres.sink import PostgreSQLSink


class TableMissing(SinkMisconfigured):
    """There is no table of this name."""


@dataclass(frozen=True)
class Column:
    """A column as far as writing to it goes.

    ``default`` is what a record that lacks the field gets instead of NULL: "constant" (the same for every row) or
    "computed" (a sequence, ``now()``: made once for a row); empty if there is none.
    """

    name: str
    type_sql: str
    kind: Kind
    not_null: bool = False
    default: Literal["", "constant", "computed"] = ""
    generated: bool = False
    always_identity: bool = False
    collation_sql: str = ""


@dataclass(frozen=True)
class Table:
    """A table as far as writing to it goes."""

    schema: str
    name: str
    columns: tuple[Column, ...]
    primary_key: tuple[str, ...] = ()
    unique_keys: tuple[tuple[str, ...], ...] = ()  # that ON CONFLICT can use; the primary key among them
    row_security: bool = False
    foreign: bool = False
    missing_privileges: tuple[str, ...] = ()

    @property
    def sql(self) -> str:
        """The qualified name, quoted, for a statement."""
        return TableName(self.schema, self.name).sql

    def column(self, name: str) -> Optional[Column]:
        """The column of this name."""
        return next((column for column in self.columns if column.name == name), None)

    @classmethod
    def load(cls, connection: Connection, name: str, rules: ValueRules = DEFAULT_RULES) -> Table:
        """Read the plan of ``name`` (an SQL name), for values written by ``rules``.

        Only SELECTs; it neither commits nor rolls back.

        Raises `TableMissing` when there is no such table, `SinkMisconfigured` with a remedy when nothing can be
        written to it.
        """
        parsed = parse_table_name(name)
        with connection.cursor() as cursor:
            relation = _relation(cursor, parsed)
            if relation.kind not in _WRITABLE_KINDS:
                raise SinkMisconfigured(
                    f"{parsed.sql} is {_KIND_NAMES.get(relation.kind, 'not a table')}, and COPY can not write to it",
                    remedy="name the table behind it",
                )
            columns = _columns(cursor, relation.oid, rules)
            primary_key, unique_keys = _keys(cursor, relation.oid)
        return cls(
            schema=relation.schema,
            name=relation.name,
            columns=columns,
            primary_key=primary_key,
            unique_keys=unique_keys,
            row_security=relation.row_security,
            foreign=relation.kind == "f",
            missing_privileges=relation.missing_privileges,
        )

    def key_of(self, sink: PostgreSQLSink) -> tuple[str, ...]:
        """The columns that tell an upsert's rows apart: the sink's key, else the primary key; () for append.

        Raises `SinkMisconfigured` with the remedy when ON CONFLICT can not use them, or when the sink may not write.
        """
        self._check_privileges(sink)
        if sink.mode != "upsert":
            return ()
        key = sink.key_columns or self.primary_key
        if not key:
            raise SinkMisconfigured(
                f"{self.sql} has no primary key, and the sink names no key to upsert by",
                remedy="give the sink a key, or the table a primary key",
            )
        for name in key:
            column = self.column(name)
            if column is None:
                raise SinkMisconfigured(
                    f"key column {quote_identifier(name)} does not exist in {self.sql}",
                    remedy=f"its columns are: {', '.join(column.name for column in self.columns)}",
                )
            if column.generated:
                raise SinkMisconfigured(
                    f"key column {quote_identifier(name)} of {self.sql} is computed by the table",
                    remedy="use a key of columns that records fill",
                )
        if self.foreign:
            raise SinkMisconfigured(f"{self.sql} is a foreign table, which can not be upserted", remedy='mode="append"')
        if not any(set(key) == set(unique) for unique in self.unique_keys):
            listed = ", ".join(map(quote_identifier, key))
            raise SinkMisconfigured(
                f"{self.sql} has no unique index on ({listed}) that ON CONFLICT can use (valid, not deferrable, "
                "without WHERE, on plain columns)",
                remedy=f"CREATE UNIQUE INDEX CONCURRENTLY ON {self.sql} ({listed})",
            )
        return key

    def _check_privileges(self, sink: PostgreSQLSink) -> None:
        upsert = sink.mode == "upsert"
        wanted = {"INSERT", "SELECT", "UPDATE"} if upsert else {"INSERT"}
        missing = sorted(wanted.intersection(self.missing_privileges))
        if missing:
            raise SinkMisconfigured(
                f"no {' and no '.join(missing)} privilege on {self.sql}",
                sqlstate="42501",
                remedy=f"GRANT {', '.join(missing)} ON {self.sql} TO …",
            )
        if (upsert or self.row_security) and "TEMPORARY" in self.missing_privileges:
            raise SinkMisconfigured(
                f"no TEMPORARY privilege on the database, where rows for {self.sql} are staged",
                sqlstate="42501",
                remedy="GRANT TEMPORARY ON DATABASE … TO …",
            )


# --- The catalog -----------------------------------------------------------------------------------------------------

_WRITABLE_KINDS = ("r", "p", "f")
_KIND_NAMES = {"v": "a view", "m": "a materialized view", "S": "a sequence", "i": "an index", "c": "a type"}

_RELATION = """
SELECT c.oid, n.nspname, c.relname, c.relkind::text, pg_catalog.row_security_active(c.oid),
       ARRAY(SELECT p FROM pg_catalog.unnest(ARRAY['INSERT', 'SELECT', 'UPDATE']) AS p
             WHERE NOT pg_catalog.has_any_column_privilege(c.oid, p)),
       pg_catalog.has_database_privilege(pg_catalog.current_database(), 'TEMPORARY')
FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.oid = pg_catalog.to_regclass(%s)
"""

# A domain may bring a default, and has the collation of the type below it, so `base` walks down to that.
_COLUMNS = """
WITH RECURSIVE base AS (
    SELECT a.attnum, t.oid, t.typtype, t.typbasetype, t.typdefaultbin IS NOT NULL AS defaults, 0 AS depth
    FROM pg_catalog.pg_attribute AS a JOIN pg_catalog.pg_type AS t ON t.oid = a.atttypid
    WHERE a.attrelid = %(oid)s AND a.attnum > 0 AND NOT a.attisdropped
  UNION ALL
    SELECT b.attnum, t.oid, t.typtype, t.typbasetype, b.defaults OR t.typdefaultbin IS NOT NULL, b.depth + 1
    FROM base AS b JOIN pg_catalog.pg_type AS t ON t.oid = b.typbasetype
    WHERE b.typtype = 'd'
)
SELECT a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attgenerated <> '',
       a.attidentity::text, d.adbin::text, b.defaults,
       a.atttypid::bigint,
       CASE WHEN a.attcollation <> t.typcollation
            THEN pg_catalog.quote_ident(ln.nspname) || '.' || pg_catalog.quote_ident(l.collname) ELSE '' END,
       COALESCE(l.collisdeterministic, true)
FROM pg_catalog.pg_attribute AS a
JOIN base AS b ON b.attnum = a.attnum AND b.typtype <> 'd'
JOIN pg_catalog.pg_type AS t ON t.oid = b.oid
LEFT JOIN pg_catalog.pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
LEFT JOIN pg_catalog.pg_collation AS l ON l.oid = a.attcollation
LEFT JOIN pg_catalog.pg_namespace AS ln ON ln.oid = l.collnamespace
WHERE a.attrelid = %(oid)s
ORDER BY a.attnum
"""

_KEYS = """
SELECT i.indisprimary, ARRAY(
    SELECT a.attname::text FROM pg_catalog.unnest(i.indkey) WITH ORDINALITY AS k (attnum, position)
    JOIN pg_catalog.pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
    WHERE k.position <= i.indnkeyatts ORDER BY k.position)
FROM pg_catalog.pg_index AS i
WHERE i.indrelid = %s AND i.indisunique AND i.indisvalid AND i.indisready AND i.indimmediate
  AND i.indpred IS NULL AND i.indexprs IS NULL
ORDER BY i.indisprimary DESC, i.indexrelid
"""


@dataclass(frozen=True)
class _Relation:
    oid: int
    schema: str
    name: str
    kind: str
    row_security: bool
    missing_privileges: tuple[str, ...]


def _relation(cursor: Cursor, name: TableName) -> _Relation:
    cursor.execute(_RELATION, (name.sql,))
    found = cursor.fetchone()
    if found is None:
        raise TableMissing(
            f"table {name.sql} does not exist",
            sqlstate="42P01",
            remedy="create it, or set create_table = true; a name without a schema is looked for on the search path",
        )
    oid, schema, relation, kind, row_security, missing, temporary = found
    missing_privileges = (*missing, *(() if temporary else ("TEMPORARY",)))
    return _Relation(oid, schema, relation, kind, row_security, missing_privileges)


def _columns(cursor: Cursor, oid: int, rules: ValueRules) -> tuple[Column, ...]:
    cursor.execute(_COLUMNS, {"oid": oid})
    found = cursor.fetchall()
    kinds = load_kinds(cursor, oid, rules)
    expressions = [row[5] for row in found if row[5] is not None and not row[3]]
    constant = _constant_expressions(cursor, expressions)
    columns = []
    for (
        name, type_sql, not_null, generated, identity, expression, domain_default,
        type_oid, collation, deterministic,
    ) in found:  # fmt: skip
        default: Literal["", "constant", "computed"] = ""
        if identity or domain_default:
            default = "computed"
        elif expression is not None and not generated:
            default = "constant" if expression in constant else "computed"
        kind = kinds[type_oid]
        columns.append(
            Column(
                name=name,
                type_sql=type_sql,
                kind=kind if deterministic else without_key(kind),
                not_null=not_null,
                default=default,
                generated=generated,
                always_identity=identity == "a",
                collation_sql=collation,
            )
        )
    return tuple(columns)


# In an expression's tree: the functions it calls, and the nodes that compute without one.
_FUNCTION = re.compile(r":(?:funcid|opfuncid|hashfuncid|negfuncid) (\d+)")
_COMPUTING_NODES = ("{NEXTVALUEEXPR", "{SQLVALUEFUNCTION", "{COERCEVIAIO")


def _constant_expressions(cursor: Cursor, trees: Sequence[str]) -> set[str]:
    """Those default expressions that give every row the same: no function in them is stable or volatile."""
    functions = {int(oid) for tree in trees for oid in _FUNCTION.findall(tree)} - {0}
    immutable: set[int] = set()
    if functions:
        cursor.execute(
            "SELECT oid FROM pg_catalog.pg_proc WHERE oid = ANY(%s::oid[]) AND provolatile = 'i'", (list(functions),)
        )
        immutable = {oid for (oid,) in cursor.fetchall()}
    return {
        tree
        for tree in trees
        if immutable.issuperset({int(oid) for oid in _FUNCTION.findall(tree)} - {0})
        and not any(node in tree for node in _COMPUTING_NODES)
    }


def _keys(cursor: Cursor, oid: int) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    cursor.execute(_KEYS, (oid,))
    found = [(primary, tuple(columns)) for primary, columns in cursor.fetchall()]
    primary_key = next((columns for primary, columns in found if primary), ())
    return primary_key, tuple(dict.fromkeys(columns for _, columns in found))


# --- Making a table --------------------------------------------------------------------------------------------------

_BIGINT = range(-(2**63), 2**63)


def load_for(
    connection: Connection,
    sink: PostgreSQLSink,
    records: Callable[[], Sequence[Mapping[str, Any]]] = tuple,
) -> Optional[Table]:
    """The plan of the sink's table, its key checked; with ``create_table``, a missing table is made first.

    The columns of a new table are the sink's ``columns``, else inferred from ``records()``, those of the flight at hand
    (transformed). Making it commits, so call this outside of a transaction. None when the table is to be made and there
    is no record to make it from: then nothing of the flight can become a row.
    """
    try:
        table = Table.load(connection, sink.table, sink.value_rules)
    except TableMissing:
        if not sink.create_table:
            raise
        columns = dict(sink.columns) if sink.columns else infer_columns(records())
        if not columns:
            return None
        create_table(connection, sink.table, columns, sink.key_columns)
        table = Table.load(connection, sink.table, sink.value_rules)
    table.key_of(sink)
    return table


def infer_columns(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Column types for a table that does not exist yet, in the order in which the fields first appear.

    Whole numbers become bigint, other numbers numeric (which keeps their digits), booleans boolean, objects and arrays
    jsonb, and all else, also a field of several kinds, text. A field whose name PostgreSQL can not have is left out.
    """
    seen: dict[str, set[str]] = {}
    for record in records:
        for name, value in record.items():
            seen.setdefault(name, set()).add(_inferred_type(value))
    columns = {}
    for name, types in seen.items():
        try:
            check_identifier(name, "field")
        except ConfigurationError:
            continue
        columns[name] = _common_type(types - {""})
    return columns


def _inferred_type(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "bigint" if value in _BIGINT else "numeric"
    if isinstance(value, (float, decimal.Decimal)):
        return "numeric"
    return "jsonb" if isinstance(value, (dict, list)) else "text"


def _common_type(types: set[str]) -> str:
    if len(types) == 1:
        return next(iter(types))
    return "numeric" if types == {"bigint", "numeric"} else "text"


def create_table(connection: Connection, name: str, columns: Mapping[str, str], key: Sequence[str]) -> None:
    """CREATE TABLE, once, however many workers try; commits."""
    parsed = parse_table_name(name)
    for column in key:
        if column not in columns:
            raise SinkMisconfigured(
                f"the new table {parsed.sql} would have no column {quote_identifier(column)} for its key",
                remedy="name it in the sink's columns",
            )
    # A type is SQL (numeric(12, 2) NOT NULL), and comes from the pipeline's author.
    parts = [f"{quote_identifier(column)} {type_sql}" for column, type_sql in columns.items()]
    if key:
        parts.append(f"PRIMARY KEY ({', '.join(map(quote_identifier, key))})")
    # CREATE TABLE IF NOT EXISTS can fail with a unique violation when two run at the same time, hence the lock. One
    # string is one transaction, also on a connection in autocommit.
    lock = f"SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtext({quote_literal('speedlayer ' + parsed.sql)}))"
    with connection.cursor() as cursor:
        cursor.execute(f"{lock}; CREATE TABLE IF NOT EXISTS {parsed.sql} ({', '.join(parts)})")
    connection.commit()
