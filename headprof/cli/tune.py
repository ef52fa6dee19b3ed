"""`headprof tune`, and what `headprof score` does of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headprof.cli.command import command
from headprof.cli.context import command_line, join_ranks, join_sharing, load, save_profile, terminal
from headprof.cli.options import LoadOptions, Model, ProfileFile, Seed, Tp
from headprof.cli.outputs import check_outputs, model_inputs
from headprof.cli.tables.tune import refined_budgets, tuned_parameters
from headprof.errors import ModelError, ProfileError, UsageError
from headprof.utils.units import parse_length

if TYPE_CHECKING:
    from headprof.models.loading import LoadedModel
    from headprof.profile.head_profile import HeadProfile
    from headprof.tuning.judging import TuneSettings


@dataclass(frozen=True)
class TuneOptions:
    """What parameters are tried on."""

    budgets: Annotated[str, typer.Option(help="Tokens per KV head that count alike, with commas.")] = "16,32,64"
    length: Annotated[str, typer.Option(help="Tokens of a prompt, such as 1k.")] = "1k"
    refine: Annotated[
        bool,
        typer.Option(
            "--refine/--no-refine",
            help="Then move the budgets of heads to where they lose less, by gradients: for headkv-refined.",
        ),
    ] = True


@command
def tune(
    *,
    profile: ProfileFile = None,
    model: Model = None,
    trying: TuneOptions,
    seed: Seed = 5,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Head profile to write. Default: the one that is tuned; of one that ships, a copy in ./profiles.",
        ),
    ] = None,
    loading: LoadOptions,
    tp: Tp = 1,
) -> None:
    """Find the parameters of headkv-r2 that serve a model best, and keep them in its profile, for headkv-tuned.

    Who judges a prompt's tokens, and how closely budgets follow the scores of heads, is tried on needle probes of the
    half that profiles are made from. Then budgets are moved to where they lose less, for headkv-refined. The profile is
    replaced, unless -o names another file. headprof score does the same, unless --no-tune says not to.

    [dim]headprof tune
    headprof tune --model meta-llama/Meta-Llama-3-8B-Instruct --budgets 64,128,256 --length 8k[/]
    """
    from headprof.models.finding import model_name
    from headprof.profile.finding import default_output, find_profile
    from headprof.profile.head_profile import HeadProfile
    from headprof.profile.profile_checks import FORMAT
    from headprof.utils.assets import asset_dir
    from headprof.utils.files import check_writable

    ranks = join_ranks(tp, sharing=True)
    settings = _settings(trying, seed)
    found = find_profile(model_name(model), profile, model)
    shipped = profile is None and found.resolve().parent == asset_dir("profiles").resolve()
    target = output or (default_output(model_name(model)) if shipped else found)
    read = model_inputs(model, loading)
    HeadProfile.load(found).scores_of("reasoning")  # complaints come before the weights
    check_outputs({target: FORMAT}, read if target == found else chain([found], read))
    check_writable(target)
    team = join_sharing(ranks)
    if not team.dismiss():
        return
    loaded = load(model, loading, tp)
    before = HeadProfile.load(found, loaded.shape, loaded.name)
    if before.model_name != loaded.name:
        terminal.remark(f"The scores in {found} are {before.model_name}'s; what is found for {loaded.name} joins them.")
    if before.refined_rows is not None and not trying.refine:
        terminal.remark(f"The refined budgets of {found} go with its earlier parameters: they are not in {target}.")
    tuned = tune_profile(loaded, before, target, settings, refine=trying.refine)
    for table in (tuned_parameters(tuned), refined_budgets(tuned)):
        if table is not None:
            terminal.table(*table)
    terminal.result(str(target))
    team.leave()


def _settings(trying: TuneOptions, seed: int) -> TuneSettings:
    from headprof.tuning.judging import TuneSettings

    budgets = []
    for text in trying.budgets.split(","):
        if not text.strip().isdecimal() or not int(text):
            raise UsageError(f"A budget of {text!r} cannot be tried: give tokens per KV head, such as 16,32,64.")
        budgets.append(int(text))
    settings = TuneSettings(budgets=tuple(dict.fromkeys(budgets)), length=parse_length(trying.length), seed=seed)
    settings.check()
    return settings


def tune_scored(loaded: LoadedModel, profile: HeadProfile, target: Path) -> HeadProfile:
    """A profile that was just made, tuned as `tune` does by itself; as it is, with a remark, where that cannot be."""
    from headprof.tuning.judging import TuneSettings

    try:
        return tune_profile(loaded, profile, target, TuneSettings(), refine=True)
    except (ProfileError, UsageError) as error:  # no reasoning scores, or a context that is too short
        terminal.remark(f"The profile is not tuned to {loaded.name}. {error}")
        return profile


def tune_profile(
    loaded: LoadedModel, profile: HeadProfile, target: Path, settings: TuneSettings, *, refine: bool
) -> HeadProfile:
    """Write the profile with the parameters that serve its model best, and return it.

    Args:
        loaded: the model.
        profile: with reasoning scores.
        target: where it is written, first when it is tuned, and again when its budgets are refined.
        settings: how parameters are looked for.
        refine: whether budgets are moved to where they lose less, too.

    Raises:
        UsageError: prompts of this length do not fit into the model's context.
    """
    from headprof.tuning.judging import with_tuning

    with terminal.progress() as report:
        tuned = with_tuning(
            profile,
            loaded,
            settings,
            command=command_line(),
            on_probe=lambda done, total: report(f"Tuning methods to {loaded.name}", done, total),
        )
    save_profile(tuned, loaded, target)
    if not refine:
        return tuned
    refined = _refined(loaded, tuned, target, settings)
    if refined is tuned and profile.refined_rows is not None:
        terminal.remark(f"The refined budgets that it had go with its earlier parameters: they are not in {target}.")
    return refined


def _refined(loaded: LoadedModel, tuned: HeadProfile, target: Path, settings: TuneSettings) -> HeadProfile:
    """The same with budgets refined, up to twice the largest that was tried; as it is, with a remark, if that fails."""
    from headprof.tuning.refining_known import RefineSettings, with_refined_rows

    budgets = tuple(sorted({*settings.budgets, 2 * max(settings.budgets)}))
    try:
        with terminal.progress() as report:
            refined = with_refined_rows(
                tuned,
                loaded,
                RefineSettings(budgets=budgets, length=settings.length),
                on_round=lambda done, total: report(f"Refining budgets for {loaded.name}", done, total),
            )
    except (ModelError, UsageError) as error:
        terminal.remark(f"Budgets are not refined for {loaded.name}. {error}")
        return tuned
    save_profile(refined, loaded, target)
    return refined
