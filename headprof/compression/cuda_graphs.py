"""What a device does, captured as CUDA graphs, by which it does it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Recording(Protocol):
    """Captures what a function does on a device; what comes back does it again, on the same addresses."""

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]: ...


class CudaGraphs:
    """Captures as CUDA graphs, one after the other in the same memory.

    The memory is a pool's, which PyTorch's allocator lets no graph join any more once all graphs in it are gone: so one
    graph stays there for good.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)  # memory of one stream serves no other
        self._first: torch.cuda.CUDAGraph | None = None

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        if self._first is None:
            self._first, _ = self._captured(lambda: torch.zeros(1, device=self._device))
        graph, output = self._captured(function, self._first.pool())
        return graph.replay, output

    def _captured(self, function: Callable[[], Tensor], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=pool, stream=self._stream):
            output = function()
        return graph, output


def recording_for(model: PreTrainedModel) -> Recording | None:
    """What captures this model's steps, if anything can."""
    devices = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    return CudaGraphs(model.device) if model.device.type == "cuda" and len(devices) <= 1 else None
