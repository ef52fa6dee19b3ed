"""Which parameters of HeadKV-R2 serve one model best when the question is known: measured, for that model.

Who judges a prompt's rows, and how closely budgets follow the scores, was set by hand on one model, and what served
that one loses others half of their answers at small budgets. So a list of judges, and then of budgets for the best of
them, is tried on needle probes of the half that profiles are made from. Most are dropped after a few probes (successive
halving: Jamieson and Talwalkar 2016, "Non-stochastic best arm identification and hyperparameter optimization"); what is
left is taken if it does better than the usual parameters by more than chance on all probes that both were tried on.

A loss here is the share of a right answer's probability that is gone, `1 - exp(-divergence)`: divergences themselves
are ruled by the few answers that are lost many times over. Shapes: `n` probes, `C` choices, `b` budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch import Tensor

from headprof.compression.methods.table import find_method
from headprof.compression.plan import CompressionPlan
from headprof.compression.session import make_plan
from headprof.errors import UsageError
from headprof.models.loading import LoadedModel
from headprof.probes.build import ProbeBuilder, ProbeContext, ProbeSettings
from headprof.profile.head_profile import HeadProfile
from headprof.profile.tuned import NOTE, Options, Tuned
from headprof.tuning.trials import known_losses
from headprof.utils.run_record import today

METHOD = "headkv-r2"
USUAL: Options = {}
"""The parameters that the method has in the table."""

_WIDTHS = {16: (1, 3, 5, 7, 15), 32: (5, 11), 8: (1, 3, 5, 11), 4: (3, 5), 1: (1, 3, 5)}
_SHARED = {16: (5, 11), 8: (3, 5), 4: (3,), 1: (1, 5)}
JUDGES: tuple[Options, ...] = (
    *({"window": window, "kernel": kernel} for window, kernels in _WIDTHS.items() for kernel in kernels),
    *(
        {"window": window, "kernel": kernel, "shared": True}
        for window, kernels in _SHARED.items()
        for kernel in kernels
    ),
)
"""Who may judge: how many of the last queries, pooled how widely, each KV head for itself or a layer's together."""

BUDGETS: tuple[Options, ...] = (
    {"temperature": 0.25},
    {"temperature": 0.75},
    {"temperature": 1.0},
    {"pool_factor": 1.1},
    {"pool_factor": 2.0},
    {"pool_factor": 4.0},
    {"aggregate": "mean"},
    {"scores": "retrieval"},
    {"scores": "write"},
)
"""How budgets may follow the scores of heads."""


@dataclass(frozen=True)
class TuneSettings:
    """How parameters are looked for.

    Attributes:
        budgets: tokens per KV head that count alike.
        length: tokens of a prompt.
        rounds: for judges, and again for budgets: of each round how many new probes are asked, and how many choices
            are left after it, the usual parameters beside them.
        seed: of the probes.
    """

    budgets: tuple[int, ...] = (16, 32, 64)
    length: int = 1024
    rounds: tuple[tuple[int, int], ...] = ((4, 6), (8, 2), (12, 1))
    seed: int = 5

    @property
    def probes(self) -> int:
        """How many are asked at most."""
        return 2 * sum(count for count, _ in self.rounds)

    def check(self) -> None:
        """
        Raises:
            UsageError: a budget is below what every head keeps, or leaves nothing of a prompt out.
        """
        least = find_method(METHOD).always_kept
        if not self.budgets or min(self.budgets) < least:
            tried = f"with a budget of {min(self.budgets)}" if self.budgets else "without a budget"
            raise UsageError(
                f"Nothing can be tried {tried}: give --budgets of at least the {least} tokens always kept."
            )
        if max(self.budgets) >= self.length:
            raise UsageError(
                f"A budget of {max(self.budgets)} tokens leaves nothing of {self.length} out: lower --budgets, or "
                "raise --length."
            )


@dataclass
class Contest:
    """Choices that are tried on ever more probes, and ever fewer of them.

    Attributes:
        choices: that are left; the first `pinned` are never dropped.
        pinned: how many these are, at least one.
        losses: of each choice that was tried, its loss on each probe; a choice that was dropped has fewer.
    """

    choices: list[Options]
    pinned: int = 1
    losses: dict[str, list[float]] = field(default_factory=dict)

    def take(self, losses: Tensor) -> None:
        """Take what the choices that are left lose on new probes, `[n, C]`."""
        for choice, column in zip(self.choices, losses.unbind(1), strict=True):
            self.losses.setdefault(repr(choice), []).extend(column.tolist())

    def mean(self, choice: Options) -> float:
        """Mean loss of a choice over all probes that it was tried on."""
        each = self.losses[repr(choice)]
        return sum(each) / len(each)

    def keep(self, count: int) -> None:
        """Drop all but the best `count` of those that may be dropped; of equal ones the earlier stays."""
        pinned, others = self.choices[: self.pinned], self.choices[self.pinned :]
        best = sorted(others, key=self.mean)[:count]
        self.choices = pinned + [choice for choice in others if choice in best]

    def winner(self) -> Options:
        """The best of those that are left, if it beats the first one by more than one standard error, paired."""
        first, *others = self.choices
        if not others:
            return first
        best = min(others, key=self.mean)
        before, after = (torch.tensor(self.losses[repr(each)], dtype=torch.float64) for each in (first, best))
        gains = before - after
        sure = len(gains) > 1 and float(gains.mean()) > float(gains.std() / len(gains) ** 0.5)
        return best if sure else first


