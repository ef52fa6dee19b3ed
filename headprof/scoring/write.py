"""What a head writes towards the answer, and from where: the write score.

After Logit-Contribution Scoring (LOCOS; Gema, Alex and Minervini 2026, arXiv 2607.01002, section 3). The other scores
say where a head looks; this one, by how much what it fetches there raises the logit of the token to be said.

Shapes: `L` layers, `B` sequences, `H` query heads, `K` KV heads, `D` head dimension, `N` answer tokens, `T` tokens that
the rows can see.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from headprof.models.write_path import WritePath
from headprof.scoring.attention_rows import RowBlock


def written(rows: Tensor, values: Tensor, directions: Tensor, weights: Tensor) -> Tensor:
    """What heads add to the logits of answer tokens through some of the tokens that they attend to.

    `sum_j w[j] * a_t[j] * (v_j . d_t)`, where `d_t` is the direction of a head's output that raises the logit of answer
    token `t` (see `WritePath.head_directions`).

    Args:
        rows: `a_t`, attention, float `[..., H, N, T]`.
        values: `v`, float `[..., K, T, D]`; query head `h` reads KV head `h // (H // K)`.
        directions: `d_t`, float `[..., H, N, D]`.
        weights: `w`, of each token, float `[T]` or what can be broadcast to the rows: one everywhere for all that a
            head writes.

    Returns:
        Float32 `[..., H, N]`, in logits but for what `directions` leaves out.
    """
    *outer, num_heads, count, num_tokens = rows.shape
    weighed = (rows * weights).reshape(*outer, values.shape[-3], -1, num_tokens)
    outputs = (weighed @ values).view(*outer, num_heads, count, -1)
    return (outputs * directions).sum(dim=-1)


def contrast_weights(
    needle: tuple[int | Tensor, int | Tensor], context_length: int | Tensor, num_tokens: int
) -> Tensor:
    """One for the needle's tokens, and minus the needle's share for the other tokens of its context, float32 `[T]`.

    With `n` tokens in the needle and `C` in the context the others have `-n / (C - n)` each, so that what is taken away
    is what as many tokens write that stand anywhere else (the paper's rescaled rest). After the paper: the question and
    the answer so far are left out of the rest, since nothing can be fetched from a needle that stands there.

    Args:
        needle: its first token, and the one behind its last; tensors `[...]` for many needles, of which the weights are
            then `[..., T]`.
        context_length: `C`, likewise.
        num_tokens: `T`, the question and the answer so far included.
    """
    start, stop, length = (torch.as_tensor(each).unsqueeze(-1) for each in (*needle, context_length))
    tokens = torch.arange(num_tokens, device=start.device)
    share = -(stop - start) / (length - (stop - start)).clamp(min=1)
    rest = torch.where(tokens < length, share, 0.0)
    return torch.where((tokens >= start) & (tokens < stop), 1.0, rest)


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
        rows: numbers of the `N` tokens that predict answers, the same in all `B` sequences, int64 `[N]`.
        said: the answers' tokens, `[B, N]`.
        weights: from `contrast_weights`, `[B, N, T]`.
    """

    def __init__(self, path: WritePath, num_heads: int, rows: Tensor, said: Tensor, weights: Tensor):
        self._path, self._num_heads = path, num_heads
        self._rows = rows.expand(len(said), -1)
        self._weights, self._directions = weights, path.directions(said)
        self._of_layers: tuple[range, Tensor] = (range(0), weights)
        self._unscaled = weights.new_zeros(len(path.layers), len(said), num_heads, len(rows))
        self._scales = weights.new_ones(1)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Note the norms' scales of the forward pass in this context."""
        with self._path.reading_scales(self._rows) as scales:
            yield
        self._scales = scales()

    def take(self, block: RowBlock) -> None:
        """Take attention rows of some layers."""
        layers, at, device = block.layers, block.columns, block.rows.device
        if self._of_layers[0] != layers:
            directions = self._path.block_directions(layers, self._directions, self._num_heads)
            self._of_layers = layers, directions.to(device)
        weights, directions = self._weights[:, None, at].to(device), self._of_layers[1][..., at, :]
        place = slice(layers.start, layers.stop)
        self._unscaled[place, ..., at] = written(block.rows, block.values, directions, weights)

    def of_rows(self) -> Tensor:
        """What each row's token is written, float32 `[L, B, H, N]`."""
        return self._unscaled * self._scales.to(self._unscaled.device)[:, :, None]
