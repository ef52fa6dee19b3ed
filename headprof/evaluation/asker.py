"""Questions under many methods and budgets, from one prefill each, or one for each kind of observers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from headprof.compression.cache.head_cache import FanOutCache, HeadCache, stack_caches
from headprof.compression.continuing import ReferenceRun, fed_reference, said_greedily
from headprof.compression.observers import repeating_observers, repeats
from headprof.compression.plan import CompressionPlan
from headprof.compression.session import attending_ragged, prefill
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
    def ask(self, question: Question) -> list[Answer]:
        """The answers under each candidate, in order."""
        prompt, tail = self._split(question)
        with attending_ragged(self.loaded.model, step=self.step):
            caches = self._read(prompt, question)
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
                cache_bytes=caches[index].nbytes,
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
        """
        Raises:
            UsageError: a method is to be judged by the repetition of a document that is too long for it.
        """
        if any(self._repeats(candidate) for candidate in self.candidates):
            self._repetition(self._split(question)[0])

    def _repeats(self, candidate: Candidate) -> bool:
        return self.repeat and not self.question_known and repeats(candidate.plan.method, None)

    def _repetition(self, prompt: list[int]) -> list[int]:
        return repeating_observers(self.loaded, PromptEncoder(self.loaded.tokenizer), prompt)

    def _read(self, prompt: list[int], question: Question) -> list[HeadCache]:
        """A filled cache for each candidate; those that have the same observers are filled together."""
        repeated = [self._repeats(candidate) for candidate in self.candidates]
        caches: dict[int, HeadCache] = {}
        for repeat in dict.fromkeys(repeated):
            observers = self._repetition(prompt) if repeat else [] if self.question_known else [*self.observer_ids]
            numbers = [number for number, its in enumerate(repeated) if its == repeat]
            plans = [self._plan(number, len(observers)) for number in numbers]
            kind = (question.task, f"{question.group}, repeated" if repeat else question.group)
            caches |= zip(numbers, self._filled(plans, prompt, observers, kind), strict=True)
        self.sharing.questions += 1
        return [caches[number] for number in range(len(repeated))]

    def _plan(self, number: int, observers: int) -> CompressionPlan:
        """A candidate's plan for so many observers, made once, since it remembers what it has allotted."""
        if (number, observers) not in self._plans:
            self._plans[number, observers] = self.candidates[number].plan.for_observers(observers)
        return self._plans[number, observers]

    def _filled(
        self, plans: list[CompressionPlan], prompt: list[int], observers: list[int], kind: tuple[str, str]
    ) -> list[HeadCache]:
        """A cache for each plan, from one prefill; a prompt of each kind is read alone, too, to see what that takes."""
        ids = torch.tensor([[*prompt, *observers]], device=self.loaded.device)
        together = FanOutCache([HeadCache(plan) for plan in plans])
        together.expect_observers(len(observers))
        self.sharing.seconds += self._timed(lambda: prefill(self.loaded.model, ids, together))
        self.sharing.prompt_tokens += ids.shape[1]
        self.sharing.candidate_tokens += len(plans) * ids.shape[1]
        if kind not in self._sampled:
            self._sampled.add(kind)
            self.sharing.sampled_seconds += self._timed(lambda: self._prefill_alone(ids))
            self.sharing.sampled_tokens += ids.shape[1]
        return together.caches

    def _prefill_alone(self, ids: torch.Tensor) -> None:
        self.loaded.model(ids, use_cache=True, logits_to_keep=1)

    def _timed(self, work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        if self.loaded.device.type == "cuda":
            torch.cuda.synchronize(self.loaded.device)
        return time.perf_counter() - start

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
