"""The table of `headprof compress`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headprof.cli.tables.cells import Rows
from headprof.utils.units import human_bytes


def document_table(figures: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """What a compressed document came to; `figures` are those of `document_figures`, and a `Promise`'s."""
    share = figures["file_bytes"] / figures["full_cache_bytes"]
    columns, row = ["method", "document tokens"], [figures["method"], str(figures["document_tokens"])]
    if figures["protected_tokens"]:
        columns.append("protected")
        row.append(str(figures["protected_tokens"]))
    columns += ["tokens per head", "file", "of the full cache"]
    row += [f"{figures['tokens_per_head']:.1f}", human_bytes(figures["file_bytes"]), f"{share:.1%}"]
    if figures["second_tier_bytes"]:
        columns += ["read into memory", "second tier"]
        row += [human_bytes(figures["cache_bytes"]), human_bytes(figures["second_tier_bytes"])]
    if "promised_loss" in figures:
        columns += ["promised loss", "measured loss", "at most"]
        row += [f"{figures[name]:.3g}" for name in ("promised_loss", "measured_loss", "measured_at_most")]
    return columns, [row]
