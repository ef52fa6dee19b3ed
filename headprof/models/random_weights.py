"""Models of published shapes with random weights: enough to measure speed and memory, where no weights are at hand."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from headprof.errors import UsageError
from headprof.models.checkpoint import quiet
from headprof.models.loading import LoadedModel
from headprof.models.placement import DTYPES, choose_device
from headprof.models.published import find_shape
from headprof.models.shape import HeadShape


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
        attn: attention implementation; `None` for Transformers' choice.
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


def load_random(
    shape_name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attn: str = "auto",
    max_positions: int | None = None,
) -> LoadedModel:
    """A model of a published shape with random weights, and a tokenizer of bytes.

    Args:
        shape_name: one of `SHAPES`.
        device, attn: as for `load_model`.
        dtype: as for `load_model`; `auto` is bfloat16 on a CUDA device, else float32.
        max_positions: tokens that it should read, if more than the published model does.

    Raises:
        UsageError: there is no such shape, device or dtype.
    """
    chosen_device, chosen_dtype = device_and_dtype(device, dtype)
    attention = None if attn == "auto" else attn
    model = random_model(shape_name, chosen_dtype, chosen_device, attention, max_positions)
    shape = HeadShape.from_config(model.config)
    return LoadedModel(model, byte_tokenizer(), shape, shape_name, model.config.max_position_embeddings)


def device_and_dtype(device: str, dtype: str) -> tuple[str, torch.dtype]:
    """Where random numbers go, and what they are; `auto` is a CUDA device if there is one, and bfloat16 there.

    Raises:
        UsageError: there is no such device or dtype.
    """
    cuda = torch.cuda.device_count()
    chosen = choose_device(device, num_cuda=cuda, has_mps=torch.backends.mps.is_available())
    if dtype == "auto":
        dtype = "bfloat16" if chosen.startswith("cuda") else "float32"
    if dtype not in DTYPES:
        raise UsageError(f"There is no dtype {dtype!r}: choose one of {', '.join(DTYPES)}.")
    return chosen, getattr(torch, dtype)
