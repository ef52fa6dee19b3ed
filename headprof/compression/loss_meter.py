"""What caches of a document have lost: how far they are from the full cache while it is repeated and asked about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from headprof.compression.cache.head_cache import HeadCache, stack_caches
from headprof.compression.continuing import divergences, fed_reference, said_greedily
from headprof.compression.session import attending_ragged
from headprof.errors import UsageError
from headprof.models.loading import LoadedModel, require_finite
from headprof.models.prompt_encoder import REPETITION, PromptEncoder

QUESTIONS = 6
"""That the model asks itself, one about each of so many parts of the document."""
SPANS, SPAN_TOKENS = 8, 64
QUESTION_TOKENS, ANSWER_TOKENS = 48, 32
_LEAD = 8
"""Tokens by which a place in the document is named."""
_FROM = 'Repeat the previous context exactly, from where it says "{lead}".'
_ASK = '"{part}" Write one question about this part of the text. Write the question only.'
_PART = 32
"""Tokens of a part of the document that are quoted to ask about it."""


@dataclass(frozen=True)
class Exam:
    """Tokens that each candidate is fed.

    Attributes:
        kind: `"span"` or `"question"`.
        tail: token ids after the document, up to what is measured.
        reference: those that are measured.
        logits: of the full cache at each of these, `[N, vocabulary]`.
    """

    kind: str
    tail: tuple[int, ...]
    reference: tuple[int, ...]
    logits: torch.Tensor = field(repr=False)


class LossMeter:
    """Measures what caches of a document have lost.

    Args:
        loaded: the model.
        encoder: of the document.
        document_ids: its tokens, frame included.
        questions: how many the model asks itself, one about each of so many parts.
        how: `backend` and `step`, as for `attending_ragged`.

    Attributes:
        exams: spans in order, then answers in order; made by `examine`.
        asked: the questions.

    Raises:
        UsageError: the model's context has no room for them.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        encoder: PromptEncoder,
        document_ids: Sequence[int],
        questions: int = QUESTIONS,
        **how: Any,
    ):
        self._loaded, self._how, self._encoder = loaded, how, encoder
        self._room = loaded.max_positions - len(document_ids)
        body = encoder.repeated_ids(document_ids)
        self._spans = [(self._repeat_from(body, start), body[start:stop]) for start, stop in _spans(len(body))]
        starts = [part * len(body) // questions for part in range(questions)]
        self._demands = [self._asking(_ASK.format(part=self._text(body[at : at + _PART]))) for at in starts]
        self.exams: list[Exam] = []
        self.asked: list[str] = []
        needed = [len(tail) + len(span) for tail, span in self._spans]
        needed += [len(demand) + QUESTION_TOKENS for demand in self._demands]
        needed.append(len(self._asking("")) + QUESTION_TOKENS + ANSWER_TOKENS)
        if (missing := max(needed) - self._room) > 0:
            raise UsageError(
                f"The document of {len(document_ids)} tokens leaves no room for questions about it within the "
                f"{loaded.max_positions} that {loaded.name} can read, so that no loss can be measured: shorten it by "
                f"{missing} tokens, or give a --budget."
            )

    @torch.inference_mode()
    def examine(self, full: HeadCache, on_question: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Have the full cache ask and answer, and note what it says at each token of the exams."""
        with attending_ragged(self._loaded.model, **self._how):
            for number, demand in enumerate(self._demands):
                on_question(number, len(self._demands))
                (_, text), *_ = said_greedily(self._loaded, _copy(full), demand, QUESTION_TOKENS, _is_question)
                if (question := _first_line(text)) and question not in self.asked:
                    self.asked.append(question)
            self.exams = [self._exam("span", full, *span) for span in self._spans]
            for tail in map(self._asking, self.asked):
                if len(tail) + ANSWER_TOKENS <= self._room:
                    (answer, _), *_ = said_greedily(self._loaded, _copy(full), tail, ANSWER_TOKENS)
                    self.exams += [self._exam("question", full, tail, answer)] if answer else []

    @torch.inference_mode()
    def losses(self, cache: HeadCache) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean divergence in nats a token over each span, and over each answer; the cache is left as it is."""
        found: dict[str, list[float]] = {"span": [], "question": []}
        with attending_ragged(self._loaded.model, **self._how):
            copy = _copy(cache)
            for exam in self.exams:
                own = exam.logits.float().log_softmax(dim=-1)
                terms = divergences(own, self._fed(copy, exam.tail, exam.reference))
                found[exam.kind].append(float(terms.mean()))
        return tuple(found["span"]), tuple(found["question"])

    @property
    def num_spans(self) -> int:
        """How many spans are repeated."""
        return len(self._spans)

    @property
    def tokens(self) -> int:
        """How many each candidate is judged by."""
        return sum(len(exam.reference) for exam in self.exams)

    def _exam(self, kind: str, full: HeadCache, tail: Sequence[int], reference: Sequence[int]) -> Exam:
        return Exam(kind, tuple(tail), tuple(reference), self._fed(_copy(full), tail, reference))

    def _fed(self, copy: HeadCache, tail: Sequence[int], reference: Sequence[int]) -> torch.Tensor:
        """Logits `[N, vocabulary]` at each token of the reference; the copy forgets all of it again."""
        seen, parts = copy.get_seq_length(), []
        for logits, _ in fed_reference(self._loaded, copy, tail, reference):
            require_finite(logits.amax(), logits.dtype)
            parts.append(logits[0])
        copy.crop(seen)
        return torch.cat(parts)

    def _repeat_from(self, body: Sequence[int], start: int) -> list[int]:
        """The demand to repeat the document from a token on."""
        lead = self._text(body[max(0, start - _LEAD) : start])
        return self._asking(_FROM.format(lead=lead) if start else REPETITION)

    def _asking(self, question: str) -> list[int]:
        return self._encoder.question_ids(question)

    def _text(self, ids: Sequence[int]) -> str:
        return " ".join(self._loaded.tokenizer.decode(ids, skip_special_tokens=True).split())


def _copy(cache: HeadCache) -> HeadCache:
    """A copy that keeps all that comes, so that it can be taken out again."""
    copy = stack_caches([cache])
    copy.continue_with(replace(cache.plan, buffer=None))
    return copy


def _spans(tokens: int) -> list[tuple[int, int]]:
    """Where the spans begin and end, evenly over a document of so many tokens; of a short one they are all of it."""
    count = min(SPANS, max(2, tokens // SPAN_TOKENS), tokens)
    starts = [part * tokens // count for part in range(count)]
    stops = [*starts[1:], tokens]
    return [(start, min(start + SPAN_TOKENS, stop)) for start, stop in zip(starts, stops, strict=True)]


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _is_question(text: str) -> bool:
    """Whether a whole line has been said, or a question mark."""
    return text.rstrip().endswith(("?", "？")) or "\n" in text.strip()
