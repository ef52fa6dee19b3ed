"""`headprof score`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headprof.cli.command import command, given_options
from headprof.cli.context import command_line, join_ranks, join_sharing, load, terminal
from headprof.cli.curves import CurveOptions, add_curves, curve_outputs, curve_request, measure
from headprof.cli.options import MOST, MOST_PROBES, Families, LoadOptions, Model, ProfileOutput, Seed, Tp, listed
from headprof.cli.outputs import check_outputs, model_inputs
from headprof.cli.reconstruction import (
    LearningOptions,
    add_reconstruction,
    calibration,
    holds,
    learn,
    learned_before,
    without_probes,
)
from headprof.cli.surrogate import fit, fit_settings
from headprof.cli.tables.profile import learned_budgets, ranked_heads
from headprof.cli.tables.score import scoring_progress, stability
from headprof.cli.tables.tune import refined_budgets, tuned_parameters
from headprof.cli.tune import tune_scored
from headprof.errors import UsageError
from headprof.utils.units import parse_lengths

if TYPE_CHECKING:
    from headprof.models.loading import LoadedModel
    from headprof.profile.head_profile import HeadProfile
    from headprof.scoring.calibration import CalibrationSettings
    from headprof.scoring.request import ScoreRequest
    from headprof.tuning.curve_request import CurveRequest
    from headprof.utils.team import Team


@dataclass(frozen=True)
class ProbeOptions:
    """What the model is asked."""

    preset: Annotated[str, typer.Option(help="How much work: quick, standard or thorough.")] = "quick"
    probes: Annotated[
        int | None,
        typer.Option(min=2, max=MOST_PROBES, help="Number of probes, instead of the preset's."),
    ] = None
    lengths: Annotated[str | None, typer.Option(help="Context lengths in tokens, such as 1k,4k.")] = None
    needles: Annotated[
        Path | None,
        typer.Option(help="JSONL with needle, real_needle, answer, question; instead of the built-in ones."),
    ] = None
    families: Families = None
    haystack: Annotated[Path | None, typer.Option(help="Folder of .txt files to hide the needles in.")] = None
    pack: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_PROBES, help="Needles that share one context. Default: by its length, 12 at 1k."),
    ] = None


@dataclass(frozen=True)
class CountingOptions:
    """Which probes count, and how many are enough."""

    decode: Annotated[
        str, typer.Option(help="teacher: the right answer is fed; greedy: the model answers, F1 above 0.5 counts.")
    ] = "teacher"
    include_failed: Annotated[bool, typer.Option("--include-failed", help="Count wrongly answered probes too.")] = False
    until_stable: Annotated[
        bool, typer.Option("--until-stable", help="Stop as soon as other probes would hardly change the top heads.")
    ] = False
    top: Annotated[
        int, typer.Option(min=1, max=MOST, help="For --until-stable: how many heads.", show_default=True)
    ] = 10
    tolerance: Annotated[
        float, typer.Option(max=1, help="For --until-stable: share of the top heads that other probes may change.")
    ] = 0.05


@command
def score(
    *,
    context: typer.Context,
    model: Model = None,
    asked: ProbeOptions,
    seed: Seed = 0,
    counting: CountingOptions,
    learning: LearningOptions,
    curving: CurveOptions,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Begin with the results kept from before: after an interruption, or for more probes."
        ),
    ] = False,
    tuning: Annotated[
        bool,
        typer.Option(
            "--tune/--no-tune",
            help="Find the parameters of headkv-r2 that serve the model best, as headprof tune does.",
        ),
    ] = True,
    output: ProfileOutput = None,
    loading: LoadOptions,
    tp: Tp = 1,
) -> None:
    """Score every attention head of a model, and write a head profile.

    It holds the parameters and budgets that serve the model best, too (methods headkv-tuned and headkv-refined).
    With --reconstruction it holds a score for how heads repeat texts, and budgets for documents whose question is not
    known, too (method learned-kvzip).
    With --curves it holds what the right answer loses when a KV head keeps so many rows (methods headkv-curves and
    curves-kvzip).
    The results of each probe are kept in NAME.probes.safetensors beside it. With torchrun or accelerate launch, several
    processes share the work.

    [dim]headprof score
    headprof score --model meta-llama/Meta-Llama-3-8B-Instruct --preset standard
    headprof score --until-stable
    headprof score --families nonliteral -o nonliteral.safetensors
    headprof score --reconstruction --add-to profiles/SmolLM2-135M-Instruct.safetensors
    headprof score --curves --add-to profiles/SmolLM2-135M-Instruct.safetensors
    headprof score --surrogate
    torchrun --nproc-per-node 8 -m headprof score --model meta-llama/Meta-Llama-3-8B-Instruct[/]
    """
    ranks = join_ranks(tp, sharing=True)
    if tp > 1:
        _check_ranks(learning)
    if learning.surrogate:
        _fit_surrogate(context, model, asked.preset, seed, learning, output, loading)
        return
    from headprof.scoring.reconstruction import check_texts

    curves = curve_request(curving, seed)
    settings = calibration(learning, seed, curves is not None)
    request = _request(asked, counting, seed)
    request.check()
    if learning.add_to is not None:
        done = "asked" if curves is None else "scored"
        _refuse_probe_options(context, f"With --add-to no probes are {done}", resuming=curves is not None)
        _add(learning, output or learning.add_to, model, loading, settings, curves, ranks, resume=resume)
        return
    if learning.no_probes:
        _refuse_probe_options(context, "With --no-probes no probes are asked")
        without_probes(output, model, loading, settings, ranks)
        return
    target = _checked_target(output, model, asked, loading, curves)
    earlier = learned_before(target, model) if resume and not learning.reconstruction else None
    team = join_sharing(ranks)
    loaded = load(model, loading, tp)
    if earlier is not None and earlier.shape.differences(loaded.shape):
        earlier = None
    if learning.reconstruction:
        check_texts(loaded, settings)
    if earlier is not None:
        terminal.remark(f"What {target} has learned from repeated texts stays in it.")
    made = {"--reconstruction": learning.reconstruction or earlier is not None, "--tune": tuning}
    for remark in _what_goes(target, made, () if curves is None else curves.situations):
        terminal.remark(remark)
    profile = _score(loaded, request, target, team, earlier, resume=resume)
    if curves is not None:
        profile = measure(loaded, profile, curves, target, team, resume=resume)
    if team.dismiss():
        if learning.reconstruction:
            profile = learn(loaded, profile, settings, target, refine=learning.refine)
        if tuning:
            profile = tune_scored(loaded, profile, target)
        _show(profile, target, stopping=request.stop is not None)
        team.leave()


def _check_ranks(learning: LearningOptions) -> None:
    """
    Raises:
        UsageError: something is asked for that processes which hold one model together do not do.
    """
    asked = {"--surrogate": learning.surrogate, "--refine": bool(learning.refine)}
    if other := next((name for name, given in asked.items() if given), None):
        raise UsageError(
            f"Processes that hold one model together neither fit surrogates nor refine budgets: leave --tp or {other} "
            "away."
        )


def _fit_surrogate(
    context: typer.Context,
    model: str | None,
    preset: str,
    seed: int,
    learning: LearningOptions,
    output: Path | None,
    loading: LoadOptions,
) -> None:
    """Fit a surrogate, which goes with nothing else.

    Raises:
        UsageError: something else is asked for.
    """
    _refuse_probe_options(context, "A surrogate is fitted to texts, not to probes")
    others = {
        "--reconstruction": learning.reconstruction,
        "--add-to": learning.add_to,
        "--no-probes": learning.no_probes,
        **dict.fromkeys(given_options(context, "refine", CurveOptions), True),
    }
    if other := next((name for name, given in others.items() if given), None):
        raise UsageError(f"A surrogate is fitted by itself: leave --surrogate, or {other}, away.")
    settings = fit_settings(preset, learning.texts, learning.text_lengths, seed, learning.text_folder)
    fit(settings, model, output, command_line(), loading)


def _add(
    learning: LearningOptions,
    target: Path,
    model: str | None,
    loading: LoadOptions,
    settings: CalibrationSettings,
    curves: CurveRequest | None,
    ranks: Team,
    *,
    resume: bool,
) -> None:
    """Add what is asked for to a profile that is there: curves first, since several processes share them."""
    assert learning.add_to is not None
    if curves is None:
        add_reconstruction(learning.add_to, target, model, loading, settings, ranks, refine=learning.refine)
        return
    learns = partial(learn, settings=settings, target=target, refine=learning.refine)
    more = learns if learning.reconstruction else None
    add_curves(learning.add_to, target, model, loading, curves, ranks, resume=resume, more=more)


def _what_goes(target: Path, made: Mapping[str, bool], situations: Sequence[str]) -> Iterator[str]:
    """What the profile that is replaced holds beside scores and the new one will not.

    Args:
        target: where it is, if there is one.
        made: what makes it again, and whether that is done.
        situations: in which influence curves are measured.
    """
    from headprof.profile.tuned import NOTE

    if not made["--reconstruction"] and holds(target, lambda profile: profile.kept_shares is not None):
        yield f"The budgets learned for {target} go with it: learn them again with --reconstruction."
    if holds(target, lambda profile: bool(set(profile.curves) - set(situations))):
        yield f"The influence curves of {target} go with it: measure them again with --curves."
    if not made["--tune"] and holds(target, lambda profile: NOTE in profile.metadata):
        yield f"The parameters tuned for {target} go with it: find them again with headprof tune."


def _score(
    loaded: LoadedModel,
    request: ScoreRequest,
    target: Path,
    team: Team,
    earlier: HeadProfile | None,
    *,
    resume: bool,
) -> HeadProfile:
    """Ask probes, and write the profile; `earlier` is one whose learned budgets stay."""
    from headprof.scoring.request import build_probes, score_to_file, starting_anew

    builder = build_probes(loaded, request)
    if not resume and (remark := starting_anew(loaded, builder, target, request.decode)):
        terminal.remark(remark)
    with terminal.progress() as report:
        return score_to_file(
            loaded,
            builder,
            request,
            target,
            resume=resume,
            command=command_line(),
            team=team,
            on_progress=lambda now: report(scoring_progress(loaded.name, now), now.done, now.total),
            learned=earlier,
        )


def _refuse_probe_options(context: typer.Context, reason: str, *, resuming: bool = False) -> None:
    """
    Raises:
        UsageError: something is asked of probes where there are none, for the reason given.
    """
    given = {*given_options(context, ProbeOptions, CountingOptions)}
    if context.params.get("surrogate"):
        given.discard("--preset")  # which says how many texts
    if context.params.get("resume") and not resuming:
        given.add("--resume")
    given.update(given_options(context, "tuning"))
    if given:
        raise UsageError(f"{reason}: leave {sorted(given)[0]} away.")


def _checked_target(
    output: Path | None, model: str | None, asked: ProbeOptions, loading: LoadOptions, curves: CurveRequest | None
) -> Path:
    """The profile to write, once it is known that neither it nor what lies beside it is read."""
    from headprof.models.finding import model_name
    from headprof.profile.finding import default_output
    from headprof.profile.profile_checks import FORMAT
    from headprof.scoring.probe_results import results_path
    from headprof.utils.files import PROBES_FORMAT

    target = output or default_output(model_name(model))
    given = [path for path in (asked.needles, asked.haystack) if path is not None]
    read = chain(given, model_inputs(model, loading))
    check_outputs({target: FORMAT, results_path(target): PROBES_FORMAT, **curve_outputs(target, curves)}, read)
    return target


def _request(asked: ProbeOptions, counting: CountingOptions, seed: int) -> ScoreRequest:
    from headprof.scoring.request import ScoreRequest
    from headprof.scoring.run import StopRule

    return ScoreRequest(
        preset=asked.preset,
        probes=asked.probes,
        lengths=parse_lengths(asked.lengths) if asked.lengths else None,
        needles=asked.needles,
        families=listed(asked.families) or None,
        haystack=asked.haystack,
        pack=asked.pack,
        seed=seed,
        decode=counting.decode,
        include_failed=counting.include_failed,
        stop=StopRule(counting.top, counting.tolerance) if counting.until_stable else None,
    )


def _show(profile: HeadProfile, target: Path, *, stopping: bool) -> None:
    for kind in profile.scores:
        terminal.table(*ranked_heads(profile, kind, 5))
    if (learned := learned_budgets(profile)) is not None:
        terminal.table(*learned)
    for table in (tuned_parameters(profile), refined_budgets(profile)):
        if table is not None:
            terminal.table(*table)
    if reason := profile.metadata.get("no_write_scores"):
        terminal.remark(reason)
    if stopping:
        terminal.remark(stability(profile))
    terminal.result(str(target))
