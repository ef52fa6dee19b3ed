"""The table of methods: each names one importance, one budget policy and one reduction, and how rows are held."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from headprof.compression.methods.budget import (
    AdaptiveBudget,
    ProfileBudget,
    PyramidBudget,
    TunedBudget,
    UniformBudget,
)
from headprof.compression.methods.curve_budget import CurveBudget
from headprof.compression.methods.expected_attention import ExpectedAttention
from headprof.compression.methods.fit import Fit
from headprof.compression.methods.global_budget import GlobalBudget
from headprof.compression.methods.importance import (
    KeepAll,
    KeyDiff,
    KeyNorm,
    Recency,
)
from headprof.compression.methods.latent import Latent
from headprof.compression.methods.learned_budget import LearnedBudget
from headprof.compression.methods.low_rank import LowRank
from headprof.compression.methods.merging import EvictThenMerge
from headprof.compression.methods.method import Method
from headprof.compression.methods.names import method_names
from headprof.compression.methods.plugins import load_plugin, plugin_names
from headprof.compression.methods.policy_order import PolicyOrder
from headprof.compression.methods.prefix_budget import PrefixBudget
from headprof.compression.methods.quantisation import Int4, Int8
from headprof.compression.methods.recall import Recall
from headprof.compression.methods.received_attention import Accumulated, GlobalLocal
from headprof.compression.methods.reconstruction import Reconstruction
from headprof.compression.methods.recovery_budget import RecoveryBudget
from headprof.compression.methods.reduction import Evict
from headprof.compression.methods.refined_budget import RefinedBudget
from headprof.compression.methods.surrogate import SurrogateImportance
from headprof.compression.methods.thinning import Thin
from headprof.compression.methods.window_attention import LastQuery, WindowAttention
from headprof.errors import UsageError

# How the papers judge tokens, with fewer of the window kept; and what serves budgets of 16 to 128 tokens better.
_SNAPKV = WindowAttention()
_TUNED = WindowAttention(kernel=11, pooling="mean", power=2, ramp=True)
_EMS = GlobalLocal(**asdict(_TUNED), combine="sum", balance=2.0, emphasis=1.0)
# Keys stay as they are: an average of keys at different positions is no key of any (README, "Evict, then merge").
_MERGE = EvictThenMerge(threshold=0.4, merge_keys=False)

TUNED = "headkv-tuned"
"""HeadKV-R2 with the parameters that a profile holds."""
REFINED = "headkv-refined"
"""The same with the budgets that a profile holds."""

METHODS: dict[str, Method] = {
    "full": Method(KeepAll()),
    "snapkv": Method(_SNAPKV, UniformBudget(), Evict()),
    "headkv": Method(_TUNED, ProfileBudget("retrieval"), Evict()),
    "headkv-r2": Method(_TUNED, ProfileBudget("reasoning"), Evict()),
    "headkv-r2-int8": Method(_TUNED, ProfileBudget("reasoning"), Evict(), representation=Int8()),
    "headkv-r2-int4": Method(_TUNED, ProfileBudget("reasoning"), Evict(), representation=Int4()),
    "lowrank": Method(_TUNED, ProfileBudget("reasoning"), Evict(), representation=LowRank()),
    "latent": Method(_TUNED, ProfileBudget("reasoning"), Evict(), representation=Latent()),
    "think": Method(_SNAPKV, UniformBudget(), Evict(), representation=Thin()),
    TUNED: Method(_TUNED, TunedBudget("reasoning"), Evict()),
    REFINED: Method(_TUNED, RefinedBudget(), Evict()),
    "clusterkv": Method(Recency(), UniformBudget(), Evict(), sinks=16, recall=Recall(cluster=80)),
    "headkv-cluster": Method(_TUNED, ProfileBudget("reasoning"), Evict(), recall=Recall(cluster=80, recall_among=4)),
    "headkv-curves": Method(_TUNED, CurveBudget("known"), Evict()),
    "ems": Method(_EMS, UniformBudget(), _MERGE),
    "headkv-ems": Method(
        replace(_EMS, balance=0.15, emphasis=10.0), ProfileBudget("reasoning"), replace(_MERGE, coverage=0.5)
    ),
    "tova": Method(LastQuery(), UniformBudget(), Evict()),
    "pyramidkv": Method(_SNAPKV, PyramidBudget(), Evict()),
    "adakv": Method(_SNAPKV, AdaptiveBudget(), Evict()),
    "h2o": Method(Accumulated(), UniformBudget(), Evict(), recent_share=0.5),
    "prefixkv": Method(Accumulated(shared=True), PrefixBudget(per="layer"), Evict()),
    "prefixkv-heads": Method(Accumulated(), PrefixBudget(per="head"), Evict()),
    "fastgen": Method(PolicyOrder(), RecoveryBudget(), Evict()),
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


def find_method(name: str, /, **options: Any) -> Method:
    """The method of this name, which may be followed by parameters: `ems`, `ems:mass=false:threshold=0.5`.

    Args:
        name: as the user gives it.
        options: further parameters, `None` for the method's own value.

    Raises:
        UsageError: there is none; the message lists those there are. Or it has no such parameter, or one is given
            twice.
    """
    own, *texts = name.split(":")
    settings = parse_settings(texts)
    for option in settings:
        if options.get(option) is not None:
            raise UsageError(
                f"The parameter {option!r} of {name!r} is given once more, apart from the method: leave one of them "
                "away."
            )
    return _named(own).with_options(**settings).with_options(**options)


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
    method = replace(method, importance=method.importance.with_surrogate(None).with_token_kinds(None))
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
    dealt = {name: method.own_options(given) for name, method in methods.items()}
    for option in given:
        if not any(option in own for own in dealt.values()):
            raise UsageError(f"None of the methods has a parameter {option!r}: leave it away, or name one that has it.")
    for name, own in dealt.items():
        find_method(name, **own)
    return dealt


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Parameters as the command line takes them: `["power=2", "ramp=true"]` is `{"power": 2, "ramp": True}`.

    Raises:
        UsageError: a text is not `name=value`, or names what another names.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier() or not value:
            raise UsageError(f"A setting of {text!r} cannot be read: write --set name=value, such as --set power=2.")
        if name in settings:
            raise UsageError(f"The parameter {name!r} is given twice, as {text!r} too: leave one of them away.")
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
