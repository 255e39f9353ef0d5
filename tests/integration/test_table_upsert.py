"""An upsert leaves each key's last record, whatever the records, the key's type and the cuts between batches."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Sequence
from typing import Any

import psycopg2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixtures.postgres import execute, query, scalar
from fixtures.tables import Pipeline

TABLE = "CREATE TABLE orders (id int PRIMARY KEY, note text, state text DEFAULT 'new')"
POOLED = pytest.mark.parametrize("pooled", [False, True], ids=["own", "pooled"])


def messages(*records: Any) -> list[bytes]:
    return [json.dumps(record).encode() for record in records]


def upsert(dsn: str, **settings: Any) -> Pipeline:
    return Pipeline(dsn, mode="upsert", **settings)


def orders(dsn: str, columns: str = "*") -> list[tuple[Any, ...]]:
    return query(dsn, f"SELECT {columns} FROM orders ORDER BY 1")


@POOLED
def test_the_last_record_of_a_key_counts_within_a_batch_and_across_batches(
    each_postgres_dsn: str, pooled: bool
) -> None:
    execute(each_postgres_dsn, TABLE)
    with upsert(each_postgres_dsn, pooled=pooled) as pipeline:
        pipeline.write(*messages({"id": 2, "note": "a"}, {"id": 1, "note": "b"}, {"id": 2, "note": "c"}))
        assert orders(each_postgres_dsn) == [(1, "b", "new"), (2, "c", "new")]
        pipeline.write(*messages({"id": 3, "note": "d"}, {"id": 1, "note": "e"}, {"id": 1, "note": None}))
    assert orders(each_postgres_dsn) == [(1, None, "new"), (2, "c", "new"), (3, "d", "new")]


@POOLED
def test_several_writes_in_one_transaction_act_one_after_the_other(each_postgres_dsn: str, pooled: bool) -> None:
    execute(each_postgres_dsn, TABLE)
    with upsert(each_postgres_dsn, pooled=pooled) as pipeline:
        records = pipeline.prepare(*messages(*[{"id": n % 3, "note": str(n)} for n in range(9)]))
        with pipeline.connection, pipeline.connection.cursor() as cursor:
            pipeline.writer.write(cursor, records.rows)
            pipeline.writer.write(cursor, records.rows[:4])
            for row in records.rows[4:7]:
                pipeline.writer.write(cursor, [row])
    assert orders(each_postgres_dsn, "id, note") == [(0, "6"), (1, "4"), (2, "5")]


@POOLED
def test_what_a_savepoint_rolls_back_is_not_merged_later(each_postgres_dsn: str, pooled: bool) -> None:
    execute(each_postgres_dsn, "CREATE TABLE orders (id int PRIMARY KEY, note varchar(3))")
    with upsert(each_postgres_dsn, pooled=pooled) as pipeline:
        rows = pipeline.prepare(
            *messages({"id": 1, "note": "a"}, {"id": 2, "note": "long"}, {"id": 3, "note": "c"})
        ).rows
        with pipeline.connection, pipeline.connection.cursor() as cursor:
            for some in (rows, rows[:2], rows[:1], rows[1:2], rows[2:]):
                cursor.execute("SAVEPOINT rows")
                if rows[1] in some:
                    with pytest.raises(psycopg2.errors.StringDataRightTruncation):
                        pipeline.writer.write(cursor, some)
                    cursor.execute("ROLLBACK TO SAVEPOINT rows")
                else:
                    pipeline.writer.write(cursor, some)
    assert orders(each_postgres_dsn) == [(1, "a"), (3, "c")]


def test_a_rolled_back_transaction_leaves_nothing_for_the_next(each_postgres_dsn: str) -> None:
    execute(each_postgres_dsn, TABLE)
    with upsert(each_postgres_dsn) as pipeline:
        first = pipeline.prepare(*messages({"id": 1}))
        with pipeline.connection.cursor() as cursor:
            pipeline.writer.write(cursor, first.rows)
        pipeline.connection.rollback()
        assert pipeline.write(*messages({"id": 2})) == []
    assert orders(each_postgres_dsn, "id") == [(2,)]


# --- keys ------------------------------------------------------------------------------------------------------------

# type: pairs of spellings of the same key, and one that is another key
KEYS: dict[str, tuple[Sequence[Any], Any]] = {
    "bigint": ([1, "1", "01", "+1", " 1"], 2),
    "text": (["a", "a"], "A"),
    'text COLLATE "C"': (["a", "a"], "A"),
    "varchar(10)": (["a", "a"], "a "),
    "char(5)": (["a", "a ", "a  "], "b"),
    "numeric": ([1.0, 1, "1.00", "1e0"], 1.5),
    "numeric(5,1)": ([1.04, 1, "0.96"], 1.5),
    "double precision": ([0.1, "1e-1", "0.10"], 0.2),
    "timestamptz": (
        ["2026-01-01T00:00:00Z", "2026-01-01 02:00:00+02", "2026-01-01T00:00:00.000Z"],
        "2026-01-01T00:00:01Z",
    ),
    "date": (["2026-01-01", "20260101", "Jan 1, 2026"], "2026-01-02"),
    "boolean": ([True, "true", 1, "yes"], False),
    "uuid": (
        [
            "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
            "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11",
            "{a0eebc999c0b4ef8bb6d6bb9bd380a11}",
            "a0ee-bc99-9c0b-4ef8-bb6d-6bb9-bd38-0a11",
        ],
        "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a12",
    ),
    "inet": (["10.0.0.1", "10.0.0.1/32"], "10.0.0.2"),
    "jsonb": ([{"a": 1, "b": 2}, {"b": 2, "a": 1.0}], {"a": 2}),
    "int[]": ([[1, 2], "{1,2}"], [2, 1]),
}


@pytest.mark.parametrize("transform", [None, dict], ids=["straight", "transformed"])
def test_one_key_spelt_in_many_ways_is_one_row(postgres_dsn: str, transform: Any) -> None:
    found, expected = [], []
    for type_sql, (spellings, other) in KEYS.items():
        execute(postgres_dsn, f"DROP TABLE IF EXISTS orders; CREATE TABLE orders (k {type_sql} PRIMARY KEY, n int)")
        records = [{"k": spelling, "n": n} for n, spelling in enumerate(spellings)]
        with upsert(postgres_dsn, transform=transform) as pipeline:
            assert pipeline.write(*messages(*records, {"k": other, "n": -1}, *records)) == []
            first = sorted(query(postgres_dsn, "SELECT n FROM orders"))
            assert pipeline.write(*messages({"k": other, "n": -2}, *reversed(records))) == []
            found.append((type_sql, first, sorted(query(postgres_dsn, "SELECT n FROM orders"))))
        expected.append((type_sql, [(-1,), (len(spellings) - 1,)], [(-2,), (0,)]))
    assert found == expected


def test_a_key_of_several_columns_in_another_order_than_the_index(postgres_dsn: str) -> None:
    execute(postgres_dsn, 'CREATE TABLE orders (a int, "B b" text, n int, PRIMARY KEY (a, "B b"))')
    with upsert(postgres_dsn, key=["B b", "a"]) as pipeline:
        pipeline.write(*messages(*[{"a": n % 2, "B b": str(n % 3), "n": n} for n in range(12)]))
    assert orders(postgres_dsn, 'a, "B b", n') == [
        (0, "0", 6),
        (0, "1", 10),
        (0, "2", 8),
        (1, "0", 9),
        (1, "1", 7),
        (1, "2", 11),
    ]


def test_a_table_of_nothing_but_its_key(postgres_dsn: str) -> None:
    execute(postgres_dsn, "CREATE TABLE orders (id int PRIMARY KEY)")
    with upsert(postgres_dsn) as pipeline:
        pipeline.write(*messages({"id": 1}, {"id": 1}))
        pipeline.write(*messages({"id": 1}, {"id": 2}))
    assert orders(postgres_dsn) == [(1,), (2,)]


# --- fields that records lack ----------------------------------------------------------------------------------------

SHARED = """
CREATE TABLE orders (id int PRIMARY KEY, note text, state text DEFAULT 'new', at timestamptz DEFAULT now(),
                     number bigserial, twice int GENERATED ALWAYS AS (id * 2) STORED)
