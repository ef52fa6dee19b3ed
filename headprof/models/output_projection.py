"""The output projection of a model's attention layers: what a head's values come to in the hidden state.

Shapes: `H` query heads, `D` head dimension, `E` hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headprof.errors import ModelError
from headprof.models.decoder import decoder_of
from headprof.models.shape import HeadShape
from headprof.models.tensor_parallel import local

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo")
"""What modelling files call it."""


def attention_modules(model: PreTrainedModel) -> dict[int, torch.nn.Module]:
    """The attention module of each layer that has an output projection where Transformers' models have it."""
    found: dict[int, torch.nn.Module] = {}
    for module in decoder_of(model).modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and projection_of(module) is not None:
            found[layer] = module
    return found


def projection_of(attention: torch.nn.Module) -> Any:
    """The output projection of an attention module; `None` if it has none under a known name."""
    return next((part for name in _NAMES if (part := attention._modules.get(name)) is not None), None)


def projecting_modules(model: PreTrainedModel, shape: HeadShape, what: str) -> list[torch.nn.Module]:
    """The attention module of each of the `L` layers.

    Args:
        model, shape: the model, and its shape.
        what: who needs their output projections, for a message.

    Raises:
        ModelError: some layer has none that takes the outputs of all heads, side by side.
    """
    found = attention_modules(model)
    modules = [found[layer] for layer in range(shape.num_layers) if layer in found]
    width = shape.num_heads * shape.head_dim
    if len(modules) < shape.num_layers or any(_width(projection_of(module)) != width for module in modules):
        raise ModelError(
            f"{what} needs the output projection of each layer's attention, which {type(model).__name__} has not where "
            "Transformers' Llama has it: leave norms away."
        )
    return modules


def _width(projection: Any) -> int | None:
    """What it takes; GPT-2's layers tell it by their weights, `[in, out]`."""
    weight = getattr(projection, "weight", None)
    return getattr(projection, "in_features", None if weight is None else weight.shape[0])


@torch.no_grad()
def output_weights(attention: torch.nn.Module, num_heads: int) -> Tensor:
    """By what each head's output is multiplied before all are added up, float32 `[H, D, E]`.

    Args:
        attention: the attention module.
        num_heads: `H`, of the heads that this process has.
    """
    projection = projection_of(attention)
    if type(projection) is torch.nn.Linear:
        return local(projection.weight).T.float().unflatten(0, (num_heads, -1))
    weight, width = next(projection.parameters()), _width(projection)
    assert width is not None  # as the plan has seen to
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    units = torch.eye(width, dtype=dtype, device=weight.device)  # an adapter's, or those of quantized weights
    return (projection(units) - projection(torch.zeros_like(units[:1]))).float().unflatten(0, (num_heads, -1))


@torch.no_grad()
def stacked_output_weights(attentions: Sequence[torch.nn.Module], num_heads: int) -> Tensor:
    """`output_weights` of several layers on one device, float32 `[l, E, H * D]`, by few operations."""
    projections = [projection_of(each) for each in attentions]
    if all(type(each) is torch.nn.Linear for each in projections):
        return torch.stack([local(each.weight) for each in projections]).float()
    return torch.stack([output_weights(each, num_heads).flatten(0, 1).T for each in attentions])


def projected_norms(values: Tensor, weights: Tensor) -> Tensor:
    """The norms of what values come to, by `output_weights` of the heads that read them.

    Args:
        values: `[B, K, T, D]`.
        weights: `[H, D, E]`.

    Returns:
        Float32 `[B, H, T]`.
    """
    # |v W| = |v R'| where W' = Q R: so nothing of the hidden size is made for each token.
    roots = torch.linalg.qr(weights.transpose(1, 2), mode="r").R.transpose(1, 2)  # [H, D, D]
    group = len(weights) // values.shape[1]
    norms = [
        (values[:, head // group].float() @ root.to(values.device)).norm(dim=-1) for head, root in enumerate(roots)
    ]
    return torch.stack(norms, dim=1)
