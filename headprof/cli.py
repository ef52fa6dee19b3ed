"""The command line: one thin function a command. Heavy modules are imported where they are used: `--help` is quick."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from headprof import __version__
from headprof.console import Terminal, human_bytes
from headprof.errors import HeadprofError
from headprof.options import (
    Attn,
    Device,
    Dtype,
    JsonFlag,
    KeepLast,
    Kernel,
    Model,
    PoolFactor,
    Pooling,
    Profile,
    Seed,
    Trust,
    Window,
)

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
terminal = Terminal()


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn errors a user can mend into one sentence and an exit code."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except HeadprofError as error:
            if terminal.debug:
                raise
            terminal.error(str(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            terminal.error("Interrupted.")
            raise typer.Exit(130) from None

    return run


def _load(model: str | None, device: str = "auto", dtype: str = "auto", attn: str = "auto", trust: bool = False):
    from headprof.models import load_model

    with terminal.progress() as report:
        return load_model(model, device=device, dtype=dtype, attn=attn, trust_remote_code=trust, progress=report)


def _load_profile(loaded, explicit: Path | None):
    from headprof.profile import HeadProfile, find_profile

    return HeadProfile.load(find_profile(loaded.name, explicit), loaded.shape, model_name=loaded.name)


def _method_options(window, keep_last, kernel, pooling, pool_factor) -> dict[str, Any]:
    """Parameters of a method's parts; `None` leaves one at its default."""
    return {
        "window": window,
        "keep_last": keep_last,
        "kernel": kernel,
        "pooling": pooling,
        "pool_factor": pool_factor,
    }


