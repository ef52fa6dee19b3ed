"""The table of methods: each names one importance, one budget policy and one reduction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from math import isfinite
from typing import Any

from torch import Tensor

from headprof.compression.methods.budget import (
    AdaptiveBudget,
    BudgetPolicy,
    ProfileBudget,
    PyramidBudget,
    TunedBudget,
    UniformBudget,
)
from headprof.compression.methods.curve_budget import CurveBudget
from headprof.compression.methods.expected_attention import ExpectedAttention
from headprof.compression.methods.fit import Fit
from headprof.compression.methods.given_budget import Budget
from headprof.compression.methods.global_budget import GlobalBudget
from headprof.compression.methods.importance import (
    Importance,
    KeepAll,
    KeyDiff,
    KeyNorm,
    Recency,
    check_importance,
)
from headprof.compression.methods.learned_budget import LearnedBudget
from headprof.compression.methods.merging import EvictThenMerge
from headprof.compression.methods.names import method_names
from headprof.compression.methods.plugins import load_plugin, plugin_names
from headprof.compression.methods.received_attention import Accumulated, GlobalLocal
from headprof.compression.methods.reconstruction import Reconstruction
from headprof.compression.methods.reduction import Evict, Reduction, ranking
from headprof.compression.methods.surrogate import SurrogateImportance
from headprof.compression.methods.window_attention import LastQuery, WindowAttention
from headprof.compression.rows import HeadCounts
from headprof.errors import UsageError

_SIMPLE = (bool, int, float, str)
_LONG = {"scores": "profile_scores"}
"""Parameters with a short name too."""


@dataclass(frozen=True)
class Method:
    """One way to compress a cache.

    Attributes:
        importance: which tokens matter; `KeepAll` makes it the full cache.
        budget: how many tokens each head keeps.
        reduction: what becomes of the others.
        sinks: first tokens of the prompt that every head keeps.
        keep_last: last tokens of the prompt that every head keeps.
        recent_share: share of a head's own tokens that are the last of the prompt (H2O, Zhang et al. 2023); 0 to 1.
    """

    importance: Importance
    budget: BudgetPolicy = field(default_factory=UniformBudget)
    reduction: Reduction = field(default_factory=Evict)
    sinks: int = 1
    keep_last: int = 2
    recent_share: float = 0.0

    def __post_init__(self) -> None:
        for name in ("sinks", "keep_last"):
            if getattr(self, name) < 0:
                raise UsageError(f"A head cannot keep {getattr(self, name)} tokens: give {name} at least 0.")
        if not 0 <= self.recent_share <= 1:
            raise UsageError(f"A recent_share of {self.recent_share} is no share of a head's tokens: give 0 to 1.")
        check_importance(self.importance)
        names = [name for part in self._parts for name in _parameters(part)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UsageError(f"Two parts of a method have a parameter {twice[0]!r}: give one of them another name.")

    @property
    def keeps_everything(self) -> bool:
        """Whether this is the full cache, whatever the budget."""
        return isinstance(self.importance, KeepAll)

    @property
    def asks_queries(self) -> bool:
        """Whether what is kept of a prompt depends on any of its queries."""
        return self.importance.queries != 0 or self.reduction.prompt_queries != 0

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

        Returns:
            float `[B, K, T]`, padding at minus infinity; and how many each head keeps.
        """
        if protected is not None:
            importance = importance.masked_fill(protected, float("inf"))
        ranked = ranking(importance, valid, sinks=self.sinks, keep_last=self.keep_last, past=past)
        always_kept: Tensor | None = None if protected is None else (ranked == float("inf")).sum(dim=-1)
        if self.budget.spreads:
            kept = self.always_kept if always_kept is None else always_kept
            counts = self.budget.spread(counts, ranked, valid, kept)
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
        return (self.importance, self.budget, self.reduction, self)

    def options(self) -> dict[str, Any]:
        """All parameters of its parts, by which `with_options` makes this method from any other of the same parts."""
        return {name: value for part in self._parts for name, value in _parameters(part).items()}

    def has_option(self, name: str) -> bool:
        """Whether a part of this method has a parameter of this name."""
        return self._holder(name) is not None

    def with_options(self, /, **options: Any) -> Method:
        """This method with some parameters changed, each on whichever part has it; `None` leaves one as it is.

        Raises:
            UsageError: no part of this method has such a parameter, or the value is not of its kind.
        """
        method = self
        for name, value in options.items():
            if value is None:
                continue
            holder, full = method._holder(name), _LONG.get(name, name)
            if holder is None:
                raise UsageError(f"This method has no parameter {name!r}: choose among {', '.join(self.options())}.")
            part: Any = method if holder == "method" else getattr(method, holder)
            part = replace(part, **{full: _of_kind(name, value, getattr(part, full))})
            method = part if holder == "method" else replace(method, **{holder: part})
        return method

    def _holder(self, name: str) -> str | None:
        """The part that has a parameter: `"method"`, or the name of one of the three axes."""
        parts = {"method": self, "importance": self.importance, "budget": self.budget, "reduction": self.reduction}
        full = _LONG.get(name, name)
        return next((holder for holder, part in parts.items() if full in _parameters(part)), None)


