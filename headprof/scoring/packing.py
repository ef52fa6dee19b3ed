"""Many questions about several contexts, laid out for one forward pass.

Every token has the position that it has in its own prompt, and sees its own context and question (`hidden_mask`), so
tokens may stand in any order: those that predict answers come first, by the kind of what is measured on them, and in
the same columns for all contexts. What follows can then take the rows of all of them as slices.

Shapes: `B` contexts, `S` tokens fed for each, `N` of which predict answers, `C` tokens of the longest context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

_CONTEXT, _NOTHING = 0, -1
"""Segments: of a context, which all of its questions see; of tokens that only fill up, which none sees. Others are
questions, from 1."""


@dataclass(frozen=True)
class Suffix:
    """What follows a context.

    Attributes:
        ids: token ids.
        wanted: how many of the last ones predict an answer.
        kind: 0 or 1, of what is measured on them.
    """

    ids: tuple[int, ...]
    wanted: int
    kind: int = 0


@dataclass(frozen=True, eq=False)
class Packed:
    """Suffixes of `B` contexts, on the host.

    Attributes:
        ids, positions, segments: int64 `[B, S]`.
        rows: the columns that predict answers, the same for all contexts, int64 `[N]`; those of kind 0 first.
        first_kind: how many of these are of kind 0.
        columns: of each context's suffixes, which of the `N` are its own.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor
    rows: Tensor
    first_kind: int
    columns: tuple[tuple[slice, ...], ...]

    @property
    def is_plain(self) -> bool:
        """Whether it is one suffix in its own order, which needs no mask."""
        return len(self.columns) == len(self.columns[0]) == 1


def pack(suffixes: Sequence[Sequence[Suffix]], lengths: Sequence[int]) -> Packed:
    """Lay out suffixes; one alone keeps its order.

    Args:
        suffixes: of each context, at least one, each with at least one wanted row.
        lengths: tokens of each context.
    """
    if len(suffixes) == len(suffixes[0]) == 1:
        return _plain(suffixes[0][0], lengths[0])
    fed = [_Fed(each, length) for each, length in zip(suffixes, lengths, strict=True)]
    widths = [max(len(each.parts[part]) for each in fed) for part in range(3)]
    ids, positions, segments = torch.tensor([each.table(widths) for each in fed]).unbind(-1)
    columns = tuple(each.columns(widths[0]) for each in fed)
    return Packed(ids, positions, segments, torch.arange(widths[0] + widths[1]), widths[0], columns)


def _plain(suffix: Suffix, length: int) -> Packed:
    count = len(suffix.ids)
    positions, segments = torch.arange(length, length + count), torch.ones(1, count, dtype=torch.long)
    rows = torch.arange(count - suffix.wanted, count)
    first = suffix.wanted if suffix.kind == 0 else 0
    return Packed(torch.tensor([suffix.ids]), positions[None], segments, rows, first, ((slice(0, suffix.wanted),),))


_Token = tuple[int, int, int]
"""Id, position, segment."""


class _Fed:
    """What is fed after one context, in three parts: rows of kind 0, rows of kind 1, and all the rest."""

    def __init__(self, suffixes: Sequence[Suffix], length: int):
        self.parts: tuple[list[_Token], ...] = ([], [], [])
        self._starts: list[tuple[Suffix, int]] = []
        self._filling: _Token = (suffixes[0].ids[0], length, _NOTHING)
        for number, suffix in enumerate(suffixes, start=1):
            tokens = [(token, length + at, number) for at, token in enumerate(suffix.ids)]
            rest = len(tokens) - suffix.wanted
            self._starts.append((suffix, len(self.parts[suffix.kind])))
            self.parts[suffix.kind].extend(tokens[rest:])
            self.parts[2].extend(tokens[:rest])

    def table(self, widths: Sequence[int]) -> list[_Token]:
        filled = (
            [*part, *[self._filling] * (width - len(part))] for part, width in zip(self.parts, widths, strict=True)
        )
        return list(chain.from_iterable(filled))

    def columns(self, first_kind: int) -> tuple[slice, ...]:
        starts = [(suffix.wanted, start + first_kind * suffix.kind) for suffix, start in self._starts]
        return tuple(slice(start, start + wanted) for wanted, start in starts)


def hidden_mask(
    positions: Tensor, segments: Tensor, lengths: Tensor, width: int, window: int | None, dtype: torch.dtype
) -> Tensor:
    """What tokens fed after contexts see, added to the logits.

    Args:
        positions, segments: of the tokens fed, `[B, S]`.
        lengths: tokens of each context, `[B]`; what stands behind them in the cache only fills up.
        width: tokens in the cache, `C`.
        window: tokens that each sees at most, itself included; `None` for all.
        dtype: of the logits.

    Returns:
        `[B, 1, S, C + S]`: zero, or the lowest number.
    """
    held = torch.arange(width, device=positions.device)[None].expand(len(positions), -1)
    held_segments = torch.where(held < lengths[:, None], _CONTEXT, _NOTHING - 1)
    seen = torch.cat([held, positions], dim=1)[:, None]  # [B, 1, C + S]
    theirs = torch.cat([held_segments, segments], dim=1)[:, None]
    own, places = segments[..., None], positions[..., None]
    visible = ((theirs == own) | (theirs == _CONTEXT)) & (seen <= places)
    if window is not None:
        visible &= seen > places - window
    zero = torch.zeros((), dtype=dtype, device=positions.device)
    return torch.where(visible, zero, torch.finfo(dtype).min)[:, None]
