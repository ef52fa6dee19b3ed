"""How alike two head profiles are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headprof.errors import ProfileError
from headprof.profile.head_profile import HeadProfile
from headprof.utils.ranks import spearman, top_indices, top_overlap

if TYPE_CHECKING:
    from torch import Tensor

OVERLAPS = (1, 5, 10, 20, 50)
"""Numbers of top heads whose overlap a comparison gives."""


@dataclass(frozen=True)
class Agreement:
    """How alike two score tensors rank the same heads.

    Attributes:
        num_heads: heads that were ranked, over all layers.
        spearman: rank correlation over all heads; NaN if either scores are constant.
        overlaps: share of the top heads that both have in common, for each of `OVERLAPS` up to `num_heads`.
        k: the number of top heads that the next two lists are about.
        only_first: (layer, head) of heads in the first top `k` and not the second, best first.
        only_second: the same the other way round.
    """

    num_heads: int
    spearman: float
    overlaps: Mapping[int, float]
    k: int
    only_first: list[tuple[int, int]]
    only_second: list[tuple[int, int]]

    def expected_overlap(self, k: int) -> float:
        """Overlap of two top `k` picked at random, `k / num_heads`."""
        return k / self.num_heads


def compare(a: Tensor, b: Tensor, k: int = 10) -> Agreement:
    """Compare two score tensors `[L, H]` of the same heads, as the retrieval-head and HeadKV papers compare models.

    Equal scores are ranked by layer, then head, so that top heads with a score of zero overlap more than by chance.

    Args:
        a, b: scores, `[L, H]`.
        k: top heads to tell apart by name.

    Raises:
        ValueError: the shapes differ.
        UsageError: `k` is negative.
    """
    rank_correlation = spearman(a, b)
    best_a, best_b = top_indices(a, k), top_indices(b, k)
    width = a.shape[-1]
    return Agreement(
        num_heads=a.numel(),
        spearman=rank_correlation,
        overlaps={count: top_overlap(a, b, count) for count in OVERLAPS if count <= a.numel()},
        k=len(best_a),
        only_first=[divmod(index, width) for index in best_a if index not in best_b],
        only_second=[divmod(index, width) for index in best_b if index not in best_a],
    )


def compare_profiles(a: HeadProfile, b: HeadProfile, which: str | None = None, k: int = 10) -> dict[str, Agreement]:
    """Compare two profiles by each kind of score that both hold, or by kind `which` alone.

    Raises:
        ProfileError: their layers or heads differ, they share no kind, or one lacks `which`.
        UsageError: `which` is no kind of score, or `k` is negative.
    """
    grids = [(profile.shape.num_layers, profile.shape.num_heads) for profile in (a, b)]
    if grids[0] != grids[1]:
        sizes = " and ".join(f"{layers} layers of {heads} heads" for layers, heads in grids)
        raise ProfileError(f"Profiles of {sizes} cannot be compared: choose two of the same model or shape.")
    kinds = [which] if which else [kind for kind in a.kinds if kind in b.kinds]
    if not kinds:
        raise ProfileError(
            f"One profile holds {a.kinds[0]} scores alone and the other {b.kinds[0]}: choose two with a kind in common."
        )
    return {kind: compare(a.scores_of(kind), b.scores_of(kind), k) for kind in kinds}
