"""What profiles hold and how they agree, as plain numbers and texts for JSON, and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headprof.profile.comparing import Agreement, compare_within
from headprof.profile.finding import FoundProfile
from headprof.profile.head_profile import HeadProfile
from headprof.profile.kinds import PROBE_KINDS


def describe_found(found: FoundProfile) -> dict[str, Any]:
    """A file among those that are searched: what it holds, or why it cannot be used."""
    return {
        "file": str(found.path),
        "shadowed_by": str(found.shadowed_by) if found.shadowed_by else None,
    } | (_summary(found.profile) if found.profile else {"fault": found.fault})


def describe_profile(path: Path, profile: HeadProfile, kinds: Sequence[str], top: int) -> dict[str, Any]:
    """All that a profile says about itself, and the `top` best heads of some kinds of score."""
    compared = {pair: describe_agreement(each) for pair, each in compare_within(profile).items()}
    return {
        "file": str(path),
        **_summary(profile),
        "settings": profile.settings,
        "accuracy": profile.accuracy,
        "metadata": dict(profile.metadata),
        "top": {kind: [_head(profile, kind, *head) for head in profile.top_heads(kind, top)] for kind in kinds},
        "retrieval_and_reasoning": compared.get(PROBE_KINDS),
        "kinds_compared": {f"{one}_and_{other}": each for (one, other), each in compared.items()},
    }


def describe_agreement(agreement: Agreement) -> dict[str, Any]:
    """A comparison; the correlation is `None` where one side's scores are constant."""
    return {
        "num_heads": agreement.num_heads,
        "heads": agreement.heads,
        "spearman": None if math.isnan(agreement.spearman) else agreement.spearman,
        "overlap": {
            str(count): {"share": share, "by_chance": agreement.expected_overlap(count)}
            for count, share in agreement.overlaps.items()
        },
        "k": agreement.k,
        "only_first": agreement.only_first,
        "only_second": agreement.only_second,
    }


def agreement_sentence(what: str, agreement: Agreement) -> str:
    """A comparison of `what` in words."""
    if math.isnan(agreement.spearman):
        return f"{what}: some are the same for all {agreement.heads}, so that there are no ranks to compare"
    text = f"{what}: Spearman {agreement.spearman:.3f} over {agreement.num_heads} {agreement.heads}"
    if 10 not in agreement.overlaps:
        return text
    return (
        f"{text}, {agreement.overlaps[10]:.0%} of the top 10 in common ({agreement.expected_overlap(10):.1%} by chance)"
    )


def _summary(profile: HeadProfile) -> dict[str, Any]:
    return {
        "model": profile.model_name,
        "shape": profile.shape.to_dict(),
        "kinds": list(profile.kinds),
        "probes_used": dict(profile.probes_used),
        "learned_budgets": profile.shares_together,
        "refined_budgets": _budgets(profile),
        "influence_curves": {situation: curves.points for situation, curves in profile.curves.items()},
        "date": profile.metadata.get("date"),
        "source": profile.metadata.get("source"),
    }


def _budgets(profile: HeadProfile) -> list[float]:
    """At which budgets there are refined ones, tokens per KV head."""
    rows = profile.refined_rows
    return [] if rows is None else [round(budget, 3) for budget in rows.double().mean(dim=(1, 2)).tolist()]


def _head(profile: HeadProfile, kind: str, layer: int, head: int, score: float) -> dict[str, Any]:
    errors, ends = profile.standard_errors.get(kind), profile.intervals.get(kind)
    return {
        "layer": layer,
        "head": head,
        "score": score,
        "standard_error": None if errors is None else float(errors[layer, head]),
        "interval": None if ends is None else [float(end[layer, head]) for end in ends],
    }
