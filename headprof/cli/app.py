"""The command line: one thin function a command. Heavy modules are imported where they are used: `--help` is quick."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from headprof._version import __version__
from headprof.cli.bench import bench
from headprof.cli.context import (
    check_method,
    choose_plan,
    decoding_options,
    guarded,
    join_team,
    lengths_of,
    load,
    method_options,
    terminal,
)
from headprof.cli.evaluate import evaluate
from headprof.cli.lm_eval import PASS_ON, lm_eval
from headprof.cli.options import (
    Attn,
    Backend,
    BudgetText,
    Buffer,
    DecodeBudget,
    Device,
    Dtype,
    JsonFlag,
    KeepLast,
    Kernel,
    MaxNewTokens,
    Method,
    Model,
    Observe,
    PoolFactor,
    Pooling,
    PrefillChunk,
    Profile,
    Seed,
    Settings,
    Trust,
    Window,
)
from headprof.cli.profiles import profiles
from headprof.cli.tables import all as tables
from headprof.cli.validate import validate
from headprof.models.prompt_encoder import OBSERVATION

app = typer.Typer(
    name="headprof",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Profile the attention heads of a language model, and spend a key/value-cache budget where it pays.\n\n"
    "Without [bold]--model[/], SmolLM2-135M-Instruct is used, which runs on a laptop. "
    "[bold]--quiet[/] (no progress, no remarks) and [bold]--debug[/] (tracebacks) may stand anywhere.",
)


@app.command()
@guarded
def score(
    model: Model = None,
    preset: Annotated[str, typer.Option(help="How much work: quick, standard or thorough.")] = "quick",
    probes: Annotated[int | None, typer.Option(min=2, help="Number of probes, instead of the preset's.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Context lengths in tokens, such as 1k,4k.")] = None,
    needles: Annotated[
        Path | None,
        typer.Option(help="JSONL with needle, real_needle, answer, question; instead of the built-in ones."),
    ] = None,
    haystack: Annotated[Path | None, typer.Option(help="Folder of .txt files to hide the needles in.")] = None,
    pack: Annotated[
        int | None, typer.Option(min=1, help="Needles that share one context. Default: by its length, 12 at 1k.")
    ] = None,
    seed: Seed = 0,
    decode: Annotated[
        str, typer.Option(help="teacher: the right answer is fed; greedy: the model answers, F1 above 0.5 counts.")
    ] = "teacher",
    include_failed: Annotated[
        bool, typer.Option("--include-failed", help="Count wrongly answered probes too.")
    ] = False,
    until_stable: Annotated[
        bool, typer.Option("--until-stable", help="Stop as soon as other probes would hardly change the top heads.")
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="For --until-stable: how many heads.", show_default=True)] = 10,
    tolerance: Annotated[
        float, typer.Option(help="For --until-stable: share of the top heads that other probes may change.")
    ] = 0.05,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Begin with the results kept from before: after an interruption, or for more probes."
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Head profile to write. Default: ./profiles/MODEL.safetensors."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attn = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Score every attention head of a model, and write a head profile.

    The results of each probe are kept in NAME.probes.safetensors beside it. With torchrun or accelerate launch, several
    processes share the work.

    [dim]headprof score
    headprof score --model meta-llama/Meta-Llama-3-8B-Instruct --preset standard
    headprof score --until-stable
    torchrun --nproc-per-node 8 -m headprof score --model meta-llama/Meta-Llama-3-8B-Instruct[/]
    """
    from headprof.scoring.request import ScoreRequest, build_probes, default_output, resumable, score_to_file
    from headprof.scoring.run import StopRule

    request = ScoreRequest(
        preset=preset,
        probes=probes,
        lengths=lengths_of(lengths) if lengths else None,
        needles=needles,
        haystack=haystack,
        pack=pack,
        seed=seed,
        decode=decode,
        include_failed=include_failed,
        stop=StopRule(top, tolerance) if until_stable else None,
    )
    request.check()
    team = join_team()
    loaded = load(model, device, dtype, attn, trust_remote_code)
    builder = build_probes(loaded, request)
    target = output or default_output(loaded.name)
    if not resume and (kept := resumable(loaded, builder, target, decode)):
        terminal.remark(f"Starting anew; with --resume, {kept} probes would be taken from {target.parent} as they are.")
    with terminal.progress() as report:
        profile = score_to_file(
            loaded,
            builder,
            request,
            target,
            resume=resume,
            command=shlex.join(["headprof", *(word for word in sys.argv[1:] if word != "--resume")]),
            team=team,
            on_progress=lambda now: report(tables.scoring_progress(loaded.name, now), now.done, now.total),
        )
    team.leave()
    if team.rank:
        return
    for which in profile.scores:
        terminal.table(*tables.ranked_heads(profile, which, 5))
    if request.stop is not None:
        terminal.remark(tables.stability(profile))
    terminal.result(str(target))


