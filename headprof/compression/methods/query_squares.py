"""How large queries are in each channel."""

from __future__ import annotations

from torch import Tensor

from headprof.compression.methods.observation import Observation


def query_squares(observed: Observation, judges: int) -> Tensor:
    """Mean square of the newest queries of each head's group, float32 `[N, D]`; 1 where there are none.

    Args:
        observed: with the queries.
        judges: how many of the newest count.
    """
    batch, num_kv_heads, _, head_dim = observed.keys.shape
    squares = observed.queries[:, :, max(0, observed.queries.shape[2] - judges) :].double().square()  # [B, H, n, D]
    if not squares.shape[2]:
        return squares.new_ones(batch * num_kv_heads, head_dim).float()
    if (valid := observed.valid_queries()) is not None:
        counting = valid[:, None, -squares.shape[2] :, None].double()
        squares = squares * counting / counting.mean(dim=2, keepdim=True).clamp(min=1e-9)
    return squares.mean(dim=2).view(batch, num_kv_heads, -1, head_dim).mean(dim=2).flatten(0, 1).float()
