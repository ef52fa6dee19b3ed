"""What all Triton kernels here need: where they run, and the type they multiply in."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from headprof.compression.kernels.requirements import Package, device_unsupported

TRITON = Package("triton", "triton")


def triton_unsupported(query: Tensor) -> str | None:
    """Why a kernel cannot serve these queries, `[..., D]`, as a verb phrase; `None` if it can.

    The interpreter, which `TRITON_INTERPRET=1` turns on, serves a CPU.
    """
    interpreted = query.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and (reason := device_unsupported(query.device)):
        return reason
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return "needs float32, float16 or bfloat16"
    if query.shape[-1] > 256:
        return "needs a head dimension of at most 256"
    return TRITON.missing()


def dot_dtype(query: Tensor) -> Any:
    """What kernels multiply in: the data's own type, but Triton's interpreter would take bfloat16 for integers."""
    interpreted = query.device.type == "cpu" and query.dtype == torch.bfloat16
    name = "float32" if interpreted else str(query.dtype).removeprefix("torch.")
    return getattr(import_module("triton.language"), name)
