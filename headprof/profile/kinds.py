"""The kinds of score that a head profile may hold."""

from __future__ import annotations

PROBE_KINDS = ("retrieval", "reasoning")
"""Kinds of score that have probes of their own."""
COUNTED_KINDS = (*PROBE_KINDS, "write")
"""Kinds that a file counts the probes of, from version 4 on."""
KINDS = (*COUNTED_KINDS, "reconstruction")
"""All kinds of score: where attention goes, what heads write from there, and what they look at to repeat a text."""


def named_kinds() -> str:
    """All kinds of score, for a message: `retrieval, reasoning or ...`."""
    return f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"
