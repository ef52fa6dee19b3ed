"""Compressing during prefill: the Python API over any model that Transformers' attention interface serves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache

from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.cache.head_layer import HeadCacheLayer
from headprof.compression.cache.prompt_layer import PromptLayer
from headprof.compression.chunked_prefill import chunked_prefill
from headprof.compression.kernels.backends import check_backend, ragged_attention
from headprof.compression.methods.budget import Budget
from headprof.compression.methods.table import find_method
from headprof.compression.plan import BUFFER, CompressionPlan
from headprof.errors import ModelError, ProfileError
from headprof.models.attention_hook import AttentionFunction, wrapped_attention
from headprof.models.shape import HeadShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headprof.profile.head_profile import HeadProfile


def make_plan(
    model: PreTrainedModel,
    profile: HeadProfile | None = None,
    *,
    method: str = "headkv-r2",
    budget: int | str | Budget = 64,
    decode_budget: int | str | Budget | None = None,
    buffer: int | None = BUFFER,
    **options,
) -> CompressionPlan:
    """Put a method, a budget and a profile together for a model.

    Args:
        model: the model whose cache is to be compressed.
        profile: its head profile, for methods that need one.
        method: a name in `METHODS`.
        budget: tokens per KV head (`64`), share of the prompt (`"1.5%"`) or bytes (`"512MB"`).
        decode_budget, buffer: what the cache may hold while generating, as for `CompressionPlan`.
        options: parameters of the method's parts, such as `window=8`, `keep_last=4`, `pool_factor=1.1`.

    Raises:
        UsageError: no such method or parameter, or the budget cannot be read.
        ProfileError: the method needs a profile and there is none, or it belongs to another model.
    """
    chosen = find_method(method).with_options(**options)
    shape = HeadShape.from_config(model.config)
    _check_layer_types(model)
    which = chosen.budget.profile_scores
    if which is None:
        scores, digest = torch.ones(shape.num_layers, shape.num_kv_heads), ""
    elif profile is None:
        raise ProfileError(
            f"The method {method!r} needs a head profile: make one with `headprof score`, or choose snapkv."
        )
    else:
        _check_profile(profile, shape)
        scores = profile.kv_head_scores(which, getattr(chosen.budget, "aggregate", "max"))
        digest = profile.digest()
    element = torch.empty(0, dtype=model.dtype).element_size()
    return CompressionPlan(
        chosen,
        Budget.parse(budget),
        shape,
        scores,
        element,
        name=method,
        profile_digest=digest,
        decode_budget=None if decode_budget is None else Budget.parse(decode_budget),
        buffer=buffer,
    )


def _check_profile(profile: HeadProfile, shape: HeadShape) -> None:
    """
    Raises:
        ProfileError: the profile is for a model of another shape.
    """
    if differences := profile.shape.differences(shape):
        raise ProfileError(
            f"The profile is for another model ({', '.join(differences)}): make one with `headprof score`."
        )


def _check_layer_types(model: PreTrainedModel) -> None:
    """
    Raises:
        ModelError: some layers keep something else than the keys and values of attention, or attend in chunks.
    """
    types = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or []
    if other := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise ModelError(
            f"{type(model).__name__} has layers of the kind {', '.join(other)}, whose cache cannot be compressed per "
            "head: choose a model with full or sliding attention only."
        )


def _compressing(base: AttentionFunction, backend: str) -> AttentionFunction:
    """The model's attention over a prompt, then compression; ragged attention for the tokens after it."""

    def attention(module, query, key, value, attention_mask, **kwargs):
        layer: PromptLayer | None = getattr(key, "head_cache_layer", None)
        if layer is None:  # another cache than ours
            return base(module, query, key, value, attention_mask, **kwargs)
        scaling = kwargs.get("scaling")
        logit_options = {
            "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling,
            "softcap": kwargs.get("softcap"),
            "sliding_window": kwargs.get("sliding_window"),
        }
        if isinstance(layer, HeadCacheLayer) and layer.is_initialized:
            own = None
            if attention_mask is not None and query.shape[2] > 1:
                own = _hide_padding(layer, attention_mask, query.shape[2])
            output = ragged_attention(
                query,
                layer.storage.in_place(),
                key.shape[1],
                sinks=kwargs.get("s_aux"),
                backend=backend,
                **logit_options,
            )
            layer.observe(query, own, **logit_options)
            return output, None
        output, weights = base(module, query, key, value, attention_mask, **kwargs)
        layer.attended(query, key, value, _valid_tokens(attention_mask, key), **logit_options)
        return output, weights

    return attention


