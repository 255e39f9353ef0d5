"""From the bytes of a flight to records: decoding runs in the worker, before the transaction begins."""

from __future__ import annotations
