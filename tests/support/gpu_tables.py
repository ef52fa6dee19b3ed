"""What `gpu_report.py` found, as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Table = list[list[str]]


def markdown(found: dict[str, Any]) -> str:
    """All that was found, as tables."""
    environment = found["environment"]
    lines = [f"# {environment['device']}", "", ", ".join(f"{name} {value}" for name, value in environment.items()), ""]
    for name, part in found["parts"].items():
        lines += [f"## {name} ({part.get('seconds', 0):.0f} s)", ""]
        if part.get("failed"):
            lines += [f"Not complete: {part['failed']}", ""]
        for table in TABLES[name](part, environment["device"]):
            lines += [*_rows(table), ""]
    return "\n".join(lines)


def _rows(table: Table) -> list[str]:
    head, *rows = table
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def _shown(value: float | None, style: str, factor: float = 1.0) -> str:
    return "-" if value is None else f"{value * factor:{style}}"


def _decoding(part: dict[str, Any], card: str) -> Iterator[Table]:
    measurements = part.get("measurements", [])
    if not measurements:
        return
    head = ["card", "prompt", "cache", "step", "a step, ms", "floor, ms", "times floor", "times the better full cache"]
    head += ["prefill, s", "times the full prefill", "compressing, of prefill", "cache, GB", "peak, GB"]
    rows = [
        [
            card,
            str(each["length"]),
            f"{each['method']} {each['budget']}".strip(),
            each["failed"] or each["step"],
            _shown(each["step_seconds"], ".2f", 1e3),
            _shown(each["floor_seconds"], ".2f", 1e3),
            _shown(each["times_floor"], ".2f"),
            _shown(each["decode_ratio"], ".2f"),
            _shown(each["prefill_seconds"], ".2f"),
            _shown(each["prefill_ratio"], ".3f"),
            _shown(each["overhead_share"], ".1%"),
            _shown(each["cache_bytes"], ".3f", 1e-9),
            _shown(each["peak_bytes"], ".2f", 1e-9),
        ]
        for each in measurements
    ]
    if all(each.get("step_seconds") is None for each in measurements):
        head, rows = head[:3] + head[8:], [row[:3] + row[8:] for row in rows]
    yield [head, *rows]
    yield [["card", "bandwidth, GB/s"], [card, _shown(part["bandwidth"], ".0f", 1e-9)]]
    if alone := part.get("forward_alone"):
        rows = [
            [card, str(each["length"]), f"{each['method']} {each['budget']}", _shown(each["step_seconds"], ".2f", 1e3)]
            for each in alone
        ]
        yield [["card", "prompt", "cache", "a forward pass alone, without generate, ms"], *rows]


def _largest(part: dict[str, Any], card: str) -> Iterator[Table]:
    batches, products = part.get("batches", []), part.get("products_seconds")
    if not batches:
        return
    head = ["card", "prompt", "cache", "step", "largest batch", "tokens/s", "times the better full cache"]
    rows = []
    for each in batches:
        step = each["batch"] / each["decode_rate"] if each["decode_rate"] else None
        ours = products is not None and step is not None and each is batches[0]
        rows.append(
            [
                card,
                str(each["length"]),
                f"{each['method']} {each['budget']}".strip(),
                each["step"],
                str(each["batch"]),
                _shown(each["decode_rate"], ".0f"),
                _shown(each["ratio"], ".2f"),
                _shown(step, ".1f", 1e3),
                _shown(products / step, ".1%") if ours else "-",
            ]
        )
    yield [[*head, "a step, ms", "of it the matrix products alone"], *rows]


def _parts_alone(part: dict[str, Any], card: str) -> Iterator[Table]:
    times = part.get("times", [])
    if times:
        yield [["card", *times[0]], *([card, *map(_cell, each.values())] for each in times)]


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _tested(part: dict[str, Any], card: str) -> Iterator[Table]:
    if counts := part.get("counts"):
        yield [["card", *counts], [card, *map(str, counts.values())]]
    if part.get("troubles"):
        yield [["what failed"], *([trouble.replace("|", "/")] for trouble in part["troubles"])]


TABLES: dict[str, Callable[[dict[str, Any], str], Iterator[Table]]] = {
    "steps": _decoding,
    "prefill": _decoding,
    "attention": _parts_alone,
    "batch": _largest,
    "layer": _parts_alone,
    "tests": _tested,
}
