"""The table of `headprof compress`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headprof.cli.tables.cells import Rows
from headprof.utils.units import human_bytes


def document_table(figures: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """What a compressed document came to; `figures` are those of `document_figures`."""
    protected = [str(figures["protected_tokens"])] if figures["protected_tokens"] else []
    share = figures["file_bytes"] / figures["full_cache_bytes"]
    return (
        [
            "method",
            "document tokens",
            *(["protected"] if protected else []),
            "tokens per head",
            "file",
            "of the full cache",
        ],
        [
            [
                figures["method"],
                str(figures["document_tokens"]),
                *protected,
                f"{figures['tokens_per_head']:.1f}",
                human_bytes(figures["file_bytes"]),
                f"{share:.1%}",
            ]
        ],
    )
