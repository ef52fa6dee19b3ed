"""How much attention each key of a prompt received from chosen queries, in all or at most, without ever holding the
`T x T` matrix.

Shapes as in `column_request`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headprof.compression.kernels.column_request import ColumnRequest
from headprof.compression.kernels.torch_column_sums import torch_column_sums
from headprof.compression.kernels.triton_column_sums import triton_column_sums
from headprof.compression.kernels.triton_support import triton_unsupported
from headprof.errors import UsageError


@torch.no_grad()
def column_sums(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    valid: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    weights: Tensor | None = None,
    backend: str = "auto",
    block: int | None = None,
    on_host: Sequence[int] | None = None,
    plans: dict[Any, Tensor] | None = None,
) -> Tensor:
    """Softmax attention summed over queries: H2O's accumulated score (Zhang et al. 2023), EMS's global one.

    A query sees the valid keys up to its own position; one that sees none adds nothing. The softmax is in float32.
    Memory beyond the arguments and the result grows with `T`, not with `N * T`.

    Args:
        query: the chosen queries, `[B, H, N, D]`.
        key: the prompt's keys, `[B, K, T, D]`.
        positions: each query's position in the prompt, below `T` and ascending, int64 `[N]`.
        valid: false for padding keys, bool `[B, T]`; `None` if there are none.
        scaling: factor on the logits.
        softcap: bound on the logits (Gemma-2), or `None`.
        sliding_window: keys this many tokens or more behind a query are hidden from it, or `None`.
        weights: each query's factor in the sum, float32 `[N]`; `None` for 1.
        backend: `torch`, `triton`, or `auto`: Triton on a CUDA device where it can serve, else plain torch.
        block: queries that plain torch takes at once; `None` goes by the device.
        on_host: `positions` as numbers that the host has; without them, plain torch looks them up.
        plans: a dictionary to be given with these positions only, in which a backend leaves what it makes of them.

    Returns:
        Sum over the queries, mean over a group's query heads, float32 `[B, K, T]`.

    Raises:
        UsageError: no such backend, or it cannot serve here.
        ValueError: the arguments' shapes do not fit together.
    """
    request = ColumnRequest(
        query,
        key,
        positions,
        valid,
        scaling,
        softcap,
        sliding_window,
        weights,
        on_host,
        {} if plans is None else plans,
    )
    return _answered(request, backend, block)


@torch.no_grad()
def column_maxima(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    valid: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    weights: Tensor | None = None,
    backend: str = "auto",
    block: int | None = None,
    on_host: Sequence[int] | None = None,
    plans: dict[Any, Tensor] | None = None,
) -> Tensor:
    """The largest softmax attention that any query pays to a key: KVzip's score (Kim et al. 2025).

    Arguments, visibility, memory and errors are those of `column_sums`; weights are each query's factor, at least 0.

    Returns:
        Maximum over the queries and a group's query heads, 0 where no query sees the key, float32 `[B, K, T]`.
    """
    plans = {} if plans is None else plans
    request = ColumnRequest(
        query, key, positions, valid, scaling, softcap, sliding_window, weights, on_host, plans, largest=True
    )
    return _answered(request, backend, block)


def _answered(request: ColumnRequest, backend: str, block: int | None) -> Tensor:
    request.check()
    if _chosen_backend(backend, request.query) == "torch":
        return torch_column_sums(request, block)
    return triton_column_sums(request)


def _chosen_backend(name: str, query: Tensor) -> str:
    """`torch` or `triton`."""
    if name not in ("auto", "torch", "triton"):
        raise UsageError(f"There is no backend {name!r} for column sums: use auto, torch or triton.")
    if name == "auto":
        return "triton" if query.is_cuda and triton_unsupported(query) is None else "torch"
    if name == "triton" and triton_unsupported(query) is not None:
        raise UsageError(
            "The backend 'triton' for column sums needs float32, float16 or bfloat16 with a head dimension of at most "
            "256 on a GPU of compute capability 8.0 or newer, and `pip install triton`: use auto or torch."
        )
    return name
