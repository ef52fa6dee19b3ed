"""How sure each head's score is, and whether it is among the best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from headprof.errors import UsageError
from headprof.profile.commands import score_command
from headprof.profile.head_profile import HeadProfile

if TYPE_CHECKING:
    from torch import Tensor

NORMAL_95 = 1.96
"""Standard errors from the mean of a normal distribution to the end of its central 95 %."""


def interval_of(profile: HeadProfile, kind: str) -> tuple[Tensor, Tensor] | None:
    """The two ends of each score's 95 % interval, float32 `[L, H]` each; `None` when the profile knows of no error.

    The bootstrap interval where the profile holds it, else the score ± 1.96 standard errors, cut off at 0.
    """
    if kind in profile.intervals:
        return profile.intervals[kind]
    if kind not in profile.standard_errors:
        return None
    scores, margin = profile.scores_of(kind), NORMAL_95 * profile.standard_errors[kind]
    return (scores - margin).clamp(min=0), scores + margin


def half_width(profile: HeadProfile, kind: str) -> Tensor | None:
    """Half the width of each score's 95 % interval, float32 `[L, H]`, in units of the score; `None` when unknown.

    Without a bootstrap interval, 1.96 standard errors.
    """
    if kind in profile.intervals:
        low, high = profile.intervals[kind]
        return (high - low) / 2
    if kind in profile.standard_errors:
        return NORMAL_95 * profile.standard_errors[kind]
    return None


def check_known(profile: HeadProfile, kinds: Sequence[str]) -> None:
    """Raise `UsageError` when the uncertainty of a kind of score is not known."""
    for kind in kinds:
        if half_width(profile, kind) is None:
            raise UsageError(
                f"The profile of {profile.model_name} holds neither intervals nor standard errors of its {kind} "
                f"scores: leave out --uncertainty, or run `{score_command(profile.called)}`."
            )


def outside_reach(profile: HeadProfile, kind: str, top: int) -> float | None:
    """The highest upper end of the intervals of all heads but the `top` best; `None` if unknown or no head is left."""
    interval = interval_of(profile, kind)
    if interval is None:
        return None
    others = profile.top_heads(kind, profile.scores_of(kind).numel())[top:]
    return max((float(interval[1][layer, head]) for layer, head, _ in others), default=None)


def is_unsure(profile: HeadProfile, kind: str, top: int) -> list[bool]:
    """For each of the `top` best heads, best first, whether its membership is uncertain; False when errors are unknown.

    A head is a sure member when its 95 % interval lies wholly above the intervals of all heads outside the top. That is
    strict: two intervals may touch where a paired test of the two heads would tell them apart.
    """
    heads = profile.top_heads(kind, top)
    interval, reach = interval_of(profile, kind), outside_reach(profile, kind, top)
    if interval is None or reach is None:
        return [False] * len(heads)
    return [float(interval[0][layer, head]) <= reach for layer, head, _ in heads]
