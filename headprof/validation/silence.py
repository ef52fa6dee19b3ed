"""Silencing attention heads: what a head puts out is zeroed before the layer's output projection.

This is how retrieval heads were first shown to matter (Wu et al. 2024, section 4, "masking out" heads).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from headprof.models.attention_hook import AttentionFunction, wrapped_attention
from headprof.models.shape import HeadShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Head = tuple[int, int]
"""A query head: its layer, and its number in the layer."""


@contextmanager
def silenced(model: PreTrainedModel, heads: Iterable[Head]) -> Iterator[None]:
    """Run `model` without some of its query heads while the context lasts.

    Raises:
        ModelError: the model's attention cannot be reached.
    """
    shape = HeadShape.from_config(model.config)
    silent = torch.zeros(1, shape.num_layers, shape.num_heads, dtype=torch.bool)
    for layer, head in heads:
        silent[0, layer, head] = True
    with silenced_each(model, silent):
        yield


@contextmanager
def silenced_each(model: PreTrainedModel, silent: torch.Tensor) -> Iterator[None]:
    """Run `model` with other query heads silent in each sequence of a batch.

    Args:
        model: a model that uses Transformers' attention interface.
        silent: which heads, bool `[B, L, H]`; with `B = 1` the same in every sequence. Layers in which no head is
            silent may see a batch of another size.

    Raises:
        ModelError: the model's attention cannot be reached.
    """
    touched = silent.any(dim=2).any(dim=0).tolist()

    def wrap(base: AttentionFunction) -> AttentionFunction:
        def attention(module, *args, **kwargs):
            output, weights = base(module, *args, **kwargs)  # [B, Q, H, D]
            if touched[module.layer_idx]:
                mask = silent[:, module.layer_idx].to(output.device)
                # Filled, not multiplied: a head that puts out NaN is silent too.
                output = output.masked_fill(mask[:, None, :, None], 0)
            return output, weights

        return attention

    with wrapped_attention(model, wrap):
        yield
