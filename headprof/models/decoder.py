"""Looking into a model: its decoder layers, where they lie, and the tokens that end what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from headprof.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_of(model: PreTrainedModel) -> Any:
    """The text decoder inside a model, without its output layer; the model itself where it names none."""
    decoder = model.get_decoder()
    return decoder if hasattr(decoder, "config") else model  # some call their output layer a decoder


def find_decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList | None:
    """The `L` decoder layers in order, or `None` where a model does not list them."""
    decoder = decoder_of(model)
    if isinstance(layers := getattr(decoder, "layers", None), torch.nn.ModuleList):
        return layers
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers  # other names are `h` and `blocks`
    lists = (module for module in decoder.modules() if isinstance(module, torch.nn.ModuleList))
    return next((layers for layers in lists if len(layers) == num_layers), None)


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The `L` decoder layers in order, for what cannot be done without them; else see `find_decoder_layers`.

    Raises:
        ModelError: the model does not list them.
    """
    layers = find_decoder_layers(model)
    if layers is None:
        raise ModelError(
            f"{type(model).__name__} does not list its decoder layers, so they cannot be reached: choose a model whose "
            "Transformers code does."
        )
    return layers


def layer_device(model: PreTrainedModel, index: int) -> torch.device:
    """Where a layer's attention runs, layers may lie on several devices; the embedding's where that is not told."""
    embedding: Any = model.get_input_embeddings()
    layers = find_decoder_layers(model)
    device = embedding.weight.device if layers is None else next(layers[index].parameters()).device
    return embedding.weight.device if device.type == "meta" else device


def end_tokens(model: PreTrainedModel, tokenizer: Any = None) -> set[int]:
    """Token ids that end an answer by the model's generation settings and, if given, its tokenizer; may be empty."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    own = None if tokenizer is None else tokenizer.eos_token_id
    return {token for token in (*(ends if isinstance(ends, list) else [ends]), own) if token is not None}