def _valid_tokens(mask: torch.Tensor | None, key: torch.Tensor) -> torch.Tensor:
    """Which prompt tokens are no padding, bool `[B, T]`, from the mask that the attention function got.

    A sliding layer's mask hides what its last query cannot see; later queries cannot see that either.
    """
    batch, _, num_tokens, _ = key.shape
    if mask is None:
        return torch.ones(batch, num_tokens, dtype=torch.bool, device=key.device)
    if mask.ndim == 2:
        return mask[:, :num_tokens].bool()
    last_row = mask[:, 0, -1, :num_tokens]
    return _visible(last_row).expand(batch, num_tokens)


def _hide_padding(layer: HeadCacheLayer, mask: torch.Tensor, num_new: int) -> torch.Tensor | None:
    """Hide padding among the newest tokens: what does not even see itself; bool `[B, Q]`, none if there is none."""
    newest = mask[..., -num_new:]
    own = newest.bool() if mask.ndim == 2 else _visible(newest[:, 0].diagonal(dim1=1, dim2=2))
    if bool(own.all()):
        return None
    own = own.expand(layer.batch_size, num_new)
    layer.storage.hide_newest(own)
    return own


def _visible(mask: torch.Tensor) -> torch.Tensor:
    """Boolean from a boolean mask, or from one that is added to the logits."""
    return mask if mask.dtype == torch.bool else mask == 0


@contextmanager
def attending_ragged(
    model: PreTrainedModel, *, backend: str = "auto", prefill_chunk: int | None = None
) -> Iterator[None]:
    """Let `model` fill and read `HeadCache`s passed as `past_key_values`; other caches work as ever.

    Args:
        model: the model.
        backend: the attention over compressed rows, a name in `BACKENDS`, or `"auto"` for the fastest that works here.
        prefill_chunk: run each layer over a prompt in chunks of this many tokens, so that what it needs besides the
            prompt's hidden states does not grow with the prompt; none for all at once.

    Raises:
        UsageError: the backend cannot be used here, or the chunk is not positive.
        ModelError: the model's attention or layers cannot be reached.
    """
    check_backend(backend)
    with ExitStack() as stack:
        wrap_mask = stack.enter_context(chunked_prefill(model, prefill_chunk)) if prefill_chunk is not None else None
        wraps = [] if wrap_mask is None else [wrap_mask]
        stack.enter_context(wrapped_attention(model, lambda base: _compressing(base, backend), *wraps))
        yield


@contextmanager
def compressed(
    model: PreTrainedModel,
    profile: HeadProfile | None = None,
    *,
    method: str = "headkv-r2",
    budget: int | str | Budget = 64,
    backend: str = "auto",
    prefill_chunk: int | None = None,
    decode_budget: int | str | Budget | None = None,
    buffer: int | None = BUFFER,
    **options,
) -> Iterator[CompressionPlan]:
    """Generate with a compressed cache: `with compressed(model, profile, budget=64): model.generate(...)`.

    Every cache that `model.generate` or `model(...)` would start inside the context becomes a `HeadCache`; one that is
    passed in as `past_key_values` is used as it is. Leaving the context restores the model.

    Args:
        model, profile, method, budget, decode_budget, buffer, options: as for `make_plan`.
        backend, prefill_chunk: as for `attending_ragged`.

    Yields:
        The plan, from which `HeadCache(plan)` makes caches to pass in by hand.
    """
    plan = make_plan(
        model, profile, method=method, budget=budget, decode_budget=decode_budget, buffer=buffer, **options
    )

    def start_head_cache(_module, args, kwargs):
        cache = kwargs.get("past_key_values")
        fresh = cache is None or (type(cache).__name__ == "DynamicCache" and cache.get_seq_length() == 0)
        if fresh and kwargs.get("use_cache", True):
            kwargs["past_key_values"] = HeadCache(plan)
        return args, kwargs

    with attending_ragged(model, backend=backend, prefill_chunk=prefill_chunk):
        hook = model.register_forward_pre_hook(start_head_cache, with_kwargs=True)
        try:
            yield plan
        finally:
            hook.remove()


@torch.no_grad()
def prefill(model: PreTrainedModel, input_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Run a prompt `[B, T]` into `cache`; returns the logits of its last token, `[B, vocabulary]`.

    Call it inside `attending_ragged` or `compressed`.
    """
    return model(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