def tune(
    loaded: LoadedModel,
    profile: HeadProfile,
    settings: TuneSettings = TuneSettings(),
    on_probe: Callable[[int, int], None] = lambda done, total: None,
) -> Tuned:
    """Look for the parameters that serve a model best.

    Args:
        loaded: the model.
        profile: with reasoning scores.
        settings: how.
        on_probe: called with the number of probes that have been asked, and of all.

    Raises:
        UsageError: prompts of this length do not fit into the model's context, or a budget is too small.
        ProfileError: the profile holds no reasoning scores.
    """
    probes = ProbeSettings(
        probes=settings.probes, lengths=(settings.length,), needles_per_context=1, seed=settings.seed
    )
    contexts = iter(ProbeBuilder(loaded.tokenizer, probes, max_positions=loaded.max_positions))
    done = 0

    def losses(choices: Sequence[Options], asked: Iterable[ProbeContext]) -> Tensor:
        nonlocal done
        plans = _plans(loaded, profile, choices, settings.budgets)
        found = []
        for context in asked:
            on_probe(done, settings.probes)
            found.append(_shares_lost(known_losses(loaded, plans, context), len(choices)))
            done += len(context.probes)
        return torch.cat(found)

    def contest(first: Sequence[Options], others: Iterable[Options]) -> Contest:
        found = Contest([*first, *others], len(first))
        for count, left in settings.rounds:
            found.take(losses(found.choices, islice(contexts, count)))
            found.keep(left)
        return found

    judge = contest([USUAL], JUDGES).winner()
    pinned = [judge] if judge == USUAL else [judge, USUAL]
    second = contest(pinned, ({**judge, **other} for other in BUDGETS if _possible(other, profile)))
    on_probe(settings.probes, settings.probes)
    best = min(second.winner(), USUAL, key=second.mean)
    return Tuned(
        options=_unusual(best),
        loss=second.mean(best),
        usual_loss=second.mean(USUAL),
        budgets=settings.budgets,
        length=settings.length,
        probes=len(second.losses[repr(best)]),
        seed=settings.seed,
    )


def with_tuning(
    profile: HeadProfile,
    loaded: LoadedModel,
    settings: TuneSettings = TuneSettings(),
    *,
    command: str = "",
    on_probe: Callable[[int, int], None] = lambda done, total: None,
) -> HeadProfile:
    """A profile whose metadata say which parameters serve its model best, without budgets refined for others.

    Args:
        profile: with reasoning scores.
        loaded: the model.
        settings: how they are looked for.
        command: noted in the metadata.
        on_probe: as for `tune`.

    Raises:
        UsageError, ProfileError: as `tune`.
    """
    found = replace(tune(loaded, profile, settings, on_probe), date=today(), command=command)
    return replace(profile, refined_rows=None, metadata={**profile.metadata, NOTE: found.note()})


def _unusual(choice: Options) -> Options:
    """Those of some parameters that differ from the usual ones."""
    usual = find_method(METHOD)
    return {name: value for name, value in choice.items() if usual.with_options(**{name: value}) != usual}


def _plans(
    loaded: LoadedModel, profile: HeadProfile, choices: Sequence[Options], budgets: Sequence[int]
) -> list[CompressionPlan]:
    """The full cache's, then each choice's at each budget."""
    plans = [make_plan(loaded.model, method="full", budget=1)]
    for choice in choices:
        plans += [make_plan(loaded.model, profile, method=METHOD, budget=budget, **choice) for budget in budgets]
    return plans


def _shares_lost(divergences: Tensor, choices: int) -> Tensor:
    """Each choice's loss, mean over budgets, `[n, C]`; of divergences `[n, 1 + C * b]`, the full cache's first."""
    return (1 - (-divergences[:, 1:]).exp()).unflatten(1, (choices, -1)).mean(dim=-1)


def _possible(choice: Options, profile: HeadProfile) -> bool:
    """Whether budgets can follow these scores: not of a kind that the profile lacks or that says nothing."""
    kind = choice.get("scores")
    return kind is None or (kind in profile.kinds and bool(profile.scores[str(kind)].any()))
