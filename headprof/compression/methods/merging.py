"""Merging rows into those that stay: evict-then-merge.

Shapes: `B` sequences, `K` KV heads, `T` rows, `D` head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import normalize, pad

from headprof.compression.kernels import looking
from headprof.compression.kernels.constants import numbers_to
from headprof.compression.methods.class_sums import add_by_class
from headprof.compression.methods.reduction import Choice, Reduction, largest
from headprof.compression.rows import COLUMNS, Rows, marked
from headprof.errors import UsageError


@dataclass(frozen=True)
class EvictThenMerge(Reduction):
    """Merge the best of what would be evicted into the rows that stay (EMS, Li et al. 2024, "Evict-then-Merge").

    A head's kept rows, but for those that it keeps whatever their importance, are *centres*; the next best rows are
    *candidates*, the rest is dropped. A candidate joins the centre with the most similar key (of equal ones the
    earlier), if their cosine similarity is above the threshold; else it joins the zero class, one more column of the
    similarity matrix, and is dropped. So heads with any number of centres and candidates are one batched operation.

    Values are averaged by their rows' weights; keys too, and then rescaled to the average of their norms. A centre that
    stands for several rows draws their attention: the log of the cluster's weight over its own is added to its logits.
    A weight counts as at least a millionth of its head's largest.

    How many candidates a head has goes by its sparsity, the number of rows that hold `coverage` of its attention: as
    many as it exceeds the kept ones by, at most `candidates` for each centre; and by its redundancy `r`, the mean
    cosine similarity of its keys: a share of `r ** redundancy` of them.

    Attributes:
        threshold: -1 to 1; 1 merges nothing, -1 drops only candidates whose keys point the opposite way of all centres.
        candidates: most candidates for each centre; 0 merges nothing.
        coverage: share of a head's attention, 0 to 1; 1 takes as many candidates as `candidates` allows.
        redundancy: exponent on the redundancy; 0 leaves it out.
        merge_keys: whether keys are averaged, or stay the centre's.
        mass: whether a centre draws the attention of its cluster.
    """

    threshold: float = 0.6
    candidates: float = 8.0
    coverage: float = 0.9
    redundancy: float = 0.0
    merge_keys: bool = True
    mass: bool = True

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise UsageError(f"A threshold of {self.threshold} is no cosine: give -1 to 1.")
        if self.candidates < 0 or self.redundancy < 0:
            raise UsageError("Candidates and redundancy cannot be below 0: give 0 or more.")
        if not 0 < self.coverage <= 1:
            raise UsageError(f"A coverage of {self.coverage} is no share of attention: give more than 0, at most 1.")

    def reduce(self, rows: Rows, choice: Choice) -> Rows:
        counts, tokens = choice.head_counts, rows.keys.shape[2]
        places = marked(choice.kept, counts.total)
        reduced = rows.at(places, counts)
        left = tokens - (min(counts.lengths) if counts.lengths else 0)
        most = min(left, math.ceil(counts.most * self.candidates))
        if self.threshold >= 1 or most == 0:
            return reduced
        centres = choice.kept & (choice.ranked < float("inf"))
        joining = self.count_candidates(rows.keys, choice, centres)
        if looking.is_free(joining.device) and (most := int(joining.max())) == 0:
            return reduced
        ranks = centres.flatten(0, 1).cumsum(dim=-1)
        clusters = self._clusters(rows.keys, choice, ranks, min(counts.most, tokens), joining, most)
        head = places[1] if len(centres) == 1 else places[0] * centres.shape[1] + places[1]
        slot = ranks.view(centres.shape)[places] - 1  # what is no centre has any
        clustered = clusters.of(rows, self.merge_keys)
        merged = clustered.merged[head, slot] & centres[places]  # of the rows kept

        def put(held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            changed = merged if new.ndim == 2 else merged[:, None]
            return new[head, slot].to(held.dtype).where(changed, held)

        columns = {name: put(reduced.columns[name], sums) for name, sums in clustered.columns.items()}
        if self.mass:
            mass, bias = clustered.mass[head, slot], reduced.columns.get("bias")
            columns["bias"] = mass.where(merged, 0.0) if bias is None else (bias + mass).where(merged, bias)
        return replace(
            reduced,
            values=put(reduced.values, clustered.values),
            keys=reduced.keys if clustered.keys is None else put(reduced.keys, clustered.keys),
            columns={**reduced.columns, **columns},
        )

    def _clusters(
        self,
        keys: torch.Tensor,
        choice: Choice,
        ranks: torch.Tensor,
        most_centres: int,
        joining: torch.Tensor,
        most_joining: int,
    ) -> _Clusters:
        """Let the best rows of each head that are not kept join its centres.

        Args:
            keys: of all rows.
            choice: which are kept.
            ranks: how many centres there are up to each row, int64 `[N, T]`.
            most_centres: no head has more of them.
            joining: candidates of each head, int64 `[B, K]`.
            most_joining: no head has more of them.
        """
        centre_index, no_centre = _packed(ranks, most_centres)
        chosen = largest(choice.rest.flatten(0, 1), joining.flatten(), most=most_joining)
        candidate_index, no_candidate = _packed(chosen.cumsum(dim=-1), most_joining)
        keys = keys.flatten(0, 1)
        cluster = nearest(_at(keys, candidate_index), _at(keys, centre_index), no_centre, self.threshold)
        weights = choice.weights.flatten(0, 1).float()
        weights = weights.maximum((_LEAST_WEIGHT * weights.amax(dim=-1, keepdim=True)).clamp(min=_TINY))
        return _Clusters(
            centre_index,
            candidate_index,
            cluster.masked_fill_(no_candidate, 0),
            weights.gather(1, centre_index),
            weights.gather(1, candidate_index),
        )

    def count_candidates(self, keys: torch.Tensor, choice: Choice, centres: torch.Tensor) -> torch.Tensor:
        """How many candidates each head has, int64 `[B, K]`.

        Args:
            keys: of all rows, `[B, K, T, D]`.
            choice: which are kept.
            centres: which of these others may join, bool `[B, K, T]`.
        """
        ranked, num_centres = choice.ranked, centres.sum(dim=-1)
        free = (choice.rest > float("-inf")).sum(dim=-1)
        counts = free.minimum((num_centres * self.candidates).long())
        if self.coverage < 1:
            needed = sparsity(choice.weights, ranked, self.coverage)
            counts = counts.minimum((needed - choice.head_counts.counts).clamp(min=0))
        if self.redundancy:
            share = redundancy(keys, ranked > float("-inf")).clamp(min=0) ** self.redundancy
            counts = (counts * share.double() + 1e-4).long()  # so that rounding loses none where all keys are alike
        return counts


def sparsity(weights: torch.Tensor, ranked: torch.Tensor, coverage: float) -> torch.Tensor:
    """How many of a head's rows, those with the most attention first, hold a share of it, int64 `[B, K]`.

    Args:
        weights: attention, at least 0, `[B, K, T]`.
        ranked: minus infinity for rows that do not count, `[B, K, T]`.
        coverage: the share, 0 to 1.
    """
    held = weights.masked_fill(ranked == float("-inf"), 0).sort(dim=-1, descending=True).values.double().cumsum(dim=-1)
    return (held < coverage * held[..., -1:]).sum(dim=-1) + 1


def redundancy(keys: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean cosine similarity of the keys of each head with one another and themselves, float32 `[B, K]`.

    It is the squared length of their mean direction, so it takes one pass, not one for each pair.

    Args:
        keys: `[B, K, T, D]`.
        valid: which of them count, bool `[B, K, T]`.
    """
    directions = normalize(keys.float(), dim=-1) * valid[..., None]
    mean = directions.sum(dim=2) / valid.sum(dim=-1, keepdim=True).clamp(min=1)
    return mean.square().sum(dim=-1)


