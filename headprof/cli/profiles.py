"""`headprof profile`: the profiles there are, what one holds, how two agree, and other people's formats."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headprof.cli.context import guarded, terminal
from headprof.cli.options import JsonFlag, Model, Trust
from headprof.cli.tables import all as tables

if TYPE_CHECKING:
    from headprof.profile.comparing import Agreement
    from headprof.profile.head_profile import HeadProfile

profiles = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", help="List, show, compare, import and export head profiles."
)

Which = Annotated[str | None, typer.Option(help="retrieval or reasoning. Default: every kind there is.")]
ProfileName = Annotated[str, typer.Argument(metavar="PROFILE", help="File of a head profile, or name of its model.")]


@profiles.command(name="list")
@guarded
def list_command(json: JsonFlag = False) -> None:
    """List every profile that is found: in ./profiles, your own, and those that ship.

    A shadowed one is not found by its model's name, since a file of the same name comes before it.

    [dim]headprof profile list[/]
    """
    from headprof.profile.finding import list_profiles, profile_dirs

    found = list_profiles()
    if json:
        terminal.json(
            [
                {"file": str(each.path), "shadowed_by": str(each.shadowed_by) if each.shadowed_by else None}
                | (_description(each.profile) if each.profile else {"fault": each.fault})
                for each in found
            ]
        )
        return
    if not found:
        terminal.remark(f"There are no profiles in {', '.join(map(str, profile_dirs()))}: make one by headprof score.")
        return
    terminal.result_table(*tables.found_profiles(found))
    for each in found:
        if each.fault:
            terminal.result(each.fault)


@profiles.command()
@guarded
def show(
    profile: Annotated[
        str | None,
        typer.Argument(help="File of a head profile, or name of its model. Default: SmolLM2-135M-Instruct."),
    ] = None,
    other: Annotated[str | None, typer.Argument(help="Another one, to compare it with.")] = None,
    which: Which = None,
    top: Annotated[int, typer.Option(min=1, help="Heads to list, or to tell apart.")] = 10,
    json: JsonFlag = False,
) -> None:
    """Show what a profile holds and where it comes from, or how two profiles agree.

    [dim]headprof profile show meta-llama/Meta-Llama-3-8B-Instruct
    headprof profile show mine.safetensors theirs.safetensors --top 20[/]
    """
    from headprof.profile.comparing import compare_profiles
    from headprof.profile.head_profile import HeadProfile

    path = _locate(profile)
    first = HeadProfile.load(path)
    if other is None:
        _show_profile(path, first, which, top, json)
        return
    other_path = _locate(other)
    second = HeadProfile.load(other_path)
    agreements = compare_profiles(first, second, which, top)
    _show_agreement([path, other_path], [first, second], agreements, json)


@profiles.command(name="import")
@guarded
def import_command(
    files: Annotated[list[Path] | None, typer.Argument(metavar="CSV", help="Table of scores, one row a head.")] = None,
    retrieval: Annotated[
        Path | None,
        typer.Option(help='Retrieval scores as the papers publish them: JSON from "layer-head" to scores.'),
    ] = None,
    reasoning: Annotated[Path | None, typer.Option(help="Reasoning scores in the same format.")] = None,
    model: Model = None,
    shape: Annotated[
        str | None, typer.Option(help="Published shape of the model (llama-3-8b, ...): no configuration is read.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Where the scores come from, to be kept in the profile.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Head profile to write. Default: ./profiles/MODEL.safetensors."),
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Make a head profile of other people's scores: the papers' JSON, or a CSV.

    Of the model only the configuration is read; with --shape not even that.

    [dim]headprof profile import --retrieval heads.json --model meta-llama/Meta-Llama-3-8B-Instruct --shape llama-3-8b
    headprof profile import scores.csv --model mistralai/Mistral-7B-Instruct-v0.3[/]
    """
    from headprof.errors import ModelError, UsageError
    from headprof.models.loading import model_name, model_shape, published_shape
    from headprof.profile.interchange import check_import, import_profile
    from headprof.scoring.request import default_output

    papers = {kind: path for kind, path in (("retrieval", retrieval), ("reasoning", reasoning)) if path is not None}
    check_import(files or [], papers)
    if shape and model is None:
        raise UsageError(f"The scores are of some model of the shape {shape}: name it with --model.")
    name = model_name(model)
    target = output or default_output(name)
    if target.suffix != ".safetensors" or target.is_dir():
        raise UsageError(f"A head profile cannot be written to {target}: give the name of a .safetensors file with -o.")
    try:
        head_shape = published_shape(shape) if shape else model_shape(model, trust_remote_code)
    except ModelError as error:
        hint = "or say with --shape which published shape the model has, such as llama-3-8b."
        raise ModelError(f"{str(error).removesuffix('.')}, {hint}") from error
    imported = import_profile(files or [], papers, name, head_shape, source)
    imported.save(target)
    for kind in imported.kinds:
        terminal.table(*tables.ranked_heads(imported, kind, 5))
    terminal.result(str(target))


