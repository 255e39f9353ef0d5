"""The orders that a run produces: made from their number, so that the log and the messages can not drift apart (pure).

Every order is a JSON object of about 200 bytes. Now and then one is broken, as orders are, and has to end as a dead
letter.
"""

from __future__ import annotations

from typing import NamedTuple

# One message in so many is broken: a few in the demo, far below the rate at which a pipeline stops.
BROKEN_EVERY = 2500

# The first broken order of a run: soon enough to be seen in the first phase.
FIRST_BROKEN = 500

CUSTOMERS = 977

NOTES = (
    "leave it at the door",
    "ring twice, the dog is harmless",
    "für Zoë, 2. Stock",
    'a gift: please wrap it, "nicely"',
    "back\\slash and\ttab",
)

STATUSES = ("NEW", "PAID", "PACKED", "SHIPPED")

# A broken order is cut off in the middle, is not an object, or has a word where the amount belongs.
BROKEN = (
    b'{"order_id": %d, "customer": "cust',
    b"[%d, 12.5]",
    b'{"order_id": %d, "customer": "customer-0", "status": "NEW", "amount": "twelve", "note": "",'
    b' "created_at": "2026-11-27T00:00:00Z"}',
)

# The columns of an order, in the order of the log's lines.
COLUMNS = {
    "order_id": "bigint",
    "customer": "text",
    "status": "text",
    "amount": "numeric",
    "note": "text",
    "created_at": "timestamptz",
}


class Order(NamedTuple):
    """A message as it is sent, and as it stands in the log (PostgreSQL's COPY text; None if it is broken)."""

    key: bytes
    value: bytes
    log_line: str | None


def make_order(number: int, created_at: str) -> Order:
    """Make the order of this number. ``created_at`` is an ISO 8601 text."""
    customer = f"customer-{number * 7919 % CUSTOMERS}"
    if number % BROKEN_EVERY == FIRST_BROKEN:
        return Order(customer.encode(), BROKEN[number // BROKEN_EVERY % len(BROKEN)] % number, None)
    status = STATUSES[number % len(STATUSES)]
    # Eight digits after the point: no binary fraction holds them, so a sink that rounds is found out.
    amount = f"{number % 997}.{number * 10_007 % 100_000_000:08d}"
    note = number % len(NOTES)
    value = (
        f'{{"order_id": {number}, "customer": "{customer}", "status": "{status}", "amount": {amount},'
        f' "note": {_NOTES_IN_JSON[note]}, "created_at": "{created_at}"}}'
    )
    line = f"{number}\t{customer}\t{status}\t{amount}\t{_NOTES_IN_COPY[note]}\t{created_at}\n"
    return Order(customer.encode(), value.encode(), line)


def escape_copy(text: str) -> str:
    """Write a text as PostgreSQL's COPY reads it."""
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def _in_json(text: str) -> str:
    import json

    return json.dumps(text, ensure_ascii=False)


_NOTES_IN_JSON = tuple(_in_json(note) for note in NOTES)
_NOTES_IN_COPY = tuple(escape_copy(note) for note in NOTES)

# What one message takes in a broker, with its key and the record's own fields.
RECORD_BYTES = 40 + len(
    max((make_order(10**9 + n, "2026-11-27T00:00:00.000000+00:00").value for n in range(20)), key=len)
)
