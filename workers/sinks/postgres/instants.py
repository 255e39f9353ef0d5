"""Numbers and zones as text of date and time. Runs in the worker.

Everything is UTC: a number counts from the epoch, or from midnight, or is a duration; a text with an offset that goes
into a column without a zone is moved to UTC, where the server would drop the offset unseen. Digits are never rounded
here: the server rounds them to its microseconds, as it does those of any text.
"""

from __future__ import annotations

import datetime
import decimal
import functools
import re
from collections.abc import Sequence
from typing import Any

from speedlayer.workers.sinks.postgres.rules import EpochUnit
from speedlayer.workers.sinks.postgres.unwritable import Unwritable

DATETIME_FIELD_OVERFLOW = "22008"
INVALID_DATETIME_FORMAT = "22007"

_DECIMALS: dict[EpochUnit, int] = {"s": 0, "ms": 3, "us": 6, "ns": 9}
# More than PostgreSQL's last year, 294276, in seconds; what lies between the two the server refuses itself.
_LIMIT_SECONDS = 10**13
# Far more than any instant has; it keeps arithmetic on hostile numbers short.
_LIMIT_CHARACTERS = 100
_DAY_SECONDS = 86_400

# Seconds, and the digits after the point ("" or ".5").
_Parts = tuple[int, str]


def parts_of(number: str, unit: EpochUnit) -> _Parts:
    """A JSON number in ``unit`` as whole seconds (rounded down) and the rest."""
    decimals = _DECIMALS[unit]
    if len(number) > _LIMIT_CHARACTERS:
        raise _out_of_range(number)
    try:
        whole = int(number)
    except ValueError:
        return _parts_of_decimal(number, decimals)
    seconds, rest = divmod(whole, 10**decimals)
    if abs(seconds) > _LIMIT_SECONDS:
        raise _out_of_range(number)
    return seconds, f".{rest:0{decimals}d}" if rest else ""


def _parts_of_decimal(number: str, decimals: int) -> _Parts:
    with decimal.localcontext() as context:
        context.prec = 2 * _LIMIT_CHARACTERS
        try:
            value = decimal.Decimal(number)
        except decimal.InvalidOperation:
            raise Unwritable(f"{number[:40]} is no number of a date or time", INVALID_DATETIME_FORMAT) from None
        # The exponent is looked at first: 1e999999999 is a short text and a long number.
        if not value.is_finite() or value.adjusted() > 30:
            raise _out_of_range(number)
        if value.adjusted() < -_LIMIT_CHARACTERS:
            return 0, ""
        value = value.scaleb(-decimals)
        seconds = int(value.to_integral_value(decimal.ROUND_FLOOR))
        if abs(seconds) > _LIMIT_SECONDS:
            raise _out_of_range(number)
        rest = value - seconds
        return seconds, f"{rest:f}"[1:] if rest else ""


def _out_of_range(number: str) -> Unwritable:
    shown = number if len(number) <= 40 else number[:39] + "…"
    return Unwritable(f"date/time field value out of range: {shown}", DATETIME_FIELD_OVERFLOW)


# --- What a number is, for each type ---------------------------------------------------------------------------------


def timestamp_text(number: str, unit: EpochUnit) -> str:
    """An instant, as the wall clock of UTC shows it."""
    return _instant(number, unit, "")


def timestamptz_text(number: str, unit: EpochUnit) -> str:
    """An instant with its zone, which is UTC."""
    return _instant(number, unit, "+00")


