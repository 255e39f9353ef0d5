"""Which `Kind` a type of the catalog has: domains, arrays, composite types and extensions' types (worker)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from speedlayer.workers.sinks.postgres.kinds import VECTOR, Kind
from speedlayer.workers.sinks.postgres.literals import array_of, composite_of, hstore_of
from speedlayer.workers.sinks.postgres.ruled_kinds import kind_of, kinds_for
from speedlayer.workers.sinks.postgres.rules import ValueRules

if TYPE_CHECKING:
    from psycopg2.extensions import cursor as Cursor

# Every type that a table's columns have, and those that these are made of. A composite type can not hold itself.
_TYPES = """
WITH RECURSIVE used (oid) AS (
    SELECT a.atttypid FROM pg_catalog.pg_attribute AS a
    WHERE a.attrelid = %(oid)s AND a.attnum > 0 AND NOT a.attisdropped
  UNION
    SELECT part.oid
    FROM used JOIN pg_catalog.pg_type AS t ON t.oid = used.oid
    CROSS JOIN LATERAL (
        SELECT t.typbasetype AS oid WHERE t.typtype = 'd'
      UNION ALL SELECT t.typelem WHERE t.typcategory = 'A' AND t.typtype <> 'd' AND t.typelem <> 0
      UNION ALL SELECT a.atttypid FROM pg_catalog.pg_attribute AS a
        WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
    ) AS part
)
SELECT t.oid::bigint, n.nspname = 'pg_catalog', t.typname::text, pg_catalog.format_type(t.oid, NULL), t.typtype::text,
       t.typdelim::text, t.typbasetype::bigint, CASE WHEN t.typcategory = 'A' THEN t.typelem::bigint ELSE 0 END,
       ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute AS a
             WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
             ORDER BY a.attnum),
       ARRAY(SELECT a.atttypid::bigint FROM pg_catalog.pg_attribute AS a
             WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
             ORDER BY a.attnum)
FROM used JOIN pg_catalog.pg_type AS t ON t.oid = used.oid
JOIN pg_catalog.pg_namespace AS n ON n.oid = t.typnamespace
"""

# Types of extensions, which may be in any schema.
_HSTORE = "hstore"
_VECTORS = frozenset({"vector", "halfvec"})


@dataclass(frozen=True)
class _Type:
    own: bool  # PostgreSQL's own, in pg_catalog
    name: str
    type_sql: str
    category: str  # pg_type.typtype: b(ase), c(omposite), d(omain), e(num), r(ange), m(ultirange)
    delimiter: str
    base: int
    element: int
    attributes: tuple[tuple[str, int], ...]


def load_kinds(cursor: Cursor, relation: int, rules: ValueRules) -> dict[int, Kind]:
    """The kind of each type that the relation's columns have, by the type's oid."""
    cursor.execute(_TYPES, {"oid": relation})
    types = {
        oid: _Type(own, name, type_sql, category, delimiter, base, element, tuple(zip(names, parts, strict=True)))
        for oid, own, name, type_sql, category, delimiter, base, element, names, parts in cursor.fetchall()
    }
    kinds: dict[int, Kind] = {}
    for oid in types:
        _resolve(oid, types, kinds, rules)
    return kinds


def _resolve(oid: int, types: Mapping[int, _Type], kinds: dict[int, Kind], rules: ValueRules) -> Kind:
    known = kinds.get(oid)
    if known is None:
        known = kinds[oid] = _kind(types[oid], types, kinds, rules)
    return known


def _kind(found: _Type, types: Mapping[int, _Type], kinds: dict[int, Kind], rules: ValueRules) -> Kind:
    if found.category == "d":  # a domain is written like the type below it
        return _resolve(found.base, types, kinds, rules)
    if found.element:
        return array_of(_resolve(found.element, types, kinds, rules), types[found.element].delimiter)
    if found.category == "c":
        attributes = tuple((name, _resolve(part, types, kinds, rules)) for name, part in found.attributes)
        return composite_of(found.type_sql, attributes, ignore_unknown=rules.ignore_unknown)
    if found.own:
        return kind_of(found.name, rules)
    if found.category == "b" and found.name == _HSTORE:
        return hstore_of(rules)
    if found.category == "b" and found.name in _VECTORS:
        return VECTOR
    return kinds_for(rules)[""]
