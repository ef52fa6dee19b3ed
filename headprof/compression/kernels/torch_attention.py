"""Attention over ragged rows in plain torch, on any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headprof.compression.kernels.ragged_rows import Request

_PADDED_ELEMENTS = 8192
"""Elements of a padded head above which copying all heads costs more than a call for each (measured on a CPU)."""


def torch_attention(request: Request) -> Tensor:
    """One call over a dense view if heads are alike, over a padded copy if they are many and short, else one each.

    Packed rows are unpacked before, for this layer alone and as long as it attends.
    """
    request = replace(request, rows=request.rows.unpacked())
    if request.rows.uniform and request.rows.in_use is not None:
        output = _attend_dense(request)
    elif _pays_to_pad(request):
        output = _attend_padded(request)
    else:
        output = _attend_each(request)
    return request.in_output_order(output)


def _pays_to_pad(request: Request) -> bool:
    if request.num_queries > 16:
        return False  # the work outweighs the calls, and the padded mask would be large
    if request.query.device.type != "cpu" or request.rows.in_use is None:
        return True
    many_operations = not (request.softcap is None and request.sinks is None and request.sliding_window is None)
    limit = 3 * _PADDED_ELEMENTS if many_operations else _PADDED_ELEMENTS * (request.num_heads > 4)
    return request.rows.most * request.head_dim <= limit


def _attend_dense(request: Request) -> Tensor:
    """Heads of one length in slots of one size are a dense cache already."""
    rows, num_heads, longest = request.rows, request.num_heads, request.rows.most
    shape = (num_heads, 1, rows.uniform, request.head_dim)
    keys = rows.keys.view(shape).narrow(2, 0, longest)
    values = rows.values.view(shape).narrow(2, 0, longest)
    mask = _mask(request, lambda flat: flat.view(num_heads, rows.uniform)[:, :longest], longest)
    return _attend(request, request.by_head(), keys, values, mask, request.sinks_by_head())


def _attend_each(request: Request) -> Tensor:
    """Head by head on slices of the storage, so that nothing is copied. On a CUDA device this waits for the bounds."""
    rows = request.rows
    edges = rows.bounds.tolist()[:-1]
    keys = rows.keys[None, None].tensor_split(edges, dim=2)[1::2]  # every other piece is free space
    values = rows.values[None, None].tensor_split(edges, dim=2)[1::2]
    sinks = request.sinks_by_head()
    outputs = []
    for head, query in enumerate(request.by_head().split(1)):
        start, end = edges[2 * head : 2 * head + 2]
        mask = _mask(request, lambda flat, start=start, end=end: flat[None, start:end], end - start)  # type: ignore[misc]
        sink = None if sinks is None else sinks[head : head + 1]
        outputs.append(_attend(request, query, keys[head], values[head], mask, sink))
    return torch.cat(outputs)


def _attend_padded(request: Request) -> Tensor:
    """All heads at once on a copy padded to the longest; the padding repeats a head's last row, which is masked."""
    rows, num_heads, longest, num_queries = request.rows, request.num_heads, request.rows.most, request.num_queries
    starts = rows.bounds[0:-1:2, None]
    lengths = rows.bounds[1::2, None] - starts
    index = (starts + torch.arange(longest, device=starts.device).minimum(lengths - 1)).flatten()

    def take(flat: Tensor) -> Tensor:
        return flat.index_select(0, index).unflatten(0, (num_heads, longest))

    last = lengths + torch.arange(-num_queries, 0, device=starts.device)
    mask = _mask(request, take, longest, last)
    keys, values = take(rows.keys)[:, None], take(rows.values)[:, None]
    return _attend(request, request.by_head(), keys, values, mask, request.sinks_by_head())


def _mask(request: Request, take: Callable[[Tensor], Tensor], length: int, last: Tensor | None = None) -> Tensor | None:
    """Which of the rows each new token sees, for `n` heads at once.

    Args:
        take: picks these heads' rows from a tensor `[rows]`, as `[n, length]`.
        last: index of each new token among its head's rows, `[n, Q]`; `None` if they are the last `Q` of `length`.

    Returns:
        `[n or 1, 1, Q, length]`: bool, or the rows' bias with -inf on hidden ones; `None` if all see all.
    """
    bias, window, num_queries = request.rows.bias, request.sliding_window, request.num_queries
    visible = None
    if num_queries > 1 or last is not None:
        device = request.query.device
        newest = torch.arange(length - num_queries, length, device=device)[None] if last is None else last
        visible = torch.arange(length, device=device) <= newest[:, :, None]  # [n or 1, Q, length]
    if window is not None:
        positions = take(request.rows.positions)
        observers = positions[:, -num_queries:] if last is None else positions.gather(1, last.long())
        near = positions[:, None] > (observers - window)[:, :, None]  # [n, Q, length]
        visible = near if visible is None else visible & near
    if bias is not None:
        added = take(bias)[:, None]
        visible = added if visible is None else torch.where(visible, added, float("-inf"))
    return None if visible is None else visible[:, None]


def _attend(
    request: Request, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, sinks: Tensor | None
) -> Tensor:
    """Attention of `n` heads with equally many rows each.

    Args:
        query: `[n, 1, g, D]` or `[n, g, Q, D]`.
        keys, values: `[n, 1, length, D]`.
        mask: as `_mask` makes it.
        sinks: `[n, 1, g, 1]` or `[n, g, 1, 1]`, or `None`.
    """
    # Fused attention takes a float mask in float32 only on a CPU, and gives zeros there for a row that sees nothing.
    fused_takes_mask = mask is None or mask.dtype == torch.bool or query.device.type == "cpu"
    if request.softcap is None and sinks is None and fused_takes_mask:
        if query.shape[1] > 1:
            keys, values = (rows.expand(-1, query.shape[1], -1, -1) for rows in (keys, values))
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=request.scaling)
    scale = request.scaling if request.softcap is None else request.scaling / request.softcap
    logits = (query.flatten(1, 2).float() * scale) @ keys[:, 0].float().transpose(1, 2)
    if request.softcap is not None:
        logits = torch.tanh(logits) * request.softcap
    logits = logits.unflatten(1, query.shape[1:3])  # [n, 1, g, length] or [n, g, Q, length]
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    if sinks is not None:
        logits = torch.cat([logits, sinks.expand(*logits.shape[:-1], 1)], dim=-1)
    weights = logits.softmax(dim=-1)
    if request.rows.bias is not None:  # which may hide every row from a query
        weights = weights.masked_fill(logits.amax(dim=-1, keepdim=True) == float("-inf"), 0.0)
    if sinks is not None:
        weights = weights[..., :-1]
    return (weights.flatten(1, 2) @ values[:, 0].float()).view(query.shape).to(query.dtype)
