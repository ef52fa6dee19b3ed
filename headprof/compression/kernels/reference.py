"""The slow twin of all backends: one query at a time, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from headprof.compression.kernels.ragged_rows import Request


def reference_attention(request: Request) -> Tensor:
    """One query at a time, in float64."""
    query, rows = request.query, request.rows.unpacked()
    batch, num_heads, num_queries, head_dim = query.shape
    bounds = rows.bounds.tolist()
    output = query.new_zeros(batch, num_queries, num_heads, head_dim, dtype=torch.float64)
    for b in range(batch):
        for h in range(num_heads):
            head = b * request.num_kv_heads + h // request.group_size
            start, end = bounds[2 * head], bounds[2 * head + 1]
            for i in range(num_queries):
                newest = end - num_queries + i
                seen = slice(start, newest + 1)
                logits = rows.keys[seen].double() @ query[b, h, i].double() * request.scaling
                if request.softcap is not None:
                    logits = request.softcap * torch.tanh(logits / request.softcap)
                if rows.bias is not None:
                    logits = logits + rows.bias[seen]
                if request.sliding_window is not None:
                    far = rows.positions[seen] <= rows.positions[newest] - request.sliding_window
                    logits = logits.masked_fill(far, float("-inf"))
                if logits.max() == float("-inf"):
                    continue
                if request.sinks is not None:
                    logits = torch.cat([logits, request.sinks[h : h + 1].double()])
                weights = logits.softmax(dim=-1)[: newest + 1 - start]
                output[b, i, h] = weights @ rows.values[seen].double()
    return output.to(query.dtype)
