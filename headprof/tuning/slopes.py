"""Influence curves foreseen from gradients: for all heads and numbers of rows at once, from one pass and one back.

When a head keeps other rows, what its attention puts out changes by so much, which one pass tells for every number of
rows. How much the divergence from the full cache changes with it, gradients tell: to first order by its own gradient,
to second order by the Gauss-Newton matrix, which the gradients of some answers drawn from the model estimate (Martens
2020, "New insights and perspectives on the natural gradient method", section 9.2). The second order says too what heads
lose together beyond what each loses alone.

Shapes: `A` answers, `S` draws, `L` layers, `K` KV heads, `N` numbers of rows, `Q` tokens that are run, `D` head
dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headprof.models.loading import LoadedModel
from headprof.tuning.exams import Answering, Exam, Exams
from headprof.tuning.hidden_rows import HidingModel, hiding
from headprof.tuning.reading import PromptReader


@dataclass(frozen=True, eq=False)
class Slopes:
    """How one answer's divergence changes with the rows that heads keep, around what they keep.

    Attributes:
        cluster: number of its context.
        at_base: divergence at the counts around which this is, nats a token.
        first: change to first order for each head and number of rows, `[L, K, N]`.
        second: for each draw, the change whose mean square over draws is twice the second order, `[S, L, K, N]`; those
            of several heads add up before they are squared.
    """

    cluster: int
    at_base: float
    first: Tensor
    second: Tensor

    def alone(self) -> Tensor:
        """What each head loses alone, beyond what is lost at the base, `[L, K, N]`."""
        return self.first + self.second.square().mean(dim=0) / 2

    def together(self, chosen: Tensor) -> Tensor:
        """What all heads lose together, `[P]`, where each has one of the numbers of rows, int64 `[P, L, K]`."""
        table, index = self.first.expand(*chosen.shape, -1), chosen[..., None]
        first = table.gather(-1, index)[..., 0].sum(dim=(1, 2))
        moved = torch.stack(
            [each.expand(*chosen.shape, -1).gather(-1, index).sum(dim=(1, 2, 3)) for each in self.second]
        )
        return self.at_base + first + moved.square().mean(dim=0) / 2


def measure_slopes(
    loaded: LoadedModel,
    exams: Exams,
    grid: Sequence[int],
    base: Tensor | None,
    *,
    draws: int = 8,
    seed: int = 0,
    on_exam: Callable[[int, int], None] = lambda done, total: None,
) -> list[Slopes]:
    """Foresee what heads lose around what they keep.

    Args:
        loaded: the model.
        exams: what is asked, and who judges rows.
        grid: numbers of rows.
        base: rows that each head keeps, int64 `[L, K]`; `None` for all.
        draws: answers that are drawn for the second order; 0 for the first order alone.
        seed: of the draws.
        on_exam: called with the number of exams that are done, and of all.
    """
    generator, found = torch.Generator().manual_seed(seed), []
    reader = PromptReader(loaded, exams.judge.of_table)
    for number, exam in enumerate(exams):
        on_exam(number, len(exams))
        found += _of_exam(loaded, reader, exams, exam, grid, base, draws, generator)
    on_exam(len(exams), len(exams))
    return found


def _of_exam(
    loaded: LoadedModel,
    reader: PromptReader,
    exams: Exams,
    exam: Exam,
    grid: Sequence[int],
    base: Tensor | None,
    draws: int,
    generator: torch.Generator,
) -> list[Slopes]:
    rows = reader.read(exam.prompt, exams.observers(loaded, exam), exam.shared)
    with hiding(loaded.model) as hider:
        hider.rows = rows
        return [
            _of_answer(loaded, hider, answer, grid, base, draws, generator, exam.cluster) for answer in exam.answers
        ]


def _of_answer(
    loaded: LoadedModel,
    hider: HidingModel,
    answer: Answering,
    grid: Sequence[int],
    base: Tensor | None,
    draws: int,
    generator: torch.Generator,
    cluster: int,
) -> Slopes:
    shape, length = loaded.shape, hider.prompt_length
    whole = torch.full((shape.num_layers, shape.num_kv_heads), length)
    counts = whole if base is None else base.minimum(whole)
    points = torch.tensor(grid).clamp(max=length)[:, None].expand(-1, shape.num_kv_heads)
    number = len(answer.reference)
    with torch.no_grad():
        full = hider.logits(answer.fed, number, whole[None])[0].float().log_softmax(dim=-1)
    levers: list[Tensor] = []
    changes: list[Tensor] = []

    def watch(layer: int, output: Tensor, seeing: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            changes.append(seeing(points) - output[:1])
        lever = torch.zeros_like(output, requires_grad=True)
        levers.append(lever)
        return output + lever

    hider.watch = watch
    with torch.enable_grad():
        said = hider.logits(answer.fed, number, counts.repeat(1 + draws, 1, 1)).float().log_softmax(dim=-1)
        divergence = (full.exp() * (full - said[0])).sum(dim=-1).mean()
        loss = divergence
        if draws:
            with torch.no_grad():
                drawn = torch.multinomial(said[0].exp().cpu(), draws, replacement=True, generator=generator).to(
                    said.device
                )
                signs = torch.randint(2, drawn.shape, generator=generator).to(said) * 2 - 1
            picked = said[1:].gather(2, drawn.T[..., None])[..., 0]  # [S, N]
            loss = loss + (picked * signs.T).sum() / number**0.5
        gradients = torch.autograd.grad(loss, levers)
    hider.watch = None
    heads = [
        torch.einsum("sqhd,nqhd->shn", gradient, change).unflatten(1, (shape.num_kv_heads, -1)).sum(dim=2).cpu()
        for gradient, change in zip(gradients, changes, strict=True)
    ]
    moved = torch.stack(heads, dim=1)  # [1 + S, L, K, N]
    return Slopes(cluster, float(divergence), moved[0], moved[1:])
