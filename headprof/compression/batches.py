"""Many questions to one document, several of them answered at a time.

Each is read from a copy of the document's cache, by itself, and then takes its tokens in the same forward passes as
the others (`TogetherCache`). When one is answered, the next one takes its place. An answer is the one that the question
gets alone: its cache is compressed again when it would be alone, and its tokens are chosen by the same settings of the
model. What remains is rounding: the same sums over a batch may be taken in another order.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from headprof.compression.cache.head_cache import HeadCache, stack_caches
from headprof.compression.cache.together import TogetherCache
from headprof.compression.encoding import question_ids
from headprof.compression.generation import Generation, ask, held_bytes, token_choice
from headprof.compression.session import attending_ragged, prefill
from headprof.errors import UsageError
from headprof.models.decoder import running_model
from headprof.models.loading import LoadedModel

BATCH = 8
"""Questions that are answered at a time unless told otherwise."""


@dataclass
class _Asked:
    """A question that is being answered.

    Attributes:
        number: its place among the questions.
        cache: a copy of the document's, with the question in it.
        prompt_tokens: those of document and question.
        ids: all that logits processors look at, int64 `[1, T]`.
        process, stop: how `generate` would choose tokens, and when it would end.
        times: when each new token came.
        new: the tokens of the answer so far.
        start: when the question began to be read.
    """

    number: int
    cache: HeadCache
    prompt_tokens: int
    ids: torch.Tensor
    process: LogitsProcessorList
    stop: StoppingCriteriaList
    start: float
    new: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def take(self, logits: torch.Tensor) -> bool:
        """Choose the next token by its logits, `[1, vocabulary]`; whether it was the last."""
        scores = self.process(self.ids, logits.to(torch.float32, copy=True))  # type: ignore[arg-type]
        token = scores.argmax(dim=-1)
        self.ids = torch.cat([self.ids, token[:, None]], dim=1)
        self.new.append(int(token))
        self.times.append(time.perf_counter())
        return bool(torch.as_tensor(self.stop(self.ids, scores)).all())  # type: ignore[arg-type]

    def made(self, loaded: LoadedModel, cached: int) -> Generation:
        return Generation(
            text=loaded.tokenizer.decode(self.new, skip_special_tokens=True),
            prompt_tokens=self.prompt_tokens,
            new_tokens=len(self.new),
            cache_bytes=held_bytes(loaded, self.cache),
            prefill_seconds=self.times[0] - self.start,
            decode_seconds=self.times[-1] - self.times[0],
            cached_tokens=cached,
            second_tier_bytes=self.cache.second_tier_bytes,
        )


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
        running: list[_Asked] = []
        while True:
            done: list[_Asked] = []
            with attending_ragged(self._loaded.model, **self._how), torch.no_grad():
                while not done and len(running) < self._batch and (number := next(waiting, None)) is not None:
                    asked, ended = self._begin(number)
                    (done if ended else running).append(asked)
                if not done and running:
                    done = self._go_on(running)
                    running = [asked for asked in running if asked not in done]
            if not done:
                return
            for asked in done:
                yield asked.number, asked.made(self._loaded, self._cache.get_seq_length())

    def _begin(self, number: int) -> tuple[_Asked, bool]:
        """Read a question and choose the first token of its answer; whether that is the last one too."""
        start, ids = time.perf_counter(), self._encoded[number].to(self._loaded.device)
        cache = stack_caches([self._cache])
        seen = cache.get_seq_length()
        process, stop, looked_at = self._settings(ids, cache, seen)
        asked = _Asked(number, cache, seen + ids.shape[1], looked_at, process, stop, start)
        return asked, asked.take(prefill(self._loaded.model, ids, cache))

    def _settings(
        self, ids: torch.Tensor, cache: HeadCache, seen: int
    ) -> tuple[LogitsProcessorList, StoppingCriteriaList, torch.Tensor]:
        """How `generate` would choose the tokens of this answer, when it would end, and what ids it would look at."""
        found: list[Any] = []

        def take(_model, input_ids, logits_processor, stopping_criteria, generation_config, **_others):
            found.extend((logits_processor, stopping_criteria, input_ids))
            return input_ids

        self._loaded.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=ids.new_ones(1, seen + ids.shape[1]),
            past_key_values=cache,
            custom_generate=take,
            **token_choice(self._loaded, self._max_new_tokens, 0.0),
        )
        process, stop, looked_at = found
        return process, stop, looked_at

    def _go_on(self, running: Sequence[_Asked]) -> list[_Asked]:
        """Take tokens for all until one has been answered, or several at once."""
        together = TogetherCache([asked.cache for asked in running])
        while True:
            fed = torch.stack([asked.ids[0, -1:] for asked in running])
            positions = together.positions.to(fed.device)
            logits = self._loaded.model(
                fed, position_ids=positions, past_key_values=together, use_cache=True, logits_to_keep=1
            ).logits[:, -1]
            done = [asked for asked, own in zip(running, logits.split(1), strict=True) if asked.take(own)]
            if done:
                together.part()
                return done
