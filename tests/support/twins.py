"""Importance the slow, obviously right way: the whole attention of the queries at hand, one query at a time."""

import math
from dataclasses import replace

import torch

from headprof.compression.methods.importance import (
    Accumulated,
    GlobalLocal,
    KeyNorm,
    LastQuery,
    Recency,
    WindowAttention,
)


def whole_prompt(states):
    """A prompt as rows that all heads hold: everything said that a prompt leaves out."""
    batch, num_kv_heads, num_tokens, _ = states.key.shape
    return replace(
        states,
        valid=states.valid[:, None].expand(batch, num_kv_heads, num_tokens),
        positions=torch.arange(num_tokens).expand(batch, num_kv_heads, num_tokens),
        places=torch.arange(num_tokens - states.query.shape[2], num_tokens),
        seen=num_tokens,
        shared={},
    )


def slow_attention(states):
    """Attention of each held query over each held row, float64 `[B, H, N, T]`."""
    batch, num_heads, num_queries, _ = states.query.shape
    group, num_rows = num_heads // states.key.shape[1], states.key.shape[2]
    attention = torch.zeros(batch, num_heads, num_queries, num_rows, dtype=torch.float64)
    for b in range(batch):
        for h in range(num_heads):
            k = h // group
            for i, place in enumerate(states.places.tolist()):
                if states.judges is not None and not states.judges[b, i]:
                    continue
                rows = [j for j in range(num_rows) if states.valid[b, k, j] and states.positions[b, k, j] <= place]
                if states.sliding_window is not None:
                    rows = [j for j in rows if states.positions[b, k, j] > place - states.sliding_window]
                if not rows:
                    continue
                logits = states.key[b, k, rows].double() @ states.query[b, h, i].double() * states.scaling
                if states.softcap is not None:
                    logits = states.softcap * torch.tanh(logits / states.softcap)
                if states.bias is not None:
                    logits = logits + states.bias[b, k, rows].double()
                attention[b, h, i, rows] = logits.softmax(-1)
    return attention


def slow_local(importance, states, attention, b, k):
    """`WindowAttention`'s score of one head's rows: lists of `T`."""
    group = attention.shape[1] // states.key.shape[1]
    places = states.places.tolist()
    observers = range(max(0, len(places) - importance.window), len(places))
    scores = []
    for j, position in enumerate(states.positions[b, k].tolist()):
        total, weights = 0.0, 0.0
        for order, i in enumerate(observers, 1):
            counts = states.judges is None or bool(states.judges[b, i])
            if places[i] < position or not counts:
                continue
            weight = order if importance.ramp else 1
            weights += weight * group
            total += sum(weight * float(attention[b, k * group + h, i, j]) ** importance.power for h in range(group))
        scores.append((total / weights) ** (1 / importance.power) if weights else 0.0)
    reach = importance.kernel // 2
    pooled = []
    for j in range(len(scores)):
        around = range(max(0, j - reach), min(j + reach + 1, len(scores)))
        held = [scores[i] for i in around if states.valid[b, k, i]] or [0.0]
        pooled.append(max(held) if importance.pooling == "max" else sum(held) / len(held))
    return pooled


def slow_received(states, attention, b, k):
    """Attention that one head's rows have received so far."""
    group = attention.shape[1] // states.key.shape[1]
    received = [0.0] * states.key.shape[2] if states.received is None else states.received[b, k].tolist()
    for j in range(len(received)):
        paid = (attention[b, k * group + h, i, j] for h in range(group) for i in range(attention.shape[2]))
        received[j] += sum(map(float, paid)) / group
    return received


def slow_both(importance, states, attention, b, k):
    """Global and local score of one head's rows together, and the global one alone."""
    rows, seen = range(states.key.shape[2]), states.seen
    seen_from = [max(1, seen - position) for position in states.positions[b, k].tolist()]
    received = slow_received(states, attention, b, k)
    mean = [received[j] / seen_from[j] for j in rows]
    whole = [mean[j] * (seen_from[j] / seen) ** importance.recency for j in rows]
    local = slow_local(importance, states, attention, b, k)
    if importance.combine == "global":
        return whole, mean
    if importance.combine == "local":
        return local, mean
    valid = [j for j in rows if states.valid[b, k, j]]
    sums = (sum(whole[j] for j in valid), sum(local[j] for j in valid))
    rescaled = [importance.balance * whole[j] * sums[1] / sums[0] if sums[0] else 0.0 for j in rows]
    joined = {
        "max": lambda a, b: max(a, b),
        "sum": lambda a, b: a + b,
        "product": lambda a, b: math.sqrt(a * b),
    }[importance.combine]
    return [joined(rescaled[j], local[j]) for j in rows], mean


def slow_score(importance, states):
    """Importance of held rows, float64 `[B, K, T]`."""
    attention = slow_attention(states)
    batch, num_kv_heads, num_rows, _ = states.key.shape
    group = attention.shape[1] // num_kv_heads
    result = torch.zeros(batch, num_kv_heads, num_rows, dtype=torch.float64)
    for b in range(batch):
        last = attention[b, :, -1].unflatten(0, (num_kv_heads, group)).mean(dim=1) if attention.shape[2] else None
        for k in range(num_kv_heads):
            match importance:
                case GlobalLocal():
                    scores = slow_both(importance, states, attention, b, k)[0]
                case WindowAttention():
                    scores = slow_local(importance, states, attention, b, k)
                case Accumulated():
                    scores = slow_received(states, attention, b, k)
                case KeyNorm():
                    scores = [-math.sqrt(sum(float(x) ** 2 for x in key)) for key in states.key[b, k]]
                case Recency():
                    scores = states.positions[b, k].tolist()
                case LastQuery():
                    scores = []
                    for position in states.positions[b, k]:
                        heads = (states.positions[b] == position) & states.valid[b]  # [K, T]
                        scores.append(float(last[heads].sum()) / max(1, int(heads.sum())) if len(last) else 0.0)
            result[b, k] = torch.tensor(scores, dtype=torch.float64)
    return result
