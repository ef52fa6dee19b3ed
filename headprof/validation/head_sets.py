"""Scores that choose heads, and the sets of heads that are silent together: top ones, random ones, bottom ones."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from headprof.profile.head_profile import HeadProfile
from headprof.utils.ranks import top_indices
from headprof.validation.settings import ValidationSettings
from headprof.validation.silence import Head


@dataclass(frozen=True, eq=False)
class CheckedScores:
    """Scores of one kind that choose heads.

    Attributes:
        name: what they are called: their kind, or, in a profile beside the one that is checked, `"write of NAME"`.
        kind: of the scores.
        values: float32 `[L, H]`.
        own: whether they are of the profile that is checked.
    """

    name: str
    kind: str
    values: torch.Tensor
    own: bool = True


def checked_scores(profile: HeadProfile, others: Mapping[str, HeadProfile] | None = None) -> tuple[CheckedScores, ...]:
    """All scores of a profile, and those of others of the same model, by the names that these go by."""
    found = [CheckedScores(kind, kind, profile.scores[kind]) for kind in profile.kinds]
    for name, other in (others or {}).items():
        found += [CheckedScores(f"{kind} of {name}", kind, other.scores[kind], own=False) for kind in other.kinds]
    return tuple(found)


@dataclass(frozen=True)
class HeadSet:
    """Heads that are silent together.

    Attributes:
        chosen_by: name of the scores that chose them; empty for no heads at all.
        family: one of `FAMILIES`, or `"none"`.
        count: how many they are.
        draw: which of several random picks it is, from 0.
        heads: (layer, head) of each.
    """

    chosen_by: str
    family: str
    count: int
    draw: int
    heads: tuple[Head, ...]


NOTHING = HeadSet("", "none", 0, 0, ())


def choose_sets(scores: Sequence[CheckedScores], settings: ValidationSettings) -> list[HeadSet]:
    """The heads to silence: for each kind of score and each count the top, the random picks and the bottom."""
    sets = []
    for each in scores:
        name, values = each.name, each.values
        for count in settings.all_counts(values.numel()):
            top = [divmod(index, values.shape[1]) for index in top_indices(values, count)]
            sets.append(HeadSet(name, "top", count, 0, tuple(top)))
            for draw in range(settings.draws):
                rng = random.Random(f"{settings.seed}/{name}/{count}/{draw}")
                sets.append(HeadSet(name, "random", count, draw, same_layer_heads(top, values.shape, rng)))
            # One order for all counts, so that each bottom holds the smaller ones.
            bottom = bottom_heads(values, top, random.Random(f"{settings.seed}/{name}/bottom"))
            sets.append(HeadSet(name, "bottom", count, 0, bottom))
    return sets


def same_layer_heads(heads: Sequence[Head], shape: Sequence[int], rng: random.Random) -> tuple[Head, ...]:
    """As many other heads, picked at random from the same layers, and from any layer where these have too few.

    Args:
        heads: at most half of all.
        shape: layers and heads per layer, `(L, H)`.
        rng: picks.
    """
    num_layers, num_heads = shape
    others = [(layer, head) for layer in range(num_layers) for head in range(num_heads) if (layer, head) not in heads]
    picked: list[Head] = []
    for layer, count in Counter(layer for layer, _ in heads).items():
        of_layer = [head for head in others if head[0] == layer]
        picked += rng.sample(of_layer, min(count, len(of_layer)))
    rest = [head for head in others if head not in picked]
    return tuple(picked + rng.sample(rest, len(heads) - len(picked)))


def bottom_heads(scores: torch.Tensor, top: Sequence[Head], rng: random.Random) -> tuple[Head, ...]:
    """As many heads as `top`, none of them, with the lowest scores `[L, H]`; equal scores in random order."""
    order = rng.sample(range(scores.numel()), scores.numel())
    ranked = sorted(order, key=scores.flatten().tolist().__getitem__)
    heads = [divmod(index, scores.shape[1]) for index in ranked]
    return tuple([head for head in heads if head not in top][: len(top)])
