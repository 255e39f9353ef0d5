"""Each line of docs/types.md, against real servers: what a JSON value becomes in a column of each type."""

from __future__ import annotations

import random
from typing import Any

import psycopg2
import pytest

from fixtures.conversions import DOCUMENT, FAMILIES, TYPES, VALUE_KINDS, Case, Dead, Type, document
from fixtures.postgres import PostgresServer, execute, query, scalar
from fixtures.tables import Pipeline

WAYS = pytest.mark.parametrize("transform", [None, dict], ids=["straight", "transformed"])


def test_docs_types_md_is_the_list_of_these_tests() -> None:
    remedy = "docs/types.md is out of date: python tests/fixtures/conversions.py"
    assert DOCUMENT.read_text(encoding="utf-8") == document(), remedy


def test_every_type_has_every_kind_of_json_value() -> None:
    lacking = [(each.title, kind) for each in TYPES for kind in VALUE_KINDS if not _has(each, kind)]
    assert lacking == []
    assert len({each.title for each in TYPES}) == len(TYPES)


def _has(each: Type, kind: str) -> bool:
    return any(case.value_kind == kind for case in each.cases)


@WAYS
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.title)
def test_every_cell_is_what_the_server_shows(
    each_postgres: PostgresServer, each_postgres_dsn: str, family: Any, transform: Any
) -> None:
    execute(each_postgres_dsn, f"ALTER DATABASE {each_postgres_dsn.rsplit('/', 1)[1]} SET timezone = 'Asia/Kolkata'")
    wrong = []
    for each in family.types:
        if each.since <= each_postgres.major_version and _make_table(each_postgres, each_postgres_dsn, each):
            wrong += _wrong_cells(each_postgres_dsn, each, transform)
    assert wrong == []


