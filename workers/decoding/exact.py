"""Numbers that remember how they were written, so that one a transform leaves alone keeps every digit."""

from __future__ import annotations


class ExactFloat(float):
    """A float for the user's arithmetic and comparisons, and the message's own digits for the table.

    Whatever is computed from it is a plain float. ``str()`` and f-strings show the digits of the message.
    """

    __slots__ = ("text",)
    text: str

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exact_float, (self.text,))


def exact_float(text: str) -> ExactFloat:
    """Make one from a JSON number's text."""
    number = ExactFloat(text)
    number.text = text
    return number
