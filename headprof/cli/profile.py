"""`headprof profile`: the profiles there are, what one holds, how two agree, and other people's formats."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headprof.cli.command import command
from headprof.cli.context import terminal
from headprof.cli.options import KIND, MOST, JsonFlag, Model, ProfileOutput, TrustRemoteCode
from headprof.cli.outputs import check_outputs, model_inputs
from headprof.cli.tables.profile import (
    family_accuracy,
    found_profiles,
    learned_budgets,
    overlaps,
    profile_facts,
    ranked_heads,
)
from headprof.errors import UsageError

if TYPE_CHECKING:
    from headprof.profile.comparing import Agreement
    from headprof.profile.head_profile import HeadProfile

FORMAT_HELP = (
    "What FILE is, where its content does not tell: retrieval-heads, locos, duoattention, rlkv, kvzip, qrhead, lu-kv, "
    "attention-matching or csv."
)

profiles = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", help="List, show, compare, import and export head profiles."
)


@profiles.command(name="list")
@command
def list_command(*, json: JsonFlag = False) -> None:
    """List every profile that is found: in ./profiles, your own, and those that ship.

    A shadowed one is not found by its model's name, since a file of the same name comes before it.

    [dim]headprof profile list[/]
    """
    from headprof.profile.describing import describe_found
    from headprof.profile.finding import list_profiles, profile_dirs

    found = list_profiles()
    if json:
        terminal.json([describe_found(each) for each in found])
        return
    if not found:
        terminal.remark(f"There are no profiles in {', '.join(map(str, profile_dirs()))}: make one by headprof score.")
        return
    terminal.result_table(*found_profiles(found))
    for each in found:
        if each.fault:
            terminal.result(each.fault)


@profiles.command()
@command
def show(
    *,
    profile: Annotated[
        str | None,
        typer.Argument(help="File of a head profile, or name of its model. Default: SmolLM2-135M-Instruct."),
    ] = None,
    other: Annotated[
        str | None, typer.Argument(help="Another one, or a file that profile import reads, to compare it with.")
    ] = None,
    form: Annotated[str | None, typer.Option("--format", help=FORMAT_HELP)] = None,
    which: Annotated[str | None, typer.Option(help=f"{KIND}. Default: every kind there is.")] = None,
    top: Annotated[int, typer.Option(min=1, max=MOST, help="Heads to list, or to tell apart.")] = 10,
    json: JsonFlag = False,
) -> None:
    """Show what a profile holds and where it comes from, or how two profiles agree.

    [dim]headprof profile show meta-llama/Meta-Llama-3-8B-Instruct
    headprof profile show mine.safetensors theirs.safetensors --top 20
    headprof profile show mine.safetensors full_attention_heads.tsv[/]
    """
    from headprof.profile.comparing import compare_profiles
    from headprof.profile.finding import load_located, locate_profile
    from headprof.profile.interchange import beside

    if form is not None and other is None:
        raise UsageError("A --format is that of a file to compare with: name it after the profile.")
    path, first = load_located(profile)
    if other is None:
        _show_profile(path, first, which, top, json)
        return
    other_path = locate_profile(other)
    second = beside(first, other_path, form)
    agreements = compare_profiles(first, second, which, top)
    _show_agreement([(path, first), (other_path, second)], agreements, json)


@profiles.command(name="import")
@command
def import_command(
    *,
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE", help="Head scores as a paper published them, or a CSV.")
    ] = None,
    retrieval: Annotated[Path | None, typer.Option(help="Instead: a file whose scores are for retrieval.")] = None,
    reasoning: Annotated[Path | None, typer.Option(help="And one whose scores are for reasoning.")] = None,
    taken_as: Annotated[
        str | None,
        typer.Option("--as", help="What FILE holds: retrieval (for headkv), reasoning (for headkv-r2) or both."),
    ] = None,
    form: Annotated[str | None, typer.Option("--format", help=FORMAT_HELP)] = None,
    model: Model = None,
    shape: Annotated[
        str | None, typer.Option(help="Published shape of the model (llama-3-8b, ...): no configuration is read.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Where the scores come from, to be kept in the profile.")] = None,
    output: ProfileOutput = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make a head profile of other people's scores.

    Read are the files of HeadKV and Retrieval Head, LOCOS, DuoAttention, RLKV, KVzip, QRHead, LU-KV and Attention
    Matching, and CSV. Of the model only the configuration is read; with --shape not even that.

    [dim]headprof profile import --retrieval heads.json --model meta-llama/Meta-Llama-3-8B-Instruct --shape llama-3-8b
    headprof profile import full_attention_heads.tsv --model meta-llama/Llama-3.1-8B-Instruct
    headprof profile import scores.csv --model mistralai/Mistral-7B-Instruct-v0.3[/]
    """
    from headprof.profile.importing import ImportRequest
    from headprof.profile.interchange import Given, notes
    from headprof.profile.profile_checks import FORMAT

    by_kind = {"retrieval": retrieval, "reasoning": reasoning}
    given = Given(files or [], {kind: path for kind, path in by_kind.items() if path is not None}, taken_as, form)
    request = ImportRequest(given, model, shape, source, output, trust_remote_code)
    request.check()
    check_outputs({request.target: FORMAT}, chain(given.files, given.by_kind.values(), model_inputs(model)))
    imported = request.carry_out()
    for note in notes(imported):
        terminal.remark(note)
    for kind in imported.kinds:
        terminal.table(*ranked_heads(imported, kind, 5))
    terminal.result(str(request.target))