def _make_table(server: PostgresServer, dsn: str, each: Type) -> bool:
    """The table of one column; False where the server has no such extension (`test_the_extensions…` says which)."""
    execute(dsn, "DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    if each.needs:
        if each.needs not in _extensions(dsn):
            return False
        execute(dsn, f"CREATE EXTENSION {each.needs}")
    execute(dsn, each.setup or "SELECT 1")
    execute(dsn, f"CREATE TABLE orders (v {each.sql})")
    return True


def _extensions(dsn: str) -> set[str]:
    return {name for (name,) in query(dsn, "SELECT name FROM pg_available_extensions")}


def test_the_extensions_are_there_on_one_server_at_least(each_postgres: PostgresServer, each_postgres_dsn: str) -> None:
    # pgvector comes with the embedded servers; Debian has it for other versions than the system's.
    wanted = {each.needs for each in TYPES if each.needs}
    if each_postgres.installation.origin != "embedded":
        wanted -= {"vector"}
    assert wanted - _extensions(each_postgres_dsn) == set()


def _wrong_cells(dsn: str, each: Type, transform: Any) -> list[tuple[str, str, Any, Any]]:
    wrong = []
    with Pipeline(dsn, transform=transform, **each.settings) as pipeline:
        for case in (*each.cases, Case("null", "NULL")):
            expected = case.outcome_after(transform)
            found = _found(pipeline, case)
            if not _agrees(found, expected):
                wrong.append((each.title, case.json, expected, found))
        # And all of them in one batch, where no value may change what another becomes.
        written = {case.json: case.outcome_after(transform) for case in each.cases}
        good = {json: outcome for json, outcome in written.items() if not isinstance(outcome, Dead)}
        dead, together = _written(pipeline, *good)
    if dead or sorted(together) != sorted(map(str, good.values())):
        wrong.append((each.title, "all in one batch", sorted(map(str, good.values())), [*dead, *sorted(together)]))
    return wrong


def _found(pipeline: Pipeline, case: Case) -> Any:
    try:
        dead, shown = _written(pipeline, case.json)
    except psycopg2.Error as error:
        return Dead(error.pgcode or "", error.diag.message_primary or "")
    return dead[0] if dead else shown[0]


def _written(pipeline: Pipeline, *values: str) -> tuple[list[Dead], list[str]]:
    """Write the values in a transaction that is rolled back; the dead, and what the server shows of the others."""
    records = pipeline.prepare(*(b'{"v": %s}' % value.encode() for value in values))
    try:
        with pipeline.connection.cursor() as cursor:
            pipeline.begin(cursor)
            pipeline.writer.write(cursor, records.rows)
            cursor.execute("SELECT v::text FROM orders")
            shown = ["NULL" if text is None else text for (text,) in cursor.fetchall()]
    finally:
        pipeline.connection.rollback()
    return [Dead(one.sqlstate or "", one.reason) for one in records.dead], shown


def _agrees(found: Any, expected: Any) -> bool:
    if isinstance(expected, Dead) and isinstance(found, Dead):
        return found.sqlstate == expected.sqlstate and expected.reason in found.reason
    return bool(found == expected)


def test_an_unknown_attribute_is_left_out_where_unknown_fields_are(postgres_dsn: str) -> None:
    execute(postgres_dsn, "CREATE TYPE pair AS (a int, b text); CREATE TABLE orders (v pair)")
    with Pipeline(postgres_dsn, unknown_fields="ignore") as pipeline:
        assert pipeline.write(b'{"v": {"a": 1, "c": 2}, "w": 3}') == []
    assert scalar(postgres_dsn, "SELECT v::text FROM orders") == "(1,)"


def test_instants_of_every_age_are_the_servers_own(each_postgres_dsn: str) -> None:
    execute(each_postgres_dsn, "CREATE TABLE orders (n bigint, v timestamptz, d date)")
    chosen = random.Random(20260102)
    # From 4713 BC to 294276, the years that PostgreSQL has, and the days on which Python's calendar ends and begins.
    seconds = [chosen.randrange(-210_866_803_200, 9_224_318_016_000) for _ in range(2000)]
    seconds += [-62_135_596_800, -62_135_596_801, 253_402_300_799, 253_402_300_800, -210_866_803_200, 9_224_318_015_999]
    with Pipeline(each_postgres_dsn, epoch_unit="s") as pipeline:
        assert pipeline.write(*(b'{"n": %d, "v": %d, "d": %d}' % (n, n, n) for n in seconds)) == []
    # to_timestamp() reckons in doubles, and is off by microseconds in far years; days and their seconds are exact.
    instant = "timestamp 'epoch' + n / 86400 * interval '1 day' + n % 86400 * interval '1 second'"
    wrong = f"SELECT n FROM orders WHERE v <> ({instant}) AT TIME ZONE 'UTC' OR d <> ({instant})::date"
    assert query(each_postgres_dsn, wrong) == []
    assert scalar(each_postgres_dsn, "SELECT count(*) FROM orders") == len(seconds)


def test_offsets_are_moved_to_utc_as_the_server_would(each_postgres_dsn: str) -> None:
    execute(each_postgres_dsn, "CREATE TABLE orders (v timestamp, z timestamptz)")
    chosen = random.Random(20260103)
    texts = []
    for _ in range(1000):
        day = f"{chosen.randrange(1, 9999):04d}-{chosen.randrange(1, 13):02d}-{chosen.randrange(1, 29):02d}"
        clock = f"{chosen.randrange(25):02d}:00" if chosen.random() < 0.1 else f"{chosen.randrange(24):02d}:59:60"
        clock = clock if clock[:2] == "24" or chosen.random() < 0.2 else f"{clock[:5]}:59.{chosen.randrange(10**6):06d}"
        offset = chosen.choice(["Z", " UTC", "", "+0530", "-08", "+14:00", " -03:30", "+01:00:30"])
        texts.append(f"{day}{chosen.choice('T ')}{clock}{offset}")
    with Pipeline(each_postgres_dsn) as pipeline:
        assert pipeline.write(*(b'{"v": "%s", "z": "%s"}' % (text.encode(), text.encode()) for text in texts)) == []
    assert query(each_postgres_dsn, "SELECT v, z FROM orders WHERE v <> z AT TIME ZONE 'UTC'") == []
    assert scalar(each_postgres_dsn, "SELECT count(*) FROM orders") == len(texts)