def _lengths(text: str) -> tuple[int, ...]:
    from headprof.numbers import parse_lengths

    return parse_lengths(text)


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
    pack: Annotated[int | None, typer.Option(min=1, help="Needles that share one context.")] = None,
    seed: Seed = 0,
    decode: Annotated[
        str, typer.Option(help="teacher: the right answer is fed; greedy: the model answers, F1 above 0.5 counts.")
    ] = "teacher",
    include_failed: Annotated[
        bool, typer.Option("--include-failed", help="Count wrongly answered probes too.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
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

    [dim]headprof score
    headprof score --model meta-llama/Meta-Llama-3-8B-Instruct --preset standard[/]
    """
    from headprof.scoring.command import ScoreRequest, build_probes, default_output, score_to_file

    request = ScoreRequest(preset, probes, _lengths(lengths) if lengths else None, needles, haystack, pack, seed)
    request.check()
    loaded = _load(model, device, dtype, attn, trust_remote_code)
    builder = build_probes(loaded, request)
    target = output or default_output(loaded.name)
    with terminal.progress() as report:
        profile = score_to_file(
            loaded,
            builder,
            target,
            decode=decode,
            include_failed=include_failed,
            resume=resume,
            command=shlex.join(["headprof", *sys.argv[1:]]),
            on_progress=lambda now: report(
                f"Scoring {loaded.name}, {now.answered} of {now.done} right", now.done, now.total
            ),
        )
    _show_top_heads(profile)
    terminal.result(str(target))


def _show_top_heads(profile) -> None:
    for which in profile.scores:
        terminal.table(
            ["", "layer", "head", "score", "standard error"],
            [
                [
                    f"{place}.",
                    str(layer),
                    str(head),
                    f"{value:.3f}",
                    f"{profile.standard_errors[which][layer, head]:.3f}",
                ]
                for place, (layer, head, value) in enumerate(profile.top_heads(which, 5), 1)
            ],
            title=f"Top {which} heads, from {profile.probes_used[which]} counted probes",
        )


@app.command()
@guarded
def heatmap(
    profile: Annotated[Path | None, typer.Argument(help="Head profile. Default: the one for the model.")] = None,
    model: Model = None,
    which: Annotated[str, typer.Option(help="retrieval, reasoning or both.")] = "both",
    top: Annotated[int, typer.Option(min=0, help="Heads to mark and list.")] = 10,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture to write: .png or .svg.")] = Path("heads.png"),
) -> None:
    """Draw a head profile: layers by heads, the top heads marked.

    [dim]headprof heatmap -o heads.svg[/]
    """
    from headprof import plots
    from headprof.models import model_name
    from headprof.profile import HeadProfile, find_profile

    loaded = HeadProfile.load(find_profile(model_name(model), profile))
    plots.heatmap(loaded, path=output, which=which, top=top)
    terminal.result(str(output))


@app.command()
@guarded
def generate(
    model: Model = None,
    profile: Profile = None,
    method: Annotated[str, typer.Option(help="full, snapkv, headkv or headkv-r2.")] = "headkv-r2",
    budget: Annotated[
        str,
        typer.Option("--budget", "-b", help="Tokens per KV head (64), share of the prompt (1.5%) or bytes (512MB)."),
    ] = "64",
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Text file: the context of the question.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The question, or the whole prompt. Default: standard input.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 for greedy decoding.")] = 0.0,
    seed: Seed = 0,
    compare: Annotated[bool, typer.Option("--compare", help="Answer with the full cache too.")] = False,
    json: JsonFlag = False,
    window: Window = None,
    keep_last: KeepLast = None,
    kernel: Kernel = None,
    pooling: Pooling = None,
    pool_factor: PoolFactor = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attn = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Answer a prompt under a key/value-cache budget.

    The text goes to stdout, a table of what it took to stderr. Without a prompt, a built-in question about a built-in
    document is asked.

    [dim]headprof generate --budget 64
    headprof generate --file report.txt --prompt "Who signed it?" --budget 1.5% --compare[/]
    """
    from headprof.compression.budget import Budget
    from headprof.compression.methods import find_method
    from headprof.compression.session import make_plan
    from headprof.generation import generate_text, prompt_ids, what_to_ask

    options = _method_options(window, keep_last, kernel, pooling, pool_factor)
    chosen = find_method(method).with_options(**options)
    Budget.parse(budget)
    document, question, built_in = what_to_ask(file, prompt, sys.stdin)
    if built_in:
        terminal.remark(f"No prompt given; asking a built-in question about a built-in document: {question}\n")
    loaded = _load(model, device, dtype, attn, trust_remote_code)
    head_profile = _load_profile(loaded, profile) if chosen.budget.profile_scores else None
    ids = prompt_ids(loaded, document, question, max_new_tokens)
    plan = None
    if method != "full":
        plan = make_plan(loaded.model, head_profile, method=method, budget=budget, **options)
        plan.allocation(ids.shape[1])  # a budget that cannot be met is an error before any work

    def run(with_plan, on_text=lambda _: None):
        return generate_text(
            loaded, ids, with_plan, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, on_text=on_text
        )

    full = run(None) if compare and plan is not None else None
    made = run(plan, (lambda _: None) if json else terminal.write)
    label = method if plan is None else f"{method}, budget {budget}"
    runs = {label: made} | ({"full": full} if full is not None else {})
    tokens_cached = made.prompt_tokens + made.new_tokens - 1
    per_token = loaded.shape.cache_bytes_per_token(loaded.model.dtype.itemsize)
    full_bytes = full.cache_bytes if full else per_token * tokens_cached
    if json:
        from dataclasses import asdict

        terminal.json(
            {"prompt": question, "full_cache_bytes": full_bytes, "runs": {n: asdict(r) for n, r in runs.items()}}
        )
        return
    terminal.write("\n")
    if full is not None:
        terminal.remark(f"\nWith the full cache: {full.text.strip()}")
    _show_runs(runs, full_bytes)


def _show_runs(runs, full_bytes: int) -> None:
    terminal.table(
        ["cache", "prompt tokens", "new tokens", "bytes", "of full", "prefill tokens/s", "decode tokens/s"],
        [
            [
                name,
                str(run.prompt_tokens),
                str(run.new_tokens),
                human_bytes(run.cache_bytes),
                f"{run.cache_bytes / full_bytes:.1%}",
                f"{run.prefill_rate:.0f}",
                f"{run.decode_rate:.1f}" if run.decode_rate else "-",
            ]
            for name, run in runs.items()
        ]
        + ([["full (not run)", "", "", human_bytes(full_bytes), "100.0%", "", ""]] if len(runs) == 1 else []),
    )


@app.command(name="eval")
@guarded
def evaluate(
    model: Model = None,
    profile: Profile = None,
    tasks: Annotated[
        str, typer.Option(help="niah (retrieval probes), reasoning, or both, with a comma.")
    ] = "niah,reasoning",
    methods: Annotated[str, typer.Option(help="Methods, with commas.")] = "full,snapkv,headkv,headkv-r2",
    budgets: Annotated[str, typer.Option(help="Budgets, with commas.")] = "16,32,64,128",
    probes: Annotated[int, typer.Option(min=1, help="Number of probes, over all tasks.")] = 120,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, such as 1k,2k.")] = "1k",
    families: Annotated[str | None, typer.Option(help="Only these probe families, with commas.")] = None,
    seed: Seed = 1000,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for answers.csv.")] = None,
    json: JsonFlag = False,
    window: Window = None,
    keep_last: KeepLast = None,
    kernel: Kernel = None,
    pooling: Pooling = None,
    pool_factor: PoolFactor = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attn = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Compare methods and budgets on probes that no profile was made from.

    [dim]headprof eval --methods full,snapkv,headkv-r2 --budgets 32,64[/]
    """
    from dataclasses import asdict

    from headprof.evaluation.command import EvalRequest, run_evaluation
    from headprof.evaluation.report import answers_csv, tabulate

    request = EvalRequest(
        tasks=tasks.split(","),
        methods=methods.split(","),
        budgets=budgets.split(","),
        probes=probes,
        lengths=_lengths(lengths),
        families=families.split(",") if families else None,
        seed=seed,
        options=_method_options(window, keep_last, kernel, pooling, pool_factor),
    )
    needs_profile = request.check()
    loaded = _load(model, device, dtype, attn, trust_remote_code)
    head_profile = _load_profile(loaded, profile) if needs_profile else None
    with terminal.progress() as report:
        answers = run_evaluation(
            loaded, head_profile, request, lambda done: report(f"Asking {loaded.name}", done, probes)
        )
    if output is not None:
        from headprof.files import atomic_write

        with atomic_write(output / "answers.csv") as temporary:
            temporary.write_text(answers_csv(answers), encoding="utf-8")
        terminal.remark(f"Every answer is in {output / 'answers.csv'}.")
    cells = tabulate(answers)
    if json:
        terminal.json([asdict(cell) for cell in cells])
    else:
        _show_cells(cells)


def _show_cells(cells) -> None:
    terminal.result_table(
        ["method", "budget", "right", "share", "95 % interval", "cache bytes"],
        [
            [
                cell.method,
                cell.budget or "-",
                f"{cell.correct}/{cell.asked}",
                f"{cell.share:.0%}",
                f"{cell.low:.0%} to {cell.high:.0%}",
                human_bytes(cell.cache_bytes),
            ]
            for cell in cells
        ],
    )


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
    global terminal
    terminal = Terminal(quiet="--quiet" in given, debug="--debug" in given)
    app(args=[argument for argument in given if argument not in ("--quiet", "--debug")], prog_name="headprof")


if __name__ == "__main__":
    main()
