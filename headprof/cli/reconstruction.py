"""What `headprof score --reconstruction` learns from how a model repeats texts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headprof.cli.context import command_line, join_sharing, load, save_profile, terminal
from headprof.cli.options import MOST_PROBES, LoadOptions
from headprof.cli.outputs import check_outputs, model_inputs
from headprof.cli.tables.profile import learned_budgets, ranked_heads
from headprof.errors import HeadprofError, ModelError, ProfileError, UsageError
from headprof.utils.units import parse_lengths

if TYPE_CHECKING:
    from headprof.models.loading import LoadedModel
    from headprof.profile.head_profile import HeadProfile
    from headprof.scoring.calibration import CalibrationSettings
    from headprof.utils.team import Team


@dataclass(frozen=True)
class LearningOptions:
    """What is learned from how the model repeats texts."""

    reconstruction: Annotated[
        bool,
        typer.Option(
            "--reconstruction",
            help="Learn reconstruction scores and budgets for learned-kvzip too, from how the model repeats texts.",
            rich_help_panel="Reconstruction",
        ),
    ] = False
    no_probes: Annotated[
        bool,
        typer.Option(
            "--no-probes",
            help="Ask no probes: the profile holds what --reconstruction learns, and nothing else.",
            rich_help_panel="Reconstruction",
        ),
    ] = False
    add_to: Annotated[
        Path | None,
        typer.Option(
            help="Head profile that gets them, or influence curves; no probes are scored. It is replaced, unless -o "
            "names another file.",
            rich_help_panel="Reconstruction",
        ),
    ] = None
    refine: Annotated[
        bool | None,
        typer.Option(
            "--refine/--no-refine",
            help="Move these budgets to where they lose less, by gradients on needle probes. Default: where it can be "
            "done; takes minutes more.",
            rich_help_panel="Reconstruction",
        ),
    ] = None
    surrogate: Annotated[
        bool,
        typer.Option(
            "--surrogate",
            help="Fit the surrogate of the kvzap methods instead: NAME.surrogate.safetensors beside the profile.",
            rich_help_panel="Reconstruction",
        ),
    ] = False
    texts: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_PROBES,
            help="How many texts. Default: 12 for --reconstruction, 36 for --surrogate.",
            rich_help_panel="Reconstruction",
        ),
    ] = None
    text_lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a text, in turns. Default: 512,1k,2k, as far as the model can repeat them; 400,700,1000 "
            "for --surrogate.",
            rich_help_panel="Reconstruction",
        ),
    ] = None
    text_folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder of .txt files to read them from, instead of built-in texts.", rich_help_panel="Reconstruction"
        ),
    ] = None


def calibration(learning: LearningOptions, seed: int, with_curves: bool = False) -> CalibrationSettings:
    """Which texts to repeat, checked.

    Args:
        learning: what the user asks for.
        seed: of the texts.
        with_curves: whether influence curves are added too, or alone.

    Raises:
        UsageError: options that go with `--reconstruction` are given without it, or the texts cannot be had.
    """
    from headprof.scoring.calibration import CalibrationSettings
    from headprof.scoring.reconstruction import TEXTS

    if learning.add_to is not None and not (learning.reconstruction or with_curves):
        raise UsageError(
            "--add-to adds what is learned from repeated texts, or influence curves: add --reconstruction or --curves, "
            "or leave it away."
        )
    if learning.no_probes and (learning.add_to is not None or not learning.reconstruction):
        fault = "with --add-to none are asked in any case" if learning.reconstruction else "add --reconstruction"
        raise UsageError(
            f"--no-probes makes a profile of what is learned from repeated texts: {fault}, or leave it away."
        )
    if learning.refine and (learning.no_probes or not learning.reconstruction):
        mend = "add --reconstruction" if not learning.no_probes else "leave --no-probes away"
        raise UsageError(f"--refine moves budgets learned from repeated texts, by probes: {mend}, or leave it away.")
    if not learning.reconstruction and replace(learning, add_to=None) != LearningOptions():
        raise UsageError(
            "--texts, --text-lengths, --text-folder and --no-refine are for what is learned from repeated texts: add "
            "--reconstruction or --surrogate, or leave them away."
        )
    lengths = parse_lengths(learning.text_lengths) if learning.text_lengths else None
    settings = CalibrationSettings(learning.texts or TEXTS, lengths, seed, learning.text_folder)
    settings.check()
    return settings


def add_reconstruction(
    profile: Path,
    target: Path,
    model: str | None,
    loading: LoadOptions,
    settings: CalibrationSettings,
    ranks: Team,
    *,
    refine: bool | None,
) -> None:
    """Add what is learned from repeated texts to a profile that is there.

    Of several processes, or of several groups that hold a model together (`ranks`), the first one does.
    """
    from headprof.profile.head_profile import HeadProfile
    from headprof.profile.profile_checks import FORMAT
    from headprof.utils.files import check_writable

    HeadProfile.load(profile, model_name=model)  # complaints come before the weights
    check_outputs({target: FORMAT}, chain(_texts_of(settings), model_inputs(model, loading)))
    check_writable(target)
    team = join_sharing(ranks)
    if not team.dismiss():
        return
    loaded = load(model, loading, team.ranks)
    before = HeadProfile.load(profile, loaded.shape, loaded.given or loaded.name)
    learned = learn(loaded, before, settings, target, refine=refine)
    show_learned(learned)
    terminal.result(str(target))
    team.leave()


def without_probes(
    output: Path | None, model: str | None, loading: LoadOptions, settings: CalibrationSettings, ranks: Team
) -> None:
    """Make a profile of repeated texts alone.

    Of several processes, or of several groups that hold a model together (`ranks`), the first one does.

    Raises:
        UsageError: there are scores from probes where it would be written.
    """
    from headprof.models.finding import model_name
    from headprof.profile.finding import default_output, find_profile
    from headprof.profile.profile_checks import FORMAT
    from headprof.scoring.reconstruction import RECONSTRUCTION, reconstruction_profile
    from headprof.utils.files import check_writable

    target = output or default_output(model_name(model))
    check_outputs({target: FORMAT}, chain(_texts_of(settings), model_inputs(model, loading)))
    places = [target]
    if output is None:  # where it would be found before what is found now
        with suppress(ProfileError):
            places.append(find_profile(model_name(model)))
    for place in places:
        if holds(place, lambda profile: profile.kinds != (RECONSTRUCTION,)):
            if place == target:
                loss, adding = "go", f"--add-to {place}"
            else:
                loss, adding = "not be found any more", f"--add-to {place} -o {target}"
            raise UsageError(
                f"{place} holds scores from probes, which would {loss}: give {adding} in place of --no-probes, or name "
                "another file with -o."
            )
    check_writable(target)
    team = join_sharing(ranks)
    if not team.dismiss():
        return
    loaded = load(model, loading, team.ranks)
    with terminal.progress() as report:
        profile = reconstruction_profile(
            loaded,
            settings,
            command=command_line(),
            on_text=lambda done, total: report(f"Repeating texts with {loaded.name}", done, total),
        )
    save_profile(profile, loaded, target)
    show_learned(profile)
    terminal.result(str(target))
    team.leave()


def _texts_of(settings: CalibrationSettings) -> list[Path]:
    """The user's own files that are repeated."""
    return [] if settings.folder is None else sorted(settings.folder.rglob("*.txt"))


