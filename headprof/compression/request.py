"""How a prompt is to be compressed: as a user asks for it, checked before any model work, and made into a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headprof.compression.decode_steps import check_step
from headprof.compression.kernels.backends import check_backend
from headprof.compression.methods.given_budget import Budget
from headprof.compression.methods.method import Method
from headprof.compression.methods.table import REFINED, TUNED, find_method
from headprof.compression.plan import CompressionPlan
from headprof.compression.ranks_check import check_ranks
from headprof.compression.session import make_plan
from headprof.errors import ProfileError, UsageError
from headprof.models.finding import model_name
from headprof.models.loading import LoadedModel
from headprof.profile.finding import find_profile, load_profile
from headprof.profile.finding_surrogate import load_surrogate
from headprof.profile.head_profile import HeadProfile
from headprof.profile.tuned import NOTE

AUTO = "auto"
"""In place of a method: what `question_method` or `document_method` chooses."""


def question_method(model: str | None, profile: Path | None) -> str:
    """The method by which a prompt is compressed that ends with its question, when the user names none.

    It is HeadKV-R2, with the parameters that serve the model best, and with budgets refined for it, if its profile
    holds them.

    Args:
        model: as the user names it; `None` for the embedded one.
        profile: file of the head profile; `None` to find the model's own.
    """
    try:
        held = HeadProfile.load(find_profile(model_name(model), profile, model))
    except ProfileError:  # of which the plan tells, once it is asked for one
        return "headkv-r2"
    if NOTE not in held.metadata:
        return "headkv-r2"
    return TUNED if held.refined_rows is None else REFINED


def document_method(model: str | None, profile: Path | None, observe: str | None) -> str:
    """The method by which a document is compressed when the user names none.

    Its own repetition judges it, at budgets that the model's profile has learned from that of other texts, or
    HeadKV-R2's if it has learned none. A text that is to judge judges as it did when HeadKV-R2 was made.

    Args:
        model: as the user names it; `None` for the embedded one.
        profile: file of the head profile; `None` to find the model's own.
        observe: a text that judges in place of the repetition; `None` for none.
    """
    if observe is not None:
        return "headkv-r2"
    try:
        learned = HeadProfile.load(find_profile(model_name(model), profile)).kept_shares
    except ProfileError:  # of which the plan tells, once it is asked for one
        learned = None
    return "headkv-kvzip" if learned is None else "learned-kvzip"


def spends_what_it_needs(method: str, recovery: float | None) -> bool:
    """Whether a method spends what it needs to recover attention, and a budget is but the most.

    Args:
        method: its name, which may be followed by parameters.
        recovery: share of the attention that is to be recovered, if the user has named one.

    Raises:
        UsageError: there is no such method, or a share is named for one that spends a budget.
    """
    needs = find_method(method).has_option("recovery")
    if recovery is not None and not needs:
        raise UsageError(
            f"The method {method!r} spends a budget, not what it needs to recover attention: choose --method fastgen, "
            "or leave --recovery away."
        )
    return needs


def check_named_files(methods: Iterable[Method], profile: Path | None, surrogate: Path | None) -> None:
    """Refuse files that the user named and that would be passed over.

    Args:
        methods: all that are asked for.
        profile: file of the head profile; one that is not needed must be there all the same.
        surrogate: file of the surrogate.

    Raises:
        UsageError: no method judges by a surrogate, or none needs the profile and it is not there.
    """
    methods = list(methods)
    judges = any(method.importance.needs_surrogate for method in methods)
    if surrogate is not None and not judges:
        raise UsageError("No method that is asked for judges by a surrogate: leave --surrogate away.")
    needed = any(method.budget.profile_scores for method in methods)
    if profile is not None and not needed and not profile.is_file():
        raise UsageError(f"There is no profile file at {profile}: check the path given with --profile.")


@dataclass(frozen=True)
class CompressionRequest:
    """A method, a budget and what goes with them.

    Attributes:
        method: a name in the table of methods, which may be followed by parameters.
        budget: as the command line takes it; a compression ratio as `ratio_budget` writes it.
        profile: file of the head profile; `None` to find the model's own, for methods that need one.
        surrogate: file of the surrogate; `None` to find the model's own, for methods that judge rows by one.
        options: parameters of the method's parts, `None` for their defaults.
        decoding: `decode_budget` and `buffer`, as for `make_plan`; what is missing keeps its default.
        backend, prefill_chunk, step: as for `attending_ragged`.
    """

    method: str
    budget: str
    profile: Path | None = None
    surrogate: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    decoding: Mapping[str, Any] = field(default_factory=dict)
    backend: str = "auto"
    prefill_chunk: int | None = None
    step: str = "auto"

    def check(self, ranks: int = 1) -> None:
        """Find mistakes that need no model.

        Args:
            ranks: how many processes are to hold it together.

        Raises:
            UsageError: the backend cannot be used here, there is no such method or parameter, the budget cannot be
                read, a file is named that is not there or not needed, or so many processes cannot do it.
        """
        check_backend(self.backend)
        check_step(self.step)
        method = find_method(self.method, **self.options)
        method.check_budget(Budget.parse(self.budget), self.method)
        check_ranks(method, f"The method {self.method!r}", ranks)
        check_named_files([method], self.profile, self.surrogate)

    @property
    def keeps_everything(self) -> bool:
        """Whether this is the full cache, whatever the budget."""
        return find_method(self.method).keeps_everything

    @property
    def label(self) -> str:
        """What to call a cache that is made by it."""
        how_much = self.budget if self.budget.startswith("ratio") else f"budget {self.budget}"
        method = find_method(self.method, **self.options)
        if (recovery := getattr(method.budget, "recovery", None)) is not None:
            how_much = (
                f"recovery {recovery:g}" if self.budget == "100%" else f"recovery {recovery:g}, {how_much} at most"
            )
        return self.method if self.keeps_everything else f"{self.method}, {how_much}"

    def plan(self, loaded: LoadedModel) -> CompressionPlan:
        """The plan for a model.

        Raises:
            ProfileError: the method needs a head profile or a surrogate, and there is none or it is for another model.
        """
        profile = None
        if find_method(self.method).budget.profile_scores:
            profile = load_profile(loaded.name, self.profile, loaded.shape, loaded.given)
        surrogate = None
        if find_method(self.method).importance.needs_surrogate:
            surrogate = load_surrogate(loaded, self.surrogate, self.profile)
        return make_plan(
            loaded.model,
            profile,
            method=self.method,
            budget=self.budget,
            surrogate=surrogate,
            tokenizer=loaded.tokenizer,
            **self.options,
            **self.decoding,
        )
