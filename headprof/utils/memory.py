"""How much memory there is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def free_bytes(device: torch.device | str) -> int:
    """Bytes that can still be allocated on a device; on a GPU those count that PyTorch holds for reuse."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        held_for_reuse = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held_for_reuse
    import psutil

    return psutil.virtual_memory().available
