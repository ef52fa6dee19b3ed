"""What is answered: a prompt that is read and compressed, or a question about a document that has been."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.document import load_document
from headprof.compression.document_checks import promised_loss
from headprof.compression.encoding import encoded_prompt, question_ids
from headprof.compression.generation import Generation, generate_text, held_bytes
from headprof.compression.keeping import Keeping
from headprof.compression.plan import CompressionPlan
from headprof.compression.protected import ProtectedTokens
from headprof.compression.request import CompressionRequest
from headprof.compression.warming import warm_up
from headprof.models.loading import LoadedModel


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the cache it is answered from.

    Attributes:
        ids: its tokens, int64 `[1, T]`; those that follow the document, when a cache holds one.
        label: of the cache, for tables.
        plan: how to compress it; `None` for Transformers' own full cache, or a cache that is filled already.
        cache: one that holds a document; it is continued in place.
        protected: tokens that every head keeps.
    """

    ids: torch.Tensor
    label: str
    plan: CompressionPlan | None = None
    cache: HeadCache | None = None
    protected: ProtectedTokens | None = None

    def with_full_cache(self) -> Prompt:
        """The same prompt, to be answered from the full cache."""
        return Prompt(self.ids, "full")

    def answer(self, loaded: LoadedModel, **options: Any) -> Generation:
        """What the model says; options are those of `generate_text`."""
        return generate_text(loaded, self.ids, self.plan, cache=self.cache, keep=self.protected, **options)

    def warm_up(self, loaded: LoadedModel, *, full: bool, **reading: Any) -> None:
        """Have what is done once in a process done before times are taken, of the full cache too if it is used beside.

        Options are `backend`, `prefill_chunk` and `step`.
        """
        plan = self.plan if self.cache is None else self.cache.plan
        warm_up(loaded, self.ids, [None, plan] if full else [plan], **reading)


def new_prompt(
    loaded: LoadedModel,
    document: str | None,
    question: str,
    request: CompressionRequest,
    max_new_tokens: int,
    keeping: Keeping = Keeping(),
) -> Prompt:
    """A prompt, with the document before it if there is one, that is compressed as requested.

    Raises:
        UsageError: prompt and answer are longer than the model's context, the budget cannot be met, what is to be kept
            is not there, or there is no place for a system message.
        ProfileError: the method needs a head profile, and there is none or it is for another model.
    """
    ids, protected = encoded_prompt(loaded, document, question, max_new_tokens, keeping)
    if request.keeps_everything:
        return Prompt(ids, request.label)
    plan = request.plan(loaded)
    plan.check(ids.shape[1], protected)
    return Prompt(ids, request.label, plan, protected=protected)


def prompt_about(
    loaded: LoadedModel, file: Path, question: str, decoding: Mapping[str, Any], max_new_tokens: int
) -> Prompt:
    """A question about a compressed document.

    Args:
        loaded: the model that made it.
        file: the compressed document.
        question: the text.
        decoding: `decode_budget` and `buffer` in place of the document's own, as for `make_plan`.
        max_new_tokens: most tokens that the answer has.

    Raises:
        CacheError: the file cannot be used with this model.
        UsageError: document, question and answer are longer than the model's context.
    """
    cache, label = document_cache(loaded, file, decoding)
    ids = question_ids(loaded, cache.get_seq_length(), question, max_new_tokens)
    return Prompt(ids, label, cache=cache)


def document_cache(loaded: LoadedModel, file: Path, decoding: Mapping[str, Any]) -> tuple[HeadCache, str]:
    """The cache of a compressed document, and what to call it in tables; the arguments are those of `prompt_about`.

    Raises:
        CacheError: the file cannot be used with this model.
    """
    cache, notes = load_document(file, loaded)
    cache.continue_with(replace(cache.plan, **decoding))
    if cache.protected is not None:
        cache.plan.check_later(cache.get_seq_length(), cache.protected)
    loss = promised_loss(notes)
    promised = "" if loss is None else f", at most {loss:g} nats a token lost"
    return cache, f"{file.name} ({notes['method']}{promised})"


def full_cache_bytes(loaded: LoadedModel, made: Generation, full: Generation | None = None) -> int:
    """Bytes that the full cache held when `full` was done; without it, what it would have held when `made` was."""
    if full is not None:
        return full.cache_bytes
    return loaded.full_cache_bytes(made.prompt_tokens + made.new_tokens - 1)  # the last token is not fed


def document_figures(loaded: LoadedModel, cache: HeadCache, file: Path) -> dict[str, Any]:
    """What a compressed document in a file came to, as numbers."""
    return {
        "file": str(file),
        "method": cache.plan.name,
        "document_tokens": cache.get_seq_length(),
        "protected_tokens": 0 if cache.protected is None else max(cache.protected.count(0)),
        "tokens_per_head": float(cache.plan.shard.together(cache.lengths).float().mean()),
        "cache_bytes": held_bytes(loaded, cache),
        "second_tier_bytes": cache.second_tier_bytes,
        "file_bytes": file.stat().st_size,
        "full_cache_bytes": loaded.full_cache_bytes(cache.get_seq_length()),
    }