def _parameters(part: Any) -> dict[str, Any]:
    """The fields of a part that a user may change, with their values."""
    if not is_dataclass(part):
        return {}
    values = {each.name: getattr(part, each.name) for each in fields(part)}
    return {name: value for name, value in values.items() if isinstance(value, _SIMPLE)}


# How the papers judge tokens, with fewer of the window kept; and what serves budgets of 16 to 128 tokens better.
_SNAPKV = WindowAttention()
_TUNED = WindowAttention(kernel=11, pooling="mean", power=2, ramp=True)
_EMS = GlobalLocal(**asdict(_TUNED), combine="sum", balance=2.0, emphasis=1.0)
# Keys stay as they are: an average of keys at different positions is no key of any (README, "Evict, then merge").
_MERGE = EvictThenMerge(threshold=0.4, merge_keys=False)

TUNED = "headkv-tuned"
"""HeadKV-R2 with the parameters that a profile holds."""

METHODS: dict[str, Method] = {
    "full": Method(KeepAll()),
    "snapkv": Method(_SNAPKV, UniformBudget(), Evict()),
    "headkv": Method(_TUNED, ProfileBudget("retrieval"), Evict()),
    "headkv-r2": Method(_TUNED, ProfileBudget("reasoning"), Evict()),
    TUNED: Method(_TUNED, TunedBudget("reasoning"), Evict()),
    "headkv-curves": Method(_TUNED, CurveBudget("known"), Evict()),
    "ems": Method(_EMS, UniformBudget(), _MERGE),
    "headkv-ems": Method(
        replace(_EMS, balance=0.15, emphasis=10.0), ProfileBudget("reasoning"), replace(_MERGE, coverage=0.5)
    ),
    "tova": Method(LastQuery(), UniformBudget(), Evict()),
    "pyramidkv": Method(_SNAPKV, PyramidBudget(), Evict()),
    "adakv": Method(_SNAPKV, AdaptiveBudget(), Evict()),
    "h2o": Method(Accumulated(), UniformBudget(), Evict(), recent_share=0.5),
    "streamingllm": Method(Recency(), UniformBudget(), Evict(), sinks=4),
    "knorm": Method(KeyNorm(), UniformBudget(), Evict()),
    "keydiff": Method(KeyDiff(), UniformBudget(), Evict()),
    "expected-attention": Method(ExpectedAttention(), UniformBudget(), Evict(), sinks=4),
    "kvzip": Method(Reconstruction(), GlobalBudget(), Evict()),
    "adakv-kvzip": Method(Reconstruction(), AdaptiveBudget(), Evict()),
    "headkv-kvzip": Method(Reconstruction(), ProfileBudget("reasoning"), Evict()),
    "learned-kvzip": Method(Reconstruction(), LearnedBudget(), Evict()),
    "curves-kvzip": Method(Reconstruction(), CurveBudget("unknown"), Evict()),
    "headkv-fit": Method(Reconstruction(), ProfileBudget("reasoning"), Fit()),
    "learned-fit": Method(Reconstruction(), LearnedBudget(), Fit()),
    "kvzap": Method(SurrogateImportance(), AdaptiveBudget(), Evict()),
    "headkv-kvzap": Method(SurrogateImportance(), ProfileBudget("reasoning"), Evict()),
    "learned-kvzap": Method(SurrogateImportance(), LearnedBudget(), Evict()),
}
"""This project's own. Installed packages add others by entry points of the group `headprof.methods`."""


