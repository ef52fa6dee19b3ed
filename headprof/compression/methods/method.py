"""A method: one of each axis, and what of the prompt is kept in any case."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from math import isfinite
from typing import Any

from torch import Tensor

from headprof.compression.methods.all_heads import spread
from headprof.compression.methods.budget import BudgetPolicy, UniformBudget
from headprof.compression.methods.given_budget import Budget
from headprof.compression.methods.importance import Importance, KeepAll, check_importance
from headprof.compression.methods.recall import Recall
from headprof.compression.methods.recovery_budget import RecoveryBudget
from headprof.compression.methods.reduction import Evict, Reduction, ranking
from headprof.compression.methods.representation import Full, Representation
from headprof.compression.methods.representations import find_representation
from headprof.compression.rows import HeadCounts
from headprof.errors import UsageError
from headprof.models.tensor_parallel import WHOLE, HeadShard

_SIMPLE = (bool, int, float, str)
_LONG = {"scores": "profile_scores"}
"""Parameters with a short name too."""
_REPRESENTATION = "representation"
"""The axis that is a parameter itself, whose value is a name."""


@dataclass(frozen=True)
class Method:
    """One way to compress a cache.

    Attributes:
        importance: which tokens matter; `KeepAll` makes it the full cache.
        budget: how many tokens each head keeps.
        reduction: what becomes of the others.
        sinks: first tokens of the prompt that every head keeps.
        keep_last: last tokens of the prompt that every head keeps.
        representation: how what is kept is held.
        recent_share: share of a head's own tokens that are the last of the prompt (H2O, Zhang et al. 2023); 0 to 1.
        recall: whether what is evicted may be brought back, and how; then a head's budget is of rows that attention
            reads, those brought back among them.
    """

    importance: Importance
    budget: BudgetPolicy = field(default_factory=UniformBudget)
    reduction: Reduction = field(default_factory=Evict)
    sinks: int = 1
    keep_last: int = 2
    recent_share: float = 0.0
    representation: Representation = field(default_factory=Full)
    recall: Recall = field(default_factory=Recall)

    def __post_init__(self) -> None:
        for name in ("sinks", "keep_last"):
            if getattr(self, name) < 0:
                raise UsageError(f"A head cannot keep {getattr(self, name)} tokens: give {name} at least 0.")
        if not 0 <= self.recent_share <= 1:
            raise UsageError(f"A recent_share of {self.recent_share} is no share of a head's tokens: give 0 to 1.")
        check_importance(self.importance)
        if self.budget.adds_up and not self.importance.adds_up:
            raise UsageError(
                f"{type(self.importance).__name__} is no attention that a budget could add up: choose another "
                "importance, or give its class adds_up = True if it is."
            )
        if isinstance(self.budget, RecoveryBudget) and not self.importance.orders_by_policy:
            raise UsageError(
                f"{type(self.importance).__name__} knows no policies of which a head could take the smallest: choose "
                "PolicyOrder."
            )
        self._check_representation()
        self._check_recall()
        names = [name for part in self._parts for name in _parameters(part)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UsageError(f"Two parts of a method have a parameter {twice[0]!r}: give one of them another name.")

    def _check_representation(self) -> None:
        if self.representation.is_full:
            return
        called = f"The representation {self.representation.name!r}"
        if self.keeps_everything:
            raise UsageError(
                f"{called} is not for the full cache, by which others are measured: choose a method with a budget, "
                "such as headkv-r2, and a budget of 100%."
            )
        if self.reduction.fits_rows:
            raise UsageError(
                f"{called} would change rows that have been fitted to stand for others: choose representation=full, or "
                "a method that evicts or merges."
            )
        if self.representation.queries and self.budget.ranks_together:
            raise UsageError(
                f"{called} judges channels by queries, which are gone when a method has ranked the rows of all layers "
                "together: choose adakv-kvzip or headkv-kvzip."
            )

    def _check_recall(self) -> None:
        if not self.recall.is_on:
            return
        mend = "give cluster=0"
        if self.keeps_everything:
            raise UsageError(f"The full cache evicts nothing that could be brought back: {mend}.")
        if not isinstance(self.reduction, Evict):
            raise UsageError(
                f"Rows that have been merged or fitted stand for those that would be brought back: {mend}, or choose a "
                "method that evicts."
            )
        if not self.representation.is_full:
            raise UsageError(
                f"Rows that may be brought back are held in full, not as {self.representation.name!r}: {mend}, or "
                "representation=full."
            )
        if self.budget.spreads:
            raise UsageError(
                "A budget that heads of a layer share by the rows they hold cannot count rows that are brought back: "
                f"{mend}, or choose a method such as headkv-cluster or clusterkv."
            )

    @property
    def keeps_everything(self) -> bool:
        """Whether this is the full cache, whatever the budget."""
        return isinstance(self.importance, KeepAll)

    @property
    def asks_queries(self) -> bool:
        """Whether what is kept of a prompt, or how it is held, depends on any of its queries."""
        asked = (self.importance.queries, self.reduction.prompt_queries, self.representation.queries)
        return any(each != 0 for each in asked)

    @property
    def always_kept(self) -> int:
        """Tokens that every head keeps, whatever its budget."""
        return self.sinks + self.keep_last

    def last_tokens_kept(self, counts: Tensor, others: int | Tensor | None = None) -> int | Tensor:
        """Last tokens of the prompt that heads with `counts` tokens keep: one number, or one for each, int64 `[B, K]`.

        It is `max(keep_last, floor(recent_share * count))`, less where others need the room.

        Args:
            counts: int64 `[B, K]`.
            others: tokens kept in any case beside these; `None` for the sinks.
        """
        if self.recent_share == 0:
            return self.keep_last
        recent = (counts.double() * self.recent_share).long()
        return recent.minimum(counts - (self.sinks if others is None else others)).clamp(min=self.keep_last)

    def ranked(
        self,
        importance: Tensor,
        counts: HeadCounts,
        valid: Tensor | None,
        protected: Tensor | None = None,
        past: Tensor | None = None,
        shard: HeadShard = WHOLE,
    ) -> tuple[Tensor, HeadCounts]:
        """Importance with the tokens that each head keeps in any case at infinity, and how many it keeps in all.

        Args:
            importance: float `[B, K, T]`, finite.
            counts: tokens allotted to each head; at most its valid tokens, or all heads of a sequence together at most
                theirs where the budget policy hands some on to other heads of the layer (`BudgetPolicy.spreads`).
            valid: false where a token is padding, bool `[B, T]`, or `[B, K, T]` if heads differ; `None` if none is.
            protected: tokens that are kept too, bool `[B, K, T]`; `None` for none. Each head is allotted enough.
            past: tokens that no later query sees, bool `[B, K, T]`: kept only where there are no others;
                `None` for none.
            shard: which heads these are, where tokens may be handed on to those that other processes have.

        Returns:
            float `[B, K, T]`, padding at minus infinity; and how many each head keeps.
        """
        if protected is not None:
            importance = importance.masked_fill(protected, float("inf"))
        ranked = ranking(importance, valid, sinks=self.sinks, keep_last=self.keep_last, past=past)
        always_kept: Tensor | None = None if protected is None else (ranked == float("inf")).sum(dim=-1)
        if self.budget.spreads:
            kept = self.always_kept if always_kept is None else always_kept
            counts = spread(self.budget, shard, counts, ranked, valid, kept)
        if self.recent_share:
            others = None if always_kept is None else always_kept - self.keep_last
            last = self.last_tokens_kept(counts.counts, others)
            ranked = ranking(importance, valid, sinks=self.sinks, keep_last=last, past=past)
        return ranked, counts

    def check_budget(self, budget: Budget, name: str = "") -> None:
        """
        Raises:
            UsageError: the budget is a threshold on an importance that has no fixed scale.
        """
        if budget.above is None or self.importance.has_scale or self.keeps_everything:
            return
        called = f"The method {name!r}" if name else "This method"
        mend = "choose kvzip, adakv-kvzip, headkv-kvzip, learned-kvzip or one of the kvzap methods"
        if self.importance.norms:
            called, mend = f"{called} with norms", "leave norms away"
        raise UsageError(
            f"{called} judges tokens by a score without a fixed scale, on which no threshold can be set: {mend}, or "
            "give a budget of tokens, a share or bytes."
        )

    def for_observers(self, count: int) -> Method:
        """This method for a prompt whose last `count` tokens only observe: a window is they, counting alike."""
        options = {"window": count, "ramp": False, "observers": count}
        return self.with_options(**{name: value for name, value in options.items() if self.has_option(name)})

    @property
    def _parts(self) -> tuple[Any, ...]:
        recall = () if self.keeps_everything else (self.recall,)
        return (self.importance, self.budget, self.reduction, self.representation, *recall, self)

    def options(self) -> dict[str, Any]:
        """All parameters of its parts, by which `with_options` makes this method from any other of the same parts."""
        own = {} if self.keeps_everything else {_REPRESENTATION: self.representation.name}
        return {name: value for part in self._parts for name, value in _parameters(part).items()} | own

    def has_option(self, name: str) -> bool:
        """Whether a part of this method has a parameter of this name."""
        return self._holder(name) is not None or (name == _REPRESENTATION and not self.keeps_everything)

    def own_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Of some parameters those that this method has, or has once it is held as they say."""
        held = self if self.keeps_everything else self._held_as(options.get(_REPRESENTATION))
        return {name: value for name, value in options.items() if held.has_option(name)}

    def with_options(self, /, **options: Any) -> Method:
        """This method with some parameters changed, each on whichever part has it; `None` leaves one as it is.

        Raises:
            UsageError: no part of this method has such a parameter, or the value is not of its kind.
        """
        method = self._held_as(options.pop(_REPRESENTATION, None))
        for name, value in options.items():
            if value is None:
                continue
            holder, full = method._holder(name), _LONG.get(name, name)
            if holder is None:
                raise UsageError(f"This method has no parameter {name!r}: choose among {', '.join(method.options())}.")
            part: Any = method if holder == "method" else getattr(method, holder)
            part = replace(part, **{full: _of_kind(name, value, getattr(part, full))})
            method = part if holder == "method" else replace(method, **{holder: part})
        return method

    def _held_as(self, name: object) -> Method:
        """This method with the representation of this name, as the table has it; unchanged where that is its own."""
        if name is None or name == self.representation.name:
            return self
        return replace(self, representation=find_representation(name))

    def _holder(self, name: str) -> str | None:
        """The part that has a parameter: `"method"`, or the name of one of the axes."""
        axes = ("importance", "budget", "reduction", "representation", *(() if self.keeps_everything else ("recall",)))
        parts = {"method": self} | {axis: getattr(self, axis) for axis in axes}
        full = _LONG.get(name, name)
        return next((holder for holder, part in parts.items() if full in _parameters(part)), None)


def _parameters(part: Any) -> dict[str, Any]:
    """The fields of a part that a user may change, with their values."""
    if not is_dataclass(part):
        return {}
    values = {each.name: getattr(part, each.name) for each in fields(part)}
    return {name: value for name, value in values.items() if isinstance(value, _SIMPLE)}


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


def _of_kind(name: str, value: Any, present: Any) -> Any:
    """The value, if it is of the kind of the present one."""
    kind = type(present)
    known = type(value) is kind or (kind is float and type(value) is int)
    if not known or (type(value) is float and not isfinite(value)):
        raise UsageError(f"The parameter {name!r} cannot be {value!r}: give {_KINDS[kind]}.")
    return value
