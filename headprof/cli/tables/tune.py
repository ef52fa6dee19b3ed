"""The table of `headprof tune`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headprof.cli.tables.cells import Rows
from headprof.profile.tuned import Tuned

if TYPE_CHECKING:
    from headprof.profile.head_profile import HeadProfile


def tuned_parameters(profile: HeadProfile) -> tuple[list[str], Rows, str] | None:
    """What serves the profile's model best, and what is lost with it and without; `None` if the profile is silent."""
    if (tuned := Tuned.of(profile.metadata)) is None:
        return None
    rows = [["headkv-r2", "as it is", f"{tuned.usual_loss:.1%}"]]
    if tuned.options:
        rows.append(["headkv-tuned", described(tuned), f"{tuned.loss:.1%}"])
    budgets = ", ".join(map(str, tuned.budgets))
    title = (
        f"Of the right answers' probability is lost, on {tuned.probes} probes of {tuned.length} tokens, at budgets of "
        f"{budgets}"
    )
    if not tuned.options:
        title += "; no other parameters were better"
    return ["method", "parameters", "lost"], rows, title


def refined_budgets(profile: HeadProfile) -> tuple[list[str], Rows, str] | None:
    """What moving budgets brought, budget by budget; `None` if that was not done."""
    tuned = Tuned.of(profile.metadata)
    if tuned is None or tuned.refined is None:
        return None
    refined = tuned.refined
    rows = [
        [str(budget), f"{losses[0]:.3g}", f"{min(losses):.3g}"]
        for budget, losses in zip(refined.budgets, refined.losses, strict=True)
    ]
    title = (
        f"Budgets refined on {refined.probes[0]} probes: what is lost on {refined.probes[1]} others, in nats a token "
        "of the answer"
    )
    return ["budget", "headkv-tuned", "headkv-refined"], rows, title


def described(tuned: Tuned) -> str:
    """The parameters as `--set` takes them."""
    return " ".join(f"{name}={_shown(value)}" for name, value in tuned.options.items()) or "as headkv-r2"


def _shown(value: bool | int | float | str) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
