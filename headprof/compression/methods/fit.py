"""Rows that are fitted to what a head's attention was before the others were evicted.

Shapes: `B` sequences, `K` KV heads, `g` query heads per KV head, `n` queries, `N = g * n` of them for one KV head, `T`
rows, `C` slots for rows that are kept, of which a head may have fewer, `D` head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headprof.compression.kernels.constants import numbers_to
from headprof.compression.methods.observation import Observation
from headprof.compression.methods.reduction import Choice, Reduction, largest
from headprof.compression.rows import HeadCounts, Rows, marked
from headprof.errors import UsageError

_STEPS = 100
"""Of projected gradients: weights end within a thousandth of the least error."""
_AT_ONCE = 1 << 25
"""Most attention weights held at once."""
_TINY = torch.finfo(torch.float32).tiny
_CHOICES = ("importance", "omp")


@dataclass(frozen=True)
class Fit(Reduction):
    """Fit the kept rows to the whole head's attention (Attention Matching, Zweiger et al. 2026).

    "Fast KV Compaction via Attention Matching", arXiv 2602.16284. The keys that stay are those of the chosen rows. To
    what some queries looked at before, two things are fitted, by least squares over these queries, those of all query
    heads of the group together:

    1. a weight for each kept row, so that the kept rows draw as much attention as all rows did, against whatever comes
       after them. Its log is added to the row's logits (the column `bias`).
    2. new values, so that the attention's output stays what it was.

    `ridge` times the mean of the squares that belong to a row pulls weights to 1 and values to the row's own, so that
    a row about which the queries say little stays as it is. The queries are the last `observers` of a prompt, of a
    document with observers all of these, and evenly spaced others before them; while text is generated, the last
    `observers` that have come. A query sees what it sees in the model: rows up to itself, in a sliding window.

    A head is left as it is if it loses no row; if it has fewer queries than `least` for each kept row, which any values
    would satisfy; or if its output over the queries would not be closer to the whole head's than if the other rows were
    just evicted.

    Attributes:
        observers: last queries to which rows are fitted; of a document that is repeated it is all observers.
        own: queries of the prompt before these that are fitted to as well, evenly spaced.
        queries: most of the observers that count, evenly spaced.
        bias: whether rows get a weight; else values alone are fitted.
        bound: largest log of a weight, up or down.
        diffuse: how much more a query counts for the weights that looks at many rows than one that looks at one: by its
            largest attention to the power of minus this. 0 to 1; at 1, as in the paper, one that looks hard at a row
            that is evicted says little about those that stay.
        ridge: how strongly rows stay as they are; above 0.
        least: fewest queries of the group for each kept row.
        choose: which rows are kept: `importance`, those with the highest; `omp`, of these and the next best those whose
            attention makes up best for what is missing, one round of them after the other (orthogonal matching
            pursuit). Rows that are kept whatever their importance stay.
        breadth: for `omp`, rows from which the kept are chosen, for each of them.
        rounds: for `omp`, after how many rounds all are chosen.
    """

    observers: int = 16
    own: int = 0
    queries: int = 512
    bias: bool = True
    bound: float = 3.0
    diffuse: float = 1.0
    ridge: float = 0.1
    least: float = 1.0
    choose: str = "importance"
    breadth: float = 4.0
    rounds: int = 16
    fits_rows = True

    def __post_init__(self) -> None:
        if min(self.observers, self.queries, self.rounds) < 1 or self.own < 0:
            raise UsageError("A fit needs queries: give observers, queries and rounds at least 1, own at least 0.")
        if not 0 < self.ridge <= 1e6:
            raise UsageError(f"A ridge of {self.ridge} fits nothing: give more than 0, at most 1e6.")
        if not 0 < self.bound <= 20:
            raise UsageError(f"A bound of {self.bound} on the log of a weight is none: give more than 0, at most 20.")
        if not 0 <= self.diffuse <= 1:
            raise UsageError(f"Queries cannot count by their attention to the {self.diffuse}th: give diffuse 0 to 1.")
        if self.least < 0 or self.breadth < 1:
            raise UsageError("A fit cannot ask for fewer than no queries, or choose from less than it keeps.")
        if self.choose not in _CHOICES:
            raise UsageError(f"Rows cannot be chosen by {self.choose!r}: give choose={' or choose='.join(_CHOICES)}.")

    @property
    def prompt_queries(self) -> int | None:  # type: ignore[override]
        return None if self.own else self.observers

    @property
    def recent_queries(self) -> int:  # type: ignore[override]
        return self.observers

    def reduce(self, rows: Rows, choice: Choice) -> Rows:
        """
        Raises:
            ValueError: the choice comes without the queries.
        """
        if choice.observed is None:
            raise ValueError("rows can be fitted only to queries, which this choice lacks")
        counts, judges = _known(choice.head_counts), self.judges(choice.observed)
        if judges is None or not _may_lose(counts, choice.observed) or self._too_few(counts, judges):
            return rows.kept(choice.kept, counts)
        kept = choice.kept
        if self.choose == "omp":
            kept = self.pursued(judges, choice, counts)
        fitted = self.fitted(judges, kept, counts)
        places = marked(kept, counts.total)
        reduced = rows.at(places, counts)
        head = places[0] * kept.shape[1] + places[1]
        slot = kept.flatten(0, 1).cumsum(dim=-1).view(kept.shape)[places] - 1
        changed = fitted.changed.flatten()[head]
        values = fitted.values.flatten(0, 1)[head, slot].to(reduced.values.dtype)
        reduced = replace(reduced, values=values.where(changed[:, None], reduced.values))
        if not self.bias:
            return reduced
        added = fitted.weights.flatten(0, 1)[head, slot].log().where(changed, 0.0)
        bias = reduced.columns.get("bias")
        return reduced.with_columns({"bias": added if bias is None else bias + added})

    def _too_few(self, counts: HeadCounts, judges: Observation) -> bool:
        """Whether the host knows that no head has queries enough."""
        if counts.lengths is None:
            return False
        group, own_rows = judges.queries.shape[1] // judges.keys.shape[1], max(1, min(counts.lengths))
        return group * judges.queries.shape[2] < self.least * own_rows

    def judges(self, observed: Observation) -> Observation | None:
        """The same rows with the queries to which they are fitted; `None` if there are none."""
        held, device = observed.queries.shape[2], observed.queries.device
        last = min(self.observers, held)
        if not held:
            return None
        own = self.own if observed.is_prompt else 0
        parts = [_spaced(0, held - last, own, device), _spaced(held - last, last, self.queries, device)]
        chosen = observed.of_queries(torch.cat(parts))
        return replace(chosen, rows=replace(chosen.rows, keys=chosen.keys.float(), values=chosen.values.float()))

    def fitted(self, judges: Observation, kept: Tensor, counts: HeadCounts) -> Fitted:
        """Weights and values of the rows that each head keeps.

        Args:
            judges: all rows, and the queries.
            kept: which rows each head keeps, bool `[B, K, T]`.
            counts: how many these are.
        """
        index, own = _slots(kept, counts.most)
        seen = _seen(judges, index, own)
        weights = self.weights(*self._counted(seen)) if self.bias else torch.ones_like(seen.paid[..., 0, :])
        values = judges.values.gather(2, index[..., None].expand(*index.shape, judges.values.shape[-1]))
        plain = _shares(seen.paid)
        shares = _shares(seen.paid * weights[..., None, :]) if self.bias else plain
        new = self.values(shares, seen.output, values).to(judges.values.dtype)
        closer = _error(shares, new, seen.output) < _error(plain, values, seen.output)
        loses = judges.valid_rows().sum(dim=-1) > counts.counts
        return Fitted(weights, new, closer & loses & self._enough(seen, counts))

    def _enough(self, seen: _Seen, counts: HeadCounts) -> Tensor:
        """Which heads have queries enough, bool `[B, K]`."""
        return seen.whole.sum(dim=-1) >= self.least * counts.counts - 0.5

    def _counted(self, seen: _Seen) -> tuple[Tensor, Tensor]:
        """Attention to kept rows, `[..., N, C]`, and to all, `[..., N]`, by how much queries count for weights."""
        counts = seen.largest.clamp(min=_TINY) ** -self.diffuse
        return seen.paid * counts[..., None], seen.whole * counts

    def weights(self, paid: Tensor, whole: Tensor) -> Tensor:
        """Weights with which kept rows draw the attention of all, float32 `[..., C]`.

        The least squares of `paid @ weights - whole`, each weight pulled to 1, between the bounds; by projected
        gradients with momentum, begun anew where that overshoots.

        Args:
            paid: what each query paid to each kept row, `[..., N, C]`.
            whole: what it paid in all, `[..., N]`.
        """
        gram = paid.transpose(-1, -2) @ paid
        return self._weights(gram, (paid.transpose(-1, -2) @ whole[..., None])[..., 0])

    def _weights(self, gram: Tensor, wanted: Tensor) -> Tensor:
        """The same by the normal equations, `[..., C, C]` and `[..., C]`; a row without entries keeps a weight of 1."""
        pull = (self.ridge * _mean_diagonal(gram)).clamp(min=_TINY)[..., None]
        squares = gram.diagonal(dim1=-2, dim2=-1) + pull
        scale = squares.rsqrt()  # each weight in its own unit: all squares are 1 then
        gram = (gram + torch.diag_embed(pull.expand_as(squares))) * scale[..., None] * scale[..., None, :]
        wanted = (wanted + pull) * scale
        low, high = (math.exp(sign * self.bound) / scale for sign in (-1, 1))
        step = 1 / gram.sum(dim=-1).amax(dim=-1, keepdim=True)  # no entry is below 0: an upper bound on the norm
        now = ahead = 1 / scale
        momentum = torch.ones_like(step)
        for _ in range(_STEPS):
            slope = (gram @ ahead[..., None])[..., 0] - wanted
            new = (ahead - step * slope).clamp(low, high)
            back = ((ahead - new) * (new - now)).sum(dim=-1, keepdim=True) > 0
            momentum = momentum.masked_fill(back, 1.0)
            next_momentum = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
            ahead = new + (momentum - 1) / next_momentum * (new - now)
            now, momentum = new, next_momentum
        return now * scale

    def values(self, shares: Tensor, output: Tensor, values: Tensor) -> Tensor:
        """Values with which kept rows give the output of all, float32 `[..., C, D]`.

        Args:
            shares: attention of each query to each kept row, `[..., N, C]`.
            output: what it saw of all rows, `[..., N, D]`.
            values: those that the kept rows had, `[..., C, D]`.
        """
        gram = shares.transpose(-1, -2) @ shares
        pull = (self.ridge * _mean_diagonal(gram)).clamp(min=_TINY)[..., None]
        gram.diagonal(dim1=-2, dim2=-1).add_(pull)
        missing = shares.transpose(-1, -2) @ (output - shares @ values)
        factor, _ = torch.linalg.cholesky_ex(gram)
        return values + torch.cholesky_solve(missing, factor)

    def pursued(self, judges: Observation, choice: Choice, counts: HeadCounts) -> Tensor:
        """Other rows to keep, as many: those whose attention makes up best for what is missing, bool `[B, K, T]`.

        A head with too few queries keeps those of the choice.
        """
        most = min(choice.kept.shape[-1], math.ceil(counts.most * self.breadth))
        valid = (choice.ranked > float("-inf")).sum(dim=-1)
        pooled = (counts.counts * self.breadth).ceil().long().minimum(valid)
        index, own = _slots(largest(choice.ranked, pooled, most=most), most)
        seen = _seen(judges, index, own)
        always = (choice.ranked.gather(2, index) == float("inf")) & own
        paid, whole = self._counted(seen)
        gram, wanted = paid.transpose(-1, -2) @ paid, (paid.transpose(-1, -2) @ whole[..., None])[..., 0]
        chosen, free = always, counts.counts - always.sum(dim=-1)
        for number in range(1, self.rounds + 1):
            among = gram * chosen[..., None] * chosen[..., None, :]
            drawn = self._weights(among, wanted * chosen) * chosen
            worth = wanted - (gram @ drawn[..., None])[..., 0]
            worth = worth.masked_fill(~own, float("-inf")).masked_fill(chosen, float("inf"))
            so_many = (always.sum(dim=-1) + free * number // self.rounds).minimum(counts.counts)
            chosen = largest(worth, so_many, most=counts.most)
        found = torch.zeros_like(choice.kept, dtype=torch.int32)
        found = found.scatter_add_(2, index, (chosen & own).int()) > 0  # slots that are none may repeat a row
        return found.where(self._enough(seen, counts)[..., None], choice.kept)


@dataclass(frozen=True)
class Fitted:
    """What has been fitted.

    Attributes:
        weights: of each kept row, float32 `[B, K, C]`.
        values: float32 `[B, K, C, D]`.
        changed: heads that are to have them, bool `[B, K]`.
    """

    weights: Tensor
    values: Tensor
    changed: Tensor


@dataclass(frozen=True)
class _Seen:
    """What queries made of the rows that a head had.

    Attributes:
        paid: attention to each kept row, float32 `[B, K, N, C]`.
        whole: attention to all rows, 1, or 0 if a query does not count, `[B, K, N]`.
        output: all rows' values by attention, `[B, K, N, D]`.
        largest: attention to the row that got most, `[B, K, N]`.
    """

    paid: Tensor
    whole: Tensor
    output: Tensor
    largest: Tensor


def _seen(judges: Observation, index: Tensor, own: Tensor) -> _Seen:
    """What queries made of all rows.

    Args:
        judges: the rows and the queries.
        index: of kept rows, int64 `[B, K, C]`.
        own: which of these a head keeps, bool `[B, K, C]`.
    """
    parts = [_part(attention, judges.values, index, own) for attention in _attention(judges)]
    return _Seen(*(torch.cat(each, dim=2) for each in zip(*parts, strict=True)))


def _part(attention: Tensor, values: Tensor, index: Tensor, own: Tensor) -> tuple[Tensor, ...]:
    slots = index[:, :, None].expand(-1, -1, attention.shape[2], -1)
    return (
        attention.gather(3, slots) * own[:, :, None],
        attention.sum(dim=-1),
        attention @ values,
        attention.amax(dim=-1),
    )


def _attention(judges: Observation) -> Iterator[Tensor]:
    """Of some queries after the other, `[B, K, N, T]` each."""
    batch, heads, number, _ = judges.queries.shape
    step = max(1, _AT_ONCE // max(1, batch * heads * judges.keys.shape[2]))
    for first in range(0, number, step):
        yield judges.attention_of(first, min(first + step, number)).flatten(2, 3)


def _spaced(start: int, span: int, most: int, device: torch.device) -> Tensor:
    """Of `span` numbers from `start` on as many as `most`, evenly spaced up to the last, int64 `[n]`."""
    count = min(span, most)
    return start - 1 + torch.arange(1, count + 1, device=device) * span // max(1, count)


def _shares(paid: Tensor) -> Tensor:
    """Attention among kept rows alone, `[..., N, C]`; none where none of them is seen."""
    return paid / paid.sum(dim=-1, keepdim=True).clamp(min=_TINY)


def _error(shares: Tensor, values: Tensor, output: Tensor) -> Tensor:
    """Sum of squares by which heads' output differs, `[...]`."""
    return (shares @ values - output).square().sum(dim=(-2, -1))


