"""The PostgreSQL sink: its description (`PostgreSQLSink`), the table's plan, and what writes rows by COPY."""

from __future__ import annotations