def date_text(number: str, unit: EpochUnit) -> str:
    """The day of an instant in UTC."""
    seconds, _ = parts_of(number, unit)
    day, era = _day(seconds // _DAY_SECONDS)
    return day + era


def time_text(number: str, unit: EpochUnit) -> str:
    """A time of day: what has passed since midnight."""
    seconds, rest = parts_of(number, unit)
    if not 0 <= seconds <= _DAY_SECONDS:
        raise _out_of_range(number)
    return _clock(seconds) + rest


def timetz_text(number: str, unit: EpochUnit) -> str:
    """A time of day in UTC."""
    return time_text(number, unit) + "+00"


def interval_text(number: str, unit: EpochUnit) -> str:
    """A duration."""
    seconds, rest = parts_of(number, unit)
    # The seconds are rounded down, and the rest is never negative.
    return f"{decimal.Decimal(seconds) + decimal.Decimal('0' + rest):f} seconds" if rest else f"{seconds} seconds"


def _instant(number: str, unit: EpochUnit, zone: str) -> str:
    seconds, rest = parts_of(number, unit)
    days, of_day = divmod(seconds, _DAY_SECONDS)
    day, era = _day(days)
    return f"{day} {_clock(of_day)}{rest}{zone}{era}"


def _clock(seconds: int) -> str:
    minutes, second = divmod(seconds, 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour:02d}:{minute:02d}:{second:02d}"


@functools.lru_cache(maxsize=4096)  # the records of a batch are of few days
def _day(days: int) -> tuple[str, str]:
    """The day so many days after 1970-01-01, and its era: "" or " BC"."""
    # Python's dates end at the year 9999. The calendar repeats itself every 400 years, which are 146,097 days.
    cycles, of_cycle = divmod(days, 146_097)
    day = datetime.date(2000, 1, 1) + datetime.timedelta(days=of_cycle - 10_957)
    year = day.year + 400 * cycles
    # The year before 1 is 1 BC.
    return (f"{year:04d}-{day:%m-%d}", "") if year > 0 else (f"{1 - year:04d}-{day:%m-%d}", " BC")


# --- A text with a zone, for a column without one --------------------------------------------------------------------

# What is left of a date and time without a zone, or in UTC, when its digits are taken away.
_DIGITS = b"0123456789:.,Z"
_SPACE_AS_T = bytes.maketrans(b" ", b"T")
_PLAIN = b"--T\n"


def may_be_zoned(values: Sequence[Any]) -> bool:
    """Whether any of the texts among the values may have a zone, in a few calls for all of them."""
    texts = [value for value in values if value.__class__ is str]
    texts.append("")
    left = "\n".join(texts).encode("utf-8", "surrogatepass").translate(_SPACE_AS_T, _DIGITS)
    return left != _PLAIN * (len(texts) - 1)


# Something after the time of day that is not Z.
_has_zone = re.compile(r"\d[T t][\d:.,]+ *[^\d\s:.,Z]").search

_ZONED = re.compile(
    r"\s*(?P<year>\d{4})-?(?P<month>\d\d)-?(?P<day>\d\d)[T t]\s*"
    r"(?P<hour>\d\d)(?::?(?P<minute>\d\d)(?::?(?P<second>\d\d)(?P<rest>[.,]\d+)?)?)?"
    r"\s*(?P<sign>[+-])(?P<hours>\d\d)(?::?(?P<minutes>\d\d)(?::?(?P<seconds>\d\d))?)?\s*"
)
_OTHER_ZONE = re.compile(r"\d[T t][\d:.,]+ *(?P<zone>(?:[A-Za-z]|[+-]\d)[\w/:+-]*)")
_NO_ZONES = frozenset({"z", "zulu", "utc", "gmt", "am", "pm", "ad", "bc"})


def without_zone(text: str) -> str:
    """The same instant in UTC, without its offset; a text without an offset stays as it is."""
    if not _has_zone(text):
        return text
    found = _ZONED.fullmatch(text)
    if found is not None:
        return _moved(text, found)
    other = _OTHER_ZONE.search(text)
    if other is not None and other["zone"].lower() not in _NO_ZONES:
        raise Unwritable(
            f'the zone "{other["zone"][:40]}" for a column without time zone: only an offset in ISO 8601 is converted',
            INVALID_DATETIME_FORMAT,
        )
    return text


def _moved(text: str, found: re.Match[str]) -> str:
    part = {name: int(found[name] or 0) for name in found.groupdict() if name not in ("rest", "sign")}
    # 24:00 and 23:59:60 are the next minute, but no time goes on from there.
    whole = not found["rest"]
    last_second = 60 if whole else 59
    last_hour = 24 if whole and not part["minute"] and not part["second"] else 23
    if part["hour"] > last_hour or part["minute"] > 59 or part["second"] > last_second or part["hours"] > 15:
        return text  # the server says what is wrong with it
    offset = datetime.timedelta(hours=part["hours"], minutes=part["minutes"], seconds=part["seconds"])
    clock = datetime.timedelta(hours=part["hour"], minutes=part["minute"], seconds=part["second"])
    try:
        day = datetime.datetime(part["year"], part["month"], part["day"])
    except ValueError:
        return text  # 30 February, the year 0
    try:
        moved = day + clock + (offset if found["sign"] == "-" else -offset)
    except OverflowError:
        raise _out_of_range(text) from None
    return moved.isoformat(sep=" ") + (found["rest"] or "").replace(",", ".")
