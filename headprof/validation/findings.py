"""A causal check as its readers want it: the verdicts, all scores side by side, and what single heads cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from headprof.models.loading import LoadedModel
from headprof.profile.head_profile import HeadProfile
from headprof.profile.influence import InfluenceCurves
from headprof.utils.team import Team
from headprof.validation import head_drops, verdict
from headprof.validation.causal_check import Validation, validate
from headprof.validation.head_drops import HeadDrops, per_head_drops
from headprof.validation.settings import ValidationSettings
from headprof.validation.side_by_side import (
    SideBySide,
    Yardstick,
    curve_yardsticks,
    drop_yardsticks,
    side_by_side,
)
from headprof.validation.verdict import Verdict, own_verdicts


@dataclass(frozen=True, eq=False)
class Findings:
    """What the check of a profile came to.

    Attributes:
        result: every answer.
        drops: what each head costs alone; `None` if that was not asked for.
        curves: the profile's influence curves, by situation.
    """

    result: Validation
    drops: HeadDrops | None = None
    curves: Mapping[str, InfluenceCurves] = field(default_factory=dict)

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """One for each kind of the profile's scores."""
        return own_verdicts(self.result)

    @property
    def confirmed(self) -> bool:
        """Whether all verdicts are good."""
        return all(each.confirmed for each in self.verdicts)

    @property
    def yardsticks(self) -> list[Yardstick]:
        """What heads were measured to be worth, which the scores are compared with."""
        drops = [] if self.drops is None else drop_yardsticks(self.drops)
        return drops + curve_yardsticks(self.curves)

    @cached_property
    def compared(self) -> SideBySide:
        """All scores side by side."""
        return side_by_side(self.result, self.yardsticks)

    def sentences(self) -> list[str]:
        """The verdicts in words."""
        return [each.sentence() for each in self.verdicts]

    def figures(self) -> dict[str, Any]:
        """All of it as plain numbers and texts, for JSON."""
        per_head = {} if self.drops is None else {"per_head": head_drops.figures(self.drops)}
        return verdict.figures(self.result) | {"side_by_side": self.compared.figures()} | per_head


def check_profile(
    loaded: LoadedModel,
    profile: HeadProfile,
    settings: ValidationSettings,
    *,
    others: Mapping[str, HeadProfile] | None = None,
    per_head: bool = False,
    batch_heads: int | None = None,
    team: Team | None = None,
    on_progress: Callable[[str, int, int], None] = lambda text, done, total: None,
) -> Findings:
    """Silence the heads of a profile, and every single head too if `per_head`.

    Args:
        loaded: the model.
        profile: of this model.
        settings: what to ask.
        others: profiles of the same model to compare it with, by the names that they go by.
        per_head: whether to find out what each head costs alone.
        batch_heads: as for `per_head_drops`.
        team: the processes that share the work; each must call this with the same arguments.
        on_progress: called by process 0 with what is going on, the work done and the work in all.

    Raises:
        HeadprofError: as `validate` and `per_head_drops`.
    """
    what = f"Silencing heads of {loaded.name}"
    result = validate(loaded, profile, settings, lambda done, total: on_progress(what, done, total), others, team)
    drops = None
    if per_head:
        drops = per_head_drops(
            loaded, settings, batch_heads, lambda done, total: on_progress("Silencing single heads", done, total), team
        )
    return Findings(result, drops, profile.curves)
