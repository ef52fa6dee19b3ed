"""Compressing during prefill: the Python API over any model that Transformers' attention interface serves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache

from headprof.compression.attention import ragged_attention
from headprof.compression.budget import Budget
from headprof.compression.cache import CompressionPlan, FanOutLayer, HeadCache, HeadCacheLayer, compress_layer
from headprof.compression.importance import PromptStates
from headprof.compression.methods import find_method
from headprof.errors import ProfileError
from headprof.interface import AttentionFunction, wrapped_attention
from headprof.shape import HeadShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headprof.profile import HeadProfile


def make_plan(
    model: PreTrainedModel,
    profile: HeadProfile | None = None,
    *,
    method: str = "headkv-r2",
    budget: int | str | Budget = 64,
    **options,
) -> CompressionPlan:
    """Put a method, a budget and a profile together for a model.

    Args:
        model: the model whose cache is to be compressed.
        profile: its head profile, for methods that need one.
        method: a name in `METHODS`.
        budget: tokens per KV head (`64`), share of the prompt (`"1.5%"`) or bytes (`"512MB"`).
        options: parameters of the method's parts, such as `window=8`, `keep_last=4`, `pool_factor=1.1`.

    Raises:
        UsageError: no such method or parameter, or the budget cannot be read.
        ProfileError: the method needs a profile and there is none, or it belongs to another model.
    """
    chosen = find_method(method).with_options(**options)
    shape = HeadShape.from_config(model.config)
    scores = torch.ones(shape.num_layers, shape.num_kv_heads)
    if (which := chosen.budget.profile_scores) is not None:
        if profile is None:
            raise ProfileError(
                f"The method {method!r} needs a head profile: make one with `headprof score`, or choose snapkv."
            )
        if differences := profile.shape.differences(shape):
            raise ProfileError(
                f"The profile is for another model ({', '.join(differences)}): make one with `headprof score`."
            )
        scores = profile.kv_head_scores(which, getattr(chosen.budget, "aggregate", "max"))
    element = torch.empty(0, dtype=model.dtype).element_size()
    return CompressionPlan(chosen, Budget.parse(budget), shape, scores, element)


def _compressing(base: AttentionFunction) -> AttentionFunction:
    """The model's attention over a prompt, then compression; ragged attention for the tokens after it."""

    def attention(module, query, key, value, attention_mask, **kwargs):
        layer: HeadCacheLayer | FanOutLayer | None = getattr(key, "head_cache_layer", None)
        if layer is None:  # another cache than ours
            return base(module, query, key, value, attention_mask, **kwargs)
        scaling = kwargs.get("scaling")
        logit_options = {
            "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling,
            "softcap": kwargs.get("softcap"),
            "sliding_window": kwargs.get("sliding_window"),
        }
        if isinstance(layer, HeadCacheLayer) and layer.is_initialized:
            output = ragged_attention(query, layer.rows(), key.shape[1], sinks=kwargs.get("s_aux"), **logit_options)
            return output, None
        output, weights = base(module, query, key, value, attention_mask, **kwargs)
        valid = _valid_tokens(attention_mask, key)
        compress_layer(layer, PromptStates(query, key, valid, **logit_options), value)
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
    visible = last_row if last_row.dtype == torch.bool else last_row == 0
    return visible.expand(batch, num_tokens)


@contextmanager
def attending_ragged(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` fill and read `HeadCache`s passed as `past_key_values`; other caches work as ever."""
    with wrapped_attention(model, _compressing):
        yield


@contextmanager
def compressed(
    model: PreTrainedModel,
    profile: HeadProfile | None = None,
    *,
    method: str = "headkv-r2",
    budget: int | str | Budget = 64,
    **options,
) -> Iterator[CompressionPlan]:
    """Generate with a compressed cache: `with compressed(model, profile, budget=64): model.generate(...)`.

    Every cache that `model.generate` or `model(...)` would start inside the context becomes a `HeadCache`; one that is
    passed in as `past_key_values` is used as it is. Leaving the context restores the model.

    Args:
        model, profile, method, budget, options: as for `make_plan`.

    Yields:
        The plan, from which `HeadCache(plan)` makes caches to pass in by hand.
    """
    plan = make_plan(model, profile, method=method, budget=budget, **options)

    def start_head_cache(_module, args, kwargs):
        cache = kwargs.get("past_key_values")
        fresh = cache is None or (type(cache).__name__ == "DynamicCache" and cache.get_seq_length() == 0)
        if fresh and kwargs.get("use_cache", True):
            kwargs["past_key_values"] = HeadCache(plan)
        return args, kwargs

    with attending_ragged(model):
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
