"""Parts of compression timed for one layer: merging the heads' rows, the importance of a prompt, attention over what is
kept.

python tests/bench_parts.py merge --shape smollm2-135m --lengths 4k --budgets 64,256
python tests/bench_parts.py importance --shape llama-3-8b --lengths 32k --samples 0,1024 --json
python tests/bench_parts.py attention --layouts 16x1024,64x1024 --sweep --output sweep.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from headprof.bench.attention import LAYOUTS, AttentionTimes, run_attention_bench
from headprof.bench.importance import ImportanceTimes, run_importance_bench
from headprof.bench.merge import MergeTimes, run_merge_bench
from headprof.errors import HeadprofError, UsageError
from headprof.models.random_weights import device_and_dtype
from headprof.utils.units import parse_lengths


def arguments() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--shape", default="llama-3-8b", help="model whose heads are counted")
    shared.add_argument("--lengths", default="4k", help="prompt lengths in tokens, such as 4k,8000")
    shared.add_argument("--repeats", type=int, default=9, help="timed runs of each case, of which the median counts")
    shared.add_argument("--seed", type=int, default=0, help="of everything random")
    shared.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    shared.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    shared.add_argument("--json", action="store_true", help="print JSON")
    shared.add_argument("--output", type=Path, help="write JSON to this file as well")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    merge = parts.add_parser("merge", parents=[shared], help="evict-then-merge, all heads at once or one by one")
    merge.add_argument("--budgets", default="64,256", help="tokens per KV head")
    merge.add_argument("--batch", type=int, default=1, help="sequences")
    importance = parts.add_parser("importance", parents=[shared], help="the global score beside the attention")
    importance.add_argument("--samples", default="0,1024", help="queries that the score asks; 0 for all")
    importance.set_defaults(repeats=5)
    attention = parts.add_parser("attention", parents=[shared], help="reading the rows that heads hold")
    usual = ",".join(f"{sequences}x{rows}" for sequences, rows in LAYOUTS)
    attention.add_argument("--layouts", default=usual, help="sequences x rows of a KV head on average")
    attention.add_argument("--sweep", action="store_true", help="the Triton kernel in many settings")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Time one part, and print a table or JSON."""
    given = arguments().parse_args(words)
    try:
        times = measure(given)
    except HeadprofError as error:
        sys.exit(f"Error: {error}")
    text = json.dumps([asdict(each) | {"ratio": each.ratio} for each in times], indent=2)
    if given.output is not None:
        given.output.write_text(text + "\n")
    if given.json:
        print(text)
    else:
        print_table(rows_of(fastest(times) if getattr(given, "sweep", False) else times))


def measure(given: argparse.Namespace) -> list[MergeTimes] | list[ImportanceTimes] | list[AttentionTimes]:
    """What the command line asks for."""
    device, dtype = device_and_dtype(given.device, given.dtype)
    shared = {"repeats": given.repeats, "seed": given.seed, "device": device, "dtype": dtype}
    if given.part == "attention":
        return run_attention_bench(given.shape, parse_layouts(given.layouts), sweep=given.sweep, **shared)
    lengths = parse_lengths(given.lengths)
    if given.part == "merge":
        return run_merge_bench(given.shape, lengths, parse_lengths(given.budgets), batch=given.batch, **shared)
    return run_importance_bench(given.shape, lengths, parse_lengths(given.samples, least=0), **shared)


def fastest(times: Sequence[AttentionTimes], most: int = 6) -> list[AttentionTimes]:
    """The best settings for each layout, the best first."""
    layouts = dict.fromkeys((each.sequences, each.rows) for each in times)
    ranked = sorted(times, key=lambda each: each.attention)
    return [
        each for layout in layouts for each in [one for one in ranked if (one.sequences, one.rows) == layout][:most]
    ]


def parse_layouts(text: str) -> list[tuple[int, int]]:
    """`16x1024,64x1024` as numbers.

    Raises:
        UsageError: it is not of that form.
    """
    try:
        return [(int(sequences), int(rows)) for sequences, rows in (each.split("x") for each in text.split(","))]
    except ValueError:
        raise UsageError(f"{text!r} are no layouts: write them as 16x1024,64x1024 with --layouts.") from None


def rows_of(times: Sequence[MergeTimes] | Sequence[ImportanceTimes] | Sequence[AttentionTimes]) -> list[list[str]]:
    """A table, its header first; times in milliseconds, or in microseconds below one."""
    head = [*asdict(times[0]), "ratio"]
    return [head, *([*map(_cell, asdict(each).values()), f"{each.ratio:.2f}"] for each in times)]


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.1f} us"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    main()
