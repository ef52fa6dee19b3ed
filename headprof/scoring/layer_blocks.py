"""Layers in blocks: what they attended with, held until there is enough for one large operation in place of many small.

A block is a run of layers that are alike. It is as long as `block_bytes` allows, at least one layer, whose rows are
then taken in parts that have half of these bytes. So all of this takes no more than `block_bytes`, or, for one layer
alone, than half of it beside float32 copies of that layer's keys and values and what is made for one layer.

Shapes: `l` layers of a block, `B` sequences, `H` query heads, `K` KV heads, `D` head dimension, `S` tokens fed, `T`
tokens seen, `N` rows wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headprof.utils.memory import free_bytes

_ON_CPU = 1 << 26
_ELSEWHERE = 1 << 31
_FREE_SHARE = 0.25


def block_bytes(device: torch.device) -> int:
    """Most bytes that one block takes beside what the pass holds anyway.

    On a CPU 64 MiB, since larger operations are no faster there. On other devices 2 GiB, or a quarter
    of what is free if that is less.
    """
    return _ON_CPU if device.type == "cpu" else min(_ELSEWHERE, int(_FREE_SHARE * free_bytes(device)))


@dataclass(frozen=True, eq=False)
class Attended:
    """What one layer attended with.

    Attributes:
        layer: its number.
        query, key, value: `[B, H, S, D]`, `[B, K, T, D]` twice.
        mask: added to the logits, or which are seen, `[B or 1, 1, S, T or more]`; `None`: the causal one, and `window`.
        scaling: factor on the logits.
        softcap: bound on the logits; `None` for none.
        window: tokens that a query sees at most; `None` for all.
        sinks: learned logits that join the softmax, `[H]`; `None` for none.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None
    window: int | None
    sinks: Tensor | None

    @classmethod
    def of(cls, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Any, how: dict[str, Any]) -> Attended:
        """From what Transformers hands to an attention function; `how` has its keywords."""
        scaling = how.get("scaling")
        return cls(
            layer,
            query,
            key,
            value,
            mask if isinstance(mask, Tensor) and mask.ndim == 4 else None,
            query.shape[-1] ** -0.5 if scaling is None else scaling,
            how.get("softcap"),
            how.get("sliding_window"),
            how.get("s_aux"),
        )

    def joins(self, before: Attended) -> bool:
        """Whether it can stand in one block with the layer before."""
        return self.layer == before.layer + 1 and self._kind() == before._kind()

    def _kind(self) -> tuple[Any, ...]:
        tensors = (self.query, self.key, self.value, self.mask, self.sinks)
        forms = tuple(None if each is None else (each.shape, each.dtype, each.device) for each in tensors)
        return (*forms, self.scaling, self.softcap, self.window if self.mask is None else None)

    def held_bytes(self) -> int:
        """What it adds to a block beside its rows: the query, and copies of keys and values, in float32 at last."""
        copied = self.key.numel() + self.value.numel()
        return self.query.nbytes + 4 * copied + (0 if self.key.dtype == torch.float32 else copied * self.key.itemsize)

    def row_bytes(self) -> int:
        """Of one row for all heads: as logits, and as what is made of them."""
        return 2 * 4 * self.query.shape[0] * self.query.shape[1] * self.key.shape[2]


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """One tensor of all, a dimension more in front; of one alone, or of one again and again, a view."""
    if all(each is parts[0] for each in parts):
        return parts[0][None].expand(len(parts), *parts[0].shape)
    return torch.stack(list(parts))


class LayerBlocks:
    """Gathers layers of a forward pass, and hands them on in blocks.

    Args:
        count: `N`, the rows that will be made of each layer.
        work: takes the layers of a block, and how many of the rows may be made at once.
        most_bytes: of a block; `None` for `block_bytes`.
        beside: bytes that `work` takes for each layer beside its rows, its keys and its values.
    """

    def __init__(
        self,
        count: int,
        work: Callable[[Sequence[Attended], int], None],
        most_bytes: int | None = None,
        beside: int = 0,
    ):
        self.count, self.work, self.most_bytes, self.beside = count, work, most_bytes, beside
        self._waiting: list[Attended] = []

    def take(self, layer: Attended) -> None:
        """Take a layer, the next one; the blocks before it may be worked at now."""
        if self.most_bytes is None:
            self.most_bytes = block_bytes(layer.query.device)
        size = self.beside + layer.held_bytes() + self.count * layer.row_bytes()
        if self._waiting and (not layer.joins(self._waiting[-1]) or (len(self._waiting) + 1) * size > self.most_bytes):
            self.finish()
        self._waiting.append(layer)

    def finish(self) -> None:
        """Work at what is left."""
        layers, self._waiting = self._waiting, []
        if layers:
            assert self.most_bytes is not None
            room = self.most_bytes // len(layers) - layers[0].held_bytes() - self.beside
            most = max(room, self.most_bytes // 2 if len(layers) == 1 else 0) // layers[0].row_bytes()
            self.work(layers, max(1, min(self.count, most)))


def in_parts(count: int, most: int) -> Iterator[slice]:
    """`count` rows in parts of at most `most`."""
    return (slice(start, min(start + most, count)) for start in range(0, count, most))
