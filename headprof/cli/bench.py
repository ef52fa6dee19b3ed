"""`headprof bench`: speed and memory, side by side in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from headprof.cli.context import decoding_options, guarded, lengths_of, load, load_profile, method_options, terminal
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
    PoolFactor,
    Pooling,
    PrefillChunk,
    Profile,
    Seed,
    Settings,
    Trust,
    Window,
)
from headprof.cli.tables import all as tables

bench = typer.Typer(no_args_is_help=True, help="Speed and memory, side by side in one run.")


@bench.command(name="generate")
@guarded
def bench_generate(
    model: Model = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Random weights of a published shape, instead of --model: llama-3-8b, qwen3-8b, ..."),
    ] = None,
    profile: Profile = None,
    methods: Annotated[
        str, typer.Option(help="Methods, with commas; the full cache is run beside them.")
    ] = "headkv-r2",
    budgets: Annotated[str, typer.Option(help="Budgets, with commas.")] = "64",
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, such as 4k,8000.")] = "1k,4k",
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode after the prompt.")] = 32,
    repeats: Annotated[int, typer.Option(help="Timed runs of each case, of which the median counts.")] = 3,
    batch: Annotated[int, typer.Option(help="Sequences decoded together.")] = 1,
    backends: Annotated[str, typer.Option(help="Attentions over the compressed cache, with commas.")] = "auto",
    largest_batch: Annotated[
        bool, typer.Option("--largest-batch", help="Also find how many sequences fit (CUDA).")
    ] = False,
    without_full: Annotated[bool, typer.Option("--without-full", help="Leave the full cache out.")] = False,
    prefill_chunk: PrefillChunk = None,
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for all figures.")] = None,
    json: JsonFlag = False,
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
    """Time decoding with compressed caches beside Transformers' own full cache.

    The floor is what reading weights and cache at the memory's measured bandwidth would allow.

    [dim]headprof bench generate --budgets 64,128 --lengths 4k,8000
    headprof bench generate --shape llama-3-8b --lengths 32k --backends triton,varlen --largest-batch[/]
    """
    from dataclasses import asdict

    from headprof.bench.generate import BenchRequest, largest_batches, run_bench

    request = BenchRequest(
        methods=tuple(methods.split(",")),
        budgets=tuple(budgets.split(",")),
        lengths=lengths_of(lengths),
        new_tokens=new_tokens,
        repeats=repeats,
        batch=batch,
        backends=tuple(backends.split(",")),
        prefill_chunk=prefill_chunk,
        full=not without_full,
        seed=seed,
        options=method_options(window, keep_last, kernel, pooling, pool_factor, settings),
        decoding=decoding_options(decode_budget, buffer),
    )
    request.check()
    head_profile: Any
    if shape is not None:
        from headprof.models.random_weights import load_random
        from headprof.profile.random_scores import random_profile

        loaded = load_random(shape, device=device, dtype=dtype, attn=attn)
        head_profile = random_profile(loaded.shape, seed)
    else:
        loaded = load(model, device, dtype, attn, trust_remote_code)
        head_profile = load_profile(loaded, profile) if request.needs_profile else None
    with terminal.progress() as report:
        result = run_bench(loaded.model, loaded.max_positions, head_profile, request, report)
        found = (
            largest_batches(loaded.model, loaded.max_positions, head_profile, request, report) if largest_batch else []
        )
    figures = asdict(result) | {"model": loaded.name, "largest_batches": [asdict(each) for each in found]}
    if output is not None:
        from headprof.utils.files import write_json

        write_json(output, figures)
    if json:
        terminal.json(figures)
        return
    environment = ", ".join(f"{name} {value}" for name, value in result.environment.items())
    terminal.remark(f"{environment}; memory {result.bandwidth / 1e9:.1f} GB/s")
    terminal.result_table(*tables.benchmark(result))
    if found:
        terminal.result_table(*tables.largest_batches(found))


@bench.command(name="score")
@guarded
def bench_score(
    model: Model = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Random weights of a published shape, instead of --model; implies --include-failed and "
            "--stop-after-answer."
        ),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens, such as 1k,4k.")] = "1k",
    probes: Annotated[int, typer.Option(help="Probes at each length.")] = 48,
    pack: Annotated[
        int | None, typer.Option(help="Probes that share a context on our side. Default: from the length, 12 at 1k.")
    ] = None,
    sides: Annotated[
        str, typer.Option(help="What is run, with commas; also unpacked: ours with one needle a context.")
    ] = "packed,stepwise-fast,stepwise-attentions",
    stop_after_answer: Annotated[
        bool, typer.Option("--stop-after-answer", help="End the papers' decoding where the right answer would end.")
    ] = False,
    include_failed: Annotated[
        bool, typer.Option("--include-failed", help="Compare scores over all probes too, not only those answered.")
    ] = False,
    top: Annotated[int, typer.Option(help="Best heads that are compared.")] = 10,
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for all figures.")] = None,
    json: JsonFlag = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attn: Attn = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Time scoring beside the papers' procedure, on the same probes.

    The papers hide one needle in a context and decode its answer token by token with every layer's attention: after a
    fast prefill, or after one that returns all attention too.

    [dim]headprof bench score --lengths 1k,2k
    headprof bench score --shape llama-3-8b --lengths 8k,32k --sides packed,stepwise-fast[/]
    """
    from dataclasses import asdict

    from headprof.bench.score import ScoreBenchRequest, run_score_bench

    request = ScoreBenchRequest(
        lengths=lengths_of(lengths),
        probes=probes,
        pack=pack,
        include_failed=include_failed or shape is not None,
        seed=seed,
        sides=tuple(sides.split(",")),
        top=top,
        stop_after_answer=stop_after_answer or shape is not None,
    )
    request.check()
    if output is not None:
        from headprof.utils.files import check_writable

        check_writable(output)
    if shape is not None:
        from headprof.models.random_weights import load_random

        loaded = load_random(shape, device=device, dtype=dtype, attn=attn, max_positions=max(request.lengths))
    else:
        loaded = load(model, device, dtype, attn, trust_remote_code)
    with terminal.progress() as report:
        result = run_score_bench(loaded, request, report)
    figures = {"model": loaded.name, "request": asdict(request)} | asdict(result)
    if output is not None:
        from headprof.utils.files import write_json

        write_json(output, figures)
    if json:
        terminal.json(figures)
        return
    terminal.remark(", ".join(f"{name} {value}" for name, value in result.environment.items()))
    terminal.result_table(*tables.score_bench(result))
    if result.agreements:
        terminal.result_table(*tables.score_agreement(result))
    for remark in tables.memory_remarks(result):
        terminal.remark(remark)
