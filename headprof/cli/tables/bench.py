"""The tables of `headprof bench`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from headprof.cli.tables.cells import Rows, number, size
from headprof.utils.units import human_bytes

if TYPE_CHECKING:
    from headprof.bench.generate import BenchResult, LargestBatch
    from headprof.bench.score import ScoreBenchResult, SideResult


def decoding(result: BenchResult) -> tuple[list[str], Rows]:
    """Every case beside the better full cache of the same length."""
    from headprof.bench.generate import comparison

    rows = []
    for compared in comparison(result):
        case = compared.measurement
        rows.append(
            [
                f"{case.method} {case.budget}".strip(),
                case.backend,
                case.step,
                str(case.length),
                number(case.prefill_seconds, ".2f", " s") if not case.failed else _in_short(case.failed),
                number(case.overhead_share, ".1%"),
                _milliseconds(case.step_seconds),
                _milliseconds(case.floor_seconds),
                number(case.times_floor, ".2f", "x"),
                number(case.decode_rate, ".1f"),
                number(compared.decode_ratio, ".2f", "x"),
                size(case.cache_bytes),
                number(compared.cache_ratio, ".1%"),
                size(case.largest_cache_bytes),
                number(case.steadiness, ".2f"),
                size(case.peak_bytes),
            ]
        )
    columns = ["cache", "attention", "step", "prompt", "prefill", "compressing", "a step", "floor", "of floor"]
    columns += ["tokens/s", "of full", "cache bytes", "of full ", "at most", "steadiness", "peak"]
    return columns, rows


def decoding_remarks(result: BenchResult) -> list[str]:
    """Why cases could not be run, where a cell of the table is too narrow to say it."""
    said = [case.failed for case in result.measurements if case.failed]
    return list(dict.fromkeys(why for why in said if _in_short(why) != why))


def _in_short(failed: str) -> str:
    return failed if len(failed) <= _WIDEST else "refused"


_WIDEST = 20
"""Characters of a reason that stands in a cell."""


def _milliseconds(seconds: float | None) -> str:
    return number(None if seconds is None else 1e3 * seconds, ".2f", " ms")


def largest_batches(found: Sequence[LargestBatch]) -> tuple[list[str], Rows]:
    """How many sequences fit, and how fast they decode together, beside the better full cache."""
    from headprof.bench.generate import beside_full

    rows = [
        [
            f"{each.method} {each.budget}".strip(),
            each.backend,
            each.step,
            str(each.length),
            str(each.batch),
            number(each.decode_rate, ".0f"),
            number(ratio, ".2f", "x"),
            size(each.cache_bytes),
        ]
        for each, ratio in zip(found, beside_full(found), strict=True)
    ]
    return ["cache", "attention", "step", "prompt", "largest batch", "tokens/s", "of full", "cache bytes"], rows


def scoring(result: ScoreBenchResult) -> tuple[list[str], Rows]:
    """Each side at each length: its speed, its memory, and, at the first, what a probe asks of the device."""
    rows = [
        [
            side.side,
            str(side.length),
            str(side.probes),
            number(side.answered, "d"),
            side.failed or number(side.seconds_per_probe, ".3g", " s"),
            number(side.probes_per_minute, ".1f"),
            number(side.packed_speedup, ".1f", "x"),
            _peak(side),
            number(side.operators_per_probe, ".0f"),
            number(side.launches_per_probe, ".0f"),
            number(side.reads_per_probe, ".1f"),
            number(side.busy_share, ".0%"),
        ]
        for side in result.sides
    ]
    columns = ["side", "length", "probes", "right", "a probe", "probes/min", "packed is faster", "peak memory"]
    return [*columns, "operators", "launches", "host reads", "busy"], rows


def agreement(result: ScoreBenchResult) -> tuple[list[str], Rows, str]:
    """How like our scores those of the other sides are."""
    rows = [
        [
            each.side,
            str(each.length),
            each.kind,
            each.over,
            " and ".join(map(str, each.probes)),
            number(each.spearman, ".3f"),
            number(each.overlap, ".0%"),
        ]
        for each in result.agreements
    ]
    columns = ["side", "length", "scores", "over probes", "ours and its", "rank correlation", f"top {result.top}"]
    return columns, rows, "Mean scores of the heads beside ours"


def memory_remarks(result: ScoreBenchResult, limit_bytes: float = 24e9) -> list[str]:
    """How each side's memory grows with the length, where there are lengths enough to tell."""
    from headprof.bench.score import PREFILLS, limit_length, memory_slope

    remarks = []
    for side in dict.fromkeys(each.side for each in result.sides):
        points = result.memory(side)
        line = memory_slope(points)
        if line is None:
            continue
        text = (
            f"{side}: peak memory grows by {human_bytes(line.bytes_per_token)} a token "
            f"(line through {line.lengths} lengths, R2 {line.r_squared:.3f})"
        )
        # Elsewhere what bends is noise.
        limit = limit_length(points, limit_bytes) if PREFILLS.get(side) == "attentions" else None
        if limit is not None:
            text += f"; {human_bytes(limit_bytes)} beside the weights at about {limit} tokens (parabola, extrapolated)"
        remarks.append(f"{text}.")
    return remarks


def _peak(side: SideResult) -> str:
    if side.peak_bytes is None and side.estimated_bytes is not None:
        return f"{human_bytes(side.estimated_bytes)} (estimate)"
    return size(side.peak_bytes)
