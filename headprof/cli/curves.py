"""What `headprof score --curves` measures: what the right answer loses when one KV head keeps so many rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headprof.cli.context import command_line, join_sharing, load, terminal
from headprof.cli.options import MOST_PROBES, LoadOptions
from headprof.cli.outputs import check_outputs, model_inputs
from headprof.errors import UsageError

if TYPE_CHECKING:
    from headprof.models.loading import LoadedModel
    from headprof.profile.head_profile import HeadProfile
    from headprof.tuning.curve_request import CurveRequest
    from headprof.utils.team import Team

_PANEL = "Influence curves"


@dataclass(frozen=True)
class CurveOptions:
    """What influence curves are measured of."""

    curves: Annotated[
        bool,
        typer.Option(
            "--curves",
            help="Measure influence curves too, by which headkv-curves and curves-kvzip share their budgets: what the "
            "right answer loses when one KV head keeps so many rows.",
            rich_help_panel=_PANEL,
        ),
    ] = False
    question: Annotated[
        str, typer.Option(help="Whether it is known when rows go: known, unknown or both.", rich_help_panel=_PANEL)
    ] = "both"
    curve_probes: Annotated[
        int, typer.Option(min=0, max=MOST_PROBES, help="Probes that they are measured on.", rich_help_panel=_PANEL)
    ] = 36
    curve_texts: Annotated[
        int,
        typer.Option(
            min=0, max=MOST_PROBES, help="Plain texts that they are measured on besides.", rich_help_panel=_PANEL
        ),
    ] = 0
    curve_length: Annotated[str, typer.Option(help="Tokens of a prompt, such as 1k.", rich_help_panel=_PANEL)] = "1k"
    others: Annotated[
        str,
        typer.Option(
            help="What all other heads keep meanwhile: all, or the budget of a method (64, 5%).", rich_help_panel=_PANEL
        ),
    ] = "all"


def curve_request(curving: CurveOptions, seed: int) -> CurveRequest | None:
    """What is to be measured, checked; `None` for nothing.

    Raises:
        UsageError: options that go with `--curves` are given without it, or ask for what there is not.
    """
    from headprof.tuning.curve_request import CurveRequest
    from headprof.utils.units import parse_lengths

    if not curving.curves:
        if curving != CurveOptions():
            raise UsageError(
                "--question, --curve-probes, --curve-texts, --curve-length and --others are for influence curves: add "
                "--curves, or leave them away."
            )
        return None
    lengths = parse_lengths(curving.curve_length)
    if len(lengths) > 1:
        raise UsageError("Influence curves are measured on prompts of one length: give --curve-length one number.")
    request = CurveRequest(
        curving.question, curving.curve_probes, curving.curve_texts, lengths[0], curving.others, seed
    )
    request.check()
    return request


def measure(
    loaded: LoadedModel, profile: HeadProfile, request: CurveRequest, target: Path, team: Team, *, resume: bool
) -> HeadProfile:
    """The profile with influence curves, which the first of several processes writes."""
    from headprof.tuning.curve_request import with_curves

    with terminal.progress() as report:
        profile = with_curves(
            profile,
            loaded,
            request,
            results=target,
            resume=resume,
            team=team,
            command=command_line(),
            on_progress=partial(report, f"Influence curves of {loaded.name}"),
        )
    if team.rank == 0:
        profile.save(target)
    return profile


def curve_outputs(target: Path, request: CurveRequest | None) -> dict[Path, str | None]:
    """The files beside a profile in which what has been measured is kept, with their format."""
    from headprof.tuning.curve_results import FORMAT, curve_results_path

    situations = () if request is None else request.situations
    return {curve_results_path(target, situation): FORMAT for situation in situations}


def add_curves(
    profile: Path,
    target: Path,
    model: str | None,
    loading: LoadOptions,
    request: CurveRequest,
    ranks: Team,
    *,
    resume: bool,
    more: Callable[[LoadedModel, HeadProfile], object] | None = None,
) -> None:
    """Add influence curves to a profile that is there; several processes share the work.

    Args:
        profile: the profile's file.
        target: the file that is written.
        model, loading: of the model.
        request: what is to be measured.
        ranks: the processes that hold the model together, of one group or several.
        resume: begin with what has been kept of it.
        more: what the first process does then, with those that hold its model, and the profile that has the curves.
    """
    from headprof.profile.head_profile import HeadProfile
    from headprof.profile.profile_checks import FORMAT
    from headprof.utils.files import check_writable

    HeadProfile.load(profile, model_name=model)  # complaints come before the weights
    check_outputs({target: FORMAT, **curve_outputs(target, request)}, model_inputs(model, loading))
    check_writable(target)
    team = join_sharing(ranks)
    loaded = load(model, loading, team.ranks)
    known = HeadProfile.load(profile, loaded.shape, loaded.given or loaded.name)
    known = measure(loaded, known, request, target, team, resume=resume)
    if team.dismiss():
        if more is not None:
            more(loaded, known)
        terminal.result(str(target))
        team.leave()
