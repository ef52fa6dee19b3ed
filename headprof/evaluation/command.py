"""What `headprof eval` is asked for, checked before any model work, and carried out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from headprof.chat import OBSERVATION, ChatFormat
from headprof.compression.budget import Budget
from headprof.compression.methods import find_method
from headprof.compression.session import make_plan
from headprof.errors import UsageError
from headprof.evaluation.probing import Answer, Candidate, answer_probes
from headprof.models import LoadedModel
from headprof.probes.build import ProbeBuilder, ProbeSettings
from headprof.profile import HeadProfile

TASKS = {"niah": "retrieval", "reasoning": "reasoning"}
"""Tasks and the kind of probe each one asks."""


@dataclass(frozen=True)
class EvalRequest:
    """Methods times budgets times tasks.

    Attributes:
        tasks: names in `TASKS`.
        methods: names in the table of methods; `full` is run once, without a budget.
        budgets: as the command line takes them.
        probes: number of probes, over all tasks.
        lengths: prompt lengths in tokens.
        families: probe families to ask; all when none are named.
        seed: of the probes.
        question_known: whether the question is part of the prompt that is compressed; if not, the document alone is.
        observe: if not, the text in the question's place that judges the document; empty for the document's own end.
        options: parameters of the methods, `None` for their defaults; a method without a parameter ignores it.
    """

    tasks: list[str]
    methods: list[str]
    budgets: list[str]
    probes: int
    lengths: tuple[int, ...]
    families: list[str] | None = None
    seed: int = 1000
    question_known: bool = True
    observe: str = OBSERVATION
    options: dict[str, Any] = field(default_factory=dict)

    def check(self) -> bool:
        """Find mistakes that need no model; returns whether a head profile is needed.

        Raises:
            UsageError: an unknown task or method, or a budget that cannot be read.
        """
        for task in self.tasks:
            if task not in TASKS:
                raise UsageError(f"There is no task {task!r}: choose among {', '.join(TASKS)}.")
        for budget in self.budgets:
            Budget.parse(budget)
        for name in self.methods:
            find_method(name).with_options(**self._options_of(name))
        return any(find_method(method).budget.profile_scores for method in self.methods)

    def _options_of(self, name: str) -> dict[str, Any]:
        """The options that this method has a parameter for."""
        return {key: value for key, value in self.options.items() if find_method(name).has_option(key)}

    def observer_ids(self, loaded: LoadedModel) -> list[int]:
        """Tokens that judge the document in the question's place; none if the question is known."""
        if self.question_known or not self.observe:
            return []
        return ChatFormat(loaded.tokenizer).question_ids(self.observe)

    def candidates(self, loaded: LoadedModel, profile: HeadProfile | None) -> list[Candidate]:
        """Every method at every budget, the full cache once."""
        made = []
        for name in self.methods:
            method = find_method(name)
            for budget in self.budgets if method.importance is not None else [""]:
                plan = make_plan(loaded.model, profile, method=name, budget=budget or 1, **self._options_of(name))
                made.append(Candidate(name, budget, plan))
        return made


def run_evaluation(
    loaded: LoadedModel,
    profile: HeadProfile | None,
    request: EvalRequest,
    on_done: Callable[[int], None] = lambda _: None,
) -> list[Answer]:
    """Ask probes that no profile was made from: names and values of the held-out half, one needle a context."""
    settings = ProbeSettings(
        probes=request.probes,
        lengths=request.lengths,
        kinds=tuple(dict.fromkeys(TASKS[task] for task in request.tasks)),
        families=tuple(request.families) if request.families else None,
        needles_per_context=1,
        seed=request.seed,
        split="eval",
    )
    builder = ProbeBuilder(loaded.tokenizer, settings, max_positions=loaded.max_positions)
    observers = request.observer_ids(loaded)
    candidates = [
        replace(candidate, plan=candidate.plan.for_observers(len(observers)))
        for candidate in request.candidates(loaded, profile)
    ]
    for candidate in candidates:  # a budget that cannot be met is an error before any work
        for length in request.lengths:
            candidate.plan.allocation(length)
    done = 0

    def count(_: list[Answer]) -> None:
        nonlocal done
        done += 1
        on_done(done)

    return answer_probes(
        loaded.model,
        builder,
        candidates,
        count,
        question_known=request.question_known,
        observer_ids=observers,
    )
