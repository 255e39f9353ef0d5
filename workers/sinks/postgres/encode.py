"""Values to COPY text, per column type. Runs in the worker."""

from __future__ import annotations
