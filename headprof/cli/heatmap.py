"""`headprof heatmap`."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from headprof.cli.command import command
from headprof.cli.context import terminal
from headprof.cli.options import KIND, MOST, Model, ProfileFile
from headprof.cli.outputs import check_outputs, model_inputs, profile_input


@command
def heatmap(
    *,
    profile: ProfileFile = None,
    model: Model = None,
    which: Annotated[str, typer.Option(help=f"{KIND}, both (retrieval and reasoning), or all.")] = "all",
    top: Annotated[int, typer.Option(min=0, max=MOST, help="Heads to mark and list.")] = 10,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="Show how sure each score is; dash heads that may not be in the top.")
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Picture to write: .png, .svg, or .html to point and click in.")
    ] = Path("heads.png"),
) -> None:
    """Draw a head profile: layers by heads, the top heads marked.

    [dim]headprof heatmap -o heads.svg
    headprof heatmap --uncertainty
    headprof heatmap -o heads.html[/]
    """
    from headprof import plots
    from headprof.models.finding import model_name
    from headprof.profile.finding import load_profile

    check_outputs({output: None}, chain(profile_input(model, profile), model_inputs(model)))
    loaded = load_profile(model_name(model), profile, given=model)
    plots.heatmap(loaded, path=output, which=which, top=top, uncertainty=uncertainty)
    terminal.result(str(output))
