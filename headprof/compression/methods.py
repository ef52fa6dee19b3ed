"""The table of methods: each names one importance, one budget policy and one reduction."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from headprof.compression.budget import BudgetPolicy, ProfileBudget, UniformBudget
from headprof.compression.importance import Importance, WindowAttention
from headprof.compression.reduction import Evict, Reduction
from headprof.errors import UsageError


@dataclass(frozen=True)
class Method:
    """One way to compress a cache.

    Attributes:
        importance: which tokens matter; none keeps the whole prompt.
        budget: how many tokens each head keeps.
        reduction: what becomes of the others.
        sinks: first tokens of the prompt that every head keeps.
        keep_last: last tokens of the prompt that every head keeps.
    """

    importance: Importance | None
    budget: BudgetPolicy = field(default_factory=UniformBudget)
    reduction: Reduction = field(default_factory=Evict)
    sinks: int = 1
    keep_last: int = 2

    @property
    def always_kept(self) -> int:
        """Tokens that every head keeps, whatever its budget."""
        return self.sinks + self.keep_last

    def has_option(self, name: str) -> bool:
        """Whether a part of this method has a parameter of this name."""
        return self._holder(name) is not None

    def with_options(self, **options: Any) -> Method:
        """This method with some parameters changed, each on whichever part has it; `None` leaves one as it is.

        Raises:
            UsageError: no part of this method has such a parameter.
        """
        method = self
        for name, value in options.items():
            if value is None:
                continue
            holder = method._holder(name)
            if holder is None:
                raise UsageError(f"This method has no parameter {name!r}: leave --{name.replace('_', '-')} away.")
            if holder == "method":
                method = replace(method, **{name: value})
            else:
                method = replace(method, **{holder: replace(getattr(method, holder), **{name: value})})
        return method

    def _holder(self, name: str) -> str | None:
        """The part that has a parameter: `"method"`, or the name of one of the three axes."""
        parts = {"method": self, "importance": self.importance, "budget": self.budget, "reduction": self.reduction}
        for holder, part in parts.items():
            if is_dataclass(part) and name in {each.name for each in fields(part)}:
                return holder
        return None


METHODS: dict[str, Method] = {
    "full": Method(None),
    "snapkv": Method(WindowAttention(), UniformBudget(), Evict()),
    "headkv": Method(WindowAttention(kernel=9, pooling="mean"), ProfileBudget("retrieval"), Evict()),
    "headkv-r2": Method(WindowAttention(kernel=9, pooling="mean"), ProfileBudget("reasoning"), Evict()),
}


def find_method(name: str) -> Method:
    """The method of this name.

    Raises:
        UsageError: there is none; the message lists those there are.
    """
    if name not in METHODS:
        raise UsageError(f"There is no method {name!r}: choose one of {', '.join(METHODS)}.")
    return METHODS[name]
