"""A first run, whose time is not taken: what is done once in a process should not count as reading or writing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from headprof.compression.generation import generate_text
from headprof.compression.methods.given_budget import Budget
from headprof.compression.plan import BUFFER, CompressionPlan
from headprof.models.loading import LoadedModel

_PROMPT, _BUDGET, _NEW = 32, 16, 3


def warm_up(
    loaded: LoadedModel,
    ids: torch.Tensor,
    plans: Sequence[CompressionPlan | None],
    *,
    backend: str = "auto",
    prefill_chunk: int | None = None,
    step: str = "auto",
) -> None:
    """Continue the end of a prompt, int64 `[1, T]`, by a few tokens under each plan; `None` is the full cache."""
    for plan in plans:
        reading: dict[str, Any] = {"backend": backend, "prefill_chunk": prefill_chunk, "step": step}
        generate_text(loaded, ids[:, -_PROMPT:], _small(plan), max_new_tokens=_NEW, **reading)


def _small(plan: CompressionPlan | None) -> CompressionPlan | None:
    """A plan that compresses so short a prompt too, whatever share of it or number of bytes it was made for."""
    if plan is None:
        return None
    budget = Budget.parse(str(max(_BUDGET, plan.method.always_kept + 1)))
    return replace(plan, budget=budget, decode_budget=None, buffer=BUFFER, _known=[])
