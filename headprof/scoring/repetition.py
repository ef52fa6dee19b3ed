"""A document and its repetition, run through a model once: what each row is worth for repeating it, and the row itself.

Importance of a token to a KV head is the largest attention that any query head of its group pays to it, of any token of
the repetition and the demand for it (KVzip, Kim et al. 2025, arXiv 2505.23416).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from headprof.errors import ModelError
from headprof.models.attention_hook import AttentionFunction, wrapped_attention
from headprof.models.shape import HeadShape
from headprof.models.tensor_parallel import HeadShard
from headprof.scoring.attention_rows import attention_rows, causal_visibility
from headprof.scoring.layer_blocks import Attended, LayerBlocks, in_parts, stacked


@dataclass(frozen=True)
class RepeatedLayer:
    """What one layer made of a document that was repeated.

    Attributes:
        index: its number.
        keys: of the document, at their positions, `[K, T, D]`.
        values: `[K, T, D]`.
        largest: the largest attention that each query head pays to each token, float32 `[H, T]`, 0 to 1.
    """

    index: int
    keys: Tensor
    values: Tensor
    largest: Tensor

    @property
    def importance(self) -> Tensor:
        """The largest of each group, float32 `[K, T]`."""
        return self.largest.unflatten(0, (len(self.keys), -1)).amax(dim=1)


@torch.no_grad()
def repeat_document(
    model: PreTrainedModel,
    shape: HeadShape,
    document: Sequence[int],
    repetition: Sequence[int],
    sink: Callable[[RepeatedLayer], None],
) -> None:
    """Run a document and its repetition, and hand each layer to `sink` once it, or a block of layers, has attended.

    Args:
        model: a causal language model that uses Transformers' attention interface.
        shape: its shape.
        document, repetition: token ids (`PromptEncoder.document_ids`, `repetition_ids`).
        sink: must not keep the keys and values as they are, if memory matters.

    Raises:
        ModelError: the layers do not attend once each, with as many heads as the configuration says.
    """
    count, layers = len(document), Counter[int]()
    own_heads = HeadShard.of_model(model).count(shape.num_heads)

    def work(block: Sequence[Attended], most: int) -> None:
        for each, largest in zip(block, _largest(block, count, most), strict=True):
            sink(RepeatedLayer(each.layer, each.key[0, :, :count], each.value[0, :, :count], largest))

    blocks = LayerBlocks(len(repetition), work)

    def wrap(base: AttentionFunction) -> AttentionFunction:
        def attention(module, query, key, value, attention_mask, **kwargs):
            output = base(module, query, key, value, attention_mask, **kwargs)
            if query.shape[1] != own_heads or query.shape[-1] != key.shape[-1]:
                raise _refused(model)
            layers[module.layer_idx] += 1
            blocks.take(Attended.of(module.layer_idx, query, key, value, None, kwargs))
            return output

        return attention

    embedding: Any = model.get_input_embeddings()
    ids = torch.tensor([[*document, *repetition]], device=embedding.weight.device)
    with wrapped_attention(model, wrap):
        model(ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
        blocks.finish()
    if len(layers) < shape.num_layers or set(layers.values()) != {1}:
        raise _refused(model)


def _largest(block: Sequence[Attended], count: int, most: int) -> Tensor:
    """The largest attention of queries from `count` on to each of the first `count` keys, float32 `[l, H, count]`."""
    first = block[0]
    queries, keys = stacked([each.query[0] for each in block]), stacked([each.key[0] for each in block]).float()
    sinks = None if first.sinks is None else stacked([each.sinks for each in block if each.sinks is not None])
    largest = queries.new_zeros(len(block), queries.shape[1], count, dtype=torch.float32)
    for part in in_parts(queries.shape[2] - count, most):
        start, stop = part.start + count, part.stop + count
        rows = attention_rows(
            queries[:, :, start:stop],
            keys[:, :, :stop],
            causal_visibility(torch.arange(start, stop, device=keys.device), stop, first.window),
            scaling=first.scaling,
            softcap=first.softcap,
            sinks=sinks,
        )
        largest = largest.maximum(rows[..., :count].amax(dim=2))
    return largest


def _refused(model: PreTrainedModel) -> ModelError:
    return ModelError(
        f"The layers of {type(model).__name__} do not attend once each with all their heads, so that nothing can be "
        "fitted to them: choose a model whose layers do, such as Llama, Qwen or Mistral."
    )
