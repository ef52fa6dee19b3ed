"""Looking into a model: what is inside its wrappers, its decoder layers, where they lie, the tokens that end a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from headprof.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def running_model(model: Any) -> PreTrainedModel:
    """The model of Transformers whose `generate` and `forward` run when those of a wrapper around it are called.

    Wrappers are `torch.compile`'s, adapters of PEFT, pipelines, and those of `torch.nn.parallel` with one device.

    Raises:
        ModelError: it is nothing of Transformers, or an adapter feeds the model otherwise than by its weights.
    """
    from transformers import PreTrainedModel

    given = model
    for _ in range(8):
        if isinstance(model, PreTrainedModel) and "_orig_mod" not in model._modules:
            return model
        inner = _inside(model)
        if inner is None:
            break
        model = inner
    raise ModelError(
        f"No model of Transformers is known inside this {type(given).__name__}: give the model itself, whose "
        "`generate` is called."
    )


def _inside(wrapper: Any) -> Any:
    """What a wrapper runs, or `None` if it is none that is known."""
    require_plain_prompts(wrapper)
    if callable(getattr(wrapper, "get_base_model", None)):  # peft
        return wrapper.get_base_model()
    if isinstance(wrapper, torch.nn.DataParallel) and len(wrapper.device_ids) > 1:
        raise ModelError("A DataParallel model runs as copies, which cannot be reached: give the model inside it.")
    modules = getattr(wrapper, "_modules", {})
    for name in ("_orig_mod", "module"):  # torch.compile; torch.nn.parallel
        if name in modules:
            return modules[name]
    if hasattr(wrapper, "base_model"):
        return getattr(wrapper.base_model, "model", wrapper.base_model)
    return None if isinstance(wrapper, torch.nn.Module) else getattr(wrapper, "model", None)  # a pipeline


def require_plain_prompts(wrapper: Any) -> None:
    """
    Raises:
        ModelError: it is an adapter of PEFT that puts something before the tokens that it is given.
    """
    adapter = getattr(wrapper, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise ModelError(
            f"The adapter {type(adapter).__name__} feeds the model tokens or keys of its own, which cannot be "
            "compressed: choose one that changes weights, such as LoRA."
        )


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


def sliding_windows(config: Any) -> tuple[int | None, ...]:
    """Tokens that each of the `L` layers can see at most, itself included, by a model's configuration; `None` for all.

    Args:
        config: of the model, or of its text part.
    """
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    return tuple((window or None) if kind == "sliding_attention" else None for kind in kinds)


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
