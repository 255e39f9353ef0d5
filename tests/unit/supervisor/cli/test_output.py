"""How commands print numbers and tables."""

from __future__ import annotations

from typing import Optional

import pytest

from speedlayer.supervisor.cli.output import amount, duration, size, table


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "–"),
        (0.0, "0 ms"),
        (0.0124, "12 ms"),
        (1.44, "1.4 s"),
        (60, "1 min"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (3661, "1 h 1 min"),
        (3601, "1 h"),
        (200_000, "2 d 7 h"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds: Optional[float], shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(None, "–"), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 kB"), (5 * 1024**2, "5.0 MB"), (2 * 1024**5, "2048.0 TB")],
)
def test_a_size_has_the_unit_in_which_it_is_small(count: Optional[float], shown: str) -> None:
    assert size(count) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "–"), (0, "0"), (0.25, "0.2"), (9.96, "10.0"), (12.5, "12"), (1234567, "1,234,567")]
)
def test_an_amount_sets_thousands_apart(value: Optional[float], shown: str) -> None:
    assert amount(value) == shown


def test_a_table_aligns_its_columns() -> None:
    text = table(("NAME", "ROWS"), [("a", "5"), ("longer", "1,000")], right=("ROWS",))
    assert text.splitlines() == ["NAME     ROWS", "a           5", "longer  1,000"]


def test_a_table_without_rows_has_its_headings() -> None:
    assert table(("NAME", "ROWS"), []) == "NAME  ROWS"
