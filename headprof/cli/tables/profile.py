"""The tables of `headprof profile`, and of other commands that show a profile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from headprof.cli.tables.cells import Rows

if TYPE_CHECKING:
    from headprof.profile.comparing import Agreement
    from headprof.profile.finding import FoundProfile
    from headprof.profile.head_profile import HeadProfile

MOST_NAMED = 12
"""Shares that are named one by one."""


def found_profiles(found: Iterable[FoundProfile]) -> tuple[list[str], Rows]:
    """Every profile that is found, a row each."""
    rows = []
    for each in found:
        state = "shadowed" if each.shadowed_by else "found"
        if each.profile is None:
            texts = ["-", "-", "-", "-", "-", "damaged"]
        else:
            profile = each.profile
            texts = [
                profile.model_name,
                _grid(profile),
                ", ".join(profile.kinds),
                ", ".join(str(profile.probes_used.get(kind, "-")) for kind in profile.kinds),
                profile.metadata.get("date") or profile.metadata.get("source") or "-",
                state,
            ]
        rows.append([escape(text) for text in (each.path.stem, _short(each.path.parent), *texts)])
    return ["name", "where", "model", "layers x heads on KV", "scores", "probes", "from", "state"], rows


def profile_facts(profile: HeadProfile, path: Path) -> list[tuple[str, str]]:
    """What a profile says about itself, as names and texts: model, shape, probes, settings, provenance."""
    shape, asked = profile.shape, [kind for kind in profile.kinds if kind != "reconstruction"]
    facts = [
        ("file", str(path)),
        ("model", profile.model_name),
        ("shape", f"{shape.architecture}, {_grid(profile)} of {shape.head_dim}, vocabulary {shape.vocab_size}"),
        ("probes used", ", ".join(f"{kind} {profile.probes_used.get(kind, 'unknown')}" for kind in asked) or "none"),
    ]
    if profile.kept_shares is not None:
        facts.append(("learned budgets", f"of each KV head where all keep {_shares(profile.shares_together)}"))
    for situation, curves in profile.curves.items():
        points = ", ".join(map(str, curves.points))
        facts.append((f"influence curves, question {situation}", f"of a KV head that keeps {points} tokens"))
    if profile.settings:
        facts.append(("settings", ", ".join(f"{name} {value}" for name, value in profile.settings.items())))
    others = ((name, text) for name, text in profile.metadata.items() if name not in ("settings", "accuracy"))
    return facts + [(name.replace("_", " "), text.replace("\n", " ")) for name, text in sorted(others)]


def family_accuracy(profile: HeadProfile) -> tuple[list[str], Rows]:
    """Probes answered of those asked, by family."""
    rows = [
        [escape(family), f"{answered}/{asked}", f"{answered / asked:.0%}" if asked else "-"]
        for family, (answered, asked) in profile.accuracy.items()
    ]
    return ["probe family", "answered", "share"], rows


def ranked_heads(profile: HeadProfile, which: str, count: int) -> tuple[list[str], Rows, str]:
    """The best heads of a profile, with all that is known of how sure their scores are."""
    errors, ends = profile.standard_errors.get(which), profile.intervals.get(which)
    rows = [
        [
            f"{rank}.",
            str(layer),
            str(head),
            f"{value:.3f}",
            "-" if errors is None else f"{errors[layer, head]:.3f}",
            "-" if ends is None else f"{ends[0][layer, head]:.3f} to {ends[1][layer, head]:.3f}",
        ]
        for rank, (layer, head, value) in enumerate(profile.top_heads(which, count), 1)
    ]
    counted = profile.probes_used.get(which)
    title = f"Top {which} heads" + (f", from {counted} counted probes" if counted else "")
    return ["", "layer", "head", "score", "standard error", "95 % interval"], rows, title


def overlaps(agreements: Mapping[str, Agreement]) -> tuple[list[str], Rows]:
    """Top heads that two rankings share, beside what chance would give."""
    rows = [
        [name, str(count), f"{share:.0%}", f"{agreement.expected_overlap(count):.1%}"]
        for name, agreement in agreements.items()
        for count, share in agreement.overlaps.items()
    ]
    return ["scores", "top heads", "in common", "by chance"], rows


def _shares(shares: list[str]) -> str:
    """Shares of all tokens, each of them unless they are many."""
    if len(shares) <= MOST_NAMED:
        return ", ".join(shares)
    return f"{shares[0]} to {shares[-1]} ({len(shares)} shares)"


def _short(folder: Path) -> str:
    home = Path.home()
    return str("~" / folder.relative_to(home) if folder.is_relative_to(home) else folder)


def _grid(profile: HeadProfile) -> str:
    return f"{profile.shape.num_layers} x {profile.shape.num_heads} on {profile.shape.num_kv_heads}"
