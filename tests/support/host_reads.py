"""A CPU that stands for a GPU: where the host would wait for it, and how many operators are issued.

Tensors that the host makes for itself, by a factory without a `device`, and what is made of these alone are the host's;
all others are the device's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from headprof.compression.kernels import column_sums, looking, marking, triton_column_sums, window_scores
from headprof.compression.methods import window_attention

aten = torch.ops.aten
_WAITING = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.nonzero,
    aten.nonzero_numpy,
    aten.masked_select,
    aten.equal,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten._linalg_eigh,
}
"""What gives a number, or a tensor of a size that depends on what the device holds."""
_READING = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.cpu: "cpu", Tensor.__array__: "numpy"}
_MOVING = {Tensor.to, Tensor.cuda, Tensor.type}
_LEAVING = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.lift_fresh, aten._unsafe_view}
"""What is no work for a device, beside views."""


class _Ledger:
    """What has been found so far, and which tensors are the host's."""

    def __init__(self, hosts: Iterable[Tensor]):
        self.waits: list[str] = []
        self.operators: list[str] = []
        self._hosts = WeakTensorKeyDictionary(dict.fromkeys(hosts, True))

    def is_host(self, tensor: Tensor) -> bool:
        return tensor in self._hosts

    def all_host(self, values: Any) -> bool:
        return all(self.is_host(each) for each in tree_leaves(values) if isinstance(each, Tensor))

    def mark(self, results: Any) -> None:
        for each in tree_leaves(results):
            if isinstance(each, Tensor):
                self._hosts[each] = True

    def take(self, tensor: Tensor) -> None:
        """The device's from now on."""
        self._hosts.pop(tensor, None)

    def note(self, what: str) -> None:
        self.waits.append(f"{what} at {_place()}")


def _place() -> str:
    """File and line of the innermost code that is neither torch's nor this file's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _has_tensor(values: Any) -> bool:
    return any(isinstance(each, Tensor) for each in tree_leaves(values))


def _device_given(args: tuple, kwargs: dict) -> bool:
    return kwargs.get("device") is not None or any(isinstance(each, torch.device | str) for each in args)


class _Functions(TorchFunctionMode):
    """Sees what the code asks for: factories, moves between host and device, reads that torch does not dispatch."""

    def __init__(self, ledger: _Ledger):
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        ledger = self.ledger
        if func in _READING and not ledger.is_host(args[0]):
            ledger.note(_READING[func])
        if func in (Tensor.__getitem__, Tensor.__setitem__) and not ledger.is_host(args[0]):
            self._look_at_index(args[1])
        if func in _MOVING and isinstance(args[0], Tensor):
            return self._moved(func, args, kwargs)
        result = func(*args, **kwargs)
        if func is Tensor.cpu:
            result = result.detach() if result is args[0] else result
            ledger.mark(result)
            return result
        if not _has_tensor((args, kwargs)):
            if not _device_given(args, kwargs):
                ledger.mark(result)
            elif func is torch.tensor and tree_leaves(args[0]):
                ledger.note("blocking upload")
        elif ledger.all_host((args, kwargs)) and func not in _READING:
            ledger.mark(result)
        return result

    def _look_at_index(self, index: Any) -> None:
        for each in index if isinstance(index, tuple) else (index,):
            if isinstance(each, list) or (isinstance(each, Tensor) and each.ndim and self.ledger.is_host(each)):
                self.ledger.note("blocking upload")

    def _moved(self, func, args, kwargs):
        own = self.ledger.is_host(args[0])
        result = func(*args, **kwargs)
        others = [each for each in (*args[1:], *kwargs.values()) if isinstance(each, Tensor)]
        to_device = _device_given(args[1:], kwargs) or any(not self.ledger.is_host(each) for each in others)
        if not own or not to_device:
            if own:
                self.ledger.mark(result)
            return result
        if not kwargs.get("non_blocking"):
            self.ledger.note("blocking upload")
        if result is args[0]:
            result = result.detach()
        self.ledger.take(result)
        return result


class _Dispatch(TorchDispatchMode):
    """Sees every operator that is issued."""

    def __init__(self, ledger: _Ledger):
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        ledger, packet = self.ledger, func.overloadpacket
        known = _has_tensor((args, kwargs)) and ledger.all_host((args, kwargs))
        if not known:
            if packet is aten.copy_ and ledger.is_host(args[0]):
                ledger.note("copy to the host")
            elif packet in _WAITING or _sizes_by_mask(packet, args) or _repeats_unknown(func, args, kwargs):
                ledger.note(packet.__name__)
            elif not func.is_view and packet not in _LEAVING:
                ledger.operators.append(packet.__name__)
        result = func(*args, **kwargs)
        if known:
            ledger.mark(result)
        return result


def _sizes_by_mask(packet: Any, args: tuple) -> bool:
    """Whether an index contains a mask whose true entries must be counted first."""
    if packet not in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        return False
    masked = [each.dtype in (torch.bool, torch.uint8) for each in args[1] if each is not None]
    fills = packet is not aten.index and args[2].numel() == 1 and all(masked)  # that is a masked_fill
    return any(masked) and not fills


def _repeats_unknown(func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether `repeat_interleave` must look how long its result is."""
    return func.overloadpacket is aten.repeat_interleave and kwargs.get("output_size") is None


_watching: list[_Ledger] = []


@contextmanager
def device_watched(hosts: Iterable[Tensor] = ()) -> Iterator[_Ledger]:
    """Within, `waits` lists where the host would have waited for a device, and `operators` what was issued to it.

    Args:
        hosts: tensors made before that are the host's, such as a plan's scores.
    """
    ledger = _Ledger(hosts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(looking, "is_free", lambda device: False)
        _watching.append(ledger)
        try:
            with _Functions(ledger), _Dispatch(ledger):
                yield ledger
        finally:
            _watching.pop()


class _Launched:
    """A kernel of Triton whose launches count as operators; what its interpreter does is not watched."""

    def __init__(self, kernel: Any, name: str):
        self.kernel, self.name = kernel, name

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args, **options):
            if _watching:
                _watching[-1].operators.append(self.name)
            with _disable_current_modes():
                return self.kernel[grid](*args, **options)

        return launch


def serve_by_kernels(patch: pytest.MonkeyPatch) -> None:
    """Let importances and the marking of the largest go by Triton's kernels, as on a GPU; on a CPU, interpreted."""
    patch.setattr(window_attention, "serves", lambda queries: True)
    patch.setattr(marking, "serves", lambda values: values.dtype == torch.float32)
    patch.setattr(column_sums, "_chosen_backend", lambda *arguments: "triton")
    for module, names in (
        (window_scores, ("window log sums", "window scores")),
        (triton_column_sums, ("column log sums", "column sums")),
    ):
        kernels = tuple(map(_Launched, module._kernels(), names))
        patch.setattr(module, "_kernels", lambda kernels=kernels: kernels)
    mark = _Launched(marking._kernel(), "mark")
    patch.setattr(marking, "_kernel", lambda: mark)
