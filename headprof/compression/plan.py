"""A method with its budget, made ready for one model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from headprof.compression.budget import Budget
from headprof.compression.methods import Method
from headprof.errors import UsageError
from headprof.shape import HeadShape


@dataclass
class CompressionPlan:
    """A method with its budget, for a model of a certain shape.

    Attributes:
        method: what to keep, how much per head, and what becomes of the rest.
        budget: average tokens per KV head.
        shape: the model's.
        scores: importance of each KV head, float `[L, K]`; all equal for methods without a profile.
        bytes_per_element: of a cached number, for budgets in bytes.
        name: the method's, for files and messages.
        profile_digest: of the head profile that the scores came from; empty without one.
    """

    method: Method
    budget: Budget
    shape: HeadShape
    scores: torch.Tensor
    bytes_per_element: int
    name: str = ""
    profile_digest: str = ""
    _allocations: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)

    def for_observers(self, count: int) -> CompressionPlan:
        """This plan for a prompt whose last `count` tokens only judge (`PromptCache.expect_observers`)."""
        return replace(self, method=self.method.for_observers(count)) if count else self

    def allocation(self, prompt_length: int) -> torch.Tensor:
        """Tokens per KV head for a prompt of this many tokens, int64 `[L, K]`.

        Raises:
            UsageError: the budget is below what every head keeps.
        """
        if prompt_length not in self._allocations:
            bytes_per_token = self.shape.cache_bytes_per_token(self.bytes_per_element)
            budget = self.budget.tokens(prompt_length, bytes_per_token)
            if budget < 1:
                raise UsageError(
                    f"A budget of {int(self.budget.amount)} bytes is less than one token per head "
                    f"({bytes_per_token} bytes): raise --budget."
                )
            if self.method.importance is None:
                budget = prompt_length
            self._allocations[prompt_length] = self.method.budget.allocate(
                self.scores,
                budget=budget,
                context_length=prompt_length,
                always_kept=self.method.always_kept,
            )
        return self._allocations[prompt_length]
