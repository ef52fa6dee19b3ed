"""Models of published shapes with random weights: enough to measure speed and memory, where no weights are at hand."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from headprof.checkpoint import quiet
from headprof.errors import UsageError
from headprof.models import DTYPES, LoadedModel, choose_device
from headprof.profile import KINDS, HeadProfile
from headprof.shape import HeadShape


def _shape(
    model_type: str,
    *,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    hidden: int,
    mlp: int,
    vocab: int,
    positions: int,
    theta: float,
    eps: float,
    tied: bool = False,
    **others: Any,
) -> dict[str, Any]:
    """Arguments of `AutoConfig.for_model`."""
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rms_norm_eps": eps,
        "tie_word_embeddings": tied,
        **others,
    }


_8B: dict[str, Any] = {"heads": 32, "kv_heads": 8, "head_dim": 128, "hidden": 4096}
_135M: dict[str, Any] = {"heads": 9, "kv_heads": 3, "head_dim": 64, "hidden": 576, "tied": True}

SHAPES: dict[str, dict[str, Any]] = {
    # With the context of Llama 3.1: Llama 3 itself was made for 8192 tokens.
    "llama-3-8b": _shape("llama", layers=32, **_8B, mlp=14336, vocab=128256, positions=131072, theta=5e5, eps=1e-5),
    # Version 0.3; earlier ones have a sliding window.
    "mistral-7b": _shape(
        "mistral", layers=32, **_8B, mlp=14336, vocab=32768, positions=32768, theta=1e6, eps=1e-5, sliding_window=None
    ),
    "qwen3-8b": _shape("qwen3", layers=36, **_8B, mlp=12288, vocab=151936, positions=40960, theta=1e6, eps=1e-6),
    "smollm2-135m": _shape("llama", layers=30, **_135M, mlp=1536, vocab=49152, positions=8192, theta=1e5, eps=1e-5),
}
"""Published models by the numbers of their configurations, for speed without weights."""


def find_shape(name: str) -> dict[str, Any]:
    """The numbers of a published model's configuration.

    Raises:
        UsageError: there is no shape of this name; the message lists those there are.
    """
    if name not in SHAPES:
        raise UsageError(f"There is no model shape {name!r}: choose one of {', '.join(SHAPES)}.")
    return SHAPES[name]


def random_model(
    shape_name: str,
    dtype: torch.dtype,
    device: torch.device | str,
    attn: str | None = None,
    max_positions: int | None = None,
) -> Any:
    """A model with the shape of a published one and random weights, made on the device in its dtype.

    Its speed and memory are those of the published model; its text is noise.

    Args:
        shape_name: a name in `SHAPES`.
        dtype: of the weights.
        device: where they are made.
        attn: attention implementation; none for Transformers' choice.
        max_positions: tokens that it should read, if more than the published model does.

    Raises:
        UsageError: there is no such shape.
    """
    numbers = dict(find_shape(shape_name))
    numbers["max_position_embeddings"] = max(numbers["max_position_embeddings"], max_positions or 0)
    config = AutoConfig.for_model(**numbers)
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), quiet():
        torch.manual_seed(0)
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn)
    model.config.architectures = [type(model).__name__]
    return model.eval().requires_grad_(False)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, with exact character offsets and no chat template; ids 0, 1, 2 are pad, bos, eos.

    It needs no file, and serves any model with at least 259 token ids. A text takes about four times the tokens that a
    trained tokenizer makes of it.
    """
    special = ["<pad>", "<s>", "</s>"]
    symbols = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )


def random_profile(model: Any, seed: int = 0) -> HeadProfile:
    """A head profile for a model with random weights: few heads with high scores, as real ones have, but any heads."""
    shape = HeadShape.from_config(model.config)
    generator = torch.Generator().manual_seed(seed)
    draw = {which: torch.rand(shape.num_layers, shape.num_heads, generator=generator) for which in KINDS}
    return HeadProfile("random", shape, {which: scores**4 for which, scores in draw.items()})


def load_random(
    shape_name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attn: str = "auto",
    seed: int = 0,
    max_positions: int | None = None,
) -> tuple[LoadedModel, HeadProfile]:
    """A model of a published shape with random weights and a tokenizer of bytes, and a profile to go with it.

    Args:
        shape_name: one of `SHAPES`.
        device, attn: as for `load_model`.
        dtype: as for `load_model`; `auto` is bfloat16 on a CUDA device, else float32.
        seed: of the profile.
        max_positions: tokens that it should read, if more than the published model does.

    Raises:
        UsageError: there is no such shape, device or dtype.
    """
    place, type_of_numbers = place_and_dtype(device, dtype)
    attention = None if attn == "auto" else attn
    model = random_model(shape_name, type_of_numbers, place, attention, max_positions)
    shape = HeadShape.from_config(model.config)
    loaded = LoadedModel(model, byte_tokenizer(), shape, shape_name, model.config.max_position_embeddings)
    return loaded, random_profile(model, seed)


def place_and_dtype(device: str, dtype: str) -> tuple[str, torch.dtype]:
    """Where random numbers go, and what they are; `auto` is a CUDA device if there is one, and bfloat16 there.

    Raises:
        UsageError: there is no such device or dtype.
    """
    cuda = torch.cuda.device_count()
    place = choose_device(device, num_cuda=cuda, has_mps=torch.backends.mps.is_available())
    if dtype == "auto":
        dtype = "bfloat16" if place.startswith("cuda") else "float32"
    if dtype not in DTYPES:
        raise UsageError(f"There is no dtype {dtype!r}: choose one of {', '.join(DTYPES)}.")
    return place, getattr(torch, dtype)
