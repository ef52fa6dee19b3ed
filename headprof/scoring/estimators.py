"""What one attention row says about its head: pure functions of the rows that predict an answer.

Shapes: `H` query heads, `N` answer tokens, `T` tokens that the rows can see. Row `t` belongs to the query that predicts
answer token `t`, and sums to one.
"""

from __future__ import annotations

import torch


def retrieval_score(
    rows: torch.Tensor, in_span: torch.Tensor, token_ids: torch.Tensor, answer_ids: torch.Tensor
) -> torch.Tensor:
    """Share of answer tokens that a head copies: its most attended token lies in the span and is that answer token.

    `(1/N) * sum_t 1[j* in S and x[j*] == y_t]`, `j* = argmax a_t` (Wu et al. 2024, "Retrieval Head Mechanistically
    Explains Long-Context Factuality", section 2). The first of several equal maxima counts.

    Args:
        rows: attention, float `[H, N, T]`.
        in_span: `S`, the answer's positions in the needle, bool `[T]`.
        token_ids: `x`, the tokens that the rows can see, `[T]`.
        answer_ids: `y`, the answer's tokens, `[N]`.

    Returns:
        float32 `[H]`, between 0 and 1.
    """
    best = rows.argmax(dim=-1)
    copied = in_span[best] & (token_ids[best] == answer_ids)
    return copied.float().mean(dim=-1)


def reasoning_score(rows: torch.Tensor, in_span: torch.Tensor) -> torch.Tensor:
    """Attention that a head puts on the right answer, where it is among the `|S|` tokens it attends to most.

    `(1/|S|) * sum_t sum_{i in top-|S|(a_t)} a_t[i] * 1[i in S]`, `S` = span of the right answer with the distractors
    outside (Fu et al. 2025, "Not All Heads Matter", HeadKV-R2). The paper's code sums over the answer's tokens, so a
    score is not bounded by one.

    Args:
        rows: attention, float `[H, N, T]`.
        in_span: `S`, bool `[T]`, at least one true.

    Returns:
        float32 `[H]`, between 0 and `N / |S|`.
    """
    span_size = int(in_span.sum())
    weights, positions = rows.topk(span_size, dim=-1)
    return (weights * in_span[positions]).float().sum(dim=(-1, -2)) / span_size
