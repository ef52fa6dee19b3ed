"""The cases that a request makes, and the prompts they all decode."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from headprof.bench.generate.full_cache import COMPILED, FULL, default_full_steps, new_full_cache
from headprof.bench.generate.request import BenchRequest
from headprof.bench.measure import device_of
from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.decode_steps import check_step
from headprof.compression.methods.table import deal_options, find_method
from headprof.compression.plan import CompressionPlan
from headprof.compression.session import attending_ragged, make_plan
from headprof.errors import UsageError
from headprof.models.shape import HeadShape
from headprof.profile.head_profile import HeadProfile


@dataclass(frozen=True)
class Case:
    """One way to decode prompts of one length.

    Attributes:
        method, budget, backend, length, step: as in `Measurement`.
        plan: what the cache is compressed by; `None` for a full cache.
    """

    method: str
    budget: str
    backend: str
    length: int
    plan: CompressionPlan | None = None
    step: str = "auto"

    @property
    def label(self) -> str:
        way = f"{self.method}, budget {self.budget}, {self.backend}" if self.plan else "full cache"
        how = "" if self.plan and self.step == "auto" else f", {self.step}"
        return f"{way}{how}, {self.length} tokens"

    @property
    def compiles_full(self) -> bool:
        """Whether Transformers compiles its steps, over a static cache."""
        return self.plan is None and self.step == COMPILED

    def new_cache(self, model: Any, new_tokens: int) -> Cache:
        """A cache for the prompt and so many tokens more."""
        if self.plan is None:
            return new_full_cache(model, self.step, self.length + new_tokens)
        return HeadCache(self.plan)

    def attending(self, model: Any, prefill_chunk: int | None) -> AbstractContextManager[None]:
        if self.plan is None:
            return nullcontext()
        return attending_ragged(model, backend=self.backend, prefill_chunk=prefill_chunk, step=self.step)


def all_cases(model: Any, max_positions: int, profile: HeadProfile | None, request: BenchRequest) -> list[Case]:
    """All cases, grouped by length, the full caches first, with budgets that are known to suffice.

    Args: as for `run_bench`, which raises what this raises.
    """
    request.check()
    for step in request.steps:
        check_step(step, device_of(model))
    if max(request.lengths) + request.new_tokens > max_positions:
        raise UsageError(
            f"Prompts of {max(request.lengths)} tokens and {request.new_tokens} new ones exceed the {max_positions} "
            "that the model can read: lower --lengths or --new-tokens."
        )
    options = deal_options(request.methods, request.options)
    common = {"surrogate": request.surrogate, "tokenizer": request.tokenizer, **request.decoding}
    plans = [
        (name, budget, make_plan(model, profile, method=name, budget=budget, **options[name], **common))
        for name in request.methods
        if not find_method(name).keeps_everything
        for budget in request.budgets
    ]
    full_steps = default_full_steps(device_of(model)) if request.full is None else request.full
    cases = []
    for length in request.lengths:
        cases += [Case(FULL, "", model.config._attn_implementation, length, step=step) for step in full_steps]
        for name, budget, plan in plans:
            plan.check(length)
            cases += [
                Case(name, budget, backend, length, plan, step)
                for backend in request.backends
                for step in request.steps
            ]
    return cases


def random_ids(model: Any, batch: int, length: int, seed: int) -> torch.Tensor:
    """Token ids `[batch, length]` on the model's device."""
    vocab_size = HeadShape.from_config(model.config).vocab_size
    ids = torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
    return ids.to(device_of(model))
