"""A CUDA graph for the CPU: a function is recorded, operator by operator, and done again on the same memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Recorder(TorchDispatchMode):
    """Notes each operator with what it was given; numbers from the host stay as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.own: set[int] = set()
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.is_view is False and func._schema.is_mutable:
            self._keep(func, args, kwargs)
        output = func(*args, **kwargs)
        given = {_address(each) for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        fresh = [
            isinstance(each, torch.Tensor) and (_address(each) not in given or each.numel() == 0)
            for each in tree_leaves(output)
        ]
        self.own |= {_address(each) for each, new in zip(tree_leaves(output), fresh, strict=True) if new}
        self.calls.append((func, args, kwargs, tree_leaves(output), fresh))
        return output

    def _keep(self, func, args, kwargs) -> None:
        """What is about to be written to, if it was there before the recording."""
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            for each in tree_leaves(given):
                if isinstance(each, torch.Tensor) and _address(each) not in self.own:
                    storage = each.untyped_storage()
                    self.before.setdefault(_address(each), (storage, storage.clone()))


def record(function: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
    """What does it again, and its output; as with a graph, the recording itself leaves no trace."""
    recorder = _Recorder()
    with recorder:
        output = function()
    for storage, before in recorder.before.values():
        storage.copy_(before)

    def replay() -> None:
        for func, args, kwargs, outputs, fresh in recorder.calls:
            made = tree_leaves(func(*args, **kwargs))
            for old, new, is_fresh in zip(outputs, made, fresh, strict=True):
                if is_fresh:
                    old.copy_(new)

    return replay, output
