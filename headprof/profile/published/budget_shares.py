"""Attention Matching's budgets (Zweiger et al. 2026, arXiv 2602.16284): what share of the whole cache a KV head gets.

`head_budget_optimization/head_budgets/*/*.json`: `{"L0H0": 0.004, ...}`; all of them sum to 1.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from headprof.errors import ProfileError
from headprof.profile.imported_scores import ImportedScores, of_kv_heads
from headprof.profile.papers_json import read_json
from headprof.profile.published.kv_table import check_head, filled, is_number
from headprof.utils.records import shortened

if TYPE_CHECKING:
    from headprof.models.shape import HeadShape

_KEY = re.compile(r"L(\d{1,5})H(\d{1,5})")
_TOLERANCE = 0.01
"""By how much all shares may miss 1: they are printed numbers."""


def share_scores(path: Path, shape: HeadShape) -> ImportedScores:
    """The shares as scores, unchanged: HeadKV divides its pool in proportion to scores.

    Raises:
        ProfileError: the file holds no shares of one cache, or its layers and heads are not the model's.
    """
    table = read_json(path)
    if not isinstance(table, dict) or not table:
        raise ProfileError(f'{path} holds no budgets: give a JSON object such as {{"L0H0": 0.004, ...}}.')
    shares: dict[tuple[int, int], float] = {}
    for key, value in table.items():
        head = _parse_key(path, key)
        check_head(path, key, head, (shape.num_layers, shape.num_kv_heads))
        if head in shares:
            raise ProfileError(f"{path} lists head {key} twice: give every head one share.")
        if not is_number(value) or not 0 <= value <= 1:
            raise ProfileError(f"{path} has {shortened(value)} for head {key}: give a share from 0 to 1.")
        shares[head] = value
    scores = filled(path, shares, shape)
    if abs(float(scores.sum()) - 1) > _TOLERANCE:
        raise ProfileError(f"The shares in {path} sum to {float(scores.sum()):g}, not to 1: download it again.")
    return of_kv_heads(scores, shape)


def _parse_key(path: Path, key: str) -> tuple[int, int]:
    match = _KEY.fullmatch(key)
    if match is None:
        raise ProfileError(f"{path} names a head {shortened(key)}: write it as L17H3, both numbers from 0.")
    return int(match[1]), int(match[2])
