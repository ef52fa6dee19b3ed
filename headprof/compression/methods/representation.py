"""How kept rows are held: one axis of the table of methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Protocol

import torch

from headprof.compression.kernels.packed_rows import ragged_index
from headprof.compression.methods.observation import Observation
from headprof.compression.rows import Rows


class Representation(Protocol):
    """How a layer's rows are held once it is compressed; later ones are held as they come, until it is once more.

    A dataclass, whose fields are its parameters.
    """

    name: ClassVar[str]
    """What it is called in `--set representation=...`."""

    is_full: ClassVar[bool] = False
    """Whether it holds rows as the model made them."""

    needs_turning: ClassVar[bool] = False
    """Whether it asks how a layer's rotary embedding turns keys (`Rotary.turning`), where that can be told."""

    is_per_head: ClassVar[bool] = True
    """Whether how a head's rows are held is nothing to the other heads of its layer."""

    queries: ClassVar[int] = 0
    """How many of the newest queries it looks at, as far as there are so many."""

    def hold(self, rows: Rows, observed: Observation, *, first: int, newest: int) -> Rows:
        """Kept rows as they are held from now on.

        Args:
            rows: flat, none of them packed.
            observed: what they were chosen from, with the newest queries.
            first, newest: rows of each head that stay as they are, its oldest and its newest.
        """
        ...

    def rows_in(self, num_bytes: float, in_full: int, head_dim: int, bytes_per_element: int, num_kv_heads: int) -> int:
        """How many rows each head of a layer can surely hold in so many bytes, of which `in_full` stay as they are."""
        ...

    def fault(self, head_dim: int) -> str | None:
        """Why heads of this dimension cannot be held so, as a clause; `None` if they can."""
        return None


@dataclass(frozen=True)
class Full(Representation):
    """Rows stay as the model made them."""

    name: ClassVar[str] = "full"
    is_full: ClassVar[bool] = True

    def hold(self, rows: Rows, observed: Observation, *, first: int, newest: int) -> Rows:
        return rows

    def rows_in(self, num_bytes: float, in_full: int, head_dim: int, bytes_per_element: int, num_kv_heads: int) -> int:
        return int(num_bytes // (2 * head_dim * bytes_per_element))


def apart(
    lengths: Sequence[int], counts: Sequence[int], first: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the rows are that are packed, and where those that stay as they are, head by head, int64 each.

    Args:
        lengths: rows of each head, flat.
        counts: how many of them are packed.
        first: rows of each head that come before these.
    """
    starts = list(accumulate(lengths, initial=0))[:-1]
    packed = ragged_index([start + first for start in starts], counts, device)
    firsts = [min(first, length) for length in lengths]
    seconds = [start + one + count for start, one, count in zip(starts, firsts, counts, strict=True)]
    rests = [length - one - count for length, one, count in zip(lengths, firsts, counts, strict=True)]
    others = ragged_index(_in_turn(starts, seconds), _in_turn(firsts, rests), device)
    return packed, others


def _in_turn(ones: Sequence[int], others: Sequence[int]) -> list[int]:
    return [number for pair in zip(ones, others, strict=True) for number in pair]
