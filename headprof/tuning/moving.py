"""Budgets moved to where they lose less: of all heads at once, by what gradients say of each.

Around some budgets, one pass over right answers and one back tell what each head's last rows are worth: how much what
the head's attention puts out would change with fewer or more rows is known exactly, and the gradient there tells what
that does to the divergence from the full cache (attribution patching: Syed et al. 2023, arXiv 2310.10348). At the best
budgets a further row is worth as much in every head, so that a head's rows are in proportion to what changing them by a
share of themselves is worth; each round moves budgets towards that. Heads that stand in for one another are seen as
they are at these budgets, not as they would be if each were cut alone.

What single rounds come to differs by chance, so that their geometric mean is taken; and it is kept if it does better
than the budgets before on probes that moved none. Shapes: `L` layers, `K` KV heads, `T` rows of a
prompt, `N` tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import torch
from torch import Tensor

from headprof.compression.continuing import divergences
from headprof.compression.methods.allocation import normalized, water_filled
from headprof.errors import ModelError
from headprof.models.loading import LoadedModel
from headprof.tuning.exams import Answering
from headprof.tuning.hidden_rows import HidingModel, hiding
from headprof.tuning.reading import RankedRows

_NEARBY = 2**0.5
"""By what factor a head's rows are fewer or more, to see what they are worth."""
_LOGITS = 2**27
"""To how many rows queries attend in a pass, those of all layers together: going back takes some 12 bytes of each."""
_MOST = 4.0
"""By what factor a head's share moves at most in a round, before the step's exponent."""

Counts = Callable[[int], Tensor]
"""Rows of each head, int64 `[L, K]`, of a prompt of so many tokens."""


@dataclass(frozen=True)
class MoveSettings:
    """How budgets are moved.

    Attributes:
        checks: prompts that move nothing, by which it is seen whether that has helped.
        steps: of each round, how far budgets go towards what rows are worth, as an exponent, 0 to 1.
        length: tokens of a prompt.
        seed: of the probes.
    """

    checks: int
    steps: tuple[float, ...] = (0.5, 0.4, 0.3, 0.3)
    length: int = 1024
    seed: int = 0


def require_gradients(loaded: LoadedModel) -> None:
    """
    Raises:
        ModelError: several processes hold the model, each of which would have the gradients of its own heads alone.
    """
    if not loaded.shard.is_whole:
        raise ModelError("Gradients are taken where one process holds the model: refine without --tp.")


def counting(on_step: Callable[[int, int], None], total: int) -> Callable[[], None]:
    """What is to be called after each step of some work, so that `on_step` hears how many are done, and of all."""
    on_step(0, total)
    steps = count(1)
    return lambda: on_step(next(steps), total)


def allotted(shares: Tensor, budget: int, tokens: int, always_kept: int) -> Tensor:
    """Rows of each head of a prompt, int64 `[L, K]`: those always kept, and its share of the rest of the budget.

    Args:
        shares: float64 `[L, K]`, of which the sum is one.
        budget: tokens per KV head, at least those always kept.
        tokens: of the prompt.
        always_kept: tokens that every head keeps.
    """
    upper, total = torch.full(shares.shape, tokens), budget * shares.numel()
    return water_filled(shares, floor=always_kept, lower=always_kept, upper=upper, total=total)