@app.command()
@guarded
def heatmap(
    profile: Annotated[Path | None, typer.Argument(help="Head profile. Default: the one for the model.")] = None,
    model: Model = None,
    which: Annotated[str, typer.Option(help="retrieval, reasoning or both.")] = "both",
    top: Annotated[int, typer.Option(min=0, help="Heads to mark and list.")] = 10,
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
    from headprof.models.loading import model_name
    from headprof.profile.finding import find_profile
    from headprof.profile.head_profile import HeadProfile

    loaded = HeadProfile.load(find_profile(model_name(model), profile))
    plots.heatmap(loaded, path=output, which=which, top=top, uncertainty=uncertainty)
    terminal.result(str(output))


app.command()(validate)


@app.command()
@guarded
def generate(
    model: Model = None,
    profile: Profile = None,
    method: Method = "headkv-r2",
    budget: BudgetText = "64",
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Text file: the context of the question.")] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Compressed document (.kv.safetensors), instead of --file.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The question, or the whole prompt. Default: standard input.")
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 for greedy decoding.")] = 0.0,
    seed: Seed = 0,
    compare: Annotated[bool, typer.Option("--compare", help="Answer with the full cache too.")] = False,
    json: JsonFlag = False,
    window: Window = None,
    keep_last: KeepLast = None,
    kernel: Kernel = None,
    pooling: Pooling = None,
    pool_factor: PoolFactor = None,
    settings: Settings = None,
    decode_budget: DecodeBudget = None,
    buffer: Buffer = None,
    backend: Backend = "auto",
    prefill_chunk: PrefillChunk = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attn = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Answer a prompt under a key/value-cache budget.

    The text goes to stdout, a table of what it took to stderr. Without a prompt, a built-in question about a built-in
    document is asked.

    [dim]headprof generate --budget 64
    headprof generate --file report.txt --prompt "Who signed it?" --budget 1.5% --compare
    headprof generate --cache report.kv.safetensors --prompt "Who signed it?"[/]
    """
    from dataclasses import replace

    from headprof.compression.document import load_document
    from headprof.compression.generation import generate_text, prompt_ids, question_ids
    from headprof.compression.inputs import check_sources, what_to_ask
    from headprof.compression.kernels.attention import check_backend

    check_backend(backend)
    check_sources(file, cache, compare)
    options = method_options(window, keep_last, kernel, pooling, pool_factor, settings)
    decoding = decoding_options(decode_budget, buffer)
    check_method(method, budget, options)
    document, question, built_in = what_to_ask(file, prompt, sys.stdin, about=cache)
    if built_in:
        terminal.remark(f"No prompt given; asking a built-in question about a built-in document: {question}\n")
    loaded = load(model, device, dtype, attn, trust_remote_code)
    plan = held = None
    if cache is not None:
        held, notes = load_document(cache, loaded)
        held.continue_with(replace(held.plan, **decoding))
        label = f"{cache.name} ({notes['method']})"
        ids = question_ids(loaded, held, question, max_new_tokens)
    else:
        label = method if method == "full" else f"{method}, budget {budget}"
        ids = prompt_ids(loaded, document, question, max_new_tokens)
        plan = choose_plan(loaded, profile, method, budget, options | decoding, ids.shape[1])

    def run(with_plan, on_text=lambda _: None):
        with ExitStack() as reading:
            report = reading.enter_context(terminal.progress())

            def begin(text):
                reading.close()  # no bar beside the text
                on_text(text)

            return generate_text(
                loaded,
                ids,
                with_plan,
                cache=held,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                backend=backend,
                prefill_chunk=prefill_chunk,
                on_text=begin,
                on_layer=lambda done, total: report("Reading the prompt, layer", done, total),
            )

    full = run(None) if compare and plan is not None else None
    made = run(plan, (lambda _: None) if json else terminal.write)
    runs = {label: made} | ({"full": full} if full is not None else {})
    tokens_cached = made.prompt_tokens + made.new_tokens - 1
    full_bytes = full.cache_bytes if full else loaded.full_cache_bytes(tokens_cached)
    if json:
        from dataclasses import asdict

        terminal.json(
            {"prompt": question, "full_cache_bytes": full_bytes, "runs": {n: asdict(r) for n, r in runs.items()}}
        )
        return
    terminal.write("\n")
    if full is not None:
        terminal.remark(f"\nWith the full cache: {full.text.strip()}")
    terminal.table(*tables.runs(runs, full_bytes))


@app.command()
@guarded
def compress(
    file: Annotated[Path, typer.Option("--file", "-f", help="Text file to compress.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Compressed document to write. Default: ./NAME.kv.safetensors."),
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option("--question", "-q", help="Ask this at once; may be repeated.")
    ] = None,
    model: Model = None,
    profile: Profile = None,
    method: Method = "headkv-r2",
    budget: BudgetText = "256",
    max_new_tokens: MaxNewTokens = 128,
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
    backend: Backend = "auto",
    prefill_chunk: PrefillChunk = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attn = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Compress a document's cache to a file that answers questions in later processes.

    The answers to --question go to stdout, one a line; without questions, the path of the file. The questions do not
    change the file: any other can be asked of it.

    [dim]headprof compress --file report.txt --budget 128 -o report.kv.safetensors
    headprof compress --file report.txt --question "Who signed it?" --question "When?"[/]
    """
    from headprof.compression.cache.head_cache import stack_caches
    from headprof.compression.document import save_document
    from headprof.compression.generation import compress_document, generate_text, question_ids
    from headprof.compression.inputs import read_document
    from headprof.compression.kernels.attention import check_backend

    check_backend(backend)
    options = method_options(window, keep_last, kernel, pooling, pool_factor, settings)
    decoding = decoding_options(decode_budget, buffer)
    check_method(method, budget, options)
    document = read_document(file)
    target = output or Path(f"{file.stem}.kv.safetensors")
    loaded = load(model, device, dtype, attn, trust_remote_code)
    plan = choose_plan(loaded, profile, method, budget, options | decoding)
    with terminal.progress() as report:
        cache = compress_document(
            loaded,
            document,
            plan,
            observe=observe,
            backend=backend,
            prefill_chunk=prefill_chunk,
            on_layer=lambda done, total: report(f"Compressing {file.name}, layer", done, total),
        )
    save_document(cache, target, loaded, {"document": file.name})
    asked = [(each, question_ids(loaded, cache, each, max_new_tokens)) for each in question or []]
    answers = {
        each: generate_text(loaded, ids, cache=stack_caches([cache]), max_new_tokens=max_new_tokens, backend=backend)
        for each, ids in asked
    }
    summary = tables.compression(cache, target, loaded.full_cache_bytes(cache.get_seq_length()))
    if json:
        terminal.json(summary | {"answers": {each: answer.text.strip() for each, answer in answers.items()}})
        return
    for answer in answers.values():
        terminal.result(" ".join(answer.text.split()))
    if answers:
        terminal.remark(f"\nThe compressed document is {target}.")
    else:
        terminal.result(str(target))
    terminal.table(*tables.summary(summary))


app.command(name="eval")(evaluate)
app.command(name="lm-eval", context_settings=PASS_ON)(lm_eval)
app.add_typer(profiles, name="profile")
app.add_typer(bench, name="bench")


def _version(shown: bool) -> None:
    if shown:
        terminal.result(f"headprof {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; `--quiet` and `--debug` are understood anywhere in it."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, TextIOWrapper):  # what a terminal cannot show should not end an hour's work
        sys.stdout.reconfigure(errors="backslashreplace")
    terminal.configure(quiet="--quiet" in given, debug="--debug" in given)
    app(args=[argument for argument in given if argument not in ("--quiet", "--debug")], prog_name="headprof")
