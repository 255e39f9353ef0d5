"""What a check finds (the process of `speedlayer check`)."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any


class Outcome(enum.Enum):
    """How a check ended. A warning does not keep the pipelines from running."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, and what to do if it is not well."""

    outcome: Outcome
    what: str
    detail: str
    remedy: str = ""

    def as_data(self) -> dict[str, Any]:
        """Return the finding as plain values."""
        return {"outcome": self.outcome.value, "what": self.what, "detail": self.detail, "remedy": self.remedy}


def ok(what: str, detail: str) -> Finding:
    """Report that something is well."""
    return Finding(Outcome.OK, what, detail)


def warning(what: str, detail: str, remedy: str = "") -> Finding:
    """Report something that an operator should know."""
    return Finding(Outcome.WARNING, what, detail, remedy)


def failed(what: str, detail: str, remedy: str = "") -> Finding:
    """Report something that keeps a pipeline from running."""
    return Finding(Outcome.FAILED, what, detail, remedy)