def learn(
    loaded: LoadedModel, profile: HeadProfile, settings: CalibrationSettings, target: Path, *, refine: bool | None
) -> HeadProfile:
    """Write the profile with what is learned from repeated texts, budgets mixed with HeadKV-R2's if there are such.

    Args:
        loaded: the model.
        profile: to which it is added.
        settings: which texts.
        target: the file.
        refine: whether budgets are moved to where they lose less; `None` for where that can be done.

    Raises:
        UsageError: the model's context is too short for that; what was learned before has been written.
    """
    from headprof.scoring.reconstruction import with_reconstruction
    from headprof.tuning.mixing import with_mixing
    from headprof.tuning.refining import with_refining

    unmixed = "" if "reasoning" in profile.scores else "The profile has no reasoning scores"
    with terminal.progress() as report:
        learned = with_reconstruction(
            profile,
            loaded,
            settings,
            command=command_line(),
            on_text=lambda done, total: report(f"Repeating texts with {loaded.name}", done, total),
        )
        if not unmixed:
            try:
                learned = with_mixing(learned, loaded, partial(report, f"Mixing budgets with {loaded.name}"))
            except UsageError as error:  # the model's context is too short
                unmixed = str(error).rstrip(".")
    save_profile(learned, loaded, target)
    if unmixed:
        terminal.remark(f"{unmixed}: the learned budgets are not mixed with those of headkv-r2.")
    if refine is False or (refine is None and unmixed):
        return learned
    try:
        with terminal.progress() as report:
            learned = with_refining(learned, loaded, on_round=partial(report, f"Refining budgets with {loaded.name}"))
    except (UsageError, ModelError) as error:
        if refine:
            why = str(error).rstrip(".")
            mend = "leave --refine away"
            raise type(error)(f"Learned budgets cannot be refined for {loaded.name} ({why}): {mend}.") from error
        terminal.remark(f"Learned budgets are not refined for {loaded.name}. {error}")
        return learned
    save_profile(learned, loaded, target)
    return learned


def show_learned(profile: HeadProfile) -> None:
    """Show a profile's best heads by reconstruction, and at which shares its budgets were learned."""
    from headprof.scoring.reconstruction import RECONSTRUCTION

    terminal.table(*ranked_heads(profile, RECONSTRUCTION, 5))
    if (table := learned_budgets(profile)) is not None:
        terminal.table(*table)


def learned_before(target: Path, model: str | None) -> HeadProfile | None:
    """A model's profile that a resumed run replaces, if it has learned from repeated texts what can stay.

    Raises:
        UsageError: its budgets are mixed by reasoning scores, which the run finds anew.
    """
    from headprof.models.finding import model_name
    from headprof.profile.head_profile import HeadProfile
    from headprof.profile.learning import is_mixed
    from headprof.scoring.reconstruction import RECONSTRUCTION

    if not holds(target, lambda profile: profile.model_name == model_name(model)):
        return None
    earlier = HeadProfile.load(target)
    if earlier.kept_shares is not None and is_mixed(earlier.metadata):
        raise UsageError(
            f"The budgets learned for {target} are mixed with headkv-r2's by reasoning scores that this run finds "
            "anew: add --reconstruction to learn them again, or move that file away."
        )
    return earlier if earlier.kept_shares is not None or RECONSTRUCTION in earlier.scores else None


def holds(target: Path, something: Callable[[HeadProfile], bool]) -> bool:
    """Whether a profile that holds something is there, which this run would replace by one without."""
    from headprof.profile.head_profile import HeadProfile

    try:
        return target.is_file() and something(HeadProfile.load(target))
    except HeadprofError:
        return False
