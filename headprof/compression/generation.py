"""Answering a prompt, about a document or alone, with the full cache or a compressed one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache, DynamicCache

from headprof.compression.cache.head_cache import HeadCache, stack_caches
from headprof.compression.encoding import check_length, encoded_document, fitting, question_ids
from headprof.compression.filling import count_readings, read_document_into
from headprof.compression.keeping import Keeping
from headprof.compression.observers import document_observers
from headprof.compression.plan import CompressionPlan
from headprof.compression.protected import Keep, ProtectedTokens
from headprof.compression.session import attending_ragged
from headprof.compression.streaming import TimedStreamer
from headprof.errors import UsageError
from headprof.models.decoder import find_decoder_layers
from headprof.models.loading import LoadedModel, require_finite
from headprof.models.tensor_parallel import HeadShard

LOWEST_TEMPERATURE = 1e-4
"""But for 0, which is greedy decoding; divided by less, logits overflow."""


if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Generation:
    """A text, and what it took.

    Attributes:
        text: the new tokens, decoded at once, without special ones.
        prompt_tokens, new_tokens: tokens read and written.
        cached_tokens: those of the prompt that came from a cache already filled.
        cache_bytes: bytes that the cache held when the text was done, on the devices of all processes that hold the
            model.
        prefill_seconds: until the first token, compression included.
        decode_seconds: from the first token to the last.
        second_tier_bytes: bytes of evicted rows that could be brought back, on the host or in a file, at that time.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    cache_bytes: int
    prefill_seconds: float
    decode_seconds: float
    cached_tokens: int = 0
    second_tier_bytes: int = 0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens read per second."""
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_seconds

    @property
    def decode_rate(self) -> float:
        """New tokens per second after the first; 0 when there is only one."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else 0.0


class _FiniteLogits(LogitsProcessor):
    """Raises `ModelError` before a token is chosen by logits that are no numbers."""

    looks_at_ids = False

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        require_finite(scores.amax(dim=-1), scores.dtype)  # some models rule tokens out by -inf
        return scores


class _OneVoice(LogitsProcessor):
    """Lets all processes that hold a model choose by the logits of the first, down to the last bit."""

    looks_at_ids = False

    def __init__(self, shard: HeadShard):
        self._shard = shard

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return self._shard.agreed(scores)  # type: ignore[return-value]