def nearest(candidates: torch.Tensor, centres: torch.Tensor, no_centre: torch.Tensor, threshold: float) -> torch.Tensor:
    """The class that each candidate joins: 0 for the zero class, else one more than the number of a centre.

    Args:
        candidates: keys, `[N, M, D]`.
        centres: keys, `[N, C, D]`.
        no_centre: true where a head has fewer than `C` centres, bool `[N, C]`.
        threshold: a cosine; a centre must be more similar than that.

    Returns:
        int64 `[N, M]`.
    """
    directions = normalize(centres.float(), dim=-1).transpose(1, 2)  # [N, D, C]
    classes = []
    step = max(1, _SIMILARITIES // max(1, len(centres) * centres.shape[1]))
    for part in candidates.split(step, dim=1):
        similarity = (normalize(part.float(), dim=-1) @ directions).clamp_(max=1.0)
        highest, centre = similarity.masked_fill_(no_centre[:, None], -2.0).max(dim=-1)  # of equal ones the first
        classes.append((centre + 1).masked_fill_(highest <= threshold, 0))
    return classes[0] if len(classes) == 1 else torch.cat(classes, dim=1)


_SIMILARITIES = 1 << 25
"""Most similarities held at once."""
_LEAST_WEIGHT = 1e-6
"""Of a head's largest: a centre that got no attention at all would else draw all of it once something joins it."""
_TINY = torch.finfo(torch.float32).tiny


def _packed(ranks: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the chosen entries of each row are, ascending, int64 `[N, most]`, and which of these are none, bool.

    Args:
        ranks: how many have been chosen up to each entry, int64 `[N, T]`.
        most: no row has more of them.
    """
    numbers = numbers_to(most, ranks.device)
    index = torch.searchsorted(ranks, numbers.expand(len(ranks), -1).contiguous())
    return index.clamp_(max=ranks.shape[1] - 1), numbers > ranks[:, -1:]


def _at(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `[N, T, D]` at an index `[N, P]`, as `[N, P, D]`."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


@dataclass(frozen=True)
class _Clusters:
    """The centres of `N = B * K` heads, up to `C` each, and their candidates, up to `M` each.

    Attributes:
        centre_index, candidate_index: their index among a head's rows, int64 `[N, C]` and `[N, M]`.
        cluster: the class that each candidate joins, as `nearest` gives it, int64 `[N, M]`.
        own, joining: weights of centres and candidates, float32 `[N, C]` and `[N, M]`.
    """

    centre_index: torch.Tensor
    candidate_index: torch.Tensor
    cluster: torch.Tensor
    own: torch.Tensor
    joining: torch.Tensor

    def of(self, rows: Rows, with_keys: bool) -> _Clustered:
        """What the clusters come to of these rows, flat but for heads, all of it summed at once."""
        values = self._weighted(*self._of(rows.values))
        weights = (self.own[..., None], self.joining[..., None])
        sums = [weights, values]
        if with_keys:
            keys = self._of(rows.keys)
            norms = (each.norm(dim=-1, keepdim=True) for each in keys)
            sums += [self._weighted(*keys), self._weighted(*norms)]
        summed = {name: self._of(column[..., None]) for name, column in rows.columns.items() if COLUMNS[name].summed}
        whole, value, *others = self._summed([*sums, *summed.values()])
        columns = {name: each[..., 0] for name, each in zip(summed, others[len(sums) - 2 :], strict=True)}
        mean_keys = _of_length(others[0] / whole, others[1] / whole, keys[0]) if with_keys else None
        return _Clustered(self.own, whole[..., 0], value / whole, mean_keys, columns)

    def _of(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of rows `[B, K, T, D]` those of the centres, `[N, C, D]`, and of the candidates, `[N, M, D]`; float32."""
        rows = rows.flatten(0, 1)
        return _at(rows, self.centre_index).float(), _at(rows, self.candidate_index).float()

    def _weighted(self, centres: torch.Tensor, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return centres * self.own[..., None], candidates * self.joining[..., None]

    def _summed(self, parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Sequence[torch.Tensor]:
        """Of each pair, of the centres' own rows and the candidates', the sum for each cluster, float32 `[N, C, D]`."""
        own, joining = (torch.cat(each, dim=-1) for each in zip(*parts, strict=True))
        total = pad(own, (0, 0, 1, 0))  # the zero class comes first
        add_by_class(total, self.cluster, joining, crowded=True)
        return total[:, 1:].split([each.shape[-1] for each, _ in parts], dim=-1)


def _of_length(mean: torch.Tensor, norm: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Mean keys, `[N, C, D]`, as long as keys are on average, `[N, C, 1]`; the centre's where they cancel out."""
    length = mean.norm(dim=-1, keepdim=True)
    return (mean * (norm / length.clamp(min=_TINY))).where(length > 1e-6 * norm, centres)


@dataclass(frozen=True)
class _Clustered:
    """What the clusters of `N` heads come to, float32.

    Attributes:
        own, whole: weight of each centre and of its cluster, `[N, C]`.
        values, keys: mean rows by weight, `[N, C, D]`; no keys where those of the centres stay.
        columns: sums of what is summed of rows, `[N, C]`, by name.
    """

    own: torch.Tensor
    whole: torch.Tensor
    values: torch.Tensor
    keys: torch.Tensor | None
    columns: dict[str, torch.Tensor]

    @property
    def merged(self) -> torch.Tensor:
        """Which centres stand for more than themselves, bool `[N, C]`."""
        return self.whole > self.own

    @property
    def mass(self) -> torch.Tensor:
        """Log of each cluster's weight over that of its centre, `[N, C]`."""
        return self.whole.log() - self.own.log()
