"""A method with its budget, made ready for one model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from headprof.compression.methods.budget import Budget
from headprof.compression.methods.table import Method
from headprof.errors import UsageError
from headprof.models.shape import HeadShape
from headprof.profile.surrogate import Surrogate

BUFFER = 64
"""New tokens that every head takes beyond its budget before it is compressed again."""


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
        decode_budget: average rows per KV head while generating; `None` for the prompt's budget. A share is one of all
            tokens seen so far, so that memory grows with them; tokens and bytes hold it constant.
        buffer: new tokens that every head takes beyond its budget before it is compressed again; `None` to keep
            all that come after the prompt.
        windows: tokens that each layer can see at most, `L` numbers, `None` for all; empty if every layer sees all.
    """

    method: Method
    budget: Budget
    shape: HeadShape
    scores: torch.Tensor
    bytes_per_element: int
    name: str = ""
    profile_digest: str = ""
    decode_budget: Budget | None = None
    buffer: int | None = BUFFER
    windows: tuple[int | None, ...] = ()
    _known: list[_Allocation] = field(default_factory=list, repr=False)

    @property
    def surrogate(self) -> Surrogate | None:
        """By which the method judges rows, if it does."""
        return getattr(self.method.importance, "surrogate", None)

    def __post_init__(self) -> None:
        if self.buffer is not None and self.buffer < 1:
            raise UsageError(f"A buffer of {self.buffer} tokens takes none: give --buffer at least 1.")

    def for_observers(self, count: int) -> CompressionPlan:
        """This plan for a prompt whose last `count` tokens only observe (`PromptCache.expect_observers`)."""
        return replace(self, method=self.method.for_observers(count), _known=[]) if count else self

    @property
    def compresses_while_generating(self) -> bool:
        """Whether what comes after the prompt is compressed too."""
        return self.buffer is not None and not self.method.keeps_everything

    def check(self, prompt_length: int) -> None:
        """
        Raises:
            UsageError: the budget for a prompt of this many tokens, or that for generating after it, cannot be met.
        """
        self.allocation(prompt_length)
        if self.compresses_while_generating:
            self.decode_allocation(prompt_length)

    def allocation(self, prompt_length: int) -> torch.Tensor:
        """Tokens per KV head for a prompt of this many tokens, int64 `[L, K]`.

        No head gets more than its layer can see. What that leaves is not handed on: the other layers' heads hold what
        they would in a model without windows.

        Raises:
            UsageError: the budget is below what every head keeps.
        """
        return self._allocation(self.budget, prompt_length)

    def loses(self, prompt_length: int) -> bool:
        """Whether some head cannot keep all that its layer can see of a prompt of this many tokens."""
        return bool((self.allocation(prompt_length) < self._visible(prompt_length)).any())

    def decode_allocation(self, seen: int) -> torch.Tensor:
        """Rows that each KV head is compressed to when the sequence has this many tokens, int64 `[L, K]`.

        Raises:
            UsageError: the budget is below what every head keeps.
        """
        return self._allocation(self.decode_budget or self.budget, seen)

    def _allocation(self, given: Budget, length: int) -> torch.Tensor:
        bytes_per_token = self.shape.cache_bytes_per_token(self.bytes_per_element)
        budget = length if self.method.keeps_everything else given.tokens(length, bytes_per_token)
        if budget < 1:
            raise UsageError(
                f"A budget of {int(given.amount)} bytes is less than one token per head "
                f"({bytes_per_token} bytes): raise --budget."
            )
        for known in self._known:
            if known.serves(budget, length):
                return known.tokens
        tokens = self.method.budget.allocate(
            self.scores, budget=budget, context_length=length, always_kept=self.method.always_kept
        )
        known = _Allocation(budget, length, int(tokens.max()), tokens.minimum(self._visible(length)))
        self._known = [known, *self._known[:15]]
        return known.tokens

    def _visible(self, length: int) -> torch.Tensor:
        """Tokens that each head can see of so many, int64 `[L, K]`."""
        windows = self.windows or (None,) * self.shape.num_layers
        seen = torch.tensor([length if window is None else min(window, length) for window in windows])
        return seen[:, None].expand(-1, self.shape.num_kv_heads)


@dataclass(frozen=True)
class _Allocation:
    """Tokens per head, `[L, K]`, for a budget and a length, and the most that one head got before windows counted."""

    budget: int
    length: int
    most: int
    tokens: torch.Tensor

    def serves(self, budget: int, length: int) -> bool:
        """A sequence that has as much as any head wants gets the same when it is longer."""
        return self.budget == budget and (self.length == length or self.most < self.length <= length)
