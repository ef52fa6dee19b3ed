"""`headprof validate`: do the heads that a profile puts on top cause the answers?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headprof.cli.command import command
from headprof.cli.context import join_ranks, join_sharing, load, load_profile, terminal
from headprof.cli.options import (
    MOST,
    MOST_PROBES,
    Families,
    JsonFlag,
    LoadOptions,
    Model,
    ProfileFile,
    Seed,
    Tp,
    listed,
)
from headprof.cli.outputs import check_outputs, model_inputs, profile_input
from headprof.cli.tables.validate import agreements, side_by_side, validation
from headprof.errors import UsageError
from headprof.utils.units import parse_length

if TYPE_CHECKING:
    from collections.abc import Mapping

    from headprof.profile.head_profile import HeadProfile
    from headprof.validation.findings import Findings
    from headprof.validation.settings import ValidationSettings


@dataclass(frozen=True)
class CheckOptions:
    """What is asked, and how many heads are silent meanwhile."""

    top: Annotated[int, typer.Option(max=MOST, help="Number of top heads that the verdict is about.")] = 10
    probes: Annotated[
        int, typer.Option(min=2, max=MOST_PROBES, help="Number of probes, retrieval and reasoning together.")
    ] = 120
    length: Annotated[str, typer.Option(help="Tokens of a prompt, such as 1k.")] = "1k"
    pack: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_PROBES, help="Needles that share one context. Default: 12 at 1k, more in longer ones."
        ),
    ] = None
    draws: Annotated[int, typer.Option(max=1000, help="How often as many heads are picked at random.")] = 3
    ablate: Annotated[
        str, typer.Option(help="What a silent head puts out: zero, or mean, its own mean over the context's tokens.")
    ] = "zero"
    families: Families = None


@command
def validate(
    *,
    profile: ProfileFile = None,
    model: Model = None,
    check: CheckOptions,
    seed: Seed = 2000,
    where: Annotated[
        str,
        typer.Option(help="question: heads are silent from the end of the context on; prompt: throughout (slower)."),
    ] = "question",
    per_head: Annotated[
        bool, typer.Option("--per-head", help="Silence every single head too, and compare with the scores.")
    ] = False,
    batch_heads: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Heads of --per-head that run at once. Default: as many as fit.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write: .png or .svg.")] = Path(
        "validate.png"
    ),
    csv: Annotated[Path | None, typer.Option("--csv", help="File for the figures of --per-head.")] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option("--beside", help="Another profile of the model, whose scores are compared; may be repeated."),
    ] = None,
    json: JsonFlag = False,
    loading: LoadOptions,
    tp: Tp = 1,
) -> None:
    """Silence the top heads of a profile and see whether the answers go, beside random heads of the same layers.

    All kinds of score that the profile holds are put side by side. Ends with code 1 when one of them is not confirmed.
    With torchrun or accelerate launch, several processes share the work.

    [dim]headprof validate
    headprof validate --ablate mean --families nonliteral
    headprof validate --top 20 --where prompt --per-head --csv drops.csv -o validate.svg[/]
    """
    from headprof.plots.validation import check_picture
    from headprof.validation.findings import check_profile

    ranks = join_ranks(tp, sharing=True)
    settings = _settings(check, seed, where)
    if csv is not None and not per_head:
        raise UsageError("The figures for --csv are those of --per-head: give both.")
    check_picture(output)
    targets = {path: None for path in (output, csv) if path is not None}
    check_outputs(targets, chain(profile_input(model, profile), beside or (), model_inputs(model, loading)))
    _check_settings(settings, model, [profile, *(beside or ())])
    team = join_sharing(ranks)
    loaded = load(model, loading, tp)
    head_profile = load_profile(loaded, profile)
    others = _named({path: load_profile(loaded, path) for path in beside or ()})
    with terminal.progress() as report:
        found = check_profile(
            loaded,
            head_profile,
            settings,
            others=others,
            per_head=per_head,
            batch_heads=batch_heads,
            team=team,
            on_progress=report,
        )
    team.leave()
    if team.rank:  # a code other than 0 would have the launcher end the first process before it has written
        return
    _keep(found, output, csv)
    _show(found, json)
    terminal.remark(f"The picture is {output}.")
    if not found.confirmed:
        raise typer.Exit(1)


def _settings(check: CheckOptions, seed: int, where: str) -> ValidationSettings:
    from headprof.validation.settings import ValidationSettings

    values = asdict(check) | {"length": parse_length(check.length)}
    return ValidationSettings(probe_families=listed(values.pop("families")) or None, **values, seed=seed, where=where)


def _check_settings(settings: ValidationSettings, model: str | None, profiles: Sequence[Path | None]) -> None:
    """Find mistakes before the model is loaded: the profile knows how many heads there are."""
    from headprof.models.finding import model_name
    from headprof.probes.families import choose_families
    from headprof.profile import finding

    choose_families(settings.probe_families)
    for profile in profiles:
        shape = finding.load_profile(model_name(model), profile, given=model).shape
        settings.check(shape.num_layers * shape.num_heads)


def _named(profiles: Mapping[Path, HeadProfile]) -> dict[str, HeadProfile]:
    """Profiles by the names of their files; those that are called alike by their paths."""
    stems = [path.stem for path in profiles]
    return {path.stem if stems.count(path.stem) == 1 else str(path): each for path, each in profiles.items()}


def _keep(found: Findings, output: Path, csv: Path | None) -> None:
    from headprof.plots.validation import validation_plot
    from headprof.utils.files import write_text
    from headprof.validation.head_drops import drops_csv

    validation_plot(found.result, output, found.compared)
    if csv is not None and found.drops is not None:
        write_text(csv, drops_csv(found.result.scores, found.drops))


def _show(found: Findings, json: bool) -> None:
    if json:
        terminal.json(found.figures())
        return
    terminal.result_table(*validation(found.result))
    terminal.result_table(*side_by_side(found.compared))
    if (table := agreements(found.compared)) is not None:
        terminal.result_table(*table)
    for sentence in found.sentences():
        terminal.result(sentence)
