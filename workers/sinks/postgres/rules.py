"""What the author of a pipeline decides about values: four of the sink's settings, as one value. Runs in the worker.

Kinds (kinds.py) are made for one set of rules, so no rule is looked up for each value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional

EpochUnit = Literal["s", "ms", "us", "ns"]
EPOCH_UNITS: tuple[EpochUnit, ...] = ("s", "ms", "us", "ns")

BYTEA_ENCODINGS = ("hex", "base64")
NUL_POLICIES = ("dead_letter", "strip", "replace")
NON_FINITE_POLICIES = ("keep", "null", "dead_letter")


@dataclass(frozen=True)
class ValueRules:
    """How values become a column's text where more than one way makes sense. docs/types.md says what each does."""

    bytea_encoding: Literal["hex", "base64"] = "hex"
    epoch_unit: Optional[EpochUnit] = None
    nul_characters: Literal["dead_letter", "strip", "replace"] = "dead_letter"
    non_finite_numbers: Literal["keep", "null", "dead_letter"] = "keep"
    # unknown_fields = "ignore", which goes for the attributes of composite types too.
    ignore_unknown: bool = False


DEFAULT_RULES = ValueRules()
