"""`headprof eval`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from headprof.cli.context import (
    decoding_options,
    guarded,
    join_team,
    length_of,
    lengths_of,
    load,
    load_profile,
    method_options,
    terminal,
)
from headprof.cli.options import (
    Attn,
    Buffer,
    DecodeBudget,
    Device,
    Dtype,
    JsonFlag,
    KeepLast,
    Kernel,
    Model,
    Observe,
    PoolFactor,
    Pooling,
    Profile,
    Seed,
    Settings,
    Trust,
    Window,
)
from headprof.cli.tables import all as tables
from headprof.models.prompt_encoder import OBSERVATION

_TASKS = (
    "niah (retrieval probes), reasoning, babilong, longbench, loogle, ruler, perplexity; with commas. "
    "One of a benchmark's tasks: longbench/hotpotqa."
)


@guarded
def evaluate(
    model: Model = None,
    profile: Profile = None,
    preset: Annotated[
        str, typer.Option(help="What is not said otherwise: quick, standard or thorough.", rich_help_panel="What")
    ] = "quick",
    tasks: Annotated[str | None, typer.Option(help=_TASKS, rich_help_panel="What")] = None,
    methods: Annotated[str | None, typer.Option(help="Methods, with commas.", rich_help_panel="What")] = None,
    budgets: Annotated[str | None, typer.Option(help="Budgets, with commas.", rich_help_panel="What")] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a prompt, such as 1k,2k, where tasks have several; or of a text for perplexity.",
            rich_help_panel="What",
        ),
    ] = None,
    probes: Annotated[
        int | None, typer.Option(min=1, help="Number of probes, over niah and reasoning.", rich_help_panel="What")
    ] = None,
    families: Annotated[
        str | None, typer.Option(help="Only these probe families, with commas.", rich_help_panel="What")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions of each task and length at most.", rich_help_panel="What")
    ] = None,
    seed: Seed = 1000,
    query_agnostic: Annotated[
        bool, typer.Option("--query-agnostic", help="Compress the document alone, before the question is known.")
    ] = False,
    without_full: Annotated[
        bool, typer.Option("--without-full", help="Do not run the full cache, nor compare with it.")
    ] = False,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the benchmarks' own files, instead of the hub; texts for perplexity: .txt, .jsonl.",
            rich_help_panel="Data",
        ),
    ] = None,
    max_prompt: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a benchmark's prompt, 4k; of longer ones the middle is left out. Default: the model's.",
            rich_help_panel="Data",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSON {task: template} in place of our LongBench prompts.", rich_help_panel="Data"),
    ] = None,
    documents: Annotated[
        int,
        typer.Option(min=1, help="Texts for perplexity: the first that are long enough.", rich_help_panel="Data"),
    ] = 20,
    skip: Annotated[int, typer.Option(min=0, help="Of these, leave out so many first.", rich_help_panel="Data")] = 0,
    continuation: Annotated[
        int, typer.Option(min=1, help="Tokens at a text's end that are predicted.", rich_help_panel="Data")
    ] = 512,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for answers, tables, pictures and the report.")
    ] = Path("results"),
    resume: Annotated[bool, typer.Option("--resume", help="Begin with the answers kept there from before.")] = False,
    json: JsonFlag = False,
    observe: Observe = OBSERVATION,
    window: Window = None,
    keep_last: KeepLast = None,
    kernel: Kernel = None,
    pooling: Pooling = None,
    pool_factor: PoolFactor = None,
    settings: Settings = None,
    decode_budget: DecodeBudget = None,
    buffer: Buffer = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attn = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Compare methods at budgets: on needle probes that no profile was made from, on benchmarks, on texts.

    One prefill serves them all. Every answer is kept in answers.jsonl as it comes; at the end there are results.json,
    CSV files, pictures and report.html beside it. With torchrun or accelerate launch, several processes share the work.

    [dim]headprof eval
    headprof eval --tasks longbench/hotpotqa,babilong --lengths 1k,2k --limit 50 --budgets 64,128
    headprof eval --preset standard --query-agnostic --budgets 128,256
    headprof eval --tasks perplexity --data-dir texts --methods h2o,ems --budgets 64,256[/]
    """
    from headprof.evaluation.journal import answers_kept
    from headprof.evaluation.request import EvalRequest, find_preset
    from headprof.evaluation.results import summary
    from headprof.evaluation.run import EvalRun
    from headprof.plots.evaluation import write_results

    chosen = find_preset(preset)
    asked = _listed(methods) or chosen.methods
    request = EvalRequest(
        tasks=_listed(tasks) or chosen.tasks,
        methods=tuple(name for name in asked if name != "full")
        if without_full
        else tuple(dict.fromkeys(("full", *asked))),
        budgets=_listed(budgets) or chosen.budgets,
        probes=probes or chosen.probes,
        lengths=lengths_of(lengths, least=0) if lengths else (None if tasks else chosen.lengths),
        families=_listed(families) or None,
        seed=seed,
        limit=limit,
        max_prompt=length_of(max_prompt) if max_prompt else None,
        prompts=prompts,
        question_known=not query_agnostic,
        observe=observe,
        data_dir=data_dir,
        documents=documents,
        skip=skip,
        continuation=continuation,
        options=method_options(window, keep_last, kernel, pooling, pool_factor, settings),
        decoding=decoding_options(decode_budget, buffer),
    )
    needs_profile = request.check()
    team = join_team()
    loaded = load(model, device, dtype, attn, trust_remote_code)
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
        if not resume and run.journal.path and (kept := answers_kept(run.journal.path, run.journal.key)):
            terminal.remark(f"Starting anew; with --resume, {kept} questions would be taken from {output} as they are.")
        found = run.evaluate(shlex.join(["headprof", *(word for word in sys.argv[1:] if word != "--resume")]))
    team.leave()
    if team.rank:
        return
    written = write_results(found, output)
    if json:
        terminal.json(summary(found))
        return
    for table in tables.evaluation(found):
        terminal.result_table(*table)
    if found.answers:
        terminal.remark(tables.sharing(found))
    terminal.remark(f"Written: {', '.join(path.name for path in written)} in {output}.")


def _listed(text: str | None) -> tuple[str, ...]:
    """Words with commas between them."""
    return tuple(word.strip() for word in text.split(",")) if text else ()
