"""Tokens of a prompt that no method may evict.

Whatever judges tokens by attention may lose an instruction that nobody looks at before it is needed, such as a rule in
a system message. So a user can name tokens that every head keeps, as the attention sinks and the end of the prompt.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headprof.errors import CacheError, UsageError

Keep = Tensor | Sequence[tuple[int, int]]
"""Tokens of a prompt: spans `[start, stop)` of positions, alike in all sequences; or bool `[T]`, or `[B, T]`."""


@dataclass(frozen=True)
class ProtectedTokens:
    """Where in each sequence of a batch its protected tokens are.

    The host knows it, for it decides how many rows a head has; a device is told once.

    Attributes:
        positions: of each sequence, ascending; of one only, if all have the same.
    """

    positions: tuple[tuple[int, ...], ...]
    _marks: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, keep: Keep | None) -> ProtectedTokens | None:
        """What `keep` names; `None` if that is nothing.

        Raises:
            UsageError: it is neither spans nor marks.
        """
        if keep is None:
            return None
        return cls.of_positions(_of_marks(keep) if isinstance(keep, Tensor) else [_of_spans(keep)])

    @classmethod
    def of_positions(cls, positions: Sequence[tuple[int, ...]]) -> ProtectedTokens | None:
        """Those at these positions of each sequence, ascending; `None` if there are none."""
        alike = len(set(positions)) == 1
        return cls(tuple(positions[:1] if alike else positions)) if any(positions) else None

    def count(self, first: int, stop: int | None = None) -> list[int]:
        """Of each sequence, how many are at positions from `first` on and before `stop`; one number, if all are alike.

        Without `stop`, all from `first` on.
        """
        ends = [len(own) if stop is None else bisect_left(own, stop) for own in self.positions]
        return [max(0, end - bisect_left(own, first)) for own, end in zip(self.positions, ends, strict=True)]

    def among(self, positions: Tensor) -> Tensor:
        """Which of some rows they are.

        Args:
            positions: of the rows in their sequences, int `[B, K, T]`.

        Returns:
            bool `[B, K, T]`, on the same device, for which the host does not wait.
        """
        marks = self._marks_on(positions.device)
        index = positions.long().clamp(max=marks.shape[1] - 1)
        return marks[:, None].expand(*positions.shape[:2], -1).gather(-1, index)

    def _marks_on(self, device: torch.device) -> Tensor:
        """Bool `[B or 1, N]`, of which the last is false: it stands for all positions from there on."""
        if device not in self._marks:
            with torch.inference_mode(False):
                marks = torch.zeros(len(self.positions), self.end + 1, dtype=torch.bool)
                for sequence, own in enumerate(self.positions):
                    marks[sequence, list(own)] = True
                self._marks[device] = marks.to(device, non_blocking=True)
        return self._marks[device]

    @property
    def end(self) -> int:
        """No position is as large."""
        return max(own[-1] + 1 for own in self.positions if own)

    def for_batch(self, batch: int, tokens: int) -> ProtectedTokens:
        """Those of a prompt of so many sequences of so many tokens; where beams repeat each sequence, of all of them.

        Raises:
            CacheError: they are of more sequences, or of longer ones.
        """
        if batch % len(self.positions):
            raise CacheError(
                f"Tokens of {len(self.positions)} sequences are protected where the prompt has {batch}: give as many."
            )
        if self.end > tokens:
            raise CacheError(
                f"Token {self.end - 1} is protected where the prompt has {tokens} tokens: protect tokens that it has."
            )
        if len(self.positions) in (1, batch):
            return self
        repeats = batch // len(self.positions)
        return ProtectedTokens(tuple(own for own in self.positions for _ in range(repeats)))

    def of_sequences(self, chosen: Sequence[int]) -> ProtectedTokens | None:
        """Those of these sequences of the batch, in this order; one may come more than once."""
        if len(self.positions) == 1:
            return self
        return self.of_positions([self.positions[number] for number in chosen])

    def before(self, stop: int) -> ProtectedTokens | None:
        """Those at positions before `stop`; `None` if there are none."""
        return self.of_positions([own[: bisect_left(own, stop)] for own in self.positions])

    def marks(self, batch: int, tokens: int) -> Tensor:
        """Which of so many tokens of so many sequences they are, bool `[B, tokens]`, on the CPU."""
        return self.among(torch.arange(tokens).expand(batch, 1, -1))[:, 0]

    @staticmethod
    def joined(parts: Sequence[ProtectedTokens | None], sizes: Sequence[int]) -> ProtectedTokens | None:
        """Those of several batches as one.

        Args:
            parts: of each batch.
            sizes: sequences of each batch.
        """
        if all(part is None for part in parts):
            return None
        rows: list[tuple[int, ...]] = []
        for part, size in zip(parts, sizes, strict=True):
            own = ((),) if part is None else part.positions
            rows += own * (size // len(own))
        return ProtectedTokens.of_positions(rows)


def _of_marks(marks: Tensor) -> tuple[tuple[int, ...], ...]:
    if marks.dtype != torch.bool or marks.ndim not in (1, 2) or not marks.numel():
        raise UsageError(
            f"Protected tokens cannot be marked by {marks.dtype} {list(marks.shape)}: give a bool tensor, one for each "
            "token of the prompt."
        )
    rows = marks[None] if marks.ndim == 1 else marks
    return tuple(tuple(row.nonzero().flatten().tolist()) for row in rows.cpu())


def _of_spans(spans: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    found: set[int] = set()
    for span in spans:
        known = isinstance(span, tuple | list) and len(span) == 2 and all(type(each) is int for each in span)
        if not known or not 0 <= span[0] <= span[1]:
            raise UsageError(f"Protected tokens cannot be at {span!r}: give (start, stop), token positions from 0 on.")
        found.update(range(*span))
    return tuple(sorted(found))
