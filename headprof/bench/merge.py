"""Evict-then-merge over all heads of a layer at once, beside a loop over the heads, in one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from headprof.bench.measure import Progress, median_seconds, require_at_least
from headprof.compression.methods.budget import ProfileBudget
from headprof.compression.methods.reduction import Choice, largest, ranking
from headprof.compression.methods.table import METHODS
from headprof.compression.rows import Rows
from headprof.models.published import find_shape


@dataclass(frozen=True)
class MergeTimes:
    """Seconds to reduce one layer's prompt, medians.

    Attributes:
        shape, length, budget, batch: what was reduced; heads get budgets as a head profile gives them.
        together: all heads in one batched operation.
        looped: the same code for one head after the other.
        equal: whether both kept the same rows, to float tolerance.
    """

    shape: str
    length: int
    budget: int
    batch: int
    together: float
    looped: float
    equal: bool

    @property
    def ratio(self) -> float:
        """How many times faster all heads together are."""
        return self.looped / self.together


def run_merge_bench(
    shape: str,
    lengths: tuple[int, ...],
    budgets: tuple[int, ...],
    *,
    batch: int = 1,
    repeats: int = 9,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    on_progress: Progress = lambda text, done, total: None,
) -> list[MergeTimes]:
    """Reduce random keys and values with uneven attention, alternating both ways.

    Args:
        shape: a name in `SHAPES`.
        lengths: prompt lengths in tokens.
        budgets: average tokens per KV head.
        batch: sequences.
        repeats: timed runs, after one that is not, of which the median counts.
        device, dtype: of the keys and values.
        seed: of all that is random.
        on_progress: called before each case.

    Raises:
        UsageError: there is no such shape, or a number is too small.
    """
    find_shape(shape)
    require_at_least(1, lengths=lengths, budgets=budgets, batch=batch, repeats=repeats)
    cases = [(length, budget) for length in lengths for budget in budgets]
    times = []
    for done, (length, budget) in enumerate(cases):
        on_progress(f"Merging {length} tokens into {budget}", done, len(cases))
        layer = _random_layer(shape, length, budget, batch, device, dtype, seed)
        works: list[Callable[[], object]] = [partial(_reduce, *layer), partial(_reduce_heads, *layer)]
        together, looped = median_seconds(works, repeats, layer[0].keys.device)
        equal = _equal(_reduce(*layer), _reduce_heads(*layer))
        times.append(MergeTimes(shape, length, budget, batch, together, looped, equal))
    return times


def _reduce(rows: Rows, choice: Choice) -> Rows:
    """All heads in one operation."""
    return METHODS["ems"].reduction.reduce(rows, choice)


def _reduce_heads(rows: Rows, choice: Choice) -> list[Rows]:
    """One head after the other."""
    batch, num_kv_heads = choice.kept.shape[:2]
    return [_reduce(*_head(rows, choice, b, k)) for b in range(batch) for k in range(num_kv_heads)]


def _random_layer(
    shape: str, length: int, budget: int, batch: int, device: str, dtype: torch.dtype, seed: int
) -> tuple[Rows, Choice]:
    """Rows of one layer and which of them its heads keep; attention falls off as a power, as it does in models."""
    numbers = find_shape(shape)
    generator = torch.Generator().manual_seed(seed)
    sizes = (batch, numbers["num_key_value_heads"], length)
    drift = torch.randn(*sizes, numbers["head_dim"], generator=generator).cumsum(dim=2) * 0.3  # neighbors are alike
    keys, values = (
        (drift + torch.randn(drift.shape, generator=generator)).to(device, dtype),
        torch.randn(drift.shape, generator=generator).to(device, dtype),
    )
    weights = (torch.rand(sizes, generator=generator) ** 8).to(device)
    scores = torch.rand(sizes[1], generator=generator)[None] ** 4
    counts = ProfileBudget().allocate(scores, budget=budget, context_length=length, always_kept=3)
    ranked = ranking(weights, torch.ones(batch, length, dtype=torch.bool, device=device), sinks=1, keep_last=2)
    kept = largest(ranked, counts.expand(batch, -1).to(device))
    return Rows.of_prompt(keys, values), Choice(kept, ranked, weights)


def _head(rows: Rows, choice: Choice, b: int, k: int) -> tuple[Rows, Choice]:
    def of_head(each: torch.Tensor) -> torch.Tensor:
        return each[b : b + 1, k : k + 1]

    return rows.map(of_head), Choice(of_head(choice.kept), of_head(choice.ranked), of_head(choice.weights))


def _equal(together: Rows, parts: list[Rows]) -> bool:
    return torch.allclose(together.keys, torch.cat([part.keys for part in parts]), atol=1e-4, rtol=1e-3) and (
        torch.allclose(together.values, torch.cat([part.values for part in parts]), atol=1e-4, rtol=1e-3)
    )
