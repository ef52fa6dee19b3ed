"""How alike two head profiles are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
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
        of_kv_heads: whether these heads are KV heads.
    """

    num_heads: int
    spearman: float
    overlaps: Mapping[int, float]
    k: int
    only_first: list[tuple[int, int]]
    only_second: list[tuple[int, int]]
    of_kv_heads: bool = False

    @property
    def heads(self) -> str:
        """What was ranked, in words: `heads`, or `KV heads`."""
        return "KV heads" if self.of_kv_heads else "heads"

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

    Scores that were published for KV heads tell nothing of the query heads that share one: then KV heads are compared,
    each by the best score of its query heads.

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
    return {kind: _compare_kinds(a, kind, b, kind, k) for kind in kinds}


def compare_within(profile: HeadProfile, k: int = 10) -> dict[tuple[str, str], Agreement]:
    """The same for each two kinds of a profile's own scores."""
    pairs = combinations(profile.kinds, 2)
    return {(one, other): _compare_kinds(profile, one, profile, other, k) for one, other in pairs}


def _compare_kinds(a: HeadProfile, kind_a: str, b: HeadProfile, kind_b: str, k: int) -> Agreement:
    if a.shape.num_kv_heads == b.shape.num_kv_heads and (_is_of_kv_heads(a, kind_a) or _is_of_kv_heads(b, kind_b)):
        return replace(compare(a.kv_head_scores(kind_a), b.kv_head_scores(kind_b), k), of_kv_heads=True)
    return compare(a.scores_of(kind_a), b.scores_of(kind_b), k)


def _is_of_kv_heads(profile: HeadProfile, kind: str) -> bool:
    """Whether all query heads that share a KV head have one score, though not all heads have the same."""
    import torch

    scores, shape = profile.scores_of(kind), profile.shape
    spread = profile.kv_head_scores(kind).repeat_interleave(shape.group_size, dim=1)
    return shape.group_size > 1 and torch.equal(scores, spread) and bool((scores != scores[0, 0]).any())
