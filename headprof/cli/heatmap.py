"""`headprof heatmap`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from headprof.cli.command import command, given_options
from headprof.cli.context import load, terminal
from headprof.cli.options import KIND, MOST, LoadOptions, Model, ProfileFile
from headprof.cli.outputs import check_outputs, model_inputs, profile_input
from headprof.errors import UsageError

_OF_PROFILES = ("profile", "which", "top", "uncertainty")
_OF_POLICIES = ("file", "recovery", LoadOptions)


@command
def heatmap(
    *,
    context: typer.Context,
    profile: ProfileFile = None,
    model: Model = None,
    which: Annotated[str, typer.Option(help=f"{KIND}, both (retrieval and reasoning), or all.")] = "all",
    top: Annotated[int, typer.Option(min=0, max=MOST, help="Heads to mark and list.")] = 10,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="Show how sure each score is; dash heads that may not be in the top.")
    ] = False,
    policies: Annotated[
        bool, typer.Option("--policies", help="Instead: which of fastgen's policies each KV head takes of a text.")
    ] = False,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="With --policies: the text. Default: a built-in one.")
    ] = None,
    recovery: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="With --policies: share of a head's attention that is recovered (0.85)."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Picture to write: .png, .svg, or for profiles .html to point and click in. Default: heads.png, or "
            "policies.png.",
        ),
    ] = None,
    loading: LoadOptions,
) -> None:
    """Draw a head profile: layers by heads, the top heads marked; or the policies that heads take of a text.

    [dim]headprof heatmap -o heads.svg
    headprof heatmap --uncertainty
    headprof heatmap -o heads.html
    headprof heatmap --policies --file report.txt -o policies.svg[/]
    """
    from headprof import plots
    from headprof.models.finding import model_name
    from headprof.profile.finding import load_profile

    _check(policies, given_options(context, *(_OF_PROFILES if policies else _OF_POLICIES)))
    if policies:
        _draw_policies(model, file, recovery, output or Path("policies.png"), loading)
        return
    target = output or Path("heads.png")
    check_outputs({target: None}, chain(profile_input(model, profile), model_inputs(model)))
    loaded = load_profile(model_name(model), profile, given=model)
    plots.heatmap(loaded, path=target, which=which, top=top, uncertainty=uncertainty)
    terminal.result(str(target))


def _check(policies: bool, given: Sequence[str]) -> None:
    """
    Args:
        policies: whether these are drawn.
        given: options that are for the other picture.

    Raises:
        UsageError: there are such.
    """
    if given:
        picture = "a head profile" if policies else "the policies that heads take of a text"
        mend = "or leave --policies away" if policies else "or add --policies"
        raise UsageError(f"The picture of {picture} is another one: leave {given[0]} away, {mend}.")


def _draw_policies(
    model: str | None, file: Path | None, recovery: float | None, target: Path, loading: LoadOptions
) -> None:
    from headprof.compression.inputs import demo_document, read_document
    from headprof.compression.methods.table import find_method
    from headprof.compression.policy_profile import METHOD, head_policies
    from headprof.plots.policies import policies_plot
    from headprof.plots.style import checked_path

    checked_path(target, what="A picture of policies", mend="choose one with -o")
    find_method(METHOD).with_options(recovery=recovery)
    document = demo_document()[0] if file is None else read_document(file)
    check_outputs({target: None}, chain([] if file is None else [file], model_inputs(model, loading)))
    policies_plot(head_policies(load(model, loading), document, recovery), target)
    terminal.result(str(target))
