"""What `headprof eval` is asked for, checked before any model work, and carried out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headprof.chat import OBSERVATION, ChatFormat
from headprof.compression.budget import Budget
from headprof.compression.methods import find_method
from headprof.compression.plan import BUFFER
from headprof.compression.session import make_plan
from headprof.errors import UsageError
from headprof.evaluation.perplexity import Loss, PerplexitySettings, measure_perplexity, select_documents
from headprof.evaluation.probing import Answer, Candidate, answer_probes
from headprof.evaluation.texts import read_texts
from headprof.models import LoadedModel
from headprof.probes.build import ProbeBuilder, ProbeSettings
from headprof.profile import HeadProfile

PROBE_TASKS = {"niah": "retrieval", "reasoning": "reasoning"}
"""Tasks and the kind of probe each one asks."""
TASKS = (*PROBE_TASKS, "perplexity")


@dataclass(frozen=True)
class EvalRequest:
    """Methods times budgets times tasks.

    Attributes:
        tasks: names in `TASKS`.
        methods: names in the table of methods; `full` is run once, without a budget.
        budgets: as the command line takes them.
        probes: number of probes, over all tasks.
        lengths: of the probes' prompts, in tokens; of the texts whose perplexity is taken, which have but one.
        families: probe families to ask; all when none are named.
        seed: of the probes.
        question_known: whether the question is part of the prompt that is compressed; if not, the document alone is.
        data_dir: a text file, or a folder of them, for perplexity.
        documents: how many texts; none for all that are long enough.
        skip: how many of those to leave out first.
        continuation: tokens at a text's end that are predicted, after those before them have been compressed.
        observe: if not, the text in the question's place that judges the document; empty for the document's own end.
        options: parameters of the methods, `None` for their defaults; a method without a parameter ignores it.
        decoding: `decode_budget` and `buffer`, as for `headprof.make_plan`; what is missing keeps its default.
    """

    tasks: list[str]
    methods: list[str]
    budgets: list[str]
    probes: int
    lengths: tuple[int, ...] | None = None
    families: list[str] | None = None
    seed: int = 1000
    question_known: bool = True
    observe: str = OBSERVATION
    data_dir: Path | None = None
    documents: int | None = 20
    skip: int = 0
    continuation: int = 512
    options: dict[str, Any] = field(default_factory=dict)
    decoding: dict[str, Any] = field(default_factory=dict)

    def check(self) -> bool:
        """Find mistakes that need no model; returns whether a head profile is needed.

        Raises:
            UsageError: an unknown task or method, a budget that cannot be read, or no texts for perplexity.
        """
        for task in self.tasks:
            if task not in TASKS:
                raise UsageError(f"There is no task {task!r}: choose among {', '.join(TASKS)}.")
        if "perplexity" in self.tasks:
            self.perplexity_settings()
        for budget in self.budgets:
            Budget.parse(budget)
        for name in self.methods:
            find_method(name).with_options(**self._options_of(name))
        return any(find_method(method).budget.profile_scores for method in self.methods)

    @property
    def probe_tasks(self) -> list[str]:
        return [task for task in self.tasks if task in PROBE_TASKS]

    def perplexity_settings(self) -> PerplexitySettings:
        """
        Raises:
            UsageError: there are no texts, or several lengths, or a length that leaves nothing to compress.
        """
        if self.data_dir is None:
            raise UsageError(
                "Perplexity needs texts: give a .txt or .jsonl file, or a folder of them, with --data-dir."
            )
        lengths = self.lengths or (4096,)
        if len(lengths) > 1:
            raise UsageError("Perplexity is taken of texts of one length: give a single number with --lengths.")
        if lengths[0] <= self.continuation:
            raise UsageError(
                f"Of {lengths[0]} tokens, {self.continuation} to be predicted leave none to compress: raise --lengths "
                "or lower --continuation."
            )
        buffer = self.decoding.get("buffer", BUFFER)
        return PerplexitySettings(
            lengths[0] - self.continuation, self.continuation, self.documents, self.skip, chunk=buffer or BUFFER
        )

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
                plan = make_plan(
                    loaded.model,
                    profile,
                    method=name,
                    budget=budget or 1,
                    **self._options_of(name),
                    **self.decoding,
                )
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
        lengths=request.lengths or (1024,),
        kinds=tuple(dict.fromkeys(PROBE_TASKS[task] for task in request.probe_tasks)),
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
        for length in settings.lengths:
            candidate.plan.check(length)
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


def run_perplexity(
    loaded: LoadedModel,
    profile: HeadProfile | None,
    request: EvalRequest,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> list[Loss]:
    """Predict the ends of the request's texts; `on_done` is told how many are done, and of how many."""
    assert request.data_dir is not None
    settings = request.perplexity_settings()
    documents = select_documents(loaded.tokenizer, read_texts(request.data_dir), settings, loaded.max_positions)
    done = 0

    def count(_: list[Loss]) -> None:
        nonlocal done
        done += 1
        on_done(done, len(documents))

    candidates = request.candidates(loaded, profile)
    return measure_perplexity(loaded.model, documents, candidates, count, chunk=settings.chunk)