@profiles.command()
@command
def export(
    *,
    profile: Annotated[str, typer.Argument(metavar="PROFILE", help="File of a head profile, or name of its model.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="File to write: .json, .csv or .safetensors.")],
    which: Annotated[
        str | None,
        typer.Option(help=f"For .json, which holds one kind. {KIND}."),
    ] = None,
) -> None:
    """Write a profile in another format, by the suffix of the file.

    A .json is in the papers' format and holds one kind of score; a .csv has all of them, errors and intervals too.

    [dim]headprof profile export SmolLM2-135M-Instruct heads.json --which reasoning[/]
    """
    from headprof.profile.finding import locate_profile, names_file
    from headprof.profile.interchange import export_profile
    from headprof.profile.profile_checks import FORMAT

    path = locate_profile(profile)
    given = None if names_file(profile) else profile
    check_outputs({output: FORMAT if output.suffix == ".safetensors" else None}, [path])
    if lost := export_profile(path, output, which, given):
        terminal.remark(f"A {output.suffix} file does not hold the profile's {', '.join(lost)}: a .safetensors does.")
    terminal.result(str(output))


def _show_profile(path: Path, profile: HeadProfile, which: str | None, top: int, json: bool) -> None:
    from headprof.profile.comparing import compare_within
    from headprof.profile.describing import agreement_sentence, describe_profile

    kinds = [which] if which else profile.kinds
    if json:
        terminal.json(describe_profile(path, profile, kinds, top))
        return
    tables: list[tuple[Any, ...]] = [family_accuracy(profile)] if profile.accuracy else []
    learned = learned_budgets(profile)
    tables += [learned] if learned is not None else []
    tables += [ranked_heads(profile, kind, top) for kind in kinds]
    facts = profile_facts(profile, path)
    width = max(len(name) for name, _ in facts)
    for name, text in facts:
        terminal.result(f"{name:<{width}}  {text}")
    for table in tables:
        terminal.result("")
        terminal.result_table(*table)
    if compared := compare_within(profile):
        terminal.result("")
    for (one, other), agreement in compared.items():
        terminal.result(agreement_sentence(f"{one.capitalize()} and {other} scores", agreement))


def _show_agreement(compared: list[tuple[Path, HeadProfile]], agreements: dict[str, Agreement], json: bool) -> None:
    from headprof.profile.describing import describe_agreement

    if json:
        described = {kind: describe_agreement(agreement) for kind, agreement in agreements.items()}
        files, models = [str(path) for path, _ in compared], [profile.model_name for _, profile in compared]
        terminal.json({"files": files, "models": models, "agreement": described})
        return
    for which, (path, profile) in zip(("first ", "second"), compared, strict=True):
        terminal.result(f"{which}  {path} ({profile.model_name})")
    terminal.result("")
    terminal.result_table(*overlaps(agreements))
    for kind, agreement in agreements.items():
        terminal.result("")
        terminal.result(f"{kind}: Spearman {agreement.spearman:.3f} over {agreement.num_heads} {agreement.heads}")
        for which, heads in (("first", agreement.only_first), ("second", agreement.only_second)):
            names = ", ".join(f"{layer}-{head}" for layer, head in heads) or "none"
            terminal.result(f"only in the top {agreement.k} of the {which}: {names}")
