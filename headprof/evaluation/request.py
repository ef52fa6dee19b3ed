"""What `headprof eval` is asked for, checked before any model work."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from headprof._version import __version__
from headprof.compression.keeping import check_patterns
from headprof.compression.methods.given_budget import Budget
from headprof.compression.methods.table import deal_options, find_method
from headprof.compression.observers import repeats, text_observers
from headprof.compression.plan import BUFFER
from headprof.compression.ranks_check import check_ranks
from headprof.compression.request import check_named_files
from headprof.compression.session import make_plan
from headprof.errors import UsageError
from headprof.evaluation.methods_at_budgets import Candidate
from headprof.evaluation.perplexity import PerplexitySettings
from headprof.evaluation.results import MULTI, OWN_TASKS
from headprof.evaluation.tasks import BENCHMARKS, TaskRequest, expand
from headprof.models.fingerprints import tokenizer_fingerprint, weights_fingerprint
from headprof.models.loading import LoadedModel
from headprof.models.prompt_encoder import OBSERVATION, PromptEncoder
from headprof.profile.finding_surrogate import load_surrogate
from headprof.profile.head_profile import HeadProfile
from headprof.profile.surrogate import Surrogate


@dataclass(frozen=True)
class Preset:
    """How much an evaluation does.

    Attributes:
        tasks, methods, budgets, lengths: as in `EvalRequest`.
        probes: number of probes, over both tasks of this project.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    budgets: tuple[str, ...]
    lengths: tuple[int, ...]
    probes: int

    def request(
        self,
        *,
        tasks: tuple[str, ...] = (),
        methods: tuple[str, ...] = (),
        budgets: tuple[str, ...] = (),
        lengths: tuple[int, ...] | None = None,
        probes: int | None = None,
        without_full: bool = False,
        **others: Any,
    ) -> EvalRequest:
        """A request in which this preset stands for what is not given.

        Args:
            tasks, methods, budgets, lengths, probes: as in `EvalRequest`; empty or `None` for the preset's. The
                preset's lengths are those of its own tasks.
            without_full: leave the full cache out, which is added otherwise.
            others: the other attributes of `EvalRequest`.
        """
        asked = methods or self.methods
        return EvalRequest(
            tasks=tasks or self.tasks,
            methods=tuple(name for name in asked if name != "full")
            if without_full
            else tuple(dict.fromkeys(("full", *asked))),
            budgets=budgets or self.budgets,
            probes=probes or self.probes,
            lengths=lengths or (None if tasks else self.lengths),
            **others,
        )


COMPARED = (
    *("full", "snapkv", "headkv", "headkv-r2", "ems", "headkv-ems"),
    *("tova", "pyramidkv", "adakv", "h2o", "streamingllm", "knorm"),
)
"""Methods of every preset. By name, not all that there are: answers that were kept are of these, in this order."""

PRESETS = {
    "quick": Preset(("niah", "reasoning"), COMPARED, ("32", "64", "128"), (512, 1024), 80),
    "standard": Preset(("niah", "reasoning"), COMPARED, ("16", "32", "64", "128", "256"), (1024,), 200),
    "thorough": Preset(
        ("niah", "reasoning", "ruler-generated", "babilong", "longbench"),
        COMPARED,
        ("64", "128", "256", "512"),
        (1024, 2048, 4096),
        600,
    ),
}


_APART = frozenset(
    ("tasks", "probes", "limit", "documents", "decoding", "prompts", "step", "surrogate", "profile", "keep")
)
"""Attributes of a request on which answers do not depend, or that their key has in another form."""


