"""How tables show their numbers."""

from __future__ import annotations

from headprof.utils.units import human_bytes

Rows = list[list[str]]


def number(value: float | None, style: str, unit: str = "") -> str:
    """A number in a format (`.2f`), with its unit; a dash for `None`."""
    return "-" if value is None else f"{value:{style}}{unit}"


def size(value: float | None) -> str:
    """So many bytes; a dash for `None`."""
    return "-" if value is None else human_bytes(value)
