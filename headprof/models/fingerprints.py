"""By what files of this package know again the weights and the tokenizer that they were made with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from headprof.models.tensor_parallel import in_full

_SAMPLES = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights_fingerprint(model: Any, dtype: torch.dtype | None = None) -> str:
    """SHA-256 (hex) of the names and shapes of a model's parameters and of a few numbers from each.

    Two models of one shape, such as a base model and its instruct version, differ in it. Where several processes hold a
    model, all of them have to ask.

    Args:
        model: a PyTorch module.
        dtype: type to which the numbers are rounded first, as if the model had been loaded in it; `None` for its own.
    """
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sha.update(f"{name}{list(parameter.shape)}".encode())
        flat = in_full(parameter.detach()).reshape(-1)
        if flat.is_meta or flat.numel() == 0:
            continue
        sample = flat[:: max(1, flat.numel() // _SAMPLES)]
        sample = sample if dtype is None else sample.to(dtype)
        sha.update(sample.float().cpu().numpy().tobytes())
    return sha.hexdigest()


def weights_fingerprints(model: Any) -> dict[str, str]:
    """The fingerprints of a model's weights as they are, and rounded, by the name of the type: `{"float32": ...}`."""
    return {str(dtype).removeprefix("torch."): weights_fingerprint(model, dtype) for dtype in _DTYPES}


def are_alike(mine: Mapping[str, str], its: Mapping[str, str], dtypes: Iterable[str]) -> bool:
    """Whether two models, one of which may have been loaded in another type than the other, have the same weights.

    Args:
        mine, its: their `weights_fingerprints`.
        dtypes: the types in which they were loaded: rounded to the coarser of these, their weights are the same.
    """
    return any(dtype in mine and mine[dtype] == its.get(dtype) for dtype in dtypes)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 (hex) of a tokenizer's vocabulary and chat template."""
    known = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template or ""]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()
