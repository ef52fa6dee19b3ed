"""Questions under many methods and budgets, from one prefill each, or one for each kind of observers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from headprof.compression.cache.head_cache import HeadCache, stack_caches
from headprof.compression.continuing import ReferenceRun, fed_reference, said_greedily
from headprof.compression.filling import read_document_into
from headprof.compression.generation import held_bytes
from headprof.compression.observers import Observers, repeating_observers, repeats
from headprof.compression.plan import CompressionPlan
from headprof.compression.protected import ProtectedTokens
from headprof.compression.session import attending_ragged, make_plan
from headprof.evaluation.methods_at_budgets import Candidate
from headprof.evaluation.questions import Grading, Question
from headprof.evaluation.results import Answer
from headprof.models.loading import LoadedModel
from headprof.models.prompt_encoder import PromptEncoder


@dataclass
class Sharing:
    """What it saved that candidates share prefills.

    Attributes:
        questions: how many were asked.
        prompt_tokens: of all their prompts; those that are read with several kinds of observers count as often.
        seconds: that reading the prompts took, all compressions included.
        sampled_tokens, sampled_seconds: of the prompts that were read once more, by themselves, to have something to
            compare with.
        candidate_tokens: of all prompts, each as often as caches were filled from it.
    """

    questions: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0
    sampled_tokens: int = 0
    sampled_seconds: float = 0.0
    candidate_tokens: int = 0

    def __add__(self, other: Sharing) -> Sharing:
        return Sharing(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def seconds_apart(self) -> float:
        """What the prefills would have taken, one for each candidate, without any compression."""
        if not self.sampled_tokens:
            return 0.0
        return self.candidate_tokens * self.sampled_seconds / self.sampled_tokens


@dataclass
class Asker:
    """Asks one question after the other.

    If the question is known, the prompt that is compressed ends with it and the start of the model's turn; else the
    document alone is compressed, and the question read afterwards. Either way at least one token is read after the
    compression and before the answer, the last of the prompt if need be: so each token of the answer, the first one
    too, depends on what the cache still holds. What comes after the prompt is kept, as in the papers, however long it
    is.

    Attributes:
        loaded: the model that answers.
        candidates: methods at budgets; the divergence is taken from the one with the method `full`, if there is one.
        question_known: whether the question is part of what is compressed.
        observer_ids: if not, tokens after the document that observe it and are not kept.
        step: how decode steps are run, as for `headprof.compressed`.
        repeat: whether methods that ask for it are judged by the document's repetition in place of `observer_ids`.
        sharing: what reading the prompts took.
    """

    loaded: LoadedModel
    candidates: Sequence[Candidate]
    question_known: bool = True
    observer_ids: Sequence[int] = ()
    step: str = "auto"
    repeat: bool = False
    sharing: Sharing = field(default_factory=Sharing)
    _sampled: set[tuple[str, str]] = field(default_factory=set)
    _plans: dict[tuple[int, int], CompressionPlan] = field(default_factory=dict)

    @torch.inference_mode()
    def ask(self, *questions: Question, protected: ProtectedTokens | None = None) -> list[Answer]:
        """The answers under each candidate, in order; to several questions about one document, one after the other.

        What they have in common is read and compressed once; each is asked of copies of that. Several can be asked
        only if the question is not known.

        Args:
            questions: what to ask.
            protected: tokens of what is compressed that every head keeps.
        """
        if self.question_known and len(questions) > 1:
            raise ValueError("a cache that was compressed for one question is not asked others")
        with attending_ragged(self.loaded.model, step=self.step):
            caches = self.read(self._split(questions[0])[0], (questions[0].task, questions[0].group), protected)
            return [answer for question in questions for answer in self._answers(question, caches)]

    def _answers(self, question: Question, caches: list[HeadCache]) -> list[Answer]:
        """The answers to a question, each from a copy of a candidate's cache."""
        tail = self._split(question)[1]
        reference = self._reference(stack_caches(caches), tail, question.reference_ids)
        if question.grading is None:
            texts, scores = [""] * len(caches), [float(right) for right in reference.right]
        else:
            texts = self._generate(stack_caches(caches), tail, question.grading)
            scores = [question.grading.score(text) for text in texts]
        return [
            Answer(
                task=question.task,
                question=question.name,
                group=question.group,
                method=candidate.method,
                budget=candidate.budget,
                score=scores[index],
                divergence=reference.divergence[index] if reference.divergence else None,
                agreement=reference.agreement[index] if reference.agreement else None,
                text=texts[index],
                prompt_tokens=caches[index].get_seq_length(),
                cache_bytes=held_bytes(self.loaded, caches[index]),
                second_tier_bytes=caches[index].second_tier_bytes,
                depth=question.depth,
                family=question.family,
            )
            for index, candidate in enumerate(self.candidates)
        ]

    def _split(self, question: Question) -> tuple[list[int], list[int]]:
        """What is compressed, and what is read from then on, up to the answer."""
        prompt, tail = [*question.document_ids], [*question.asked_ids, *question.reply_ids]
        if self.question_known:
            prompt, tail = [*prompt, *question.asked_ids], [*question.reply_ids]
        if not tail:
            prompt, tail = prompt[:-1], prompt[-1:]
        return prompt, tail

    def compressed_length(self, question: Question) -> int:
        """Tokens of a question that are compressed."""
        return len(self._split(question)[0])

    def check(self, question: Question) -> None:
        """As `check_prompt`, for what is compressed of a question."""
        self.check_prompt(self._split(question)[0])

    def check_prompt(self, prompt: list[int]) -> None:
        """
        Raises:
            UsageError: a method is to be judged by the repetition of a document that is too long for it.
        """
        if any(self._repeats(candidate) for candidate in self.candidates):
            self._observers(prompt)

    def _repeats(self, candidate: Candidate) -> bool:
        return self.repeat and not self.question_known and repeats(candidate.plan.method, None)

    def _observers(self, prompt: list[int]) -> list[Observers]:
        """Those of each candidate; the same object for candidates that have the same."""
        text = Observers(() if self.question_known else tuple(self.observer_ids))
        repeating: dict[int | None, Observers] = {}
        for candidate in filter(self._repeats, self.candidates):
            method = candidate.plan.method
            if method.importance.segment not in repeating:
                encoder = PromptEncoder(self.loaded.tokenizer)
                made = repeating_observers(self.loaded, encoder, prompt, method)
                same = (each for each in repeating.values() if each == made)
                repeating[method.importance.segment] = next(same, made)
        return [
            repeating[candidate.plan.method.importance.segment] if self._repeats(candidate) else text
            for candidate in self.candidates
        ]

    def read(self, prompt: list[int], of: tuple[str, str], protected: ProtectedTokens | None = None) -> list[HeadCache]:
        """A filled cache for each candidate; those that have the same observers are filled together.

        Args:
            prompt: what is compressed.
            of: task and group, of which one prompt is read once more to see what that takes.
            protected: tokens that every head keeps, as far as the prompt has them.
        """
        protected = protected and protected.before(len(prompt))
        every = self._observers(prompt)
        caches: dict[int, HeadCache] = {}
        for observers in {id(each): each for each in every}.values():
            numbers = [number for number, its in enumerate(every) if its is observers]
            plans = [self._plan(number, len(observers)) for number in numbers]
            how = f", repeated in {len(observers.segments) or 1}" if self._repeats(self.candidates[numbers[0]]) else ""
            kind = (of[0], f"{of[1]}{how}")
            filled = self._filled([HeadCache(plan).protect(protected) for plan in plans], prompt, observers, kind)
            caches |= zip(numbers, filled, strict=True)
        self.sharing.questions += 1
        return [caches[number] for number in range(len(every))]

    def _plan(self, number: int, observers: int) -> CompressionPlan:
        """A candidate's plan for so many observers, made once, since it remembers what it has allotted."""
        if (number, observers) not in self._plans:
            self._plans[number, observers] = self.candidates[number].plan.for_observers(observers)
        return self._plans[number, observers]

    def _filled(
        self, caches: list[HeadCache], prompt: list[int], observers: Observers, kind: tuple[str, str]
    ) -> list[HeadCache]:
        """The caches, from one prefill; a prompt of each kind is read alone, too, to see what that takes."""
        start = self._now()
        readings = read_document_into(self.loaded.model, caches, prompt, observers)
        self.sharing.seconds += self._now() - start
        self.sharing.prompt_tokens += sum(reading.tokens for reading in readings)
        self.sharing.candidate_tokens += sum(reading.tokens * reading.caches for reading in readings)
        if kind not in self._sampled:
            self._sampled.add(kind)
            ids = torch.tensor([[*prompt, *observers.ids]], device=self.loaded.device)
            start = self._now()
            self._prefill_alone(ids, observers)
            self.sharing.sampled_seconds += self._now() - start
            self.sharing.sampled_tokens += ids.shape[1]
        return caches

    def _prefill_alone(self, ids: torch.Tensor, observers: Observers) -> None:
        cache = None
        if observers.segments:  # which no other cache knows; this one keeps all of the document
            cache = HeadCache(make_plan(self.loaded.model, method="full"))
            cache.expect_observers(len(observers), observers.segments)
        self.loaded.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def _now(self) -> float:
        if self.loaded.device.type == "cuda":
            torch.cuda.synchronize(self.loaded.device)
        return time.perf_counter()

    def _reference(self, stack: HeadCache, tail: list[int], reference: Sequence[int]) -> ReferenceRun:
        """Feed the right answer to each entry of the stack, and see what they would have said."""
        full = next((n for n, candidate in enumerate(self.candidates) if candidate.method == "full"), None)
        run = ReferenceRun(stack.batch_size, full)
        for logits, wanted in fed_reference(self.loaded, stack, tail, reference):
            run.add(logits, wanted)
        return run

    def _generate(self, stack: HeadCache, tail: list[int], grading: Grading) -> list[str]:
        """What each entry of the stack goes on to say, greedily."""
        said = said_greedily(self.loaded, stack, tail, grading.max_new_tokens, grading.is_complete)
        return [text for _, text in said]
