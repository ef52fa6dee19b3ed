"""An evaluation: all questions under all candidates, kept on disk as they are answered, shared among processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

from headprof.compression.protected import ProtectedTokens
from headprof.errors import UsageError
from headprof.evaluation.asker import Asker, Sharing
from headprof.evaluation.journal import Journal, QuestionKey, Results
from headprof.evaluation.kept_tokens import KeptTokens
from headprof.evaluation.methods_at_budgets import Candidate
from headprof.evaluation.multi import FirstQuestions, MultiDocuments
from headprof.evaluation.perplexity import Document, Loss, measure_perplexity, select_documents, tabulate_losses
from headprof.evaluation.questions import ExampleQuestions, ProbeQuestions, Question, digest_of
from headprof.evaluation.request import EvalRequest
from headprof.evaluation.results import MULTI, PROBE_TASKS, Answer, Evaluation, tabulate
from headprof.evaluation.tasks import TASKS, Example
from headprof.evaluation.tasks.example import DEFAULT_LENGTHS
from headprof.evaluation.texts import read_texts
from headprof.models.loading import LoadedModel
from headprof.profile.head_profile import HeadProfile
from headprof.utils.resuming import KeptResults
from headprof.utils.run_record import device_name, library_versions, machine, today
from headprof.utils.team import Team

ROUND = 4
"""Questions for each process between two meetings of a team."""


class RunnableTask(Protocol):
    """What is asked of a task, by number."""

    def __len__(self) -> int: ...

    def run(self, number: int) -> Results:
        """What the question comes to under each candidate."""
        ...

    def digest(self, number: int) -> str:
        """Of the data that the question is made from; empty if it is made from settings alone."""
        ...


@dataclass
class QuestionTask:
    """Questions that are answered; `protected` are the tokens that every head keeps of each, where there are such."""

    questions: ProbeQuestions | ExampleQuestions
    asker: Asker
    protected: Mapping[int, ProtectedTokens] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.questions)

    def run(self, number: int) -> Results:
        return self.asker.ask(self.questions[number], protected=self.protected.get(number))

    def digest(self, number: int) -> str:
        return self.questions.digest(number)


@dataclass
class MultiTask:
    """Documents, about each of which many questions are answered; `protected` as in `QuestionTask`."""

    documents: MultiDocuments
    asker: Asker
    protected: Mapping[int, ProtectedTokens] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.documents)

    def run(self, number: int) -> Results:
        return self.asker.ask(*self.documents[number], protected=self.protected.get(number))

    def digest(self, number: int) -> str:
        """Empty: needles follow from their settings."""
        return ""


@dataclass
class PerplexityTask:
    """Texts whose ends are predicted.

    With an `asker` their beginnings are read as documents are about which there is no question yet: judged by their own
    repetition where a method asks for that, by their ends where it does not.
    """

    loaded: LoadedModel
    documents: Sequence[Document]
    candidates: Sequence[Candidate]
    chunk: int
    asker: Asker | None = None

    def __len__(self) -> int:
        return len(self.documents)

    def run(self, number: int) -> Results:
        document, asker = self.documents[number], self.asker
        fill = None if asker is None else partial(asker.read, of=("perplexity", ""), protected=document.protected)
        losses = measure_perplexity(self.loaded.model, [document], self.candidates, chunk=self.chunk, fill=fill)
        return [replace(loss, document=number) for loss in losses]

    def digest(self, number: int) -> str:
        return digest_of(self.documents[number])


class EvalRun:
    """The work of `headprof eval` for a model and a request.

    Args:
        loaded: the model.
        profile: its head profile, for methods that need one.
        request: what to do.
        output: a folder for `answers.jsonl`, to which each answer is written at once; `None` to keep none.
        resume: begin with what that file holds.
        team: the processes that share the work; each must do the same.
        on_progress: called with the task, the number of questions done and that of all, by process 0.

    Raises:
        UsageError: the request asks for something that does not exist, does not fit, or cannot be had; what is to be
            kept is nowhere, or more than a budget; `output` holds the answers of another run.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        profile: HeadProfile | None,
        request: EvalRequest,
        *,
        output: Path | None = None,
        resume: bool = False,
        team: Team | None = None,
        on_progress: Callable[[str, int, int], None] = lambda task, done, total: None,
    ):
        self.loaded, self.profile, self.request = loaded, profile, request
        self.team, self.on_progress = team or Team(), on_progress
        observers = request.observer_ids(loaded)
        candidates = request.candidates(loaded, profile)
        self.asker = Asker(
            loaded, candidates, request.question_known, observers, request.step, repeat=request.observe is None
        )
        self._protecting = KeptTokens(request.keep)
        self.tasks = {name: self._task(name) for name in request.all_tasks}
        self._protecting.check(list(self.tasks))
        results = [(candidate.method, candidate.budget) for candidate in candidates]
        journal = None
        if output is not None and self.team.rank == 0:
            journal = Journal(output / "answers.jsonl", self._digest, results)
        self.kept: KeptResults[QuestionKey, Results] = KeptResults(request.key(loaded, profile), journal)
        self._resume = resume

    def _task(self, name: str) -> RunnableTask:
        request, loaded = self.request, self.loaded
        if name == "perplexity":
            assert request.data_dir is not None
            settings = request.perplexity_settings()
            texts = read_texts(request.data_dir)
            documents = select_documents(loaded.tokenizer, texts, settings, loaded.max_positions, self._protecting)
            self._check(settings.prefix)
            for document in documents:
                if document.protected is not None:
                    self._check(settings.prefix, f"The text {document.name}: ", document.protected)
            asker = replace(self.asker, observer_ids=(), sharing=Sharing()) if request.repeats else None
            if asker is not None:
                asker.check_prompt(list(documents[0].prefix[:-1]))
            return PerplexityTask(loaded, documents, self.asker.candidates, settings.chunk, asker)
        lengths = tuple(dict.fromkeys(request.lengths or DEFAULT_LENGTHS))
        if name == MULTI:
            number = request.probes_of(name, lengths)
            asked = MultiDocuments(loaded, number, lengths, request.families, request.seed)
            return MultiTask(asked, self.asker, self._checked(name, FirstQuestions(asked)))
        if name in PROBE_TASKS:
            number = request.probes_of(name, lengths)
            probes = ProbeQuestions(loaded, name, number, lengths, request.families, request.seed)
            return QuestionTask(probes, self.asker, self._checked(name, probes))
        examples = by_turns(TASKS[name].examples(request.task_request(loaded)))
        questions = ExampleQuestions(loaded, examples, request.max_prompt, locates=bool(request.keep))
        questions.check()
        return QuestionTask(questions, self.asker, self._checked(name, questions))

    def _checked(self, name: str, questions: Sequence[Question]) -> dict[int, ProtectedTokens]:
        """What every head keeps of each question, where it does, once the budgets can be met; raises `UsageError`.

        If nothing tells questions apart, only the first one is looked at.
        """
        shares = self.request.has_shares  # of what is compressed: the shortest has the smallest budget
        all_differ = shares or self.request.repeats or self.request.keep
        lengths, found = [], {}
        for number in range(len(questions) if all_differ else 1):
            question = questions[number]
            lengths.append(self._checked_length(name, question))
            if (protected := self._protecting.find(question.texts, lengths[-1])) is not None:
                self._check(lengths[-1], f"Question {question.name} of {name}: ", protected)
                found[number] = protected
        shortest = min(lengths)
        self._check(shortest, f"The shortest text of {name} to be compressed has {shortest} tokens: " if shares else "")
        return found

    def _checked_length(self, name: str, question: Question) -> int:
        """Tokens of a question that are compressed, if they can be repeated where they have to; raises `UsageError`."""
        try:
            self.asker.check(question)
        except UsageError as error:
            raise UsageError(f"A text of {name} is too long for --query-agnostic: {error}") from None
        return self.asker.compressed_length(question)

    def _check(self, length: int, where: str = "", protected: ProtectedTokens | None = None) -> None:
        """Budgets that cannot be met are errors before any work; raises `UsageError`."""
        for candidate in self.asker.candidates:
            try:
                candidate.plan.check(length, protected)
            except UsageError as error:
                raise UsageError(f"{where}{error}") from None

    def _digest(self, question: QuestionKey) -> str:
        name, number = question
        return self.tasks[name].digest(number) if name in self.tasks and number < len(self.tasks[name]) else ""

    def evaluate(self, command: str = "") -> Evaluation:
        """Ask everything that has no answer yet; the outcome does not depend on interruptions or on the team's size.

        Args:
            command: noted in the outcome.

        Raises:
            InterruptedRun: Ctrl-C; what there is has been kept.
        """
        self.kept.start(self._resume, self.team)
        with self.kept.keeping():
            self._work()
        return self._outcome(command)

    @cached_property
    def questions(self) -> list[QuestionKey]:
        """All questions, in order."""
        return [(name, number) for name, task in self.tasks.items() for number in range(len(task))]

    def _work(self) -> None:
        missing = [question for question in self.questions if question not in self.kept.results]
        step = 1 if self.team.size == 1 else ROUND * self.team.size
        self._report(missing)
        for start in range(0, len(missing), step):
            mine: dict[QuestionKey, Results] = {}
            for name, number in self.team.claim(missing[start : start + step]):
                mine[name, number] = self.tasks[name].run(number)
            for theirs in self.team.gather(mine):
                self.kept.add(theirs)
            self._report(missing[start + step :])
        self.asker.sharing = sum(self.team.gather(self.asker.sharing), Sharing())

    def _report(self, left: Sequence[QuestionKey]) -> None:
        if self.team.rank == 0:
            name = left[0][0] if left else self.questions[-1][0]
            self.on_progress(name, len(self.questions) - len(left), len(self.questions))

    def _outcome(self, command: str) -> Evaluation:
        answers: list[Answer] = []
        losses: list[Loss] = []
        for question in self.questions:
            for result in self.kept.results[question]:
                (answers if isinstance(result, Answer) else losses).append(result)  # type: ignore[arg-type]
        return Evaluation(
            about=self._about(command),
            answers=answers,
            losses=losses,
            cells=tabulate(answers),
            perplexities=tabulate_losses(losses),
        )

    def _about(self, command: str) -> dict[str, Any]:
        key = self.kept.key
        sharing = self.asker.sharing
        candidates = len(self.asker.candidates)
        return {
            "command": command,
            "model": self.loaded.name,
            "dtype": key["dtype"],
            "device": device_name(self.loaded.device),
            "machine": machine(),
            "date": today(),
            "seed": self.request.seed,
            "versions": library_versions(),
            "question_known": self.request.question_known,
            "profile": key["profile"],
            "questions": {name: len(task) for name, task in self.tasks.items()},
            "settings": key,
            "sharing": asdict(sharing) | {"candidates": candidates, "seconds_apart": sharing.seconds_apart()},
        }


def by_turns(examples: Iterable[Example]) -> list[Example]:
    """The first example of each group, then the second of each ...: fewer examples are the beginning of more."""
    seen: Counter[str] = Counter()
    turns = []
    for example in examples:
        seen[example.group] += 1
        turns.append((seen[example.group], example))
    return [example for _, example in sorted(turns, key=itemgetter(0))]
