"""A causal check as its readers want it: the verdicts, and what single heads cost if that was asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from headprof.models.loading import LoadedModel
from headprof.profile.head_profile import HeadProfile
from headprof.validation import head_drops, verdict
from headprof.validation.causal_check import Validation, ValidationSettings, validate
from headprof.validation.head_drops import HeadDrops, per_head_drops
from headprof.validation.verdict import Verdict


@dataclass(frozen=True, eq=False)
class Findings:
    """What the check of a profile came to.

    Attributes:
        profile: that was checked.
        result: every answer.
        drops: what each head costs alone; `None` if that was not asked for.
    """

    profile: HeadProfile
    result: Validation
    drops: HeadDrops | None = None

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """One for each kind of score."""
        return [verdict.verdict(self.result, kind) for kind in self.result.kinds]

    @property
    def confirmed(self) -> bool:
        """Whether all verdicts are good."""
        return all(each.confirmed for each in self.verdicts)

    def sentences(self) -> list[str]:
        """The verdicts in words, and how scores and drops agree."""
        found = [each.sentence() for each in self.verdicts]
        if self.drops is not None:
            found += [each.sentence() for each in head_drops.agreements(self.profile, self.drops)]
        return found

    def figures(self) -> dict[str, Any]:
        """All of it as plain numbers and texts, for JSON."""
        per_head = {} if self.drops is None else {"per_head": head_drops.figures(self.profile, self.drops)}
        return verdict.figures(self.result) | per_head


def check_profile(
    loaded: LoadedModel,
    profile: HeadProfile,
    settings: ValidationSettings,
    *,
    per_head: bool = False,
    batch_heads: int | None = None,
    on_progress: Callable[[str, int, int], None] = lambda text, done, total: None,
) -> Findings:
    """Silence the heads of a profile, and every single head too if `per_head`.

    Args:
        loaded: the model.
        profile: of this model.
        settings: what to ask.
        per_head: whether to find out what each head costs alone.
        batch_heads: as for `per_head_drops`.
        on_progress: called with what is going on, the work done and the work in all.

    Raises:
        HeadprofError: as `validate` and `per_head_drops`.
    """
    what = f"Silencing heads of {loaded.name}"
    result = validate(loaded, profile, settings, lambda done, total: on_progress(what, done, total))
    drops = None
    if per_head:
        drops = per_head_drops(
            loaded, settings, batch_heads, lambda done, total: on_progress("Silencing single heads", done, total)
        )
    return Findings(profile, result, drops)
