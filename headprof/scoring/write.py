"""What a head writes towards the answer, and from where: the write score.

After Logit-Contribution Scoring (LOCOS; Gema, Alex and Minervini 2026, arXiv 2607.01002, section 3). The other scores
say where a head looks; this one, by how much what it fetches there raises the logit of the token to be said.

Shapes: `H` query heads, `K` KV heads, `D` head dimension, `N` answer tokens, `T` tokens that the rows can see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from headprof.models.write_path import WritePath


def written(rows: Tensor, values: Tensor, directions: Tensor, weights: Tensor) -> Tensor:
    """What heads add to the logits of answer tokens through some of the tokens that they attend to.

    `sum_j w[j] * a_t[j] * (v_j . d_t)`, where `d_t` is the direction of a head's output that raises the logit of answer
    token `t` (see `WritePath.head_directions`).

    Args:
        rows: `a_t`, attention, float `[H, N, T]`.
        values: `v`, float `[K, T, D]`; query head `h` reads KV head `h // (H // K)`.
        directions: `d_t`, float `[H, N, D]`.
        weights: `w`, of each token, float `[T]`: one everywhere for all that a head writes.

    Returns:
        Float32 `[H, N]`, in logits but for what `directions` leaves out.
    """
    num_heads, count, num_tokens = rows.shape
    weighed = (rows * weights).reshape(len(values), -1, num_tokens)
    outputs = (weighed @ values).reshape(num_heads, count, -1)
    return (outputs * directions).sum(dim=-1)


def contrast_weights(needle: tuple[int, int], context_length: int, num_tokens: int) -> Tensor:
    """One for the needle's tokens, and minus the needle's share for the other tokens of its context, float32 `[T]`.

    With `n` tokens in the needle and `C` in the context the others have `-n / (C - n)` each, so that what is taken away
    is what as many tokens write that stand anywhere else (the paper's rescaled rest). After the paper: the question and
    the answer so far are left out of the rest, since nothing can be fetched from a needle that stands there.

    Args:
        needle: its first token, and the one behind its last.
        context_length: `C`.
        num_tokens: `T`, the question and the answer so far included.
    """
    start, stop = needle
    weights = torch.zeros(num_tokens)
    weights[:context_length] = -(stop - start) / max(1, context_length - (stop - start))
    weights[start:stop] = 1.0
    return weights


class WriteMeter:
    """The write scores of all heads on the probes of one forward pass.

    A probe's score of a head is the mean over the answer's tokens `t` of
    `s_t * sum_j w[j] * a_t[j] * (v_j . d_t)`, in logits: `w` from `contrast_weights`, and `s_t` the scale of the final
    norm at that position, times that of the layer's own norm behind the attention, if there is one. The scales are
    taken as they were in the pass, that is, as constants; biases of the output projection are no head's and are left
    out, and so is a cap on the logits, which keeps their order. After the paper, whose program multiplies by the
    unembedding alone: the norms are folded in, so that a channel's weight and a position's scale are not missing.

    Args:
        path: of the model.
        num_heads: `H`.
        needles: where each probe's needle stands.
        said: the answer's tokens of each probe.
        rows: numbers of the tokens that predict them, counted over the pass, int64 `[N]` each.
        context_length: tokens of the context that the probes share.
    """

    def __init__(
        self,
        path: WritePath,
        num_heads: int,
        needles: Sequence[tuple[int, int]],
        said: Sequence[Sequence[int]],
        rows: Sequence[Tensor],
        context_length: int,
    ):
        self._path, self._num_heads = path, num_heads
        self._needles, self._context_length = needles, context_length
        self._sizes, self._rows = [len(each) for each in said], torch.cat(list(rows))
        self._directions = path.directions(torch.tensor([token for each in said for token in each]))
        self._of_layer: tuple[int, tuple[Tensor, ...]] = (-1, ())
        self._unscaled = torch.zeros(len(path.layers), num_heads, sum(self._sizes))
        self._parts = self._unscaled.split(self._sizes, dim=-1)
        self._scales = torch.ones(len(path.layers), sum(self._sizes))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Note the norms' scales of the forward pass in this context."""
        with self._path.reading_scales(self._rows) as scales:
            yield
        self._scales = scales()

    def take(self, layer: int, number: int, rows: Tensor, values: Tensor) -> None:
        """Take a probe's attention rows `[H, N, T]` in a layer, and the layer's values `[K, T, D]`."""
        if self._of_layer[0] != layer:
            directions = self._path.head_directions(layer, self._directions, self._num_heads)
            self._of_layer = layer, directions.to(rows.device).split(self._sizes, dim=1)
        weights = contrast_weights(self._needles[number], self._context_length, rows.shape[-1]).to(rows.device)
        self._parts[number][layer] = written(rows, values, self._of_layer[1][number], weights)

    def scores(self) -> list[Tensor]:
        """Of each probe, float32 `[L, H]`."""
        scaled = self._unscaled * self._scales[:, None]
        return [each.mean(dim=-1) for each in scaled.split(self._sizes, dim=-1)]