def compress_document(
    loaded: LoadedModel,
    document: str,
    plan: CompressionPlan,
    *,
    observe: str | None = None,
    keep: Sequence[str] = (),
    system: str | None = None,
    keep_system: bool = True,
    backend: str = "auto",
    prefill_chunk: int | None = None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> HeadCache:
    """A compressed cache of a document, ready for questions about it.

    Args:
        loaded: the model.
        document: the text.
        plan: how to compress it.
        observe: text in the place of the question, which is not known yet: methods that judge by the last queries judge
            by its tokens. They are not kept. If empty, the end of the document judges. `None` for what the method asks
            for: the document's own repetition, or `OBSERVATION`.
        keep: texts, or regular expressions between slashes: every head keeps the tokens of all their matches.
        system: a system message before the document, in the place of the chat template's own.
        keep_system: whether every head keeps the tokens of that message.
        backend, prefill_chunk: as for `headprof.compressed`.
        on_layer: called with the number of layers that are compressed, and of all.

    Raises:
        UsageError: the document, or the document and its repetition, is longer than the model's context, the budget
            cannot be met, what is to be kept is not there, or there is no place for a system message.
        ModelError: the model's numbers overflow.
    """
    how: dict[str, Any] = {"observe": observe, "backend": backend, "prefill_chunk": prefill_chunk}
    keeping = Keeping(keep, system, keep_system)
    return compress_under_each(loaded, document, [plan], keeping, **how, on_layer=on_layer)[0]


def compress_under_each(
    loaded: LoadedModel,
    document: str,
    plans: Sequence[CompressionPlan],
    keeping: Keeping,
    *,
    observe: str | None = None,
    backend: str = "auto",
    prefill_chunk: int | None = None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> list[HeadCache]:
    """A compressed cache of a document for each of some plans of one method, from one prefill.

    Other arguments and errors are those of `compress_document`.
    """
    encoder = keeping.encoder(loaded.tokenizer)
    if observe:
        check_length(loaded, observe)
    document_ids, protected = encoded_document(loaded, document, keeping)
    observers = document_observers(loaded, encoder, document_ids, plans[0], observe)
    fitting(loaded, document_ids, observers.longest, 0)
    for plan in plans:
        plan.check(len(document_ids), protected)
    caches = [HeadCache(plan.for_observers(len(observers))).protect(protected) for plan in plans]
    with (
        attending_ragged(loaded.model, backend=backend, prefill_chunk=prefill_chunk),
        _layer_by_layer(loaded, on_layer, count_readings(caches, len(document_ids))),
    ):
        logits = read_document_into(loaded.model, caches, document_ids, observers)[-1].logits
    require_finite(logits.amax(), logits.dtype)
    for cache in caches:
        for layer in cache.head_layers:  # a merge may overflow where the model does not
            rows = layer.storage.compact()
            require_finite(rows.keys, rows.keys.dtype)
            require_finite(rows.values, rows.values.dtype)
    return caches


@contextmanager
def _layer_by_layer(loaded: LoadedModel, on_layer: Callable[[int, int], None], readings: int = 1) -> Iterator[None]:
    """Report each decoder layer when it has run, in the first `readings` passes; nothing of a model that lists none."""
    layers = find_decoder_layers(loaded.model) or ()
    hooks: dict[Any, RemovableHandle] = {}
    done = 0

    def count(layer: Any, *_: Any) -> None:
        nonlocal done
        done += 1
        if done > (readings - 1) * len(layers):
            hooks[layer].remove()
        on_layer(done, readings * len(layers))

    hooks |= {layer: layer.register_forward_hook(count) for layer in layers}
    try:
        yield
    finally:
        for hook in hooks.values():
            hook.remove()


def held_bytes(loaded: LoadedModel, cache: Cache) -> int:
    """Bytes that a cache holds, in all processes together that hold the model."""
    return loaded.shard.total(cache_nbytes(cache))


def cache_nbytes(cache: Cache) -> int:
    """Bytes that a cache holds in this process, ours or one of Transformers' dynamic ones."""
    if isinstance(cache, HeadCache):
        return cache.nbytes
    held = [
        tensor for layer in cache.layers for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
    ]
    return sum(tensor.untyped_storage().nbytes() for tensor in held if tensor is not None)


def ask(
    loaded: LoadedModel, cache: HeadCache, question: str, *, max_new_tokens: int = 128, **options: Any
) -> Generation:
    """Answer a question about a document that a cache holds, from a copy: the cache can be asked again.

    Args:
        loaded: the model that filled the cache.
        cache: from `compress_document` or `load_document`.
        question: the text.
        max_new_tokens: most tokens to write.
        options: `temperature`, `seed`, `backend`, `on_text` and the like of `generate_text`.

    Raises:
        UsageError: document, question and answer together are longer than the model's context.
        CacheError: a setting of the model looks at the document's tokens, which an older file does not hold.
    """
    ids = question_ids(loaded, cache.get_seq_length(), question, max_new_tokens)
    return generate_text(loaded, ids, cache=stack_caches([cache]), max_new_tokens=max_new_tokens, **options)


def generate_text(
    loaded: LoadedModel,
    ids: torch.Tensor,
    plan: CompressionPlan | None = None,
    *,
    cache: HeadCache | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    backend: str = "auto",
    prefill_chunk: int | None = None,
    step: str = "auto",
    keep: Keep | ProtectedTokens | None = None,
    on_text: Callable[[str], None] = lambda _: None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
    on_ids: Callable[[Sequence[int]], None] = lambda _: None,
) -> Generation:
    """Continue a prompt.

    Args:
        loaded: the model.
        ids: the prompt, int64 `[1, T]`; what follows the document, when there is a cache that holds one.
        plan: how to compress the prompt's cache; `None` for Transformers' own full cache.
        cache: one that is filled already; it is continued in place.
        max_new_tokens: most tokens to write.
        temperature: 0 for greedy decoding, else sampling.
        seed: of the sampling.
        backend, prefill_chunk, step: as for `headprof.compressed`.
        keep: tokens of the prompt that every head keeps, as for `HeadCache.protect`; a full cache keeps all.
        on_text: called with each piece of text as it becomes final.
        on_layer: called while the prompt is read, with the number of layers that have read it, and of all.
        on_ids: called at the end, with the new tokens.

    Raises:
        ModelError: the model's numbers overflow.
        CacheError: a setting of the model looks at the tokens that the cache has seen, and they are not known.
    """
    model: Any = loaded.model
    seen = 0 if cache is None else cache.get_seq_length()
    ids = ids.to(loaded.device)
    if cache is not None and keep is not None:
        cache.protect(keep)
    used: Cache = cache or (DynamicCache(config=model.config) if plan is None else HeadCache(plan).protect(keep))
    streamer = TimedStreamer(loaded.tokenizer, on_text)
    ours = isinstance(used, HeadCache)
    how: dict[str, Any] = {"backend": backend, "prefill_chunk": prefill_chunk, "step": step}
    attending = attending_ragged(model, **how) if ours else nullcontext()
    forked = torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else [])
    twice = isinstance(used, HeadCache) and not seen and used.before_reading(ids.shape[1]) is not None
    with attending, forked, _layer_by_layer(loaded, on_layer, 2 if twice else 1):
        torch.manual_seed(seed)
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=ids.new_ones(1, seen + ids.shape[1]),  # so it is known that these ids follow the cache's
            past_key_values=used,
            streamer=streamer,
            **token_choice(loaded, max_new_tokens, temperature),
        )
    on_ids(streamer.new_ids)
    evicted = used.second_tier_bytes if isinstance(used, HeadCache) else 0
    return _made(streamer, start, seen, ids.shape[1], held_bytes(loaded, used), evicted)