@dataclass(frozen=True, eq=False)
class ReadPrompt:
    """A prompt that has been read, its rows ranked, and what is asked about it.

    Attributes:
        rows: of each layer.
        answers: what comes after it, each by itself.
        full: what the full cache says at each answer's tokens, log-probabilities `[N, vocabulary]`.
        query_heads: of a layer.
    """

    rows: Sequence[RankedRows]
    answers: Sequence[Answering]
    full: Sequence[Tensor]
    query_heads: int

    @classmethod
    @torch.no_grad()
    def of(cls, loaded: LoadedModel, rows: Sequence[RankedRows], answers: Sequence[Answering]) -> ReadPrompt:
        """With what the full cache says.

        Raises:
            ModelError: the model's attention cannot be reached.
        """
        whole = torch.full((len(rows), loaded.shape.num_kv_heads), rows[0].positions.shape[-1])
        with hiding(loaded.model) as hider:
            hider.rows = rows
            full = [each.float().log_softmax(dim=-1) for each in _said(hider, answers, whole)]
        return cls(rows, answers, full, loaded.shape.num_heads)

    @property
    def tokens(self) -> int:
        """Of the prompt."""
        return self.rows[0].positions.shape[-1]

    @property
    def nbytes(self) -> int:
        """What its rows and what the full cache says take."""
        parts = [part for rows in self.rows for part in (rows.keys, rows.values, rows.positions)]
        return sum(part.nbytes for part in (*parts, *self.full))

    def to(self, device: torch.device | str) -> ReadPrompt:
        """The same on a device."""
        return replace(self, rows=[each.to(device) for each in self.rows], full=[each.to(device) for each in self.full])

    def groups(self) -> Iterator[tuple[Sequence[Answering], Sequence[Tensor]]]:
        """Answers and what the full cache says at them, as many together as one pass takes."""
        longest = max(len(each.fed) for each in self.answers)
        of_one = len(self.rows) * self.query_heads * longest * (self.tokens + longest)
        together = max(1, _LOGITS // of_one)
        for begin in range(0, len(self.answers), together):
            part = slice(begin, begin + together)
            yield self.answers[part], self.full[part]


class Mover:
    """Moves budgets by some prompts, and by others sees whether that has helped.

    Args:
        hider: the model, within `hiding`.
        moving: by which budgets are moved.
        checking: by which it is seen whether moved budgets are better.
        steps: of each round, how far budgets go towards what rows are worth, as an exponent, 0 to 1.
        on_round: called after each round.
    """

    def __init__(
        self,
        hider: HidingModel,
        moving: Sequence[ReadPrompt],
        checking: Sequence[ReadPrompt],
        steps: Sequence[float],
        on_round: Callable[[], None] = lambda: None,
    ):
        self._hider, self._moving, self._checking = hider, moving, checking
        self._steps, self._on_round = steps, on_round

    @property
    def asked(self) -> tuple[int, int]:
        """How many answers move budgets, and how many see whether that has helped."""
        moving, checking = (sum(len(each.answers) for each in part) for part in (self._moving, self._checking))
        return moving, checking

    def move(self, start: Tensor, allot: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, tuple[float, float]]:
        """Move budgets, round by round.

        Args:
            start: heads' shares of a budget to begin with, float64 `[L, K]`, of which the sum is one.
            allot: from such shares and the tokens of a prompt, rows of each head, int64 `[L, K]`.

        Returns:
            Shares that lose less, or those to begin with; and the mean loss of these and of the moved ones on the
            prompts that moved nothing, nats a token.
        """
        shares, rounds = start, []
        for step in self._steps:
            worth = [worth_of(self._hider, each, allot(shares, each.tokens)) for each in self._moving]
            shares = moved(shares, torch.stack(worth).mean(dim=0), step)
            rounds.append(shares)
            self._on_round()
        middle = _middle(rounds)
        before, after = (mean_loss(self._hider, self._checking, partial(allot, each)) for each in (start, middle))
        return middle if after < before else start, (before, after)


def _middle(shares: Sequence[Tensor]) -> Tensor:
    """The geometric mean of several heads' shares of a budget, float64 `[L, K]`, of which the sum is one."""
    return normalized(torch.stack([each.clamp(min=1e-12).log() for each in shares]).mean(dim=0).exp())


def moved(shares: Tensor, worth: Tensor, step: float) -> Tensor:
    """Heads' shares of a budget, a step nearer to being in proportion to what their rows are worth.

    Args:
        shares: float64 `[L, K]`, zero or more, of which the sum is one.
        worth: what is lost less where a head's rows are more by a share of themselves, over that share, `[L, K]`; what
            is below zero counts as nothing.
        step: how far, as an exponent of the ratio of both, 0 to 1.
    """
    wanted = normalized(worth.double().clamp(min=0))
    ratio = (wanted / shares.clamp(min=1e-12)).clamp(1 / _MOST, _MOST)
    return normalized(shares * ratio**step)


@torch.no_grad()
def mean_loss(hider: HidingModel, prompts: Sequence[ReadPrompt], counts: Counts) -> float:
    """Mean divergence from the full cache over all answers, nats a token."""
    lost = []
    for prompt in prompts:
        each = prompt.to(hider.model.device)
        hider.rows = each.rows
        lost += [_divergences(hider, *group, counts(each.tokens)) for group in each.groups()]
    return float(torch.cat(lost).mean())


def worth_of(hider: HidingModel, prompt: ReadPrompt, counts: Tensor) -> Tensor:
    """What each head's rows are worth there, mean over a prompt's answers, float64 `[L, K]` (see `moved`)."""
    prompt = prompt.to(hider.model.device)
    hider.rows = prompt.rows
    fewer, more = ((counts * factor).round().long().clamp(1, prompt.tokens) for factor in (1 / _NEARBY, _NEARBY))
    apart = (more.double() / fewer).log().clamp(min=1e-3)
    total = torch.zeros_like(counts, dtype=torch.float64)
    for group in prompt.groups():
        hider.watch = levers = _Levers(fewer, more)
        try:
            with torch.enable_grad():
                slopes = torch.autograd.grad(_divergences(hider, *group, counts).sum(), levers.moved)
        finally:
            hider.watch = None
        pairs = zip(slopes, levers.changes, strict=True)
        of_heads = torch.stack([(slope * change).double().sum(dim=(0, 1, 3)) for slope, change in pairs])
        total += of_heads.unflatten(1, (counts.shape[1], -1)).sum(dim=-1).cpu() / apart
    return total / len(prompt.answers)


class _Levers:
    """Watches a pass: by how much each head's output changes with its rows, and what it can be moved by.

    Args:
        fewer, more: rows of each head between which it changes, int64 `[L, K]`.
    """

    def __init__(self, fewer: Tensor, more: Tensor):
        self._fewer, self._more = fewer, more
        self.moved: list[Tensor] = []
        self.changes: list[Tensor] = []

    def __call__(self, layer: int, output: Tensor, seeing: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            self.changes.append(seeing(self._fewer[layer][None]) - seeing(self._more[layer][None]))
        self.moved.append(torch.zeros_like(output, requires_grad=True))
        return output + self.moved[-1]


def _divergences(hider: HidingModel, answers: Sequence[Answering], full: Sequence[Tensor], counts: Tensor) -> Tensor:
    """Of answers from what the full cache says, mean over the tokens of each, nats."""
    pairs = zip(full, _said(hider, answers, counts), strict=True)
    return torch.stack([divergences(own, other).mean() for own, other in pairs])


def _said(hider: HidingModel, answers: Sequence[Answering], counts: Tensor) -> list[Tensor]:
    """Logits at each answer's tokens, `[N, vocabulary]`."""
    return hider.answers([each.fed for each in answers], [len(each.reference) for each in answers], counts)