"""


def test_a_missing_field_goes_back_to_its_default_but_a_computed_default_is_made_once(each_postgres_dsn: str) -> None:
    execute(each_postgres_dsn, SHARED)
    with upsert(each_postgres_dsn) as pipeline:
        pipeline.write(*messages({"id": 1, "note": "a", "state": "old"}))
        before = orders(each_postgres_dsn, "at, number")
        pipeline.write(*messages({"id": 1}))
    assert orders(each_postgres_dsn, "id, note, state, twice") == [(1, None, "new", 2)]
    assert orders(each_postgres_dsn, "at, number") == before


def test_a_missing_field_keeps_its_value_when_the_sink_says_so(each_postgres_dsn: str) -> None:
    execute(each_postgres_dsn, SHARED)
    with upsert(each_postgres_dsn, missing_fields="keep") as pipeline:
        pipeline.write(*messages({"id": 1, "note": "a", "state": "old"}))
        pipeline.write(
            *messages({"id": 1, "note": "b"}, {"id": 2}, {"id": 1}, {"id": 2, "note": "c"}, {"id": 2, "state": None})
        )
    assert orders(each_postgres_dsn, "id, note, state, twice") == [(1, "b", "old", 2), (2, "c", None, 4)]


def test_the_primary_key_of_a_row_is_not_renewed_when_another_key_finds_it(postgres_dsn: str) -> None:
    execute(
        postgres_dsn, "CREATE TABLE orders (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), code text UNIQUE, n int)"
    )
    with upsert(postgres_dsn, key="code") as pipeline:
        pipeline.write(*messages({"code": "a", "n": 1}))
        before = scalar(postgres_dsn, "SELECT id FROM orders")
        pipeline.write(*messages({"code": "a", "n": 2}, {"code": "b", "n": 3}))
    assert scalar(postgres_dsn, "SELECT id FROM orders WHERE code = 'a' AND n = 2") == before


def test_an_identity_that_is_always_generated_takes_the_records_key(postgres_dsn: str) -> None:
    execute(postgres_dsn, "CREATE TABLE orders (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, n int)")
    with upsert(postgres_dsn) as pipeline:
        pipeline.write(*messages({"id": 7, "n": 1}, {"id": 8, "n": 2}))
        pipeline.write(*messages({"id": 7, "n": 3}))
    assert orders(postgres_dsn) == [(7, 3), (8, 2)]


FIELDS = st.fixed_dictionaries(
    {"k": st.integers(0, 3)},
    optional={
        "note": st.sampled_from(["a", "b\t\\", None]),
        "state": st.sampled_from(["x", None]),
        "doc": st.sampled_from([{"a": 1}, [1], None]),
        "n": st.integers(0, 9),
    },
)
BATCHES = st.lists(st.lists(FIELDS, min_size=1, max_size=8), min_size=1, max_size=4)


@pytest.mark.parametrize("missing_fields", ["default", "keep"])
@pytest.mark.parametrize("key_type", ["int", "numeric"])  # folded here, folded by the server
@pytest.mark.parametrize("transform", [None, dict], ids=["straight", "transformed"])
def test_any_batches_end_as_one_record_after_the_other_would(
    postgres_dsn: str, missing_fields: Any, key_type: str, transform: Any
) -> None:
    execute(
        postgres_dsn,
        f"CREATE TABLE orders (k {key_type} PRIMARY KEY, note text, state text DEFAULT 'new', doc jsonb,"
        " n int NOT NULL DEFAULT 7)",
    )
    with upsert(postgres_dsn, missing_fields=missing_fields, transform=transform) as pipeline:

        @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
        @given(BATCHES)
        def check(batches: list[list[dict[str, Any]]]) -> None:
            execute(postgres_dsn, "TRUNCATE orders")
            expected: dict[int, dict[str, Any]] = {}
            for batch in batches:
                assert pipeline.write(*messages(*batch)) == []
                for record in batch:
                    row = {"note": None, "state": "new", "doc": None, "n": 7}
                    if missing_fields == "keep":
                        row.update(expected.get(record["k"], {}))
                    expected[record["k"]] = {**row, **record}
            found = query(postgres_dsn, "SELECT k, note, state, doc, n FROM orders")
            names = ("k", "note", "state", "doc", "n")
            assert {int(row[0]): dict(zip(names, row, strict=True)) for row in found} == expected

        check()


# --- the stage -------------------------------------------------------------------------------------------------------


def test_the_stage_lives_as_long_as_the_connection_and_the_catalogs_do_not_churn(each_postgres_dsn: str) -> None:
    execute(each_postgres_dsn, TABLE)
    with upsert(each_postgres_dsn) as pipeline:
        pipeline.write(*messages({"id": 0}))
        with pipeline.connection, pipeline.connection.cursor() as cursor:
            stages = (
                "SELECT oid, relfilenode FROM pg_class WHERE relname LIKE 'speedlayer_stage_%' AND relpersistence = 't'"
            )
            cursor.execute(stages)
            first = cursor.fetchall()
            assert len(first) == 1
        for number in range(5):
            pipeline.write(*messages({"id": number}))
        with pipeline.connection, pipeline.connection.cursor() as cursor:
            cursor.execute(stages)
            assert cursor.fetchall() == first


def test_behind_a_pooler_nothing_outlives_the_transaction(each_postgres_dsn: str) -> None:
    execute(each_postgres_dsn, TABLE)
    with upsert(each_postgres_dsn, pooled=True) as pipeline:
        pipeline.write(*messages({"id": 0}))
        with pipeline.connection, pipeline.connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_class WHERE relname LIKE 'speedlayer_stage_%'")
            assert cursor.fetchall() == [(0,)]


def test_a_table_that_was_altered_gets_a_stage_of_its_new_columns(postgres_dsn: str) -> None:
    execute(postgres_dsn, TABLE)
    with upsert(postgres_dsn) as old:
        old.write(*messages({"id": 1, "note": "a"}))
        execute(postgres_dsn, "ALTER TABLE orders ALTER note TYPE int USING 1, ADD COLUMN more numeric(3, 1)")
        with upsert(postgres_dsn) as new:
            new.connection.close()
            new.connection = old.connection
            new.write(*messages({"id": 1, "note": 2, "more": 1.25}))
    assert orders(postgres_dsn, "id, note, more::text") == [(1, 2, "1.3")]


def test_a_table_of_the_stages_name_is_left_alone(postgres_dsn: str) -> None:
    execute(postgres_dsn, TABLE)
    with upsert(postgres_dsn) as pipeline:
        pipeline.write(*messages({"id": 1}))
        with pipeline.connection, pipeline.connection.cursor() as cursor:
            cursor.execute("SELECT relname FROM pg_class WHERE relname LIKE 'speedlayer_stage_%'")
            ((name,),) = cursor.fetchall()
    execute(postgres_dsn, f"CREATE TABLE {name} (precious int)")
    with upsert(postgres_dsn) as pipeline:
        pipeline.write(*messages({"id": 2}))
    assert orders(postgres_dsn, "id") == [(1,), (2,)]
    assert scalar(postgres_dsn, f"SELECT count(*) FROM {name}") == 0


def test_a_column_with_the_name_of_one_of_the_stages_own(postgres_dsn: str) -> None:
    execute(postgres_dsn, "CREATE TABLE orders (k numeric PRIMARY KEY, row_number int, row_group int)")
    with upsert(postgres_dsn) as pipeline:
        pipeline.write(*messages({"k": 1.0, "row_number": 5}, {"k": 1, "row_number": 6}))
    assert query(postgres_dsn, "SELECT k::text, row_number FROM orders") == [("1", 6)]


def test_two_writers_of_the_same_keys_do_not_deadlock(postgres_dsn: str) -> None:
    execute(postgres_dsn, "CREATE TABLE orders (id int PRIMARY KEY, n int)")
    rounds, keys = 30, 400
    errors: list[BaseException] = []
    barrier = threading.Barrier(2)

    def write(step: int) -> None:
        try:
            with upsert(postgres_dsn) as pipeline:
                for number in range(rounds):
                    barrier.wait(timeout=60)
                    pipeline.write(*messages(*[{"id": n, "n": number} for n in range(keys)[::step]]))
        except BaseException as error:
            errors.append(error)
            with contextlib.suppress(threading.BrokenBarrierError):
                barrier.abort()

    threads = [threading.Thread(target=write, args=(step,)) for step in (1, -1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert scalar(postgres_dsn, "SELECT count(*) FROM orders") == keys
