"""`headprof eval`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headprof.cli.command import command
from headprof.cli.context import command_line, join_ranks, join_sharing, load, load_profile, terminal
from headprof.cli.options import (
    BOTH,
    MOST,
    MOST_PROBES,
    DecodingOptions,
    Eager,
    JsonFlag,
    Keep,
    LoadOptions,
    MethodOptions,
    Model,
    Observe,
    Profile,
    Seed,
    Surrogate,
    Tp,
    listed,
    step_of,
)
from headprof.cli.outputs import check_outputs, data_of_eval, model_inputs, outputs_of_eval, profile_input
from headprof.cli.tables.evaluate import evaluation, sharing
from headprof.errors import UsageError
from headprof.utils.units import parse_length, parse_lengths

if TYPE_CHECKING:
    from headprof.evaluation.request import EvalRequest
    from headprof.evaluation.results import Evaluation

_TASKS = (
    "niah (retrieval probes), reasoning, nonliteral, multi (many to one document), babilong, longbench, loogle, ruler "
    "(or ruler-generated, which needs no data), perplexity; with commas. A benchmark's task: longbench/hotpotqa."
)


@dataclass(frozen=True)
class WhatOptions:
    """What is compared, and how much of it."""

    preset: Annotated[
        str, typer.Option(help="What is not said otherwise: quick, standard or thorough.", rich_help_panel="What")
    ] = "quick"
    tasks: Annotated[str | None, typer.Option(help=_TASKS, rich_help_panel="What")] = None
    methods: Annotated[str | None, typer.Option(help="Methods, with commas.", rich_help_panel="What")] = None
    budgets: Annotated[str | None, typer.Option(help="Budgets, with commas.", rich_help_panel="What")] = None
    compression_ratio: Annotated[
        str | None,
        typer.Option(
            "--compression-ratio",
            help="Instead: shares of the prompt's cache to remove, such as 0.5,0.75,0.9.",
            rich_help_panel="What",
        ),
    ] = None
    recovery: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Instead, for fastgen: share of each head's attention that is recovered (0.85); budgets beside it are "
            "the most that is kept.",
            rich_help_panel="What",
        ),
    ] = None
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a prompt, such as 1k,2k, where tasks have several; or of a text for perplexity.",
            rich_help_panel="What",
        ),
    ] = None
    probes: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_PROBES,
            help="Number of probes, over niah, reasoning, nonliteral and multi, of which documents are whole.",
            rich_help_panel="What",
        ),
    ] = None
    families: Annotated[
        str | None, typer.Option(help="Only these probe families, with commas.", rich_help_panel="What")
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Questions of each task and length at most.", rich_help_panel="What"),
    ] = None


@dataclass(frozen=True)
class DataOptions:
    """Where texts and benchmarks come from, and what is made of them."""

    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the benchmarks' own files, instead of the hub; texts for perplexity: .txt, .jsonl.",
            rich_help_panel="Data",
        ),
    ] = None
    max_prompt: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a benchmark's prompt, 4k; of longer ones the middle is left out. Default: the model's.",
            rich_help_panel="Data",
        ),
    ] = None
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSON {task: template} in place of our LongBench prompts.", rich_help_panel="Data"),
    ] = None
    documents: Annotated[
        int,
        typer.Option(
            min=1, max=MOST, help="Texts for perplexity: the first that are long enough.", rich_help_panel="Data"
        ),
    ] = 20
    skip: Annotated[
        int, typer.Option(min=0, max=MOST, help="Of these, leave out so many first.", rich_help_panel="Data")
    ] = 0
    continuation: Annotated[
        int, typer.Option(min=1, max=MOST, help="Tokens at a text's end that are predicted.", rich_help_panel="Data")
    ] = 512


@dataclass(frozen=True)
class ComparisonOptions:
    """Which caches are compared."""

    query_agnostic: Annotated[
        bool, typer.Option("--query-agnostic", help="Compress the document alone, before the question is known.")
    ] = False
    without_full: Annotated[
        bool, typer.Option("--without-full", help="Do not run the full cache, nor compare with it.")
    ] = False
    eager: Eager = False


@command
def evaluate(
    *,
    model: Model = None,
    profile: Profile = None,
    what: WhatOptions,
    seed: Seed = 1000,
    caches: ComparisonOptions,
    data: DataOptions,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for answers, tables, pictures and the report.")
    ] = Path("results"),
    resume: Annotated[bool, typer.Option("--resume", help="Begin with the answers kept there from before.")] = False,
    json: JsonFlag = False,
    observe: Observe = None,
    keep: Keep = None,
    surrogate: Surrogate = None,
    tuning: MethodOptions,
    decoding: DecodingOptions,
    loading: LoadOptions,
    tp: Tp = 1,
) -> None:
    """Compare methods at budgets: on needle probes that no profile was made from, on benchmarks, on texts.

    One prefill serves them all. Every answer is kept in answers.jsonl as it comes; at the end there are results.json,
    CSV files, pictures and report.html beside it. With torchrun or accelerate launch, several processes share the work.

    [dim]headprof eval
    headprof eval --tasks longbench/hotpotqa,babilong --lengths 1k,2k --limit 50 --budgets 64,128
    headprof eval --preset standard --query-agnostic --budgets 128,256
    headprof eval --tasks multi --query-agnostic --budgets 128,256
    headprof eval --tasks ruler --lengths 4k --query-agnostic --compression-ratio 0.5,0.75 --data-dir questions
    headprof eval --tasks longbench/hotpotqa --query-agnostic --keep "/Passage [0-9]+:/"
    headprof eval --methods fastgen --recovery 0.9
    headprof eval --tasks perplexity --data-dir texts --methods h2o,ems --budgets 64,256[/]
    """
    from headprof.evaluation.run import EvalRun

    ranks = join_ranks(tp, sharing=True)
    request = _request(what, caches, data, seed, observe, tuning, decoding)
    request = replace(request, surrogate=surrogate, profile=profile, keep=tuple(keep or ()))
    needs_profile = request.check(tp)
    _check_outputs(output, model, profile, data, loading, surrogate)
    team = join_sharing(ranks)
    loaded = load(model, loading, tp)
    head_profile = load_profile(loaded, profile) if needs_profile else None
    with terminal.progress() as report:
        run = EvalRun(
            loaded,
            head_profile,
            request,
            output=output,
            resume=resume,
            team=team,
            on_progress=lambda task, done, total: report(f"Asking {loaded.name}, {task}", done, total),
        )
        if not resume and (remark := run.kept.starting_anew()):
            terminal.remark(remark)
        found = run.evaluate(command_line())
    team.leave()
    if team.rank == 0:
        _show(found, output, json)


def _check_outputs(
    output: Path,
    model: str | None,
    profile: Path | None,
    data: DataOptions,
    loading: LoadOptions,
    surrogate: Path | None = None,
) -> None:
    given = [] if data.prompts is None else [data.prompts]
    beside = profile_input(model, profile, surrogate)
    read = (given, data_of_eval(data.data_dir, output), beside, model_inputs(model, loading))
    check_outputs(outputs_of_eval(output), chain.from_iterable(read))


def _request(
    what: WhatOptions,
    caches: ComparisonOptions,
    data: DataOptions,
    seed: int,
    observe: str | None,
    tuning: MethodOptions,
    decoding: DecodingOptions,
) -> EvalRequest:
    from headprof.evaluation.request import find_preset

    return find_preset(what.preset).request(
        tasks=listed(what.tasks),
        methods=listed(what.methods),
        budgets=_budgets(what),
        lengths=parse_lengths(what.lengths, least=0) if what.lengths else None,
        probes=what.probes,
        without_full=caches.without_full,
        families=listed(what.families) or None,
        limit=what.limit,
        seed=seed,
        question_known=not caches.query_agnostic,
        observe=observe,
        **asdict(data) | {"max_prompt": parse_length(data.max_prompt) if data.max_prompt else None},
        options=tuning.chosen() | ({} if what.recovery is None else {"recovery": what.recovery}),
        decoding=decoding.chosen(),
        step=step_of(caches.eager),
    )


def _budgets(what: WhatOptions) -> tuple[str, ...]:
    """Budgets as given, or what the compression ratios come to; without bound where recovery stands in their place.

    Raises:
        UsageError: there are both, or recovery is in the place of a budget of methods that need one.
    """
    from headprof.compression.methods.given_budget import ratio_budget

    if what.compression_ratio is None and what.budgets is None and what.recovery is not None:
        return _without_bound(listed(what.methods))
    if what.compression_ratio is None:
        return listed(what.budgets)
    if what.budgets is not None:
        raise UsageError(BOTH.format("--budgets"))
    return tuple(ratio_budget(ratio) for ratio in what.compression_ratio.split(","))


def _without_bound(methods: Sequence[str]) -> tuple[str, ...]:
    from headprof.compression.methods.table import find_method

    found = {name: find_method(name) for name in methods}
    needing = [name for name, each in found.items() if not each.has_option("recovery") and not each.keeps_everything]
    if needing or not methods:
        raise UsageError(
            "--recovery stands in the place of a budget for fastgen alone: add --budgets, or choose --methods fastgen."
        )
    return ("100%",)


def _show(found: Evaluation, output: Path, json: bool) -> None:
    from headprof.evaluation.results import summary
    from headprof.plots.results_folder import write_results

    written = write_results(found, output)
    if json:
        terminal.json(summary(found))
        return
    for table in evaluation(found):
        terminal.result_table(*table)
    if found.answers:
        terminal.remark(sharing(found))
    terminal.remark(f"Written: {', '.join(path.name for path in written)} in {output}.")
