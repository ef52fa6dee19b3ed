"""The table of `headprof generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from headprof.cli.tables.cells import Rows
from headprof.utils.units import human_bytes

if TYPE_CHECKING:
    from headprof.compression.generation import Generation


def runs(generations: Mapping[str, Generation], full_bytes: int) -> tuple[list[str], Rows]:
    """What each way of answering took, beside the full cache; a second tier's bytes apart, if there is one."""
    tiers = any(run.second_tier_bytes for run in generations.values())
    rows = [
        [
            name,
            str(run.prompt_tokens),
            str(run.new_tokens),
            human_bytes(run.cache_bytes),
            f"{run.cache_bytes / full_bytes:.1%}",
            *([human_bytes(run.second_tier_bytes) if run.second_tier_bytes else "-"] if tiers else []),
            f"{run.prefill_rate:.0f}",
            f"{run.decode_rate:.1f}" if run.decode_rate else "-",
        ]
        for name, run in generations.items()
    ]
    if len(generations) == 1:
        rows.append(["full (not run)", "", "", human_bytes(full_bytes), "100.0%", *([""] if tiers else []), "", ""])
    second = ["second tier"] if tiers else []
    return (
        ["cache", "prompt tokens", "new tokens", "bytes", "of full", *second, "prefill tokens/s", "decode tokens/s"],
        rows,
    )


def answers_table(name: str, answers: Sequence[Generation], seconds: float) -> tuple[list[str], Rows]:
    """What many answers from copies of one cache took together."""
    new = sum(answer.new_tokens for answer in answers)
    row = [name, str(len(answers)), str(new), f"{seconds:.1f}", f"{new / seconds:.1f}"]
    return ["cache", "answers", "new tokens", "seconds", "tokens/s"], [row]
