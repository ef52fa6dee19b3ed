"""The cases that a request makes, and the prompts they all decode."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from headprof.bench.generate.request import BenchRequest
from headprof.bench.measure import device_of
from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.methods.table import deal_options, find_method
from headprof.compression.plan import CompressionPlan
from headprof.compression.session import attending_ragged, make_plan
from headprof.errors import UsageError
from headprof.models.shape import HeadShape
from headprof.profile.head_profile import HeadProfile


@dataclass(frozen=True)
class Case:
    """One way to decode prompts of one length."""

    method: str
    budget: str
    backend: str
    length: int
    plan: CompressionPlan | None = None

    @property
    def label(self) -> str:
        way = f"{self.method}, budget {self.budget}, {self.backend}" if self.plan else "full cache"
        return f"{way}, {self.length} tokens"

    def new_cache(self, model: Any) -> Cache:
        return DynamicCache(config=model.config) if self.plan is None else HeadCache(self.plan)

    def attending(self, model: Any, prefill_chunk: int | None) -> AbstractContextManager[None]:
        if self.plan is None:
            return nullcontext()
        return attending_ragged(model, backend=self.backend, prefill_chunk=prefill_chunk)


def all_cases(model: Any, max_positions: int, profile: HeadProfile | None, request: BenchRequest) -> list[Case]:
    """All cases, grouped by length, the full cache first, with budgets that are known to suffice.

    Args: as for `run_bench`, which raises what this raises.
    """
    request.check()
    if max(request.lengths) + request.new_tokens > max_positions:
        raise UsageError(
            f"Prompts of {max(request.lengths)} tokens and {request.new_tokens} new ones exceed the {max_positions} "
            "that the model can read: lower --lengths or --new-tokens."
        )
    options = deal_options(request.methods, request.options)
    plans = [
        (name, budget, make_plan(model, profile, method=name, budget=budget, **options[name], **request.decoding))
        for name in request.methods
        if not find_method(name).keeps_everything
        for budget in request.budgets
    ]
    cases = []
    for length in request.lengths:
        if request.full:
            cases.append(Case("full", "", model.config._attn_implementation, length))
        for name, budget, plan in plans:
            plan.check(length)
            cases += [Case(name, budget, backend, length, plan) for backend in request.backends]
    return cases


def random_ids(model: Any, batch: int, length: int, seed: int) -> torch.Tensor:
    """Token ids `[batch, length]` on the model's device."""
    vocab_size = HeadShape.from_config(model.config).vocab_size
    ids = torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
    return ids.to(device_of(model))
