"""Where a model goes: its device, the type of its weights and its attention implementation."""

from __future__ import annotations

from typing import Any

from headprof.errors import ModelError, UsageError
from headprof.models.checkpoint import Source
from headprof.utils.memory import free_bytes

DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2")

# Shares of the free memory that weights may take, so that activations and a cache fit beside them.
_CPU_SHARE = 0.8
_GPU_SHARE = 0.85


def choose_device(requested: str, *, num_cuda: int, has_mps: bool) -> str:
    """`cpu`, `mps` or `cuda:N` for a requested device; raises `UsageError` or `ModelError` when it cannot be had."""
    if requested == "auto":
        return "cuda:0" if num_cuda else "cpu"
    if requested == "cpu":
        return requested
    if requested == "mps":
        if not has_mps:
            raise ModelError("There is no MPS device here; pass --device cpu.")
        return requested
    kind, _, index = requested.partition(":")
    if kind != "cuda" or (":" in requested and not index.isdecimal()):
        raise UsageError(f"Unknown device {requested!r}; pass auto, cpu, cuda, cuda:N or mps.")
    if not num_cuda:
        raise ModelError(
            "PyTorch sees no CUDA device; pass --device cpu, or check the driver and that PyTorch is a CUDA build."
        )
    if int(index or 0) >= num_cuda:
        raise ModelError(f"There is no device {requested}; the last one is cuda:{num_cuda - 1}.")
    return f"cuda:{int(index or 0)}"


def choose_dtype(
    requested: str, *, device: str, stored: str | None, num_parameters: int, free_bytes: int, has_bfloat16: bool
) -> str:
    """Name of the dtype to load weights in.

    Args:
        requested: one of `DTYPES`.
        device: as `choose_device` returns it.
        stored: dtype of the checkpoint, if it says so.
        free_bytes: memory that is free on `device`.
        has_bfloat16: whether the GPU computes in bfloat16.
    """
    if requested != "auto":
        return requested
    if device == "cpu":
        return "float32" if 4 * num_parameters <= _CPU_SHARE * free_bytes else "bfloat16"
    if stored == "float16" or not has_bfloat16:
        return "float16"
    return "bfloat16"


def attention_order(requested: str, flash: bool) -> list[str]:
    """Attention implementations to try, best first; `flash` says whether FlashAttention 2 can be used."""
    if requested != "auto":
        return [requested]
    return ["flash_attention_2", "sdpa", "eager"] if flash else ["sdpa", "eager"]


def split_device(requested: str, *, has_cuda: bool) -> str:
    """`cuda` or `cpu` for a model that is held by several processes: Transformers takes what there is.

    Raises:
        UsageError: something else is asked for.
    """
    kind = "cuda" if has_cuda else "cpu"
    if requested not in ("auto", kind):
        raise UsageError(f"With --tp each process takes its own {kind.upper()} device here: leave --device away.")
    return kind


def split_placement(
    source: Source, config: Any, device: str, dtype: str, num_parameters: int, size: int
) -> dict[str, Any]:
    """As `placement`, for a model of which each of `size` processes holds its part by Transformers' own plan."""
    import torch
    from transformers.distributed.configuration_utils import DistributedConfig

    here = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
    placed = placement(source, config, here, dtype, num_parameters if device == "cpu" else num_parameters // size)
    if placed["device_map"] == "auto":
        raise ModelError(f"{source.name} does not fit the memory of {size} GPUs: start more processes.")
    return {"dtype": placed["dtype"], "distributed_config": DistributedConfig(tp_plan="auto", tp_size=size)}


def placement(source: Source, config: Any, device: str, dtype: str, num_parameters: int) -> dict[str, Any]:
    """The `dtype` and `device_map` arguments of `from_pretrained`.

    Args:
        source: of the model.
        config: its configuration.
        device: as `choose_device` returns it.
        dtype: one of `DTYPES`.
        num_parameters: how many weights there are.

    Raises:
        ModelError: the weights do not fit the memory.
    """
    import torch

    on_gpu = device.startswith("cuda")
    free = free_bytes(device)
    if getattr(config, "quantization_config", None) is not None and not source.is_gguf:
        # A quantized checkpoint knows its own types, and its size is not that of its parameters.
        return {"dtype": "auto" if dtype == "auto" else getattr(torch, dtype), "device_map": {"": device}}
    chosen = choose_dtype(
        dtype,
        device=device,
        stored=str(config.dtype).removeprefix("torch.") if getattr(config, "dtype", None) else None,
        num_parameters=num_parameters,
        free_bytes=free,
        has_bfloat16=not on_gpu or torch.cuda.is_bf16_supported(),
    )
    weight_dtype = getattr(torch, chosen)
    weight_bytes = num_parameters * weight_dtype.itemsize
    if on_gpu and weight_bytes > _GPU_SHARE * free:
        return {"dtype": weight_dtype, "device_map": "auto"}
    if weight_bytes > free:
        raise ModelError(
            f"{source.name} needs {weight_bytes / 1e9:.1f} GB in {chosen} but only {free / 1e9:.1f} GB are free; "
            f"pass {'--dtype bfloat16' if chosen == 'float32' else 'a smaller model'} or free some memory."
        )
    return {"dtype": weight_dtype, "device_map": None if device == "cpu" else {"": device}}