@profiles.command()
@guarded
def export(
    profile: ProfileName,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="File to write: .json, .csv or .safetensors.")],
    which: Annotated[str | None, typer.Option(help="For .json, which holds one kind: retrieval or reasoning.")] = None,
) -> None:
    """Write a profile in another format, by the suffix of the file.

    A .json is in the papers' format and holds one kind of score; a .csv has all of them, errors and intervals too.

    [dim]headprof profile export SmolLM2-135M-Instruct heads.json --which reasoning[/]
    """
    from headprof.profile.interchange import export_profile

    export_profile(_locate(profile), output, which)
    terminal.result(str(output))


def _locate(name: str | None) -> Path:
    """A profile's file, given as itself or by its model's name; the embedded model's when nothing is given."""
    from headprof.models.loading import model_name
    from headprof.profile.finding import find_profile

    path = Path(name or "").expanduser()
    if path.suffix == ".safetensors" or (path.is_file() and path.suffix != ".gguf"):
        return path
    return find_profile(model_name(name))


def _show_profile(path: Path, profile: HeadProfile, which: str | None, top: int, json: bool) -> None:
    from headprof.profile.comparing import compare

    kinds = [which] if which else profile.kinds
    ranked = {kind: profile.top_heads(kind, top) for kind in kinds}
    between = compare(profile.retrieval, profile.reasoning) if len(profile.kinds) == 2 else None
    if json:
        terminal.json(
            {"file": str(path)}
            | _description(profile)
            | {
                "settings": profile.settings,
                "accuracy": profile.accuracy,
                "metadata": dict(profile.metadata),
                "top": {kind: [_head(profile, kind, *place) for place in ranked[kind]] for kind in kinds},
                "retrieval_and_reasoning": between and _agreement(between),
            }
        )
        return
    facts = tables.profile_facts(profile, path)
    width = max(len(name) for name, _ in facts)
    for name, text in facts:
        terminal.result(f"{name:<{width}}  {text}")
    if profile.accuracy:
        terminal.result("")
        terminal.result_table(*tables.family_accuracy(profile))
    for kind in kinds:
        terminal.result("")
        terminal.result_table(*tables.ranked_heads(profile, kind, top))
    if between:
        terminal.result("")
        terminal.result(_sentence("Retrieval and reasoning scores", between))


def _show_agreement(paths: list[Path], loaded: list[HeadProfile], agreements: dict[str, Agreement], json: bool) -> None:
    if json:
        terminal.json(
            {
                "files": [str(path) for path in paths],
                "models": [profile.model_name for profile in loaded],
                "agreement": {kind: _agreement(agreement) for kind, agreement in agreements.items()},
            }
        )
        return
    for path, profile, place in zip(paths, loaded, ("first ", "second"), strict=True):
        terminal.result(f"{place}  {path} ({profile.model_name})")
    terminal.result("")
    terminal.result_table(*tables.overlaps(agreements))
    for kind, agreement in agreements.items():
        terminal.result("")
        terminal.result(f"{kind}: Spearman {agreement.spearman:.3f} over {agreement.num_heads} heads")
        for place, heads in (("first", agreement.only_first), ("second", agreement.only_second)):
            names = ", ".join(f"{layer}-{head}" for layer, head in heads) or "none"
            terminal.result(f"only in the top {agreement.k} of the {place}: {names}")


def _sentence(what: str, agreement: Agreement) -> str:
    text = f"{what}: Spearman {agreement.spearman:.3f} over {agreement.num_heads} heads"
    if 10 not in agreement.overlaps:
        return text
    return (
        f"{text}, {agreement.overlaps[10]:.0%} of the top 10 in common ({agreement.expected_overlap(10):.1%} by chance)"
    )


def _description(profile: HeadProfile) -> dict[str, Any]:
    return {
        "model": profile.model_name,
        "shape": profile.shape.to_dict(),
        "kinds": list(profile.kinds),
        "probes_used": dict(profile.probes_used),
        "date": profile.metadata.get("date"),
        "source": profile.metadata.get("source"),
    }


def _head(profile: HeadProfile, kind: str, layer: int, head: int, score: float) -> dict[str, Any]:
    errors, ends = profile.standard_errors.get(kind), profile.intervals.get(kind)
    return {
        "layer": layer,
        "head": head,
        "score": score,
        "standard_error": None if errors is None else float(errors[layer, head]),
        "interval": None if ends is None else [float(end[layer, head]) for end in ends],
    }


def _agreement(agreement: Agreement) -> dict[str, Any]:
    return {
        "num_heads": agreement.num_heads,
        "spearman": None if math.isnan(agreement.spearman) else agreement.spearman,
        "overlap": {
            str(count): {"share": share, "by_chance": agreement.expected_overlap(count)}
            for count, share in agreement.overlaps.items()
        },
        "k": agreement.k,
        "only_first": agreement.only_first,
        "only_second": agreement.only_second,
    }
