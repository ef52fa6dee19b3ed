"""Whether the host may look at what a device holds."""

from __future__ import annotations

import torch


def is_free(device: torch.device) -> bool:
    """Whether the host has nothing to wait for there, so that sizes may go by what is found rather than by bounds.

    Call it as `looking.is_free`: tests in which a CPU stands for a GPU deny it.
    """
    return device.type == "cpu"
