"""The newest queries of a layer, kept until its rows are scored by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from headprof.compression.methods.observation import AttentionLayer


@dataclass
class RecentQueries:
    """The newest queries of a layer, by which its rows are scored next.

    Attributes:
        queries: in order, `[B, H, Q, D]` each.
        valid: which of each are no padding, bool `[B, Q]`; `None` for all.
        layer: how it attends.
    """

    queries: list[torch.Tensor] = field(default_factory=list)
    valid: list[torch.Tensor | None] = field(default_factory=list)
    layer: AttentionLayer = field(default_factory=lambda: AttentionLayer(scaling=1.0))

    def __len__(self) -> int:
        return sum(query.shape[2] for query in self.queries)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [*self.queries, *(each for each in self.valid if each is not None)]

    def add(self, query: torch.Tensor, valid: torch.Tensor | None, needed: int | None) -> None:
        """Take newer ones, and forget those before the last `needed`, if it is a number."""
        self.queries.append(_owned(query))
        self.valid.append(None if valid is None else _owned(valid))
        while needed is not None and len(self) - self.queries[0].shape[2] >= needed:
            del self.queries[0], self.valid[0]

    def joined(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """All queries, `[B, H, N, D]`, and which are no padding, bool `[B, N]`; `None` if none, or all."""
        if not self.queries:
            return None, None
        valid = None
        if any(each is not None for each in self.valid):
            valid = torch.cat(
                [
                    query.new_ones(query.shape[0], query.shape[2], dtype=torch.bool) if each is None else each
                    for query, each in zip(self.queries, self.valid, strict=True)
                ],
                dim=1,
            )
        return torch.cat(self.queries, dim=2), valid

    def split(self, count: int) -> tuple[RecentQueries, RecentQueries]:
        """Copies of the first `count`, and of the rest."""
        query, valid = self.joined()

        def part(which: slice) -> RecentQueries:
            if query is None:
                return RecentQueries(layer=self.layer)
            own = None if valid is None else valid[:, which].clone()
            return RecentQueries([query[:, :, which].clone()], [own], self.layer)

        return part(slice(count)), part(slice(count, None))

    def forget(self) -> None:
        self.queries, self.valid = [], []

    def select(self, sequences: Sequence[int]) -> None:
        """Keep those of these sequences of the batch, in this order."""
        self.queries = [query[sequences] for query in self.queries]
        self.valid = [None if each is None else each[sequences] for each in self.valid]

    @classmethod
    def stacked(cls, parts: Sequence[RecentQueries], batch_sizes: Sequence[int]) -> RecentQueries:
        """Those of several as a batch; where one remembers fewer than another, padding comes before them."""
        most = max(len(part) for part in parts)
        if most == 0:
            return cls(layer=parts[0].layer)
        longest = next(part for part in parts if len(part) == most)
        like = longest.queries[0]
        shape = (sum(batch_sizes), like.shape[1], most, like.shape[3])
        queries, valid = like.new_zeros(shape), like.new_zeros(shape[0], most, dtype=torch.bool)
        start = 0
        for part, size in zip(parts, batch_sizes, strict=True):
            query, counts = part.joined()
            if query is not None:
                queries[start : start + size, :, most - len(part) :] = query
                valid[start : start + size, most - len(part) :] = True if counts is None else counts
            start += size
        return cls([queries], [valid], longest.layer)


def _owned(part: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if it is a part of a larger one (a mask `[B, 1, T, T]`), which it would keep in memory."""
    return part.clone() if part.untyped_storage().nbytes() != part.nbytes else part
