"""Attention over a ragged cache: all backends, one table, and the one function that picks.

Shapes as in `ragged_rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headprof.compression.kernels.flash import (
    FLASH_ATTN,
    flash_attention,
    flash_attn_unsupported,
    varlen_attention,
    varlen_unsupported,
)
from headprof.compression.kernels.packed_kinds import as_arguments, from_arguments
from headprof.compression.kernels.ragged_rows import RaggedRows, Request
from headprof.compression.kernels.reference import reference_attention
from headprof.compression.kernels.requirements import Package
from headprof.compression.kernels.torch_attention import torch_attention
from headprof.compression.kernels.triton_attention import PLAN, attention_unsupported, planned, triton_attention
from headprof.compression.kernels.triton_support import TRITON, triton_unsupported
from headprof.compression.kernels.work_items import WorkItems, rows_per_item
from headprof.errors import UsageError

PREFERENCE = ("triton", "flash-attn", "varlen", "torch")
"""What `auto` tries on a CUDA device, in this order. On any other device it takes `torch`."""


@dataclass(frozen=True)
class Backend:
    """A way to compute ragged attention.

    Attributes:
        attend: the request's answer, `[B, Q, H, D]`.
        unsupported: why it cannot serve a request, as a verb phrase for "The attention backend 'x' ...", or `None`.
        package: what it needs beyond torch, or `None`.
    """

    attend: Callable[[Request], Tensor]
    unsupported: Callable[[Request], str | None]
    package: Package | None = None


def _anything(request: Request) -> str | None:
    return None


BACKENDS = {
    "reference": Backend(reference_attention, _anything),
    "torch": Backend(torch_attention, _anything),
    "flash-attn": Backend(flash_attention, flash_attn_unsupported, FLASH_ATTN),
    "varlen": Backend(varlen_attention, varlen_unsupported),
    "triton": Backend(triton_attention, attention_unsupported, TRITON),
}


def ragged_attention(
    query: Tensor,
    rows: RaggedRows,
    num_kv_heads: int,
    *,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention of the newest tokens over the kept rows of each head, softmax in float32.

    A new token sees all older rows and the new ones up to its own. One that sees no row at all, since `rows.bias` hides
    them, gets zeros. In code that is being compiled it is the operator `headprof::ragged_attention`.

    Args:
        query: `[B, H, Q, D]`, queries of the last `Q` rows of every head.
        rows: keys and values, the new tokens' included.
        num_kv_heads: `K`.
        scaling: factor on the logits.
        softcap: bound on the logits (Gemma-2), or `None`.
        sliding_window: rows this many positions or more behind a token are hidden from it, or `None`.
        sinks: learned logits `[H]` that join the softmax and are dropped (gpt-oss), or `None`.
        backend: a name in `BACKENDS`, or `auto`.

    Returns:
        `[B, Q, H, D]`, in the query's dtype.

    Raises:
        UsageError: no such backend, or it cannot serve this request.
    """
    request = Request(query, rows, num_kv_heads, scaling, softcap, sliding_window, sinks)
    return _compiled(request, backend) if torch.compiler.is_compiling() else _attend(request, backend)


def _attend(request: Request, backend: str) -> Tensor:
    """The answer of this backend, or of the one that `auto` takes."""
    if backend != "auto":
        check_backend(backend)
        if reason := BACKENDS[backend].unsupported(request):
            raise UsageError(f"The attention backend {backend!r} {reason}: use --backend auto or torch.")
        return BACKENDS[backend].attend(request)
    if request.query.is_cuda:
        for name in PREFERENCE:
            if BACKENDS[name].unsupported(request) is None:
                return BACKENDS[name].attend(request)
    return torch_attention(request)


def make_plans(rows: RaggedRows) -> None:
    """Make the work plans that a backend would make at its first call over this storage, outside of any graph."""
    if rows.keys.is_cuda and triton_unsupported(rows.keys) is None:
        planned(rows)


def _compiled(request: Request, backend: str) -> Tensor:
    """The same as an operator, which is given tensors and numbers."""
    rows = request.rows
    plan = rows.plans.get(PLAN)
    return torch.ops.headprof.ragged_attention(
        request.query,
        rows.keys,
        rows.values,
        rows.positions,
        rows.bounds,
        rows.bias,
        request.sinks,
        plan.table if isinstance(plan, WorkItems) else rows.bounds.new_empty(0),
        *as_arguments(rows.packed),
        rows.longest,
        rows.uniform,
        request.num_kv_heads,
        request.scaling,
        request.softcap,
        request.sliding_window,
        backend,
    )


@torch.library.custom_op("headprof::ragged_attention", mutates_args=("work_items",))
def _ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    bounds: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    work_items: Tensor,
    packed_tensors: Sequence[Tensor],
    packed_numbers: Sequence[int],
    longest: int,
    uniform: int,
    num_kv_heads: int,
    scaling: float,
    softcap: float | None,
    sliding_window: int | None,
    backend: str,
) -> Tensor:
    """`ragged_attention` as an operator; `work_items` is the table of the storage's `WorkItems`, empty if not made."""
    packed = from_arguments(packed_tensors, packed_numbers)
    rows = RaggedRows(keys, values, positions, bounds, longest, uniform, bias, packed=packed)
    if len(work_items):
        rows.plans[PLAN] = WorkItems(bounds, work_items, rows_per_item(rows))
    if keys.device.type == "cpu":  # where that costs nothing, and plain torch goes by it
        rows = replace(rows, in_use=int((bounds[1::2] - bounds[:-1:2]).max()))
    request = Request(query, rows, num_kv_heads, scaling, softcap, sliding_window, sinks)
    return _attend(request, backend).contiguous()


@_ragged_attention.register_fake
def _(query, *_arguments, **_options) -> Tensor:
    batch, num_heads, num_queries, head_dim = query.shape
    return query.new_empty(batch, num_queries, num_heads, head_dim)


def check_backend(name: str) -> None:
    """See that a backend exists and its package is installed.

    Raises:
        UsageError: it does not, or is not.
    """
    if name == "auto":
        return
    if name not in BACKENDS:
        raise UsageError(f"There is no attention backend {name!r}: use {', '.join(['auto', *BACKENDS])}.")
    package = BACKENDS[name].package
    if package is not None and not package.importable:
        raise UsageError(
            f"The attention backend {name!r} needs a package that is missing: `pip install {package.pip_name}`, "
            "or use --backend auto or torch."
        )


def available_backends(device: torch.device | str, dtype: torch.dtype) -> tuple[str, ...]:
    """Names of the backends that can serve a plain request there; `reference`, which is no rival, left out."""
    empty = torch.empty(0, 64, device=device, dtype=dtype)
    no_rows = torch.empty(0, device=device, dtype=torch.int32)
    request = Request(empty.view(0, 1, 1, 64), RaggedRows(empty, empty, no_rows, no_rows, 0, 0), 1, 1.0)
    return tuple(
        name for name, backend in BACKENDS.items() if name != "reference" and backend.unsupported(request) is None
    )
