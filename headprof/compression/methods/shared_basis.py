"""Kept rows by what they are in a basis that the heads of a layer share: what is common to the ways to do so."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headprof.compression.kernels.constants import constant
from headprof.compression.kernels.packed_rows import PackedRows, sums_before
from headprof.compression.kernels.shared_basis import turned
from headprof.compression.methods.directions import grams, of_groups
from headprof.compression.methods.observation import Observation
from headprof.compression.methods.query_squares import query_squares
from headprof.compression.methods.representation import Representation, apart
from headprof.compression.rows import Rows
from headprof.errors import UsageError
from headprof.models.rotary import Rotary


@dataclass(frozen=True)
class Sharing:
    """Which heads share a basis, and how many rows of each are packed in it.

    Attributes:
        counts: packed rows of each of all heads.
        groups: of each head, which of the bases it has; any where it has no packed rows.
        bases: of each basis, which of all groups of heads it is for.
        num_groups: how many groups there are.
    """

    counts: Sequence[int]
    groups: Sequence[int]
    bases: Sequence[int]
    num_groups: int

    def of_bases(self, each: Tensor) -> Tensor:
        """Of what there is for each group of heads, `[groups, ...]`, that of those which have a basis, `[M, ...]`."""
        if len(self.bases) == self.num_groups:
            return each
        return each[torch.tensor(self.bases).to(each.device, non_blocking=True)]


@dataclass(frozen=True)
class Packing:
    """Rows that are to be packed.

    Attributes:
        keys, values: `[P, D]`, head by head; keys, in float32, turned back from their positions.
        key_weights: by how much an error in a key's channels counts, float32 `[M, D]`.
        turning: how they are turned (see `kernels.shared_basis.turned`).
        sharing: of the heads.
        before: packed rows of all heads before each, then of all, int32 `[N + 1]`.
        batch: `B`.
        heads: how many heads of a sequence share a basis.
        first: rows of each head that come before its packed ones.
        dtype: of the rows that are not packed.
    """

    keys: Tensor
    values: Tensor
    key_weights: Tensor
    turning: tuple[Tensor, Tensor]
    sharing: Sharing
    before: Tensor
    batch: int
    heads: int
    first: int
    dtype: torch.dtype

    def grams(self, rows: Tensor) -> Tensor:
        """Products `x^T x` of such rows that share each basis, float64 `[M, D, D]`."""
        return self.sharing.of_bases(grams(rows, self.before, max(self.sharing.counts), self.batch, self.heads))


@dataclass(frozen=True)
class SharedBasis(Representation):
    """Rows in a basis that heads share and that is held with them.

    Keys are packed as they were before the layer's rotary embedding turned them, where that can be told. What counts of
    an error in a key is what it does to logits: a channel of a key weighs as much as queries are large there (as in
    ThinK, Xu et al. 2024), on average over it and the channel with which it is turned, since queries that ask for a key
    from afar are turned by any angle. A head's first and newest rows stay as they are, and so do those of heads that
    have too few together to make up for a basis.

    Attributes:
        heads: KV heads of a layer, one after the other, that share a basis; 0 for all.
        unrotated: whether keys are turned back before they are packed.
        judges: newest queries by which channels of keys are weighed; 0 if all weigh the same.
        residual: newest rows of a head that stay as they are, if that is more than the method's `keep_last`.
    """

    heads: int = 0
    unrotated: bool = True
    judges: int = 32
    residual: int = 0

    def __post_init__(self) -> None:
        if self.heads < 0 or self.judges < 0 or self.residual < 0:
            raise UsageError(
                "There are no fewer heads and queries than none: give heads, judges and residual at least 0."
            )

    @property
    def queries(self) -> int:  # type: ignore[override]
        return self.judges

    @property
    def is_per_head(self) -> bool:  # type: ignore[override]
        return self.heads == 1

    @property
    def needs_turning(self) -> bool:  # type: ignore[override]
        return self.unrotated

    @abstractmethod
    def _basis_numbers(self, head_dim: int) -> int:
        """How many numbers make up the basis of some heads."""

    @abstractmethod
    def _packed_bytes(self, count: int, head_dim: int, bytes_per_element: int) -> int:
        """What so many packed rows of a head take, without the basis."""

    @abstractmethod
    def _packed_in(self, num_bytes: float, head_dim: int, bytes_per_element: int) -> int:
        """How many packed rows a head can surely hold in so many bytes, the basis aside; below 0 if they are short."""

    @abstractmethod
    def _packed(self, packing: Packing) -> PackedRows:
        """Rows packed."""

    def rows_in(self, num_bytes: float, in_full: int, head_dim: int, bytes_per_element: int, num_kv_heads: int) -> int:
        each, in_full = 2 * head_dim * bytes_per_element, in_full + self.residual
        left = num_bytes - in_full * each - self._beside_rows(head_dim, bytes_per_element, num_kv_heads)
        return max(int(num_bytes // each), in_full + self._packed_in(left, head_dim, bytes_per_element))

    def hold(self, rows: Rows, observed: Observation, *, first: int, newest: int) -> Rows:
        lengths, head_dim, device = rows.known_lengths(), rows.keys.shape[1], rows.keys.device
        batch, num_kv_heads = observed.keys.shape[:2]
        kept = first + max(newest, self.residual)
        heads = min(self.heads or num_kv_heads, num_kv_heads)
        free = [max(0, length - kept) for length in lengths]
        sharing = self._sharing(free, num_kv_heads, heads, head_dim, rows.keys.element_size())
        if not sharing.bases:
            return rows
        packed, others = apart(lengths, sharing.counts, first, device)
        turning = _turning(observed.layer.rotary if self.unrotated else None, head_dim, device)
        keys, before = turned(rows.keys[packed], -rows.positions[packed], *turning), sums_before(sharing.counts, device)
        weights = sharing.of_bases(self._key_weights(observed, heads, turning[1]))
        values, dtype = rows.values[packed], rows.keys.dtype
        packing = Packing(keys, values, weights, turning, sharing, before, batch, heads, first, dtype)
        own = {"keys": rows.keys[others], "values": rows.values[others], "lengths": lengths}
        return replace(rows, **own, packed=self._packed(packing))  # type: ignore[arg-type]

    def _key_weights(self, observed: Observation, heads: int, partners: Tensor) -> Tensor:
        """By how much an error in the channels of keys counts, for each group of heads, float32 `[B * groups, D]`.

        Args:
            observed: with the newest queries.
            heads: of a group.
            partners: with which channel each is turned, int16 `[D]`, or empty.
        """
        squares = of_groups(query_squares(observed, self.judges), len(observed.keys), heads)
        if len(partners):
            squares = squares + squares[:, partners.long()]
        squares = squares / squares.mean(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return (squares + _LEAST).sqrt()

    def _sharing(
        self, free: Sequence[int], num_kv_heads: int, heads: int, head_dim: int, bytes_per_element: int
    ) -> Sharing:
        """Which heads, of those with so many rows that may be packed, have a basis: those that it saves bytes for."""
        basis = self._basis_numbers(head_dim) * bytes_per_element
        saved = [
            2 * count * head_dim * bytes_per_element - self._packed_bytes(count, head_dim, bytes_per_element)
            for count in free
        ]
        groups, bases, number = [0] * len(free), list[int](), 0
        for start in range(0, len(free), num_kv_heads):
            own = [range(at, min(at + heads, start + num_kv_heads)) for at in range(start, start + num_kv_heads, heads)]
            gains = [sum(saved[head] for head in each) - basis for each in own]
            pays = sum(gain for gain in gains if gain > 0) > _turning_bytes(head_dim) + _OF_HEAD * num_kv_heads
            for each, gain in zip(own, gains, strict=True):
                if pays and gain > 0:
                    bases.append(number)
                for head in each:
                    groups[head] = len(bases) - 1 if pays and gain > 0 else -1
                number += 1
        counts = [count if group >= 0 else 0 for count, group in zip(free, groups, strict=True)]
        return Sharing(counts, [max(0, group) for group in groups], bases, number)

    def _beside_rows(self, head_dim: int, bytes_per_element: int, num_kv_heads: int) -> float:
        """A head's part of what a layer holds beside its packed rows, in bytes, at most."""
        number = -(-num_kv_heads // (self.heads or num_kv_heads))
        bases = number * self._basis_numbers(head_dim) * bytes_per_element
        return (bases + _turning_bytes(head_dim)) / num_kv_heads + _OF_HEAD


_LEAST = 1e-3
"""Of the mean of all channels, what is added to the mean square of queries in each: those to come may be larger."""
_OF_HEAD = 4
"""Bytes that say which basis a head has."""


def _turning_bytes(head_dim: int) -> int:
    """What says how keys are turned: a frequency in 4 bytes and a partner in 2 for each dimension."""
    return 6 * head_dim


def _turning(rotary: Rotary | None, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Frequencies and partners of dimensions, float32 and int16 `[D]`; empty where keys are packed as they are."""
    turning = None if rotary is None else rotary.turning(head_dim)
    frequencies, partners = ((), ()) if turning is None else (turning.frequencies, turning.partners)
    return constant(frequencies, device), constant(partners, device, torch.int16)