def _mean_diagonal(gram: Tensor) -> Tensor:
    """Of the rows that anybody looks at, `[...]`."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    return diagonal.sum(dim=-1) / (diagonal > 0).sum(dim=-1).clamp(min=1)


def _slots(kept: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Where the kept rows of each head are, int64 `[B, K, most]`, and which of these it has, bool `[B, K, most]`."""
    ranks = kept.flatten(0, 1).cumsum(dim=-1)
    numbers = numbers_to(most, kept.device)
    index = torch.searchsorted(ranks, numbers.expand(len(ranks), -1).contiguous()).clamp_(max=kept.shape[-1] - 1)
    shape = (*kept.shape[:2], most)
    return index.view(shape), (numbers <= ranks[:, -1:]).view(shape)


def _known(counts: HeadCounts) -> HeadCounts:
    """With a bound that is not far too large; for it the host waits where heads share out a layer's rows."""
    if counts.lengths is not None:
        return counts
    return replace(HeadCounts.looked_up(counts.counts), lengths=None)


def _may_lose(counts: HeadCounts, observed: Observation) -> bool:
    """Whether a head may lose a row, as far as the host knows."""
    if counts.lengths is None:
        return True
    batch, heads, rows = observed.keys.shape[:3]
    visible = observed.visible or ([rows] * batch if observed.is_prompt and not observed.padded else None)
    if visible is None:
        return True
    held = [count for count in visible for _ in range(heads)]
    return any(count < most for count, most in zip(counts.lengths, held, strict=True))
