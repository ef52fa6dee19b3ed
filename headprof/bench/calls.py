"""What some work asks of a device: operators, kernels, and how often the host waits to read what it found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Result = TypeVar("Result")
aten = torch.ops.aten

_READING = {
    aten._local_scalar_dense,
    aten.item,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
}
"""What gives a number, or a tensor of a size that depends on what the device holds."""
_COPYING = {aten._to_copy, aten.copy_, aten.to}
_FREE = {
    aten.empty,
    aten.empty_like,
    aten.new_empty,
    aten.empty_strided,
    aten.lift_fresh,
    aten.detach,
    aten._unsafe_view,
}
"""What is no work, beside views."""


@dataclass(frozen=True)
class Calls:
    """What some work asked of a device.

    Attributes:
        operators: of torch that were issued, views aside.
        reads: how often the host had to wait for what the device holds, as far as operators show it; `None` on a CPU,
            where nothing waits.
        launches: kernels, copies and fills that ran on a CUDA device; `None` elsewhere.
        busy_seconds: that it was at work with these; `None` elsewhere.
    """

    operators: int
    reads: int | None = None
    launches: int | None = None
    busy_seconds: float | None = None


class OperatorCount(TorchDispatchMode):
    """Counts operators, and reads from a device, while it is in force."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.operators, self.reads = device, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        moves = packet is aten.to and result is not args[0]  # in inference mode operators come as they were called
        if moves or not (func.is_view or packet in _FREE):
            self.operators += 1
            self.reads += self._waits(packet, args, result)
        return result

    def _waits(self, packet: Any, args: tuple, result: Any) -> bool:
        if self.device.type == "cpu" or not any(self._is_there(each) for each in args):
            return False
        return packet in _READING or (packet in _COPYING and not self._is_there(result))

    def _is_there(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.device.type == self.device.type


def counted(work: Callable[[], Result], device: torch.device) -> tuple[Result, Calls]:
    """Do some work, and say what it asked of the device; it takes longer than it would alone."""
    count = OperatorCount(device)
    if device.type != "cuda":
        with count:
            result = work()
        return result, Calls(count.operators, None if device.type == "cpu" else count.reads)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        with count:
            result = work()
        torch.cuda.synchronize(device)
    ran = [each for each in profile.key_averages() if each.device_type == torch.autograd.DeviceType.CUDA]
    seconds = sum(each.self_device_time_total for each in ran) / 1e6
    return result, Calls(count.operators, count.reads, sum(each.count for each in ran), seconds)
