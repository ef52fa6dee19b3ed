"""Questions under many methods and budgets, from one prefill each, or one for each kind of observers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from headprof.compression.cache.head_cache import FanOutCache, HeadCache, RankingCache, stack_caches
from headprof.compression.observers import Observers, repeating_observers, repeats
from headprof.compression.plan import CompressionPlan
from headprof.compression.session import attending_ragged, make_plan, prefill
from headprof.evaluation.methods_at_budgets import Candidate
from headprof.evaluation.questions import Grading, Question
from headprof.evaluation.results import Answer
from headprof.models.decoder import end_tokens
from headprof.models.loading import LoadedModel, require_finite
from headprof.models.prompt_encoder import PromptEncoder

MOST_LOGITS = 2**25
"""Numbers that the logits of one forward pass over the reference answer may have, unless one token has more."""


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
    def ask(self, *questions: Question) -> list[Answer]:
        """The answers under each candidate, in order; to several questions about one document, one after the other.

        What they have in common is read and compressed once; each is asked of copies of that. Several can be asked
        only if the question is not known.
        """
        if self.question_known and len(questions) > 1:
            raise ValueError("a cache that was compressed for one question is not asked others")
        with attending_ragged(self.loaded.model, step=self.step):
            caches = self._read(self._split(questions[0])[0], questions[0])
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
            self._observers(self._split(question)[0])

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

    def _read(self, prompt: list[int], question: Question) -> list[HeadCache]:
        """A filled cache for each candidate; those that have the same observers are filled together."""
        every = self._observers(prompt)
        caches: dict[int, HeadCache] = {}
        for observers in {id(each): each for each in every}.values():
            numbers = [number for number, its in enumerate(every) if its is observers]
            plans = [self._plan(number, len(observers)) for number in numbers]
            how = f", repeated in {len(observers.segments) or 1}" if self._repeats(self.candidates[numbers[0]]) else ""
            kind = (question.task, f"{question.group}{how}")
            caches |= zip(numbers, self._filled(plans, prompt, observers, kind), strict=True)
        self.sharing.questions += 1
        return [caches[number] for number in range(len(every))]

    def _plan(self, number: int, observers: int) -> CompressionPlan:
        """A candidate's plan for so many observers, made once, since it remembers what it has allotted."""
        if (number, observers) not in self._plans:
            self._plans[number, observers] = self.candidates[number].plan.for_observers(observers)
        return self._plans[number, observers]

    def _filled(
        self, plans: list[CompressionPlan], prompt: list[int], observers: Observers, kind: tuple[str, str]
    ) -> list[HeadCache]:
        """A cache for each plan, from one prefill; a prompt of each kind is read alone, too, to see what that takes."""
        ids = torch.tensor([[*prompt, *observers.ids]], device=self.loaded.device)
        caches = [HeadCache(plan) for plan in plans]
        judged = [cache for cache in caches if len(observers) and cache.before_reading(len(prompt)) is not None]
        ranking = FanOutCache(judged).before_reading(len(prompt)) if judged else None
        together = FanOutCache([cache for cache in caches if cache not in judged], ranking)
        together.expect_observers(len(observers), observers.segments)
        self.sharing.seconds += self._timed(lambda: prefill(self.loaded.model, ids, together))
        self.sharing.prompt_tokens += ids.shape[1]
        self.sharing.candidate_tokens += len(plans) * ids.shape[1]
        if ranking is not None:
            self.sharing.seconds += self._timed(lambda: self._fill_judged(judged, ranking, ids[:, : len(prompt)]))
            self.sharing.prompt_tokens += len(prompt)
            self.sharing.candidate_tokens += len(judged) * len(prompt)
        if kind not in self._sampled:
            self._sampled.add(kind)
            self.sharing.sampled_seconds += self._timed(lambda: self._prefill_alone(ids, observers))
            self.sharing.sampled_tokens += ids.shape[1]
        return caches

    def _fill_judged(self, caches: list[HeadCache], ranking: RankingCache, ids: torch.Tensor) -> None:
        """Read a document once more, without observers, for methods that rank the rows of all layers together."""
        alone = FanOutCache(caches)
        alone.judged_by(ranking)
        prefill(self.loaded.model, ids, alone)

    def _prefill_alone(self, ids: torch.Tensor, observers: Observers) -> None:
        cache = None
        if observers.segments:  # which no other cache knows; this one keeps all of the document
            cache = HeadCache(make_plan(self.loaded.model, method="full"))
            cache.expect_observers(len(observers), observers.segments)
        self.loaded.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def _timed(self, work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        if self.loaded.device.type == "cuda":
            torch.cuda.synchronize(self.loaded.device)
        return time.perf_counter() - start

    def _reference(self, stack: HeadCache, tail: list[int], reference: Sequence[int]) -> _ReferenceRun:
        """Feed the right answer to each entry of the stack, and see what they would have said."""
        entries = stack.head_layers[0].batch_size
        full = next((n for n, candidate in enumerate(self.candidates) if candidate.method == "full"), None)
        run = _ReferenceRun(entries, full)
        ids = torch.tensor([[*tail, *reference[:-1]]], device=self.loaded.device).expand(entries, -1)
        wanted = torch.tensor(reference, device=self.loaded.device)
        most = max(1, MOST_LOGITS // (entries * self.loaded.shape.vocab_size))
        start, first = 0, len(tail) - 1  # the first token that predicts one of the answer
        for done in range(0, len(reference), most):
            count = min(most, len(reference) - done)
            stop = first + done + count
            logits = self.loaded.model(
                ids[:, start:stop], past_key_values=stack, use_cache=True, logits_to_keep=count
            ).logits
            run.add(logits, wanted[done : done + count])
            start = stop
        return run

    def _generate(self, stack: HeadCache, tail: list[int], grading: Grading) -> list[str]:
        """What each entry of the stack goes on to say, greedily; those that are done leave the stack in good time."""
        tokenizer, ends = self.loaded.tokenizer, end_tokens(self.loaded.model, self.loaded.tokenizer)
        said: list[list[int]] = [[] for _ in range(stack.head_layers[0].batch_size)]
        texts = [""] * len(said)
        running = list(range(len(said)))  # whose answer each entry of the stack is
        finished: set[int] = set()
        fed = torch.tensor([tail], device=self.loaded.device).expand(len(said), -1)
        for _ in range(grading.max_new_tokens):
            logits = self.loaded.model(fed, past_key_values=stack, use_cache=True, logits_to_keep=1).logits
            chosen = logits[:, -1].argmax(dim=-1)
            for number, token in zip(running, chosen.tolist(), strict=True):
                if number in finished:
                    continue
                if token in ends:
                    finished.add(number)
                    continue
                said[number].append(token)
                texts[number] = tokenizer.decode(said[number], skip_special_tokens=True)
                if grading.is_complete(texts[number]):
                    finished.add(number)
            kept = [entry for entry, number in enumerate(running) if number not in finished]
            if not kept:
                break
            if len(kept) <= len(running) // 2:
                indices = torch.tensor(kept)
                stack.batch_select_indices(indices)
                chosen, running = chosen[indices.to(chosen.device)], [running[entry] for entry in kept]
            fed = chosen[:, None]
        return texts


class _ReferenceRun:
    """What each entry of a stack makes of the right answer, and how far it is from entry `full`."""

    def __init__(self, entries: int, full: int | None):
        self._full = full
        self._tokens = 0
        self._right = torch.ones(entries, dtype=torch.bool)
        self._divergence = torch.zeros(entries, dtype=torch.float64)
        self._agreement = torch.zeros(entries, dtype=torch.int64)

    def add(self, logits: torch.Tensor, wanted: torch.Tensor) -> None:
        """Take in logits `[entries, N, vocabulary]` of tokens that should be `wanted`, `[N]`."""
        self._tokens += len(wanted)
        highest, chosen = logits.max(dim=-1)
        require_finite(highest, logits.dtype)
        self._right &= (chosen == wanted).all(dim=-1).cpu()
        if self._full is None:
            return
        own = logits[self._full].float().log_softmax(dim=-1)
        self._agreement += (chosen == chosen[self._full]).sum(dim=-1).cpu()
        for entry, other in enumerate(logits):  # one by one, to hold no second copy of all logits
            terms = own.exp() * (own - other.float().log_softmax(dim=-1))
            self._divergence[entry] += terms.sum(dim=-1).clamp(min=0).double().sum().cpu()

    @property
    def right(self) -> list[bool]:
        """Whether each entry's arg-max is right at every token."""
        return self._right.tolist()

    @property
    def divergence(self) -> list[float] | None:
        """In nats, a token; `None` without tokens or something to compare with."""
        return None if self._full is None or not self._tokens else (self._divergence / self._tokens).tolist()

    @property
    def agreement(self) -> list[float] | None:
        """Share of tokens; `None` likewise."""
        return None if self._full is None or not self._tokens else (self._agreement / self._tokens).tolist()