def find_preset(name: str) -> Preset:
    """The preset of this name; raises `UsageError` when there is none."""
    if name not in PRESETS:
        raise UsageError(f"There is no preset {name!r}: choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]


@dataclass(frozen=True)
class EvalRequest:
    """Methods times budgets times tasks.

    Attributes:
        tasks: `niah`, `reasoning`, `nonliteral`, `multi`, `perplexity`, a benchmark (`ruler`) or one of its tasks
            (`longbench/hotpotqa`).
        methods: names in the table of methods, each of which may be followed by parameters; `full` is run once, without
            a budget.
        budgets: as the command line takes them.
        probes: number of probes, over the tasks that ask them together; those of `multi` are rounded up to
            whole documents, of 5 to 10 questions each.
        lengths: of prompts that can be had in several, in tokens; of the texts whose perplexity is taken, which have
            but one.
        families: probe families to ask; `None` for all.
        seed: of what is generated.
        limit: questions of each task, and of each of its lengths, at most; `None` for all.
        max_prompt: tokens of a benchmark's prompt, the middle of a longer one is left out; `None` for as many as
            the model can read.
        prompts: a JSON file of templates in place of LongBench's.
        question_known: whether the question is part of the prompt that is compressed; if not, the document alone is.
        observe: if not, the text in the question's place that observes the document; empty for the document's own end;
            `None` for what a method asks for: the document's own repetition, or `OBSERVATION`.
        data_dir: a folder with the benchmarks' files; for perplexity, a text file or a folder of them.
        documents: how many texts; `None` for all that are long enough.
        skip: how many of those to leave out first.
        continuation: tokens at a text's end that are predicted, after those before them have been compressed.
        options: parameters of the methods, `None` for their defaults; a method without a parameter ignores it.
        decoding: `decode_budget` and `buffer`, as for `headprof.make_plan`; what is missing keeps its default. They
            matter to perplexity alone: what a model answers is kept.
        step: how decode steps are run, as for `headprof.compressed`; answers are the same.
        surrogate: file of the surrogate; `None` to find the model's own, for methods that judge rows by one.
        profile: file of the head profile if the user named one: a surrogate is looked for beside it first.
        keep: patterns, as for `compress_document`: every head keeps the tokens of all their matches in what is
            compressed. Each must match in some question.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    budgets: tuple[str, ...]
    probes: int = PRESETS["quick"].probes
    lengths: tuple[int, ...] | None = None
    families: tuple[str, ...] | None = None
    seed: int = 1000
    limit: int | None = None
    max_prompt: int | None = None
    prompts: Path | None = None
    question_known: bool = True
    observe: str | None = None
    data_dir: Path | None = None
    documents: int | None = 20
    skip: int = 0
    continuation: int = 512
    options: dict[str, Any] = field(default_factory=dict)
    decoding: dict[str, Any] = field(default_factory=dict)
    step: str = "auto"
    surrogate: Path | None = None
    profile: Path | None = None
    keep: tuple[str, ...] = ()

    def check(self, ranks: int = 1) -> bool:
        """Find mistakes that need no model; returns whether a head profile is needed.

        Args:
            ranks: how many processes are to hold it together.

        Raises:
            UsageError: an unknown task or method, a budget or a pattern that cannot be read, no texts for perplexity,
                a file that is not there or not needed, or a method that so many processes cannot do.
        """
        check_patterns(self.keep)
        if not self.all_tasks or not self.methods:
            raise UsageError("There is nothing to evaluate: name at least one task and one method.")
        if "perplexity" in self.all_tasks:
            self.perplexity_settings()
        if MULTI in self.all_tasks and self.question_known:
            raise UsageError(
                f"{MULTI} asks many questions of one compressed document, none of which is known before: add "
                "--query-agnostic."
            )
        own = [task for task in self.all_tasks if task in OWN_TASKS]
        if self.probes < len(own):
            raise UsageError(f"{self.probes} probes do not go round {len(own)} tasks: ask for more with --probes.")
        if self.families and not own:
            *others, last = OWN_TASKS
            raise UsageError(
                f"Families are those of {', '.join(others)} and {last}: add one of these tasks, or leave --families "
                "away."
            )
        if self.prompts is not None and not self.prompts.is_file():
            raise UsageError(f"There is no file {self.prompts}: give a JSON file {{task: template}} with --prompts.")
        observe = self.observe or ""
        if observe != observe.encode("utf-8", "replace").decode("utf-8"):
            raise UsageError("The text to observe with is not UTF-8: give another with --observe.")
        if self.observe is not None and self.question_known:
            raise UsageError("A known question observes by itself: leave --observe away, or add --query-agnostic.")
        if self.observe is not None and "perplexity" in self.all_tasks:
            raise UsageError("For perplexity no text is read in a question's place: leave --observe away.")
        for budget in map(Budget.parse, self.budgets):
            for method in self.methods:
                find_method(method).check_budget(budget, method)
        for name, parameters in deal_options(self.methods, self.options).items():
            check_ranks(find_method(name, **parameters), f"The method {name!r}", ranks)
        methods = [find_method(method) for method in self.methods]
        check_named_files(methods, self.profile, self.surrogate)
        return any(method.budget.profile_scores for method in methods)

    @property
    def all_tasks(self) -> list[str]:
        """The tasks by their own names, each once.

        Raises:
            UsageError: there is no such task.
        """
        own = (*OWN_TASKS, "perplexity")
        found: list[str] = []
        for name in self.tasks:
            if name not in own and name.partition("/")[0] not in BENCHMARKS:
                raise UsageError(f"There is no task {name!r}: choose among {', '.join((*own, *BENCHMARKS))}.")
            found += [name] if name in own else expand([name])
        return list(dict.fromkeys(found))

    @property
    def has_shares(self) -> bool:
        """Whether a budget is a share of the prompt."""
        return any(Budget.parse(budget).unit.startswith("share") for budget in self.budgets)

    def probes_of(self, task: str, lengths: tuple[int, ...]) -> int:
        """How many of the probes are of `task`: an even share, within the limit."""
        asked = [each for each in self.all_tasks if each in OWN_TASKS]
        share, rest = divmod(self.probes, len(asked))
        share += asked.index(task) < rest
        return share if self.limit is None else min(share, self.limit * len(lengths))

    def task_request(self, loaded: LoadedModel) -> TaskRequest:
        """What the benchmarks are asked for."""
        return TaskRequest(
            self.data_dir,
            self.limit,
            self.lengths or (),
            loaded.tokenizer,
            self.seed,
            self.prompts,
            loaded.max_positions,
            self.question_known,
        )

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
        documents = self.documents if self.limit is None else min(self.limit, self.documents or self.limit)
        return PerplexitySettings(
            lengths[0] - self.continuation, self.continuation, documents, self.skip, chunk=buffer or BUFFER
        )

    def observer_ids(self, loaded: LoadedModel) -> list[int]:
        """Tokens that observe the document in the question's place; empty if the question is known.

        Documents that are judged by their own repetition have others (`Asker.repeat`).
        """
        return [] if self.question_known else text_observers(PromptEncoder(loaded.tokenizer), self.observe)

    @property
    def repeats(self) -> bool:
        """Whether some document is judged by its own repetition."""
        return not self.question_known and any(repeats(find_method(name), self.observe) for name in self.methods)

    def candidates(self, loaded: LoadedModel, profile: HeadProfile | None) -> list[Candidate]:
        """Every method at every budget, the full cache once."""
        made = []
        surrogate = self._surrogate(loaded)
        budgets: dict[Budget, str] = {}
        for text in self.budgets:
            budgets.setdefault(Budget.parse(text), text)
        options = deal_options(self.methods, self.options)
        for name in dict.fromkeys(self.methods):
            method = find_method(name)
            for budget in [""] if method.keeps_everything else budgets.values():
                plan = make_plan(
                    loaded.model,
                    profile,
                    method=name,
                    budget=budget or 1,
                    surrogate=surrogate,
                    tokenizer=loaded.tokenizer,
                    **options[name],
                    **self.decoding,
                )
                made.append(Candidate(name, budget, plan))
        return made

    def _surrogate(self, loaded: LoadedModel) -> Surrogate | None:
        """By which some of the methods judge rows, if there are such.

        Raises:
            ProfileError: there is none, or it is for another model.
        """
        if not any(find_method(name).importance.needs_surrogate for name in self.methods):
            return None
        return load_surrogate(loaded, self.surrogate, self.profile)

    def key(self, loaded: LoadedModel, profile: HeadProfile | None) -> dict[str, Any]:
        """Everything that an answer depends on, as JSON has it; how many questions are asked is left out."""
        settings = {
            name: str(value) if isinstance(value, Path | Budget) else value
            for name, value in asdict(self).items()
            if name not in _APART
        }
        surrogate = self._surrogate(loaded)
        return {
            "version": __version__,
            "model": loaded.name,
            "fingerprint": loaded.shape.to_dict(),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "weights": weights_fingerprint(loaded.model),
            "tokenizer": tokenizer_fingerprint(loaded.tokenizer),
            "profile": profile.digest() if profile is not None else "",
            **({} if surrogate is None else {"surrogate": surrogate.digest()}),
            **({"keep": list(self.keep)} if self.keep else {}),  # answers of before there was such a thing are the same
            **{name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
            "prompts": None if self.prompts is None else sha256(self.prompts.read_bytes()).hexdigest(),
            "observe": OBSERVATION if self.observe is None and not self.repeats else self.observe,
            "decoding": {name: str(value) for name, value in self.decoding.items()},
            # What goes around prompts without a chat template, which the tokenizer's fingerprint does not tell.
            **({} if loaded.tokenizer.chat_template else {"frame": "question and answer"}),
        }
