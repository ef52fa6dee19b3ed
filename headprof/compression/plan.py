"""A method with its budget, made ready for one model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from headprof.compression.methods.allocation import headkv_allocation
from headprof.compression.methods.given_budget import Budget
from headprof.compression.methods.method import Method
from headprof.compression.protected import ProtectedTokens
from headprof.errors import UsageError
from headprof.models.shape import HeadShape
from headprof.models.tensor_parallel import WHOLE, HeadShard
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
        scores: importance of each KV head, float `[L, K]`; all equal for methods without a profile. For budgets that
            were learned `[S, L, K]` (see `LearnedBudget`), for those by curves `[2, N, L, K]` (see `CurveBudget`).
        bytes_per_element: of a cached number, for budgets in bytes.
        name: the method's, for files and messages.
        profile_digest: of the head profile that the scores came from; empty without one.
        decode_budget: average rows per KV head while generating; `None` for the prompt's budget, or for what has been
            kept of the prompt where its content decided on that (`follows_content`). A share is one of all tokens seen
            so far, so that memory grows with them; tokens and bytes hold it constant.
        buffer: new tokens that every head takes beyond its budget before it is compressed again; `None` to keep
            all that come after the prompt.
        windows: tokens that each layer can see at most, `L` numbers, `None` for all; empty if every layer sees all.
        shares: how the heads share the budget while generating, float `[L, K]`, or `[B, L, K]` for several sequences,
            where what a prompt holds has decided how many tokens each head kept of it; `None` to share it as the
            method's budget policy says.
        unobserved: of a plan for observers, the method that judges what comes after them.
        shard: which of the heads this process has; all else that is said here of heads is of all of them.
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
    shares: torch.Tensor | None = None
    unobserved: Method | None = None
    shard: HeadShard = WHOLE
    _known: list[_Allocation] = field(default_factory=list, repr=False)

    @property
    def surrogate(self) -> Surrogate | None:
        """By which the method judges rows, if it does."""
        return getattr(self.method.importance, "surrogate", None)

    def __post_init__(self) -> None:
        if self.buffer is not None and self.buffer < 1:
            raise UsageError(f"A buffer of {self.buffer} tokens takes none: give at least 1, or None for no bound.")
        self.method.check_budget(self.budget, self.name)
        held = self.method.representation
        if fault := held.fault(self.shape.head_dim):
            raise UsageError(f"This model's rows cannot be held as {held.name!r}: {fault}; choose representation=full.")
        if self.decode_budget is not None and self.decode_budget.above is not None:
            raise UsageError("A threshold is for what is read: give --decode-budget in tokens, as a share or in bytes.")

    def for_observers(self, count: int) -> CompressionPlan:
        """This plan for a prompt whose last `count` tokens only observe (`PromptCache.expect_observers`)."""
        if not count:
            return self
        return replace(self, method=self.method.for_observers(count), unobserved=self.method, _known=[])

    def after_observers(self) -> CompressionPlan:
        """This plan for what comes after such a prompt: who observed that does not judge what is read later."""
        return self if self.unobserved is None else replace(self, method=self.unobserved, unobserved=None)

    @property
    def compresses_while_generating(self) -> bool:
        """Whether what comes after the prompt is compressed too."""
        return self.buffer is not None and not self.method.keeps_everything

    def check(self, prompt_length: int, protected: ProtectedTokens | None = None) -> None:
        """
        Args:
            prompt_length: tokens of the prompt.
            protected: those that every head keeps.

        Raises:
            UsageError: the budget for a prompt of this many tokens, or that for generating after it, cannot be met.
        """
        self.check_later(prompt_length, protected)
        self.allocation(prompt_length, max(self.protected_of_prompt(protected, prompt_length), default=0))

    def check_later(self, prompt_length: int, protected: ProtectedTokens | None = None) -> None:
        """
        Raises:
            UsageError: the budget for generating after a prompt of this many tokens cannot be met.
        """
        lasting = max(self.protected_later(protected), default=0)
        if lasting:  # when none of them is among the last tokens any more
            prompt_length += self.method.keep_last + 1
        if self.compresses_while_generating:
            self.decode_allocation(prompt_length, lasting)

    def protected_of_prompt(self, protected: ProtectedTokens | None, prompt_length: int) -> list[int]:
        """Of each sequence, how many tokens are kept beside the first and the last ones, which are kept in any case.

        One number, if that is the same in all sequences.
        """
        return [] if protected is None else protected.count(self.method.sinks, prompt_length - self.method.keep_last)

    def protected_later(self, protected: ProtectedTokens | None) -> list[int]:
        """As `protected_of_prompt`, when the last tokens are later ones."""
        return [] if protected is None else protected.count(self.method.sinks)

    def allocation(self, prompt_length: int, protected: int = 0) -> torch.Tensor:
        """Tokens per KV head for a prompt of this many tokens, int64 `[L, K]`.

        No head gets more than its layer can see. What that leaves is not handed on: the other layers' heads hold what
        they would in a model without windows.

        Args:
            prompt_length: tokens of the prompt.
            protected: tokens that every head keeps beside those that its method does.

        Raises:
            UsageError: the budget is below what every head keeps.
        """
        return self._allocation(self.budget, prompt_length, protected)

    @property
    def follows_content(self) -> bool:
        """Whether what a prompt holds decides how much of it is kept, and the budget is but the most that may be."""
        return self.budget.above is not None or self.method.budget.follows_content

    def loses(self, prompt_length: int) -> bool:
        """Whether some head cannot keep all that its layer can see of a prompt of this many tokens, just as it is."""
        return not self.method.representation.is_full or self.follows_content or self._is_short(prompt_length)

    def _is_short(self, prompt_length: int) -> bool:
        """Whether the budget alone, without a threshold, is too small for a prompt of this many tokens."""
        return bool((self.allocation(prompt_length) < self._visible(prompt_length)).any())

    def ranks_together(self, prompt_length: int) -> bool:
        """Whether one ranking over all layers decides what is kept of a prompt of this many tokens.

        Raises:
            UsageError: the budget is below what every head keeps.
        """
        return self.method.budget.ranks_together and self._is_short(prompt_length)

    def total(self, prompt_length: int) -> int:
        """Tokens that all heads of all layers keep together of a prompt of this many, if their layers can see so many.

        Raises:
            UsageError: the budget is less than one token per head.
        """
        heads = self.shape.num_layers * self.shape.num_kv_heads
        return min(self._tokens(self.budget, prompt_length), prompt_length) * heads

    def sharing_by(self, counts: torch.Tensor) -> CompressionPlan:
        """This plan for what comes after prompts of which the heads have kept so many tokens, int64 `[B, L, K]`.

        While text is generated, they share the budget as they have shared these. Where the prompt's content decided how
        many there are, and no budget is given for generating, each holds as many as it has kept.
        """
        shares = (counts - self.method.always_kept).clamp(min=0).float()
        return replace(self, shares=shares[0] if len(shares) == 1 else shares, _known=[])

    def goes_by_prompt(self, prompt_length: int) -> bool:
        """Whether what heads keep of a prompt of this many tokens says what they hold after it (`sharing_by`)."""
        if self.follows_content:
            return True
        return self.shares is None and self.method.budget.goes_by_share and self._is_short(prompt_length)

    def of_sequences(self, indices: torch.Tensor) -> CompressionPlan:
        """This plan for some sequences of a batch, in this order; one may come more than once."""
        if self.shares is None or self.shares.ndim == 2:
            return self
        return replace(self, shares=self.shares[indices.cpu() % len(self.shares)], _known=[])

    def decode_allocation(self, seen: int, protected: int = 0) -> torch.Tensor:
        """Rows that each KV head is compressed to when the sequences have this many tokens.

        Args:
            seen: tokens so far.
            protected: tokens that every head keeps beside those that its method does.

        Returns:
            int64 `[L, K]`, alike for all sequences, or `[B, L, K]`.

        Raises:
            UsageError: the budget is below what every head keeps.
        """
        if self.follows_content and self.shares is not None and self.decode_budget is None:
            least = self.method.always_kept + protected
            return (self.shares.round().long() + self.method.always_kept).clamp(min=least).minimum(self._visible(seen))
        return self._allocation(self.decode_budget or self.budget, seen, protected, self.shares)

    def _tokens(self, given: Budget, length: int) -> int:
        bytes_per_token = self.shape.cache_bytes_per_token(self.bytes_per_element)
        budget = length if self.method.keeps_everything else given.tokens(length, bytes_per_token)
        num_bytes = given.num_bytes(length, bytes_per_token)
        if num_bytes is not None and not self.method.representation.is_full:
            budget = self._rows_in(num_bytes)
        if budget < 1:
            raise UsageError(
                f"A budget of {int(num_bytes or 0)} bytes is less than one token per head "
                f"({bytes_per_token} bytes): raise --budget."
            )
        return budget

    def _rows_in(self, num_bytes: float) -> int:
        """Rows per head that fit in so many bytes for all heads, as the method holds them."""
        shape = self.shape
        num_bytes /= shape.num_layers * shape.num_kv_heads
        size = shape.head_dim, self.bytes_per_element, shape.num_kv_heads
        return self.method.representation.rows_in(num_bytes, self.method.always_kept, *size)

    def _allotted(self, budget: int, length: int, always_kept: int, shares: torch.Tensor | None) -> torch.Tensor:
        sizes = {"budget": budget, "context_length": length, "always_kept": always_kept}
        if shares is None:
            return self.method.budget.allocate(self.scores, **sizes)
        each = [headkv_allocation(own, **sizes, pool_factor=1.0) for own in shares.view(-1, *shares.shape[-2:])]
        return torch.stack(each).view(shares.shape)

    def _allocation(
        self, given: Budget, length: int, protected: int = 0, shares: torch.Tensor | None = None
    ) -> torch.Tensor:
        budget = self._tokens(given, length)
        for known in self._known:
            exactly = shares is None and self.method.budget.goes_by_share
            same = known.serves(budget, length, protected, shares is not None)
            if same and (known.length == length or not exactly):
                return known.tokens
        always_kept = self.method.always_kept + protected
        least = min(always_kept, length)
        if protected and budget < least:
            raise UsageError(
                f"A budget of {budget} tokens is below the {least} that every head keeps, since {protected} are "
                f"protected: raise {'--budget' if given is self.budget else '--decode-budget'} to {least} or more, or "
                "protect less."
            )
        tokens = self._allotted(budget, length, always_kept, shares)
        if protected and int(tokens.min()) < least:
            raise UsageError(
                f"The method {self.name!r} leaves a head fewer tokens than the {always_kept} that every head keeps: "
                "protect nothing, or choose another method."
            )
        visible = tokens.minimum(self._visible(length))
        known = _Allocation(budget, length, int(tokens.max()), visible, protected, shares is not None)
        self._known = [known, *self._known[:15]]
        return known.tokens

    def _visible(self, length: int) -> torch.Tensor:
        """Tokens that each head can see of so many, int64 `[L, K]`."""
        windows = self.windows or (None,) * self.shape.num_layers
        seen = torch.tensor([length if window is None else min(window, length) for window in windows])
        return seen[:, None].expand(-1, self.shape.num_kv_heads)


@dataclass(frozen=True)
class _Allocation:
    """Tokens per head, `[L, K]` or `[B, L, K]`, for a budget and a length.

    `most` is what one head got at most before windows counted, and `shared` whether the plan's shares allotted them.
    """

    budget: int
    length: int
    most: int
    tokens: torch.Tensor
    protected: int = 0
    shared: bool = False

    def serves(self, budget: int, length: int, protected: int = 0, shared: bool = False) -> bool:
        """A sequence that has as much as any head wants gets the same when it is longer."""
        if (self.budget, self.protected, self.shared) != (budget, protected, shared):
            return False
        return self.length == length or self.most < self.length <= length
