"""What `headprof score` says of its run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headprof.profile.head_profile import HeadProfile
    from headprof.profile.surrogate import Surrogate
    from headprof.scoring.run import Progress


def scoring_progress(name: str, now: Progress) -> str:
    """Where a scoring run stands, for its progress bar."""
    text = f"Scoring {name}, {now.answered} of {now.done} right"
    if now.change:
        text += ", others would change " + ", ".join(f"{share:.0%} of {kind}" for kind, share in now.change.items())
    return text


def surrogate_table(surrogate: Surrogate) -> tuple[list[str], list[list[str]]]:
    """How well a surrogate does on texts that were held out: columns and rows."""
    quality = surrogate.quality
    shown = [
        [f"the best {share} %", *(f"{quality[f'{where}_top_{share}']:.0%}" for where in ("head", "layer", "model"))]
        for share in (10, 25)
    ]
    columns = [f"found of held-out rows (rank correlation {quality['spearman']:.2f})", "in a head", "a layer", "all"]
    return columns, shown


def stability(profile: HeadProfile) -> str:
    """What became of `--until-stable`."""
    settings = profile.settings
    rule = settings["until_stable"]
    changes = " and ".join(
        f"{share:.1%} of the top {rule['top']} {kind} heads" for kind, share in rule["change"].items()
    )
    state = "Stable" if rule["stable"] else "Not yet stable"
    found = f": other probes would change {changes}" if changes else ", too few probes were answered to tell"
    mend = "" if rule["stable"] else "; ask more with --resume --probes"
    return f"{state} after {settings['asked']} of at most {settings['probes']} probes{found}{mend}."
