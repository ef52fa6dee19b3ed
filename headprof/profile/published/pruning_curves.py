"""LU-KV's curves (Tang et al. 2026, arXiv 2602.08585): what share of its tokens a KV head gives up.

A NumPy file `[99, L, K]`: row `i` is for when `i + 1` % of all tokens are given up together
(`evaluation/curve_data/*/*.npy`; read so by their `LUPress` and by kvpress's `LUKVPress`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from headprof.errors import ProfileError
from headprof.profile.imported_scores import ImportedScores, of_kv_heads
from headprof.profile.kept_shares import MOST_SHARES
from headprof.profile.published.kv_table import check_kv_grid, check_numbers, check_size

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from headprof.models.shape import HeadShape

ROWS = 99
_TOLERANCE = 0.05
"""How far a row's mean may be from its percentage: tokens that must stay leave the last rows short of it."""
PERCENT_KEPT = (*range(1, 20), *range(20, 98, 2), 99)
"""Of which rows a profile's learned budgets are made: all where little is kept, and every second after that."""
assert len(PERCENT_KEPT) <= MOST_SHARES


def curve_scores(path: Path, shape: HeadShape) -> ImportedScores:
    """The curves as learned budgets, for `learned-kvzip`; a head's score is the mean of what it keeps in all rows.

    Raises:
        ProfileError: the file holds no such curves, or those of another model.
    """
    import torch

    pruned = torch.from_numpy(_read(path))
    if pruned.ndim != 3 or len(pruned) != ROWS:
        raise ProfileError(
            f"{path} holds an array of shape {list(pruned.shape)} where [{ROWS}, layers, KV heads] belongs: give the "
            "file of the curves."
        )
    check_kv_grid(path, tuple(pruned.shape[1:]), shape)
    check_numbers(path, pruned, 0, 1)
    _check_rows(path, pruned)
    kept = 1 - pruned
    learned = _learned(path, kept)
    remarks = (
        f"The curves are kept as budgets at {len(learned)} shares; a head's score is the mean share that it keeps over "
        f"the {ROWS} rows.",
    )
    return of_kv_heads(kept.mean(dim=0), shape, remarks, kept_shares=learned)


def _read(path: Path) -> np.ndarray:
    """The array, float64, read without pickle."""
    import numpy as np

    check_size(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # of many kinds: whatever a header may say
        raise ProfileError(
            f"{path} is no array of numbers that NumPy wrote, or was cut off: download it again."
        ) from error
    if not isinstance(array, np.ndarray):
        array.close()
    elif array.dtype.kind == "f":
        return np.array(array, dtype=np.float64)
    raise ProfileError(f"{path} is no single array of floating-point numbers: give the file of the curves.")


def _check_rows(path: Path, pruned: Tensor) -> None:
    """That each row is of its percentage; what a file of anything else would not be."""
    for row, mean in enumerate(pruned.mean(dim=(1, 2)).tolist(), 1):
        if abs(mean - row / 100) > _TOLERANCE:
            raise ProfileError(
                f"Row {row} of {path} gives up {mean:.0%} of the tokens on average, not {row} %: give a file of "
                "LU-KV's curves."
            )


def _learned(path: Path, kept: Tensor) -> Tensor:
    """Some rows as float32 `[S, L, K]`, ascending; rows that say the same as one before are left out."""
    import torch

    chosen: list[Tensor] = []
    for row in (kept[ROWS - percent].float() for percent in PERCENT_KEPT):
        mean = row.double().mean()
        if chosen and (row < chosen[-1]).any():
            raise ProfileError(
                f"A head in {path} keeps less where all together keep more: give a file of LU-KV's curves."
            )
        if mean > (chosen[-1].double().mean() if chosen else 0):
            chosen.append(row)
    return torch.stack(chosen)
