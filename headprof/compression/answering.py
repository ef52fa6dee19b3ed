"""Answers on their way: each reads its prompt by itself, then several take their tokens in the same forward passes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.cache.together import TogetherCache
from headprof.compression.generation import Generation, held_bytes, token_choice
from headprof.compression.session import prefill
from headprof.models.loading import LoadedModel


@dataclass(frozen=True)
class Choosing:
    """How the tokens of an answer are chosen, and how many may come.

    Attributes:
        max_new_tokens: most tokens of the answer.
        temperature: 0 for greedy decoding, else sampling.
        top_p: when sampling, only of the likeliest tokens that have this share of the probability together.
        seed: of the sampling, which is the answer's own.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass
class Answering:
    """An answer on its way.

    Attributes:
        cache: what the model has read, and the tokens of the answer but the last.
        prompt_tokens: those that came before the answer.
        cached_tokens: those of them that the cache held before the prompt was read.
        ids: all that logits processors look at, int64 `[1, T]`.
        process, stop: how `generate` would choose tokens, and when it would end.
        generator: of the sampling; `None` for greedy decoding.
        start: when the prompt began to be read, as `time.perf_counter`.
        new: the tokens of the answer so far.
        times: when each of them came.
    """

    cache: HeadCache
    prompt_tokens: int
    cached_tokens: int
    ids: torch.Tensor
    process: LogitsProcessorList
    stop: StoppingCriteriaList
    generator: torch.Generator | None
    start: float
    new: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def take(self, logits: torch.Tensor) -> bool:
        """Choose the next token by its logits, `[1, vocabulary]`; whether it was the last."""
        scores = self.process(self.ids, logits.to(torch.float32, copy=True))  # type: ignore[arg-type]
        token = self._chosen(scores)
        self.ids = torch.cat([self.ids, token[:, None]], dim=1)
        self.new.append(int(token))
        self.times.append(time.perf_counter())
        return bool(torch.as_tensor(self.stop(self.ids, scores)).all())  # type: ignore[arg-type]

    def _chosen(self, scores: torch.Tensor) -> torch.Tensor:
        if self.generator is None:
            return scores.argmax(dim=-1)
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator).squeeze(1)

    def made(self, loaded: LoadedModel) -> Generation:
        """What has come of it."""
        return Generation(
            text=loaded.tokenizer.decode(self.new, skip_special_tokens=True),
            prompt_tokens=self.prompt_tokens,
            new_tokens=len(self.new),
            cache_bytes=held_bytes(loaded, self.cache),
            prefill_seconds=self.times[0] - self.start,
            decode_seconds=self.times[-1] - self.times[0],
            cached_tokens=self.cached_tokens,
            second_tier_bytes=self.cache.second_tier_bytes,
        )


def begin_answer(
    loaded: LoadedModel, ids: torch.Tensor, cache: HeadCache, choosing: Choosing
) -> tuple[Answering, torch.Tensor]:
    """Read a prompt, or what follows a document; the answer to it, and logits `[1, vocabulary]` for its first token.

    Call it inside `attending_ragged`.

    Args:
        loaded: the model.
        ids: int64 `[1, T]`, on any device.
        cache: a new one, or one that holds a document; it is continued in place.
        choosing: how the tokens are chosen.
    """
    start, seen = time.perf_counter(), cache.get_seq_length()
    ids = ids.to(loaded.device)
    process, stop, looked_at = _settings(loaded, ids, cache, choosing)
    generator = None
    if choosing.temperature > 0:
        generator = torch.Generator(ids.device).manual_seed(choosing.seed)
    answer = Answering(cache, seen + ids.shape[1], seen, looked_at, process, stop, generator, start)
    return answer, prefill(loaded.model, ids, cache)


def next_logits(loaded: LoadedModel, together: TogetherCache | None, answers: Sequence[Answering]) -> torch.Tensor:
    """Logits for the next token of each answer, `[answers, vocabulary]`, by one forward pass.

    Call it inside `attending_ragged`.

    Args:
        loaded: the model.
        together: of the answers' caches, in their order; `None` for a single answer, which goes on from its own cache.
        answers: all have a token already.
    """
    fed = torch.stack([answer.ids[0, -1:] for answer in answers])
    if together is None:
        return prefill(loaded.model, fed, answers[0].cache)
    positions = together.positions.to(fed.device)
    return loaded.model(fed, position_ids=positions, past_key_values=together, use_cache=True, logits_to_keep=1).logits[
        :, -1
    ]


def _settings(
    loaded: LoadedModel, ids: torch.Tensor, cache: HeadCache, choosing: Choosing
) -> tuple[LogitsProcessorList, StoppingCriteriaList, torch.Tensor]:
    """How `generate` would choose the tokens of an answer, when it would end, and what ids it would look at."""
    found: list[Any] = []

    def take(_model, input_ids, logits_processor, stopping_criteria, generation_config, **_others):
        found.extend((logits_processor, stopping_criteria, input_ids))
        return input_ids

    loaded.model.generate(
        ids,
        attention_mask=ids.new_ones(1, cache.get_seq_length() + ids.shape[1]),
        past_key_values=cache,
        custom_generate=take,
        **token_choice(loaded, choosing.max_new_tokens, choosing.temperature, choosing.top_p),
    )
    process, stop, looked_at = found
    return process, stop, looked_at
