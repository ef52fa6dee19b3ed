"""What the attention rows of many probes and many layers say about their heads, by one operation for all of them.

The same as `retrieval_score` and `reasoning_score` of each probe and layer by itself, but that a row has its score
here, and a probe the sum of its rows' at the end.

Shapes: `L` layers, `l` of them in a block, `B` contexts, `H` query heads, `N` rows of each context, of which those of
retrieval probes come first, `T` tokens that they see, `P` probes of all contexts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from headprof.models.tensor_parallel import WHOLE, HeadShard
from headprof.models.write_path import WritePath
from headprof.probes.build import Probe
from headprof.scoring.attention_rows import RowBlock
from headprof.scoring.packing import Packed
from headprof.scoring.write import WriteMeter, contrast_weights

FIRST_KIND = "retrieval"
"""Of the probes whose rows come first; the others' are `"reasoning"`."""


@dataclass(frozen=True)
class Answer:
    """A probe of one of the contexts, what is said, and which rows predict it."""

    probe: Probe
    context: int
    said: tuple[int, ...]
    columns: slice


def answers_of(
    packed: Packed, probes: Sequence[Sequence[Probe]], said: Sequence[Sequence[tuple[int, ...]]]
) -> list[Answer]:
    """The answers of packed suffixes, in order: of each context its probes, and what is said to each."""
    return [
        Answer(probe, number, words, columns)
        for number, parts in enumerate(zip(probes, said, packed.columns, strict=True))
        for probe, words, columns in zip(*parts, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class FoundScores:
    """What a pass says, on the host.

    Attributes:
        scores: float32 `[P, L, H]`.
        writes: float32 `[P, L, H]`; `None` where they cannot be told.
        right: of each answer, which of its tokens were the arg-max.
        peaks: the largest logits of the pass and of what was read before, which are not finite where numbers overflow.
    """

    scores: Tensor
    writes: Tensor | None
    right: list[list[bool]]
    peaks: Tensor


class RowScores:
    """Scores of all probes of one forward pass.

    Args:
        answers: what is asked.
        packed: how it is laid out.
        tokens: that the rows see, `[B, T]`, on the model's device.
        lengths: tokens of each context.
        grid: `L` and `H`.
        path: from heads to logits, for write scores; `None` for none.
        shard: which of these heads the rows are of.
    """

    def __init__(
        self,
        answers: Sequence[Answer],
        packed: Packed,
        tokens: Tensor,
        lengths: Sequence[int],
        grid: tuple[int, int],
        path: WritePath | None,
        shard: HeadShard = WHOLE,
    ):
        self._answers, self._first_kind, device = answers, packed.first_kind, tokens.device
        self._shard, heads = shard, shard.count(grid[1])
        table = _of_rows(answers, len(packed.rows), lengths).to(device, non_blocking=True)
        spans, needles, self._said, context, *self._shares = table[:2], table[2:4], *table[4:]
        places = torch.arange(tokens.shape[1], device=device)
        self._in_span = (places >= spans[0, ..., None]) & (places < spans[1, ..., None])  # [B, N, T]
        first = slice(0, self._first_kind)
        self._copies = self._in_span[:, first] & (tokens[:, None] == self._said[:, first, None])
        sizes = [stop - start for start, stop in (a.probe.answer_span for a in answers if a.probe.kind != FIRST_KIND)]
        self._most = max(sizes, default=0)
        ranks = torch.arange(self._most, device=device)
        self._ranked = (ranks < (spans[1] - spans[0])[:, self._first_kind :, None]).float()  # [B, n, most]
        self._found = torch.zeros(grid[0], len(lengths), heads, len(packed.rows), device=device)
        self._meter = None
        if path is not None:
            weights = contrast_weights((needles[0], needles[1]), context, tokens.shape[1])
            self._meter = WriteMeter(path, heads, packed.rows, self._said, weights)

    def take(self, block: RowBlock) -> None:
        """Take attention rows of some layers."""
        start, stop = block.columns.start, block.columns.stop
        middle = min(max(self._first_kind, start), stop)
        layers = self._found[block.layers.start : block.layers.stop]
        if start < middle:
            layers[..., start:middle] = self._copied(block.rows[..., : middle - start, :], slice(start, middle))
        if middle < stop:
            layers[..., middle:stop] = self._attended(block.rows[..., middle - start :, :], slice(middle, stop))
        if self._meter is not None:
            self._meter.take(block)

    def _copied(self, rows: Tensor, at: slice) -> Tensor:
        """Whether each row's most attended token is copied, `[l, B, H, n]`."""
        return _looked_up(self._copies[:, at].to(rows.device), rows.argmax(dim=-1, keepdim=True))[..., 0]

    def _attended(self, rows: Tensor, at: slice) -> Tensor:
        """Attention of each row on the tokens of its span that are among as many most attended ones, `[l, B, H, n]`."""
        weights, places = rows.topk(self._most, dim=-1)
        ranked = self._ranked[:, None, at.start - self._first_kind : at.stop - self._first_kind].to(rows.device)
        return (weights * _looked_up(self._in_span[:, at].to(rows.device), places)).mul_(ranked).sum(dim=-1)

    def reading(self) -> AbstractContextManager[None]:
        """To be in force during the pass."""
        return nullcontext() if self._meter is None else self._meter.reading()

    def results(self, logits: Tensor, peak: Tensor) -> FoundScores:
        """Read all that was found from the device, at once.

        Args:
            logits: of the rows, `[B, N, vocabulary]`.
            peak: the largest logit of what was read before.
        """
        owners, span, count = (each.flatten()[:, None] for each in self._shares)
        own = (owners == torch.arange(len(self._answers), device=owners.device)).float()  # [B * N, P]
        tables = [_summed(self._found, own / span)]
        if self._meter is not None:
            tables.append(_summed(self._meter.of_rows(), own / count))
        tables = [self._shard.together(table) for table in tables]
        right = logits.argmax(dim=-1) == self._said.to(logits.device)
        parts = [*tables, right, logits.amax(), peak]
        flat = torch.cat([part.to(tables[0].device, torch.float32).flatten() for part in parts]).cpu()
        *read, hits, _, _ = flat.split([part.numel() for part in parts])
        scores, *writes = (each.view(tables[0].shape) for each in read)
        rights = hits.view(right.shape).bool().tolist()
        chosen = [rights[each.context][each.columns] for each in self._answers]
        return FoundScores(scores, writes[0] if writes else None, chosen, flat[-2:])


def _looked_up(table: Tensor, places: Tensor) -> Tensor:
    """Entries `[l, B, H, n, k]` of a table `[B, n, T]` of rows, by places in them."""
    layers, _, heads = places.shape[:3]
    return table[None, :, None].expand(layers, -1, heads, -1, -1).gather(-1, places)


def _summed(of_rows: Tensor, shares: Tensor) -> Tensor:
    """From `[L, B, H, N]` to what each probe has by shares `[B * N, P]`, `[P, L, H]`."""
    return (of_rows.transpose(1, 2).flatten(2) @ shares).permute(2, 0, 1)


def _of_rows(answers: Sequence[Answer], rows: int, lengths: Sequence[int]) -> Tensor:
    """What is to be known of each row, int64 `[9, B, N]`, on the host.

    First and end of its answer's span, and of its needle; the token said; the context's length; the number of its
    probe; by what the sum of its probe's rows is divided for a score, and for a mean. Rows that only fill up are no
    probe's: they have empty spans, and a token that there is not.
    """
    filling = [[[0, 0, 0, 0, -1, length, -1, 1, 1]] * rows for length in lengths]
    for number, each in enumerate(answers):
        span, count = each.probe.answer_span, len(each.said)
        by = count if each.probe.kind == FIRST_KIND else span[1] - span[0]
        filling[each.context][each.columns] = [
            [*span, *each.probe.needle_span, token, lengths[each.context], number, by, count] for token in each.said
        ]
    return torch.tensor(filling).permute(2, 0, 1)
