"""Transformers' own full caches: the growing one, run eagerly, and the static one, whose steps are compiled."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation.configuration_utils import CompileConfig

FULL = "full"
"""What a case without compression is called in the place of a method."""

EAGER, COMPILED = "eager", "compiled"
FULL_STEPS = (EAGER, COMPILED)
"""`DynamicCache`, whose steps PyTorch runs one operator after the other; `StaticCache`, whose steps are compiled."""

COMPILED_WARM_UP = 5
"""New tokens after which nothing is compiled or recorded any more: the first comes from the prompt, which is not."""


def default_full_steps(device: torch.device) -> tuple[str, ...]:
    """Which full caches are run where none is asked for: on a CPU compiling takes longer than it saves."""
    return FULL_STEPS if device.type == "cuda" else (EAGER,)


def new_full_cache(model: Any, step: str, tokens: int) -> Cache:
    """An empty full cache for sequences of at most so many tokens."""
    if step == EAGER:
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=tokens)


def compile_config(device: torch.device) -> CompileConfig:
    """How `generate` compiles a step over a static cache: by Transformers' own settings, but on a CPU too."""
    config = CompileConfig()
    if device.type == "cpu":
        vars(config)["_compile_all_devices"] = True
    return config


def compiled_call(model: Any, device: torch.device) -> Callable[..., Any]:
    """The model's forward pass as `generate` compiles it."""
    return model.get_compiled_call(compile_config(device))


def repeat_sequences(cache: Cache, batch: int) -> None:
    """Let a full cache of one sequence hold so many copies of it, layer by layer."""
    if not isinstance(cache, StaticCache):
        cache.batch_repeat_interleave(batch)
        return
    layers: list[Any] = cache.layers
    for layer in layers:
        for name in ("keys", "values"):
            copies = getattr(layer, name).repeat(batch, 1, 1, 1)
            torch._dynamo.mark_static_address(copies)
            setattr(layer, name, copies)
        layer.batch_size = batch


def forget_compiled(model: Any) -> None:
    """Free what has been compiled for the model, its recorded graphs and the memory that these hold."""
    torch._dynamo.reset()
    for name in ("_compiled_call", "_last_compile_config"):
        vars(model).pop(name, None)
    free_memory()


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
