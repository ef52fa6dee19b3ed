"""Silencing attention heads: what a head puts out is replaced before the layer's output projection.

By zeros, which is how retrieval heads were first shown to matter (Wu et al. 2024, section 4, "masking out" heads); or
by the head's own mean output (Wang et al. 2022, arXiv 2211.00593, "knockouts"), since layers behind it may lean on what
a head puts out everywhere, and zeros are nothing that they have seen. What replaces an activation can change which
parts of a model seem to matter (Zhang and Nanda 2023, arXiv 2309.16042).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from headprof.models.attention_hook import AttentionFunction, wrapped_attention
from headprof.models.shape import HeadShape
from headprof.models.tensor_parallel import HeadShard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Head = tuple[int, int]
"""A query head: its layer, and its number in the layer."""


class MeanOutputs:
    """Each head's mean output over the tokens of forward passes, before the output projection.

    Where Wang et al. average over other texts, this averages over the tokens of one text: no other text is needed, and
    what a head fetches for one question from one place is next to nothing of it.
    """

    def __init__(self) -> None:
        self._sums: dict[int, torch.Tensor] = {}
        self._tokens: Counter[int] = Counter()

    @contextmanager
    def measuring(self, model: PreTrainedModel) -> Iterator[None]:
        """Take in all tokens of the forward passes in this context.

        Raises:
            ModelError: the model's attention cannot be reached.
        """

        def wrap(base: AttentionFunction) -> AttentionFunction:
            def attention(module, *args, **kwargs):
                output, weights = base(module, *args, **kwargs)  # [B, Q, H, D]
                layer = module.layer_idx
                self._sums[layer] = output.float().sum(dim=(0, 1)) + self._sums.get(layer, 0.0)
                self._tokens[layer] += output.shape[0] * output.shape[1]
                return output, weights

            return attention

        with wrapped_attention(model, wrap):
            yield

    def of_layer(self, layer: int) -> torch.Tensor:
        """The means of a layer's heads, of those that this process has, float32 `[H, D]`."""
        return self._sums[layer] / self._tokens[layer]


@contextmanager
def silenced(model: PreTrainedModel, heads: Iterable[Head], instead: MeanOutputs | None = None) -> Iterator[None]:
    """Run `model` without some of its query heads while the context lasts.

    Args:
        model: a model that uses Transformers' attention interface.
        heads: which.
        instead: what these put out; `None` for zeros.

    Raises:
        ModelError: the model's attention cannot be reached.
    """
    shape = HeadShape.from_config(model.config)
    silent = torch.zeros(1, shape.num_layers, shape.num_heads, dtype=torch.bool)
    for layer, head in heads:
        silent[0, layer, head] = True
    with silenced_each(model, silent, instead):
        yield


@contextmanager
def silenced_each(model: PreTrainedModel, silent: torch.Tensor, instead: MeanOutputs | None = None) -> Iterator[None]:
    """Run `model` with other query heads silent in each sequence of a batch.

    Args:
        model: a model that uses Transformers' attention interface.
        silent: which heads, bool `[B, L, H]`; with `B = 1` the same in every sequence. Layers in which no head is
            silent may see a batch of another size.
        instead: what these put out; `None` for zeros.

    Raises:
        ModelError: the model's attention cannot be reached.
    """
    touched = silent.any(dim=2).any(dim=0).tolist()
    own = HeadShard.of_model(model).own(silent)

    def wrap(base: AttentionFunction) -> AttentionFunction:
        def attention(module, *args, **kwargs):
            output, weights = base(module, *args, **kwargs)  # [B, Q, H, D]
            layer = module.layer_idx
            if touched[layer]:
                mask = own[:, layer].to(output.device)[:, None, :, None]
                put_out = torch.zeros((), device=output.device) if instead is None else instead.of_layer(layer)
                # Replaced, not multiplied: a head that puts out NaN is silent too.
                output = torch.where(mask, put_out.to(output), output)
            return output, weights

        return attention

    with wrapped_attention(model, wrap):
        yield
