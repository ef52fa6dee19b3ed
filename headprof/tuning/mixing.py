"""How much of HeadKV-R2's budgets goes into those learned from repetition, at each share: measured, for one model.

Where heads may keep little, one ranking over all heads leaves most of them with next to nothing: in some models that is
what heads are worth, in others it loses what those few rows would have said. So for each share the geometric mean of
learned and HeadKV-R2's budgets is tried with several weights, on needle probes of the half that profiles are made from,
and the weight whose caches stay nearest to the full one is taken.

Shapes: `L` layers, `K` KV heads, `S` shares, `M` mixes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headprof.compression.methods.allocation import normalized, water_filled
from headprof.compression.methods.budget import ProfileBudget
from headprof.compression.observers import repeating_observers
from headprof.compression.plan import CompressionPlan
from headprof.compression.session import make_plan
from headprof.models.loading import LoadedModel
from headprof.models.prompt_encoder import PromptEncoder
from headprof.probes.build import ProbeBuilder, ProbeContext, ProbeSettings
from headprof.profile.head_profile import HeadProfile
from headprof.profile.learning import NOTE
from headprof.tuning.trials import divergences
from headprof.utils.records import parse_object

MIXES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Weights of HeadKV-R2's budgets that are tried."""
LARGEST = 0.3
"""Shares from here on are not tried, since little is lost there; what is learned stays as it is."""
PROBES, LENGTH, SEED = 48, 1024, 7
"""How many probes are asked, in contexts of how many tokens, and the seed of them."""
METHOD = "learned-kvzip"
_FINE = 1_000_000
"""Parts in which shares are counted."""


@dataclass(frozen=True)
class Mixing:
    """What was found.

    Attributes:
        shares: that were tried, `S`.
        losses: mean divergence from the full cache at the tokens of right answers, nats a token, `S` rows of `M`.
        probes: how many were asked.
    """

    shares: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    probes: int

    @property
    def mixes(self) -> tuple[float, ...]:
        """The best weight for each share; of equal ones the smallest."""
        return tuple(MIXES[row.index(min(row))] for row in self.losses)

    def notes(self) -> dict[str, object]:
        """The same for a profile's metadata."""
        losses = [[round(loss, 5) for loss in row] for row in self.losses]
        return {"mixes": self.mixes, "mix_losses": losses, "mix_probes": self.probes}


def mixed_shares(kept: Tensor, scores: Tensor, mixes: Sequence[float]) -> Tensor:
    """Learned shares, mixed with those that HeadKV-R2 gives at the same share of all tokens.

    No head keeps more at a share than at a larger one: what that takes from it goes to the others.

    Args:
        kept: `[S, L, K]`, as `kept_shares` learns them.
        scores: by which HeadKV-R2 shares out, `[L, K]`.
        mixes: weights of its shares in the geometric mean, for the first shares; 0 for the others.

    Returns:
        float32 `[S, L, K]`, each with the mean that it had.
    """
    budgets = {}
    for number, mix in enumerate(mixes):
        if mix:
            budget = round(float(kept[number].double().mean()) * _FINE)
            sizes = {"budget": budget, "context_length": _FINE, "always_kept": 0}
            others = normalized(ProfileBudget().allocate(scores, **sizes))
            budgets[number] = normalized(normalized(kept[number]) ** (1 - mix) * others**mix)
    return with_shares(kept, budgets)


def with_shares(kept: Tensor, budgets: Mapping[int, Tensor]) -> Tensor:
    """Learned shares with others in the place of some of them.

    No head keeps more at a share than at a larger one: what that takes from it goes to the others.

    Args:
        kept: `[S, L, K]`, as `kept_shares` learns them.
        budgets: by the number of a share, what part of it each head gets, float64 `[L, K]`, of which the sum is one.

    Returns:
        float32 `[S, L, K]`, each with the mean that it had.
    """
    changed = kept.double().clone()
    upper = torch.full(kept.shape[1:], _FINE)
    for number in reversed(range(len(kept))):
        total = round(float(kept[number].double().mean()) * _FINE) * upper.numel()
        if number in budgets or bool((changed[number] * _FINE > upper).any()):
            shares = budgets.get(number, normalized(kept[number]))
            changed[number] = water_filled(shares, floor=0, lower=0, upper=upper, total=total).double() / _FINE
        upper = (changed[number] * _FINE).floor().long()
    return changed.float()


def find_mixing(
    loaded: LoadedModel,
    profile: HeadProfile,
    *,
    probes: int = PROBES,
    length: int = LENGTH,
    seed: int = SEED,
    on_question: Callable[[int, int], None] = lambda done, total: None,
) -> Mixing:
    """Try each mix at each share.

    Args:
        loaded: the model.
        profile: with learned budgets and reasoning scores.
        probes: how many are asked, several a context.
        length: of their contexts, in tokens.
        seed: of the probes.
        on_question: called with the number of questions that have been asked, and of all.

    Raises:
        UsageError: such contexts do not fit into the model's, or cannot be repeated there.
    """
    kept, scores = profile.reconstruction, profile.kv_head_scores("reasoning")
    shares = [share for share in kept.double().mean(dim=(1, 2)).tolist() if share < LARGEST]
    plans = [make_plan(loaded.model, method="full", budget=1)]
    for share in shares:
        for mix in MIXES:
            mixed = replace(profile, kept_shares=mixed_shares(kept, scores, [mix] * len(shares)))
            plans.append(make_plan(loaded.model, mixed, method=METHOD, budget=f"{share:.4%}"))
    settings = ProbeSettings(probes=probes, lengths=(length,), needles_per_context=None, seed=seed)
    builder = ProbeBuilder(loaded.tokenizer, settings, max_positions=loaded.max_positions)
    total, asked = torch.zeros(len(plans), dtype=torch.float64), 0
    for context in builder:
        for divergence in _divergences(loaded, plans, context):
            on_question(asked, probes)
            total += torch.tensor(divergence, dtype=torch.float64)
            asked += 1
    on_question(asked, probes)
    losses = loaded.shard.agreed(total[1:] / max(1, asked)).view(len(shares), len(MIXES))
    return Mixing(tuple(shares), tuple(map(tuple, losses.tolist())), asked)


def with_mixing(
    profile: HeadProfile, loaded: LoadedModel, on_question: Callable[[int, int], None] = lambda done, total: None
) -> HeadProfile:
    """A profile whose learned budgets are mixed with HeadKV-R2's as loses least; its metadata says how.

    Raises:
        UsageError: as `find_mixing`.
    """
    found = find_mixing(loaded, profile, probes=PROBES, length=LENGTH, on_question=on_question)
    kept = mixed_shares(profile.reconstruction, profile.kv_head_scores("reasoning"), found.mixes)
    noted = parse_object(profile.metadata[NOTE]) | found.notes()
    return replace(profile, kept_shares=kept, metadata={**profile.metadata, NOTE: json.dumps(noted)})


def _divergences(loaded: LoadedModel, plans: Sequence[CompressionPlan], context: ProbeContext) -> Iterator[list[float]]:
    """Of each probe of a context, how far the cache of each plan is from the first one's."""
    document = list(context.context_ids)
    observers = repeating_observers(loaded, PromptEncoder(loaded.tokenizer), document, plans[-1].method)
    asked = [((*probe.asked_ids, *probe.reply_ids), probe.answer_ids) for probe in context.probes]
    return divergences(loaded, plans, document, observers, asked)
