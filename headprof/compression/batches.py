"""Many questions to one document, several of them answered at a time.

Each is read from a copy of the document's cache, by itself, and then takes its tokens in the same forward passes as
the others (`TogetherCache`). When one is answered, the next one takes its place. An answer is the one that the question
gets alone: its cache is compressed again when it would be alone, and its tokens are chosen by the same settings of the
model. What remains is rounding: the same sums over a batch may be taken in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any

import torch

from headprof.compression.answering import Answering, Choosing, begin_answer, next_logits
from headprof.compression.cache.head_cache import HeadCache, stack_caches
from headprof.compression.cache.together import TogetherCache
from headprof.compression.encoding import question_ids
from headprof.compression.generation import Generation, ask
from headprof.compression.session import attending_ragged
from headprof.errors import UsageError
from headprof.models.decoder import running_model
from headprof.models.loading import LoadedModel

BATCH = 8
"""Questions that are answered at a time unless told otherwise."""


def answer_each(
    loaded: LoadedModel,
    cache: HeadCache,
    questions: Sequence[str],
    *,
    max_new_tokens: int = 128,
    batch: int = BATCH,
    temperature: float = 0.0,
    seed: int = 0,
    backend: str = "auto",
    prefill_chunk: int | None = None,
    step: str = "auto",
) -> Iterator[Generation]:
    """The answer to each question about a document, in order, as soon as those before it are there.

    Every one is given from a copy of the document's cache, and is what `ask` would give.

    Args:
        loaded: the model.
        cache: of the document, as `compress_document` and `load_document` give it; it is not changed.
        questions: the texts; one that comes again is answered once.
        max_new_tokens: most tokens to write for each.
        batch: how many are answered at a time; 1 for one after the other.
        temperature, seed: of the sampling, as for `generate_text`; answers that are sampled come one after the other,
            and so do those of a cache that brings back rows from the host.
        backend, prefill_chunk, step: as for `headprof.compressed`. The steps of a batch are issued one by one, also
            where those of a single answer are captured.

    Raises:
        UsageError: a question is too long for the model's context, or the batch is below 1; none is answered then.
    """
    if batch < 1:
        raise UsageError(f"A batch of {batch} questions answers none: give --batch at least 1.")
    distinct = list(dict.fromkeys(questions))
    encoded = question_tokens(loaded, cache.get_seq_length(), questions, max_new_tokens)
    how: dict[str, Any] = {"backend": backend, "prefill_chunk": prefill_chunk, "step": step}
    takes_positions = "position_ids" in signature(running_model(loaded.model).forward).parameters
    if min(batch, len(distinct)) > 1 and temperature == 0 and takes_positions and not cache.recalls:
        made = _Batches(loaded, cache, encoded, max_new_tokens, batch, how).answers()
    else:
        how |= {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        made = ((number, ask(loaded, cache, each, **how)) for number, each in enumerate(distinct))
    return _in_order(made, distinct, questions)


def question_tokens(
    loaded: LoadedModel, seen: int, questions: Sequence[str], max_new_tokens: int
) -> list[torch.Tensor]:
    """Tokens of each distinct question about a document of `seen` tokens, int64 `[1, Q]`.

    Raises:
        UsageError: a question is too long for the model's context; of several, the message says which.
    """
    tokens = []
    for question in dict.fromkeys(questions):
        try:
            tokens.append(question_ids(loaded, seen, question, max_new_tokens))
        except UsageError as error:
            if len(questions) == 1:
                raise
            raise UsageError(f"Question {questions.index(question) + 1} is too long: {error}") from None
    return tokens


def _in_order(
    made: Iterator[tuple[int, Generation]], distinct: Sequence[str], questions: Sequence[str]
) -> Iterator[Generation]:
    """Answers that come in any order, with the numbers of distinct questions, as those of the questions."""
    known: dict[str, Generation] = {}
    for question in questions:
        while question not in known:
            number, answer = next(made)
            known[distinct[number]] = answer
        yield known[question]


class _Batches:
    """Answers questions, several at a time."""

    def __init__(
        self,
        loaded: LoadedModel,
        cache: HeadCache,
        encoded: Sequence[torch.Tensor],
        max_new_tokens: int,
        batch: int,
        how: dict[str, Any],
    ):
        self._loaded, self._cache, self._encoded = loaded, cache, encoded
        self._max_new_tokens, self._batch, self._how = max_new_tokens, batch, how

    def answers(self) -> Iterator[tuple[int, Generation]]:
        """The number of each question and its answer, as they come."""
        waiting = iter(range(len(self._encoded)))
        running: dict[int, Answering] = {}
        while True:
            done: dict[int, Answering] = {}
            with attending_ragged(self._loaded.model, **self._how), torch.no_grad():
                while not done and len(running) < self._batch and (number := next(waiting, None)) is not None:
                    answer, ended = self._begin(number)
                    (done if ended else running)[number] = answer
                if not done and running:
                    done = self._go_on(running)
                    running = {number: answer for number, answer in running.items() if number not in done}
            if not done:
                return
            for number, answer in done.items():
                yield number, answer.made(self._loaded)

    def _begin(self, number: int) -> tuple[Answering, bool]:
        """Read a question and choose the first token of its answer; whether that is the last one too."""
        copy = stack_caches([self._cache])
        answer, logits = begin_answer(self._loaded, self._encoded[number], copy, Choosing(self._max_new_tokens))
        return answer, answer.take(logits)

    def _go_on(self, running: dict[int, Answering]) -> dict[int, Answering]:
        """Take tokens for all until one has been answered, or several at once."""
        together = TogetherCache([answer.cache for answer in running.values()])
        while True:
            logits = next_logits(self._loaded, together, list(running.values()))
            pairs = zip(running.items(), logits.split(1), strict=True)
            done = {number: answer for (number, answer), own in pairs if answer.take(own)}
            if done:
                together.part()
                return done
