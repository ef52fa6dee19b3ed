"""Plugging into Transformers' attention interface: wrap a model's attention function, and put it back.

Nothing is registered on import, no modelling file is copied, and a wrapped model is restored when its context ends,
also after an exception.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headprof.errors import ModelError
from headprof.models.decoder import decoder_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

AttentionFunction = Callable[..., "tuple[torch.Tensor, torch.Tensor | None]"]
"""`(module, query [B, H, Q, D], key [B, K, T, D], value, attention_mask, ...) -> (output [B, Q, H, D], weights)`"""


def eager_attention(module: torch.nn.Module, *args, **kwargs):
    """The attention function that a modelling file keeps for itself, under the name every such file gives it."""
    modeling_file: Any = sys.modules[type(module).__module__]
    return modeling_file.eager_attention_forward(module, *args, **kwargs)


def _free_name(implementation: str) -> str:
    """A name that no running context uses; few are ever needed, so the registry of masks stays small."""
    number = 0
    while (name := f"headprof-{number}|{implementation}") in ALL_ATTENTION_FUNCTIONS:
        number += 1
    return name


@contextmanager
def wrapped_attention(
    model: PreTrainedModel,
    wrap: Callable[[AttentionFunction], AttentionFunction],
    wrap_mask: Callable[[Callable], Callable] = lambda mask: mask,
) -> Iterator[None]:
    """Run `model`'s decoder with its attention function `f` replaced by `wrap(f)` while the context lasts.

    The function that makes its masks is replaced by `wrap_mask` of it. Contexts nest, and two models may be wrapped at
    once. Only the text decoder is touched: a vision tower keeps its own.

    Raises:
        ModelError: the model's attention cannot be replaced, because its code does not use the attention interface.
    """
    decoder = decoder_of(model)
    previous = decoder.config._attn_implementation
    base = eager_attention if previous == "eager" else ALL_ATTENTION_FUNCTIONS[previous]
    name = _free_name(previous)
    ALL_ATTENTION_FUNCTIONS[name] = wrap(base)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, wrap_mask(ALL_MASK_ATTENTION_FUNCTIONS[previous]))
    try:
        decoder.set_attn_implementation(name)
        if decoder.config._attn_implementation != name:
            raise ModelError(
                f"{type(model).__name__} does not use Transformers' attention interface, so its heads cannot be "
                "reached: choose a model whose Transformers code supports it."
            )
        yield
    finally:
        if decoder.config._attn_implementation != previous:
            decoder.set_attn_implementation(previous)
        del ALL_ATTENTION_FUNCTIONS[name]
