"""The ids of the tokens that a cache has seen, for its layers and for whoever asks later."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_PARTS = 256
"""Pieces, one of each forward pass, before they are laid together."""


class SeenTokens:
    """Token ids in the order in which they came, as far as they are known from the first one on."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, ids: Tensor | None) -> None:
        """Take the ids of the tokens that come next, `[B, N]`; `None` where nobody knows them."""
        if ids is None or (self._parts and len(ids) != len(self._parts[0])):
            self._parts = []
            return
        self._parts.append(ids)
        if len(self._parts) > _MOST_PARTS:
            self.joined()

    def replace(self, ids: Tensor | None) -> None:
        """Know these instead, `[B, T]`; `None` to know none."""
        self._parts = [] if ids is None else [ids]

    def joined(self) -> Tensor | None:
        """All that are known, int64 `[B, T]`; `None` where none are."""
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts, dim=1)]
        return self._parts[0] if self._parts else None

    def first(self, count: int, batch: int) -> Tensor | None:
        """Those of the first `count` tokens of `batch` sequences, int64 `[B, count]`; `None` where they are unknown."""
        known = self.joined()
        if known is None or len(known) != batch or known.shape[1] < count:
            return None
        return known[:, :count]