def token_choice(
    loaded: LoadedModel, max_new_tokens: int, temperature: float, top_p: float | None = None
) -> dict[str, Any]:
    """Arguments of `generate` that say how tokens are chosen, and how many; `top_p` is for sampling alone."""
    shard = loaded.shard
    return {
        "max_new_tokens": max_new_tokens,
        "pad_token_id": loaded.tokenizer.pad_token_id or loaded.tokenizer.eos_token_id or 0,
        "logits_processor": LogitsProcessorList([_FiniteLogits(), *([] if shard.is_whole else [_OneVoice(shard)])]),
        **_sampling(temperature, top_p),
    }


def _made(
    streamer: TimedStreamer, start: float, seen: int, given: int, cache_bytes: int, second_tier_bytes: int
) -> Generation:
    """What came of `given` tokens after `seen` that the cache held, begun at `start`."""
    times = streamer.token_times
    return Generation(
        text=streamer.text,
        prompt_tokens=seen + given,
        new_tokens=len(times),
        cache_bytes=cache_bytes,
        prefill_seconds=times[0] - start,
        decode_seconds=times[-1] - times[0],
        cached_tokens=seen,
        second_tier_bytes=second_tier_bytes,
    )


def check_temperature(temperature: float) -> None:
    """Raise `UsageError` for a temperature that logits cannot be divided by."""
    if temperature != 0 and not LOWEST_TEMPERATURE <= temperature < math.inf:
        raise UsageError(
            f"A temperature of {temperature:g} cannot be sampled with: give 0 for greedy decoding, or a number from "
            f"{LOWEST_TEMPERATURE:g} on."
        )


def _sampling(temperature: float, top_p: float | None) -> dict[str, Any]:
    """Greedy decoding at 0, else sampling from all of the distribution that `top_p` leaves, whatever the model's own
    settings."""
    check_temperature(temperature)
    share = top_p if temperature else None
    return {"do_sample": temperature > 0, "temperature": temperature or None, "top_p": share, "top_k": None}
