"""The tables of `headprof profile`, and of other commands that show a profile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from headprof.cli.tables.cells import Rows
from headprof.cli.tables.tune import described
from headprof.profile.learning import NOTE, Learning
from headprof.profile.tuned import NOTE as TUNED_NOTE
from headprof.profile.tuned import Tuned

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
    learning = Learning.of(profile.metadata)
    if learning is not None:
        facts += _learning_facts(learning)
    if (tuned := Tuned.of(profile.metadata)) is not None:
        facts += _tuned_facts(tuned)
    for situation, curves in profile.curves.items():
        points = ", ".join(map(str, curves.points))
        facts.append((f"influence curves, question {situation}", f"of a KV head that keeps {points} tokens"))
    if profile.settings:
        facts.append(("settings", ", ".join(f"{name} {value}" for name, value in profile.settings.items())))
    shown = (
        {"settings", "accuracy"} | (set() if learning is None else {NOTE}) | (set() if tuned is None else {TUNED_NOTE})
    )
    others = ((name, text) for name, text in profile.metadata.items() if name not in shown)
    return facts + [(name.replace("_", " "), text.replace("\n", " ")) for name, text in sorted(others)]


def learned_budgets(profile: HeadProfile) -> tuple[list[str], Rows, str] | None:
    """At which shares budgets were learned, and what of them is HeadKV-R2's; `None` if the profile does not say."""
    learning = Learning.of(profile.metadata)
    if profile.kept_shares is None or learning is None:
        return None
    columns, rows = ["all heads keep", "weight of headkv-r2"], []
    for number, share in enumerate(profile.shares_together):
        tried = learning.losses[number] if number < len(learning.losses) else ()
        row = [share, f"{learning.mixes[number] if tried else 0:g}"]
        if learning.losses:
            row += [f"{loss:.3g}" for loss in (min(tried), tried[0], tried[-1])] if tried else ["-"] * 3
        rows.append(row)
    if learning.refined:
        columns, rows = (
            [*columns, "not refined", "refined"],
            [[*row, *_refining(learning, at)] for at, row in enumerate(rows)],
        )
    if not learning.losses:
        return columns, rows, "Learned budgets, mixed with no others"
    columns[2:2] = ["lost, nats a token", "without mixing", "headkv-r2 alone"]
    return columns, rows, f"Learned budgets, mixed with headkv-r2's by what was lost on {learning.probes} probes"


def _refining(learning: Learning, number: int) -> list[str]:
    """What was lost at a share on probes that moved nothing, before budgets were moved and after.

    They stay where they were if they would have lost more.
    """
    if number >= len(learning.refined):
        return ["-", "-"]
    before, after = learning.refined[number][0], learning.refined[number][-1]
    return [f"{before:.3g}", f"{after:.3g}" if after < before else f"(not moved: {after:.3g})"]


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


def _tuned_facts(tuned: Tuned) -> list[tuple[str, str]]:
    """What serves the model best, how much better, and how that was found."""
    where = f"{tuned.probes} probes of {tuned.length} tokens at budgets of {', '.join(map(str, tuned.budgets))}"
    lost = f"{tuned.loss:.1%} of the right answers' probability is lost, {tuned.usual_loss:.1%} as headkv-r2: {where}"
    facts = [("tuned", described(tuned)), ("tuned on", lost), ("tuned by", tuned.command)]
    if (refined := tuned.refined) is not None:
        pairs = zip(refined.budgets, refined.losses, strict=True)
        lowered = "; ".join(f"at {budget} from {row[0]:.3g} to {min(row):.3g}" for budget, row in pairs)
        facts.append(("refined budgets", f"what is lost {lowered} nats a token, on {refined.probes[1]} other probes"))
    return [(name, text.replace("\n", " ")) for name, text in facts if text]


def _learning_facts(learning: Learning) -> list[tuple[str, str]]:
    """What was repeated, when, and by which command."""
    *others, last = map(str, learning.lengths or ("?",))
    lengths = f"{', '.join(others)} and {last}" if others else last
    source = f" in {learning.folder}" if learning.folder else ""
    text = f"{learning.texts} texts{source} of {lengths} tokens, repeated by the model; seed {learning.seed}"
    refined = "; ".join(f"from {row[0]:.3g} to {min(row):.3g}" for row in learning.refined)
    lowered = refined and f"what is lost {refined} nats a token, share by share, on probes that moved nothing"
    facts = [("learned from", text), ("learned on", learning.date), ("learned by", learning.command)]
    facts.append(("budgets refined", lowered))
    return [(name, text.replace("\n", " ")) for name, text in facts if text]


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
