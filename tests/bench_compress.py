"""One layer of a prompt compressed by each method: milliseconds, launches on a GPU, and operators of torch.

python tests/bench_compress.py --shape llama-3-8b --lengths 8k,32k --methods headkv-r2,headkv-ems
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

import torch
from bench_parts import print_table
from support.host_reads import device_watched
from support.observations import compress

from headprof.bench.measure import now
from headprof.compression.methods.budget import ProfileBudget
from headprof.compression.methods.method import Method
from headprof.compression.methods.observation import AttentionLayer, Observation
from headprof.compression.methods.table import METHODS
from headprof.compression.rows import HeadCounts, Rows
from headprof.errors import HeadprofError
from headprof.models.published import find_shape
from headprof.models.random_weights import device_and_dtype
from headprof.utils.units import parse_lengths

TIMED = ("headkv-r2", "snapkv", "headkv-ems", "ems", "adakv", "h2o", "tova")


@dataclass(frozen=True)
class CompressTimes:
    """One layer of one sequence.

    Attributes:
        method, length, budget: what is compressed, and to how many tokens per head.
        milliseconds: median of the warm runs, from the first launch to the end of the last.
        host_milliseconds: median until the host has issued all.
        operators: of torch that were issued, views aside; kernels of Triton are not among them.
        launches: kernels that ran on a CUDA device; `None` elsewhere.
        waits: how often the host waited for the device, as far as torch's operators show it.
    """

    method: str
    length: int
    budget: int
    milliseconds: float
    host_milliseconds: float
    operators: int
    launches: int | None
    waits: int


def run_compress_bench(
    shape: str,
    lengths: Sequence[int],
    *,
    methods: Sequence[str] = TIMED,
    budget: int = 128,
    repeats: int = 15,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[CompressTimes]:
    """Compress one layer of random queries, keys and values, warm.

    Raises:
        UsageError: there is no such shape.
    """
    find_shape(shape)
    times = []
    for length in lengths:
        whole = _random_layer(shape, length, torch.device(device), dtype)
        for name in methods:
            method = METHODS[name]
            work = _work(method, whole, min(budget, length))
            taken = [_timed(work, torch.device(device)) for _ in range(repeats + 2)][2:]
            with device_watched() as watched:
                work()
            both = (median(each) for each in zip(*taken, strict=True))
            counts = (len(watched.operators), _launches(work) if device.startswith("cuda") else None)
            times.append(CompressTimes(name, length, budget, *both, *counts, len(watched.waits)))
    return times


def _random_layer(shape: str, length: int, device: torch.device, dtype: torch.dtype) -> Observation:
    """A prompt of one layer, with all its queries."""
    numbers = find_shape(shape)
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, length, numbers[heads], numbers["head_dim"], dtype=dtype, device=device).transpose(1, 2)
        for heads in ("num_attention_heads", "num_key_value_heads", "num_key_value_heads")
    )
    query, key = query.contiguous(), key.contiguous()  # as rotation leaves them, but not the values
    valid = torch.ones(1, length, dtype=torch.bool, device=device)
    layer = AttentionLayer(key.shape[-1] ** -0.5)
    return Observation(query, Rows.of_prompt(key, value), valid, layer, padded=False)


def _work(method: Method, whole: Observation, budget: int) -> Callable[[], object]:
    needed, num_kv_heads = method.importance.queries, whole.keys.shape[1]
    queries = whole.queries if needed is None else whole.queries[:, :, max(0, whole.queries.shape[2] - needed) :]
    policy = method.budget if isinstance(method.budget, ProfileBudget) else ProfileBudget(temperature=0.0)
    scores = torch.linspace(0.1, 1.0, num_kv_heads)[None]
    allotted = policy.allocate(
        scores, budget=budget, context_length=whole.keys.shape[2], always_kept=method.always_kept
    )

    counts = HeadCounts.of(allotted, whole.keys.device)

    def work() -> object:
        return compress(method, replace(whole, queries=queries, shared={}), counts)

    return work


def _timed(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Milliseconds until the device is done, and until the host is."""
    start = now(device)
    if device.type != "cuda":
        work()
        taken = 1e3 * (now(device) - start)
        return taken, taken
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    work()
    last.record()
    host = now(torch.device("cpu")) - start
    last.synchronize()
    return first.elapsed_time(last), 1e3 * host


def _launches(work: Callable[[], object]) -> int:
    """Kernels, copies and fills that ran on a CUDA device."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    kinds = torch.autograd.DeviceType.CUDA
    return sum(event.count for event in profile.key_averages() if event.device_type == kinds)


def main(words: Sequence[str] | None = None) -> None:
    """Time it, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-8b", help="model whose heads are counted")
    parser.add_argument("--lengths", default="8k", help="prompt lengths in tokens, such as 8k,32000")
    parser.add_argument("--methods", default=",".join(TIMED), help="names, with commas between")
    parser.add_argument("--budget", type=int, default=128, help="tokens per KV head")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs, of which the median counts")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(words)
    try:
        device, dtype = device_and_dtype(given.device, given.dtype)
        times = run_compress_bench(
            given.shape,
            parse_lengths(given.lengths),
            methods=given.methods.split(","),
            budget=given.budget,
            repeats=given.repeats,
            device=device,
            dtype=dtype,
        )
    except HeadprofError as error:
        sys.exit(f"Error: {error}")
    if given.json:
        print(json.dumps([asdict(each) for each in times], indent=2))
        return
    rows = [
        [f"{value:.3f}" if isinstance(value, float) else str(value) for value in asdict(each).values()]
        for each in times
    ]
    print_table([[name.replace("_", " ") for name in asdict(times[0])], *rows])


if __name__ == "__main__":
    main()
