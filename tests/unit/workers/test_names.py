"""Table names are read as PostgreSQL reads them, and whatever they hold is quoted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speedlayer.workers.errors import ConfigurationError
from speedlayer.workers.sinks.postgres.names import TableName, parse_table_name, quote_identifier, quote_literal


@pytest.mark.parametrize(
    ("text", "name", "sql"),
    [
        ("orders", (None, "orders"), '"orders"'),
        ("Orders", (None, "orders"), '"orders"'),
        ("public.orders", ("public", "orders"), '"public"."orders"'),
        ("PUBLIC.Orders_2024$", ("public", "orders_2024$"), '"public"."orders_2024$"'),
        ('public."Mixed Case"', ("public", "Mixed Case"), '"public"."Mixed Case"'),
        ('"A.B"."C.D"', ("A.B", "C.D"), '"A.B"."C.D"'),
        (' public . "x" ', ("public", "x"), '"public"."x"'),
        ('"say ""hi"""', (None, 'say "hi"'), '"say ""hi"""'),
        ("select", (None, "select"), '"select"'),
        ("größe", (None, "größe"), '"größe"'),
        ("Größe", (None, "größe"), '"größe"'),
        ("ÄRGER", (None, "Ärger"), '"Ärger"'),  # PostgreSQL folds ASCII alone in UTF-8
        ('"; drop table x; --"', (None, "; drop table x; --"), '"; drop table x; --"'),
        ("x" * 63, (None, "x" * 63), '"' + "x" * 63 + '"'),
    ],
)
def test_a_name_is_parsed_and_quoted(text: str, name: tuple[str | None, str], sql: str) -> None:
    parsed = parse_table_name(text)
    assert parsed == name
    assert parsed.sql == sql


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not an SQL name at character 1"),
        ("Mixed Case", "needs double quotes"),
        ("order-items", "needs double quotes"),
        ("orders; drop table x", "needs double quotes"),
        ("1orders", "not an SQL name at character 1"),
        ("public.", "not an SQL name at character 8"),
        (".orders", "not an SQL name at character 1"),
        ('"open', "not an SQL name at character 1"),
        ('"a""', "not an SQL name at character 4"),
        ('""', "can not be empty"),
        ("db.public.orders", "3 parts"),
        ('"a\0b"', "NUL"),
        ('"\ud800"', "valid Unicode"),
        ("x" * 64, "64 bytes"),
        ("ü" * 32, "64 bytes"),
    ],
)
def test_what_is_no_name_is_refused_with_an_example(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^table: ") as caught:
        parse_table_name(text)
    assert says in str(caught.value)


def test_a_name_must_be_a_text() -> None:
    with pytest.raises(ConfigurationError, match="table must be a text"):
        parse_table_name(7)  # type: ignore[arg-type]


IDENTIFIERS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=15)


@given(IDENTIFIERS, IDENTIFIERS)
def test_quoting_and_parsing_are_inverse(schema: str, name: str) -> None:
    assert parse_table_name(TableName(schema, name).sql) == (schema, name)


def test_quotes_inside_are_doubled() -> None:
    assert quote_identifier('a"b') == '"a""b"'
    assert quote_literal("a'b\\c") == "E'a''b\\\\c'"
