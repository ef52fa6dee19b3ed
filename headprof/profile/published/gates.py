"""Gates that are trained: how far each KV head needs its whole cache. A row of tab-separated numbers for each layer.

DuoAttention (Xiao et al. 2024, arXiv 2410.10819) trains them by distillation on passkeys that are to be found
(`attn_patterns/*/full_attention_heads.tsv`), RLKV (Du et al. 2025, arXiv 2510.08525) by reinforcement learning on
problems that are to be solved (`adapter_weights.tsv`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from headprof.errors import ProfileError
from headprof.profile.head_table import read_text
from headprof.profile.imported_scores import ImportedScores, of_kv_heads
from headprof.profile.published.kv_table import check_kv_grid, check_numbers
from headprof.utils.records import shortened

if TYPE_CHECKING:
    from headprof.models.shape import HeadShape

_BEYOND = 0.5
"""How far training leaves a gate outside of 0 to 1, at most; what is farther off is no gate."""


def gate_scores(path: Path, shape: HeadShape) -> ImportedScores:
    """The gates as scores; those beyond 0 or 1 count as that, which is how both papers' programs take them.

    Raises:
        ProfileError: the file is no such table, or its layers and heads are not the model's.
    """
    import torch

    text = read_text(path)
    if not text.endswith("\n"):  # a number that is cut off is one too
        raise ProfileError(f"{path} does not end with the end of a line, as if it were cut off: download it again.")
    lines = text.rstrip("\n").split("\n")
    rows = [[_parse_gate(path, number, cell) for cell in line.split("\t")] for number, line in enumerate(lines, 1)]
    for number, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ProfileError(
                f"{path} has {len(row)} gates for layer {number} where layer 0 has {len(rows[0])}: download it again."
            )
    check_kv_grid(path, (len(rows), len(rows[0])), shape)
    gates = torch.tensor(rows, dtype=torch.float64)
    check_numbers(path, gates, -_BEYOND, 1 + _BEYOND)
    beyond = int(((gates < 0) | (gates > 1)).sum())
    remarks = (f"{beyond} of {gates.numel()} gates lie beyond 0 or 1, and count as that.",) if beyond else ()
    return of_kv_heads(gates.clamp(0, 1), shape, remarks)


def _parse_gate(path: Path, number: int, cell: str) -> float:
    try:
        gate = float(cell)
    except ValueError:
        gate = math.nan
    if math.isnan(gate):
        raise ProfileError(f"{path} has {shortened(cell)} in line {number}: give numbers with tabs between them.")
    return gate


def looks_like_gates(text: str) -> bool:
    """Whether the first line is numbers with tabs between them."""
    try:
        return bool([float(cell) for cell in text.partition("\n")[0].split("\t")])
    except ValueError:
        return False
