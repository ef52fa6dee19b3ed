"""Influence curves: what the right answer loses when one KV head keeps `n` rows of a prompt, measured head by head.

A prompt is read once. What comes after it runs once up to each layer, and from there on in copies: one for each KV head
of that layer and each number of rows, all other heads keeping what they keep in any case. That is everything, or
what some budgets give them: where all others are whole, they stand in for a head that is not, and what it loses alone
says little of what all of them lose together.

Shapes: `A` answers, `L` layers, `K` KV heads, `N` numbers of rows, the last of them all of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product

import torch
from torch import Tensor

from headprof.errors import UsageError
from headprof.models.loading import LoadedModel
from headprof.profile.influence import InfluenceCurves
from headprof.tuning.asked import Asked
from headprof.tuning.exams import Exam, Exams
from headprof.tuning.hidden_rows import hiding, read_ranked
from headprof.utils.bootstrap import standard_error

GRID = (4, 8, 16, 32, 64, 128, 256, 512)
"""Numbers of rows that a head keeps; all of the prompt comes after them."""


@dataclass(frozen=True, eq=False)
class AnswerLosses:
    """What one answer loses, for each head and number of rows.

    Attributes:
        kind: of what was asked, as `Answering.kind`.
        cluster: number of its context.
        divergence: from the full cache, mean over the answer's tokens in nats, float32 `[L, K, N]`.
        drop: of the answer's log-probability, mean over its tokens in nats, float32 `[L, K, N]`.
        base: both where each head keeps what it keeps in any case, float32 `[2]`.
    """

    kind: str
    cluster: int
    divergence: Tensor
    drop: Tensor
    base: Tensor


@dataclass(frozen=True, eq=False)
class MeasuredCurves:
    """What was measured.

    Attributes:
        answers: of all exams, in order.
        grid: numbers of rows, `N`.
        base: rows that the other heads kept, int64 `[L, K]`; `None` for all.
    """

    answers: Sequence[AnswerLosses]
    grid: tuple[int, ...]
    base: Tensor | None

    @property
    def base_loss(self) -> float:
        """Mean divergence where each head keeps what it keeps in any case, in nats a token."""
        return sum(float(answer.base[0]) for answer in self.answers) / max(1, len(self.answers))

    def curves(self, part: str = "divergence") -> InfluenceCurves:
        """Means over all answers, with standard errors over contexts.

        Args:
            part: `"divergence"`, or `"drop"` of log-probability.
        """
        measured = torch.stack([getattr(answer, part) for answer in self.answers]).double()  # [A, L, K, N]
        lost = measured - measured[..., -1:]
        errors = standard_error(lost.flatten(1), [answer.cluster for answer in self.answers]).view(lost.shape[1:])
        return InfluenceCurves(lost.mean(dim=0).float(), errors, torch.tensor(self.grid))


def measure_curves(
    loaded: LoadedModel,
    exams: Exams,
    grid: Sequence[int] = GRID,
    base: Tensor | None = None,
    *,
    batch: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> MeasuredCurves:
    """Measure what each head loses at each number of rows.

    Args:
        loaded: the model.
        exams: what is asked, and who judges rows.
        grid: numbers of rows, ascending; all of a prompt is added.
        base: rows that all other heads keep meanwhile, int64 `[L, K]`; `None` for all.
        batch: copies that run at once; `None` to choose by the free memory.
        on_progress: called after each layer of each answer, with the number done and the number of all.

    Raises:
        UsageError: the grid does not ascend from 1, or the model's context is too short to judge a prompt.
        ModelError: the model's attention or layers cannot be reached, or its numbers overflow.
    """
    check_grid(grid, exams.settings.length)
    total = sum(len(exam.answers) for exam in exams) * loaded.shape.num_layers
    found: list[AnswerLosses] = []
    for exam in exams:
        before = len(found) * loaded.shape.num_layers
        on_layer = partial(_shifted, on_progress, before, total)
        found += examine(loaded, exams, exam, grid, base, batch, on_layer)
    return MeasuredCurves(found, (*grid, exams.settings.length), base)


def _shifted(on_progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    on_progress(before + done, total)


def check_grid(grid: Sequence[int], length: int) -> None:
    """
    Raises:
        UsageError: such curves cannot be measured on prompts of so many tokens.
    """
    ascending = all(low < high for low, high in pairwise(grid))
    if not grid or grid[0] < 1 or grid[-1] >= length or not ascending:
        raise UsageError(
            f"A head cannot keep {', '.join(map(str, grid)) or 'none'} of {length} tokens in turns: give ascending "
            "numbers below that."
        )


@torch.no_grad()
def examine(
    loaded: LoadedModel,
    exams: Exams,
    exam: Exam,
    grid: Sequence[int],
    base: Tensor | None,
    batch: int | None = None,
    on_layer: Callable[[int], None] = lambda done: None,
) -> list[AnswerLosses]:
    """What each answer to one exam loses; arguments as for `measure_curves`.

    Raises:
        UsageError: the model's context is too short to judge the prompt.
        ModelError: the model's attention or layers cannot be reached, or its numbers overflow.
    """
    model, layers = loaded.model, loaded.shape.num_layers
    observers = exams.observers(loaded, exam)
    rows = read_ranked(model, exams.judge.of_table, exam.prompt, observers, layers)
    found = []
    with hiding(model) as hider:
        hider.rows = rows
        for number, answer in enumerate(exam.answers):
            asked = Asked(loaded, hider, answer, batch)
            kept = asked.whole if base is None else base.minimum(asked.whole)
            at_base = torch.zeros(2) if base is None else asked.lost(kept[None])[0]
            measured = torch.empty(2, layers, loaded.shape.num_kv_heads, len(grid) + 1)
            for layer in range(layers):
                measured[:, layer] = _of_layer(asked, kept, at_base, layer, grid)
                on_layer(number * layers + layer + 1)
            found.append(AnswerLosses(answer.kind, exam.cluster, measured[0], measured[1], at_base))
    return found


def _of_layer(asked: Asked, base: Tensor, at_base: Tensor, layer: int, grid: Sequence[int]) -> Tensor:
    """Divergence and drop for each head of a layer and each number of rows, float32 `[2, K, N]`."""
    heads, points = base.shape[1], [*grid, int(asked.whole[0, 0])]
    found = at_base[:, None, None].repeat(1, heads, len(points))
    changes = [
        (head, number)
        for head, number in product(range(heads), range(len(points)))
        if min(points[number], points[-1]) != int(base[layer, head])
    ]
    if not changes:
        return found
    counts = base.repeat(len(changes), 1, 1)
    for copy, (head, number) in enumerate(changes):
        counts[copy, layer, head] = points[number]
    for (head, number), losses in zip(changes, asked.lost(counts, layer), strict=True):
        found[:, head, number] = losses
    return found
