"""`headprof validate`: do the heads that a profile puts on top cause the answers?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headprof.cli.context import guarded, length_of, load, load_profile, terminal
from headprof.cli.options import Attn, Device, Dtype, JsonFlag, Model, Seed, Trust
from headprof.cli.tables import all as tables


@guarded
def validate(
    profile: Annotated[Path | None, typer.Argument(help="Head profile. Default: the one for the model.")] = None,
    model: Model = None,
    top: Annotated[int, typer.Option(help="Number of top heads that the verdict is about.")] = 10,
    probes: Annotated[int, typer.Option(min=2, help="Number of probes, retrieval and reasoning together.")] = 120,
    length: Annotated[str, typer.Option(help="Tokens of a prompt, such as 1k.")] = "1k",
    pack: Annotated[
        int | None, typer.Option(min=1, help="Needles that share one context. Default: 12 at 1k, more in longer ones.")
    ] = None,
    draws: Annotated[int, typer.Option(help="How often as many heads are picked at random.")] = 3,
    seed: Seed = 2000,
    where: Annotated[
        str,
        typer.Option(help="question: heads are silent from the end of the context on; prompt: throughout (slower)."),
    ] = "question",
    per_head: Annotated[
        bool, typer.Option("--per-head", help="Silence every single head too, and compare with the scores.")
    ] = False,
    batch_heads: Annotated[
        int | None, typer.Option(min=1, help="Heads of --per-head that run at once. Default: as many as fit.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write: .png or .svg.")] = Path(
        "validate.png"
    ),
    csv: Annotated[Path | None, typer.Option("--csv", help="File for the figures of --per-head.")] = None,
    json: JsonFlag = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attn = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Silence the top heads of a profile and see whether the answers go, beside random heads of the same layers.

    Ends with code 1 when a kind of score is not confirmed.

    [dim]headprof validate
    headprof validate --top 20 --where prompt --per-head --csv drops.csv -o validate.svg[/]
    """
    from headprof.errors import UsageError
    from headprof.models.loading import model_name
    from headprof.plots.validation import check_picture, validation_plot
    from headprof.profile.finding import find_profile
    from headprof.profile.head_profile import HeadProfile
    from headprof.utils.files import write_text
    from headprof.validation import head_drops
    from headprof.validation.causal_check import ValidationSettings
    from headprof.validation.causal_check import validate as run_validation
    from headprof.validation.verdict import figures, verdict

    tokens = length_of(length)
    if csv is not None and not per_head:
        raise UsageError("The figures for --csv are those of --per-head: give both.")
    check_picture(output)
    settings = ValidationSettings(top=top, probes=probes, length=tokens, pack=pack, draws=draws, seed=seed, where=where)
    found = HeadProfile.load(find_profile(model_name(model), profile))
    settings.check(found.shape.num_layers * found.shape.num_heads)
    loaded = load(model, device, dtype, attn, trust_remote_code)
    head_profile = load_profile(loaded, profile)
    drops = None
    with terminal.progress() as report:
        result = run_validation(
            loaded, head_profile, settings, lambda done, total: report(f"Silencing heads of {loaded.name}", done, total)
        )
        if per_head:
            drops = head_drops.per_head_drops(
                loaded, settings, batch_heads, lambda done, total: report("Silencing single heads", done, total)
            )
    verdicts = [verdict(result, kind) for kind in result.kinds]
    validation_plot(result, output)
    if csv is not None and drops is not None:
        write_text(csv, head_drops.drops_csv(head_profile, drops))
    if json:
        per = {"per_head": head_drops.figures(head_profile, drops)} if drops else {}
        terminal.json(figures(result) | per)
    else:
        terminal.result_table(*tables.validation(result))
        for each in verdicts:
            terminal.result(each.sentence())
        if drops is not None:
            for agreement in head_drops.agreements(head_profile, drops):
                terminal.result(agreement.sentence())
    terminal.remark(f"The picture is {output}.")
    if not all(each.confirmed for each in verdicts):
        raise typer.Exit(1)
