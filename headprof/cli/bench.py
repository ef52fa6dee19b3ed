"""`headprof bench`: speed and memory, side by side in one run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headprof.cli import context
from headprof.cli.command import command
from headprof.cli.context import load_profile, terminal
from headprof.cli.options import (
    MOST,
    MOST_PROBES,
    DecodingOptions,
    JsonFlag,
    LoadOptions,
    MethodOptions,
    Model,
    PrefillChunk,
    Profile,
    Seed,
)
from headprof.cli.outputs import check_outputs, model_inputs, profile_input
from headprof.cli.tables import bench as tables
from headprof.errors import UsageError
from headprof.utils.units import parse_lengths

if TYPE_CHECKING:
    from headprof.bench.generate import BenchRequest, BenchResult, LargestBatch
    from headprof.bench.score import ScoreBenchRequest, ScoreBenchResult
    from headprof.models.loading import LoadedModel

bench = typer.Typer(no_args_is_help=True, help="Speed and memory, side by side in one run.")

Figures = Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for all figures.")]


@dataclass(frozen=True)
class CaseOptions:
    """What is timed."""

    methods: Annotated[str, typer.Option(help="Methods, with commas; full caches are run beside them.")] = "headkv-r2"
    budgets: Annotated[str, typer.Option(help="Budgets, with commas.")] = "64"
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, such as 4k,8000.")] = "1k,4k"
    new_tokens: Annotated[int, typer.Option(max=MOST, help="Tokens to decode after the prompt.")] = 32
    repeats: Annotated[
        int, typer.Option(max=1_000_000, help="Timed runs of each case, of which the median counts.")
    ] = 3
    batch: Annotated[int, typer.Option(max=1_000_000, help="Sequences decoded together.")] = 1
    backends: Annotated[str, typer.Option(help="Attentions over the compressed cache, with commas.")] = "auto"
    step: Annotated[
        str,
        typer.Option(help="How a step over the compressed cache is run, with commas: auto, eager, graph, compiled."),
    ] = "auto"
    full: Annotated[
        str | None,
        typer.Option(
            help="Transformers' full caches run beside, with commas: eager (DynamicCache), compiled (StaticCache with "
            "torch.compile). Default: both on CUDA, else eager."
        ),
    ] = None


@bench.command(name="generate")
@command
def bench_generate(
    *,
    model: Model = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Random weights of a published shape, instead of --model: llama-3-8b, qwen3-8b, ..."),
    ] = None,
    profile: Profile = None,
    cases: CaseOptions,
    largest_batch: Annotated[
        bool, typer.Option("--largest-batch", help="Also find how many sequences fit (CUDA).")
    ] = False,
    without_full: Annotated[bool, typer.Option("--without-full", help="Leave the full caches out.")] = False,
    prefill_chunk: PrefillChunk = None,
    seed: Seed = 0,
    output: Figures = None,
    json: JsonFlag = False,
    tuning: MethodOptions,
    decoding: DecodingOptions,
    loading: LoadOptions,
) -> None:
    """Time decoding with compressed caches beside Transformers' own full caches.

    These are the growing DynamicCache, run eagerly, and the StaticCache, compiled; all ratios are to the better of
    them. The floor is what reading weights and cache at the memory's measured bandwidth would take.

    [dim]headprof bench generate --budgets 64,128 --lengths 4k,8000
    headprof bench generate --shape llama-3-8b --lengths 32k --backends triton,varlen --largest-batch[/]
    """
    from headprof.bench.generate import figures, largest_batches, run_bench
    from headprof.compression.methods.table import find_method
    from headprof.compression.request import check_named_files

    request = _case_request(cases, tuning, decoding, without_full, prefill_chunk=prefill_chunk, seed=seed)
    request.check()
    if profile is not None and shape is not None:
        raise UsageError("Random weights have random scores: leave --profile or --shape away.")
    check_named_files(map(find_method, request.methods), profile, None)
    _check_output(output, model, loading, profile)
    loaded = _load(model, shape, loading)
    head_profile: Any
    if shape is not None:
        from headprof.profile.random_scores import random_profile, random_surrogate

        head_profile = random_profile(loaded.shape, seed)
        surrogate = random_surrogate(loaded.model, loaded.shape, seed) if request.needs_surrogate else None
    else:
        from headprof.profile.finding_surrogate import load_surrogate

        head_profile = load_profile(loaded, profile) if request.needs_profile else None
        surrogate = load_surrogate(loaded, profile=profile) if request.needs_surrogate else None
    request = replace(request, surrogate=surrogate, tokenizer=loaded.tokenizer)
    run = loaded.model, loaded.max_positions, head_profile, request
    with terminal.progress() as report:
        result = run_bench(*run, report)
        largest = largest_batches(*run, report) if largest_batch else []
    found = figures(result) | {"model": loaded.name, "largest_batches": [asdict(each) for each in largest]}
    _keep(found, output, json)
    if not json:
        _show_generation(result, largest)


@dataclass(frozen=True)
class SideOptions:
    """What is scored, and how the papers' procedure is run beside."""

    lengths: Annotated[str, typer.Option(help="Context lengths in tokens, such as 1k,4k.")] = "1k"
    probes: Annotated[int, typer.Option(max=MOST_PROBES, help="Probes at each length.")] = 48
    pack: Annotated[
        int | None,
        typer.Option(
            max=MOST_PROBES, help="Probes that share a context on our side. Default: from the length, 12 at 1k."
        ),
    ] = None
    sides: Annotated[
        str,
        typer.Option(
            help="What is run, with commas; also unpacked (ours with one needle a context) and together (ours with "
            "contexts that share passes)."
        ),
    ] = "packed,stepwise-fast,stepwise-attentions"
    stop_after_answer: Annotated[
        bool, typer.Option("--stop-after-answer", help="End the papers' decoding where the right answer would end.")
    ] = False
    include_failed: Annotated[
        bool, typer.Option("--include-failed", help="Compare scores over all probes too, not only those answered.")
    ] = False
    top: Annotated[int, typer.Option(max=MOST, help="Best heads that are compared.")] = 10