def find_method(name: str) -> Method:
    """The method of this name, which may be followed by parameters: `ems`, `ems:mass=false:threshold=0.5`.

    Raises:
        UsageError: there is none; the message lists those there are. Or it has no such parameter.
    """
    name, *settings = name.split(":")
    return _named(name).with_options(**parse_settings(settings))


def _named(name: str) -> Method:
    added = plugin_names()
    if name in METHODS and name in added:
        raise UsageError(
            f"An installed package has a method {name!r} too, so that it is not clear which is meant: uninstall it, or "
            "let it choose another name."
        )
    if name in METHODS:
        return METHODS[name]
    if name not in added:
        raise UsageError(f"There is no method {name!r}: choose one of {', '.join(method_names())}.")
    method = load_plugin(name)
    if not isinstance(method, Method):
        raise UsageError(f"The method {name!r} of an installed package is no headprof.Method: update that package.")
    return method


def name_of(method: Method) -> str:
    """The name in the table from which `with_options(**method.options())` makes this method; empty if there is none."""
    method = replace(method, importance=method.importance.with_surrogate(None))
    same = [name for name, known in METHODS.items() if known == method]
    return next((name for name in (*same, *METHODS) if _alike(METHODS[name], method)), "")


def _alike(known: Method, method: Method) -> bool:
    """Whether two methods are of the same parts, and differ in options alone."""
    axes = ("importance", "budget", "reduction")
    if any(type(getattr(known, axis)) is not type(getattr(method, axis)) for axis in axes):
        return False
    return known.with_options(**method.options()) == method


def deal_options(names: Iterable[str], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What each of some methods takes of parameters that are given to all: those that it has.

    Args:
        names: of the methods.
        options: parameters, `None` for a method's own value.

    Returns:
        For each name the parameters to give to `Method.with_options`.

    Raises:
        UsageError: there is no such method, none of them has such a parameter, or a value is not of its kind.
    """
    methods = {name: find_method(name) for name in names}
    given = {name: value for name, value in options.items() if value is not None}
    for option in given:
        if not any(method.has_option(option) for method in methods.values()):
            raise UsageError(f"None of the methods has a parameter {option!r}: leave it away, or name one that has it.")
    dealt = {
        name: {option: value for option, value in given.items() if method.has_option(option)}
        for name, method in methods.items()
    }
    for name, method in methods.items():
        method.with_options(**dealt[name])
    return dealt


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Parameters as the command line takes them: `["power=2", "ramp=true"]` is `{"power": 2, "ramp": True}`.

    Raises:
        UsageError: a text is not `name=value`.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier() or not value:
            raise UsageError(f"A setting of {text!r} cannot be read: write --set name=value, such as --set power=2.")
        settings[name] = _SETTING.get(value.lower(), value)
        for number in (int, float):
            with suppress(ValueError):
                settings[name] = number(value)
                break
        if isinstance(settings[name], int | float) and not abs(settings[name]) < _LARGEST:
            raise UsageError(f"A setting of {text!r} is beyond all use: give a number below {_LARGEST:g}.")
    return settings


_LARGEST = 1e15
_SETTING = {"true": True, "false": False}
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


def _of_kind(name: str, value: Any, present: Any) -> Any:
    """The value, if it is of the kind of the present one."""
    kind = type(present)
    known = type(value) is kind or (kind is float and type(value) is int)
    if not known or (type(value) is float and not isfinite(value)):
        raise UsageError(f"The parameter {name!r} cannot be {value!r}: give {_KINDS[kind]}.")
    return value
