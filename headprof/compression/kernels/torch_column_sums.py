"""Column sums and column maxima in plain torch, on any device."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from headprof.compression.kernels.column_request import ColumnRequest

_LOG2_E = math.log2(math.e)

_ELEMENTS_PER_BLOCK = 2**20
"""Logits held at once on a CPU, so that they stay in its cache (measured). Other devices take 64 times more."""

_PRODUCT_BY_ONEDNN = torch.backends.mkldnn.is_available() and platform.machine().lower() in ("x86_64", "amd64")


def torch_column_sums(request: ColumnRequest, block: int | None) -> Tensor:
    """One KV head after the other, a block of queries at a time over the keys that some of them see."""
    batch, num_kv_heads, num_tokens, _ = request.key.shape
    group_size = request.group_size
    positions = request.positions.tolist() if request.on_host is None else request.on_host
    block = block or _queries_per_block(request)
    sums = request.key.new_zeros(batch, num_kv_heads, num_tokens, dtype=torch.float32)
    for b, (first, end, gaps) in enumerate(request.spans_for_host()):
        seen_blocks = list(_seen_blocks(positions, block, first, end, request.sliding_window))
        for k in range(num_kv_heads):
            group = request.query[b, k * group_size : (k + 1) * group_size]
            keys = request.key[b, k].float().contiguous()
            for queries, seen in seen_blocks:
                logits = _base_2_logits(request, group[:, queries], keys[seen])  # [g, n, cols]
                valid = request.valid[b] if gaps and request.valid is not None else None
                _hide(request, logits, queries, seen, positions[queries.start], valid)
                weights = None if request.weights is None else request.weights[queries].repeat(group_size)
                if request.largest:
                    maxima = _softmax_column_maxima(logits.flatten(0, 1), weights)
                    torch.maximum(sums[b, k, seen], maxima, out=sums[b, k, seen])
                else:
                    sums[b, k, seen] += _softmax_column_sums(logits.flatten(0, 1), weights)
    return sums if request.largest else sums.div_(group_size)


def _queries_per_block(request: ColumnRequest) -> int:
    elements, most_rows = _ELEMENTS_PER_BLOCK, 256
    if request.key.device.type != "cpu":
        elements, most_rows = 64 * elements, 16 * most_rows
    rows = min(max(elements // request.key.shape[2], 96), most_rows)
    return max(1, rows // request.group_size)


def _seen_blocks(
    positions: Sequence[int], block: int, first: int, end: int, sliding_window: int | None
) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, each with the keys that some of it see, from `first` to before `end`."""
    for start in range(0, len(positions), block):
        stop = min(start + block, len(positions))
        oldest = 0 if sliding_window is None else positions[start] - sliding_window + 1
        seen = slice(max(first, oldest), min(end, positions[stop - 1] + 1))
        if seen.start < seen.stop:
            yield slice(start, stop), seen


def _base_2_logits(request: ColumnRequest, query: Tensor, keys: Tensor) -> Tensor:
    """Logits by which to raise 2, which is faster than to raise e; a constant may be missing from all of a query's.

    Args:
        query: `[g, n, D]`, of any type.
        keys: `[cols, D]`, float32.

    Returns:
        Float32 `[g, n, cols]`.
    """
    scale = request.scaling * _LOG2_E
    if request.softcap is not None:
        scale *= 2 / request.softcap
    logits = _products(query.flatten(0, 1).float() * scale, keys).unflatten(0, query.shape[:2])
    if request.softcap is not None:
        # The hyperbolic tangent of x is 1 - 2 / (1 + exp(2x)), which is faster; a softmax does not miss the 1.
        logits.exp2_().add_(1.0).reciprocal_().mul_(-2.0 * request.softcap * _LOG2_E)
    return logits


def _products(query: Tensor, keys: Tensor) -> Tensor:
    """`query @ keys.T`, for which torch takes MKL; oneDNN, which serves these tensors, is twice as fast on AMD CPUs."""
    if query.device.type == "cpu" and _PRODUCT_BY_ONEDNN:
        return linear(query.to_mkldnn(), keys).to_dense()
    return query @ keys.T


def _hide(
    request: ColumnRequest, logits: Tensor, queries: slice, seen: slice, oldest: int, valid: Tensor | None
) -> None:
    """Put -inf for the keys `seen` that not all of these queries see.

    Args:
        request: what is asked.
        logits: `[g, n, cols]`, written to.
        queries, seen: which these are of.
        oldest: position of the first of the queries.
        valid: bool `[T]`, only if there are gaps in it.
    """
    positions = request.positions[queries, None]
    start = seen.start
    if valid is None and request.sliding_window is None:
        start = min(max(start, oldest + 1), seen.stop)  # all see what is before
    keys = torch.arange(start, seen.stop, device=positions.device)
    hidden = keys > positions
    if request.sliding_window is not None:
        hidden |= keys <= positions - request.sliding_window
    if valid is not None:
        hidden |= ~valid[start : seen.stop]
    logits[:, :, start - seen.start :].masked_fill_(hidden, float("-inf"))


def _softmax_column_maxima(logits: Tensor, weights: Tensor | None) -> Tensor:
    """Maximum over the rows' weighted softmax to the base 2, `[cols]`, from `[rows, cols]`, which it overwrites."""
    powers, totals = _powers(logits)
    return powers.div_((totals if weights is None else totals / weights)[:, None]).amax(dim=0)


def _powers(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Powers of 2 in proportion to the softmax, in place of `[rows, cols]`, and each row's sum of them, `[rows]`."""
    highest = logits.amax(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)  # -inf if it sees nothing
    powers = logits.sub_(highest).exp2_()
    return powers, powers.sum(dim=1).clamp_(min=1.0)  # the highest alone makes 1, unless it sees nothing


def _softmax_column_sums(logits: Tensor, weights: Tensor | None) -> Tensor:
    """Weighted sum over the rows' softmax to the base 2, `[cols]`, from `[rows, cols]`, which it overwrites."""
    powers, totals = _powers(logits)
    shares = totals.reciprocal_() if weights is None else weights / totals
    return shares @ powers