@bench.command(name="score")
@command
def bench_score(
    *,
    model: Model = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Random weights of a published shape, instead of --model; implies --include-failed and "
            "--stop-after-answer."
        ),
    ] = None,
    asked: SideOptions,
    seed: Seed = 0,
    output: Figures = None,
    json: JsonFlag = False,
    loading: LoadOptions,
) -> None:
    """Time scoring beside the papers' procedure, on the same probes.

    The papers hide one needle in a context and decode its answer token by token with every layer's attention: after a
    fast prefill, or after one that returns all attention too.

    [dim]headprof bench score --lengths 1k,2k
    headprof bench score --shape llama-3-8b --lengths 8k,32k --sides packed,stepwise-fast[/]
    """
    from headprof.bench.score import run_score_bench

    request = _side_request(asked, seed, random_weights=shape is not None)
    request.check()
    _check_output(output, model, loading)
    loaded = _load(model, shape, loading, max_positions=max(request.lengths))
    with terminal.progress() as report:
        result = run_score_bench(loaded, request, report)
    figures = {"model": loaded.name, "request": asdict(request)} | asdict(result)
    _keep(figures, output, json)
    if not json:
        _show_scoring(result)


def _load(model: str | None, shape: str | None, loading: LoadOptions, max_positions: int | None = None) -> LoadedModel:
    """The model, or one of a published shape with random weights, which reads as many tokens as it should."""
    if shape is None:
        return context.load(model, loading)
    from headprof.models.random_weights import load_random

    return load_random(
        shape, device=loading.device, dtype=loading.dtype, attn=loading.attn, max_positions=max_positions
    )


def _case_request(
    cases: CaseOptions, tuning: MethodOptions, decoding: DecodingOptions, without_full: bool, **others: Any
) -> BenchRequest:
    from headprof.bench.generate import BenchRequest

    full = () if without_full else None if cases.full is None else tuple(cases.full.split(","))
    return BenchRequest(
        methods=tuple(cases.methods.split(",")),
        budgets=tuple(cases.budgets.split(",")),
        lengths=parse_lengths(cases.lengths),
        new_tokens=cases.new_tokens,
        repeats=cases.repeats,
        batch=cases.batch,
        backends=tuple(cases.backends.split(",")),
        steps=tuple(cases.step.split(",")),
        full=full,
        options=tuning.chosen(),
        decoding=decoding.chosen(),
        **others,
    )


def _side_request(asked: SideOptions, seed: int, random_weights: bool) -> ScoreBenchRequest:
    """What to compare; random weights answer nothing right, and never end by themselves."""
    from headprof.bench.score import ScoreBenchRequest

    return ScoreBenchRequest(
        lengths=parse_lengths(asked.lengths),
        probes=asked.probes,
        pack=asked.pack,
        include_failed=asked.include_failed or random_weights,
        seed=seed,
        sides=tuple(asked.sides.split(",")),
        top=asked.top,
        stop_after_answer=asked.stop_after_answer or random_weights,
    )


def _check_output(output: Path | None, model: str | None, loading: LoadOptions, profile: Path | None = None) -> None:
    """Find out before any work that the figures cannot be written, or would replace what is read."""
    from headprof.utils.files import check_writable

    if output is not None:
        check_outputs({output: None}, chain(profile_input(model, profile), model_inputs(model, loading)))
        check_writable(output)


def _keep(figures: dict[str, Any], output: Path | None, json: bool) -> None:
    """Write all figures to a file, to stdout, to both or to neither."""
    from headprof.utils.files import write_json

    if output is not None:
        write_json(output, figures)
    if json:
        terminal.json(figures)


def _show_generation(result: BenchResult, largest: list[LargestBatch]) -> None:
    environment = ", ".join(f"{name} {value}" for name, value in result.environment.items())
    terminal.remark(f"{environment}; memory {result.bandwidth / 1e9:.1f} GB/s")
    terminal.result_table(*tables.decoding(result))
    for remark in tables.decoding_remarks(result):
        terminal.remark(remark)
    if largest:
        terminal.result_table(*tables.largest_batches(largest))


def _show_scoring(result: ScoreBenchResult) -> None:
    terminal.remark(", ".join(f"{name} {value}" for name, value in result.environment.items()))
    terminal.result_table(*tables.scoring(result))
    if result.agreements:
        terminal.result_table(*tables.agreement(result))
    for remark in tables.memory_remarks(result):
        terminal.remark(remark)
