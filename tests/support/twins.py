"""Importance the slow, obviously right way: the whole attention of the queries at hand, one query at a time."""

import math

import torch

from headprof.compression.methods.expected_attention import ExpectedAttention
from headprof.compression.methods.importance import KeepAll, KeyDiff, KeyNorm, Recency
from headprof.compression.methods.received_attention import Accumulated, GlobalLocal
from headprof.compression.methods.reconstruction import Reconstruction
from headprof.compression.methods.window_attention import LastQuery, WindowAttention


def slow_attention(observed):
    """Attention of each held query over each held row, float64 `[B, H, N, T]`."""
    batch, num_heads, num_queries, _ = observed.queries.shape
    group, num_rows = num_heads // observed.keys.shape[1], observed.keys.shape[2]
    attention = torch.zeros(batch, num_heads, num_queries, num_rows, dtype=torch.float64)
    for b in range(batch):
        for h in range(num_heads):
            k = h // group
            for i, position in enumerate(observed.query_positions.tolist()):
                if observed.query_valid is not None and not observed.query_valid[b, i]:
                    continue
                rows = [
                    j for j in range(num_rows) if observed.valid[b, k, j] and observed.positions[b, k, j] <= position
                ]
                if observed.layer.sliding_window is not None:
                    rows = [j for j in rows if observed.positions[b, k, j] > position - observed.layer.sliding_window]
                if not rows:
                    continue
                logits = (
                    observed.keys[b, k, rows].double() @ observed.queries[b, h, i].double() * observed.layer.scaling
                )
                if observed.layer.softcap is not None:
                    logits = observed.layer.softcap * torch.tanh(logits / observed.layer.softcap)
                if "bias" in observed.rows.columns:
                    logits = logits + observed.rows.columns["bias"][b, k, rows].double()
                attention[b, h, i, rows] = logits.softmax(-1)
    return attention


def slow_local(importance, observed, attention, b, k):
    """`WindowAttention`'s score of one head's rows: lists of `T`."""
    group = attention.shape[1] // observed.keys.shape[1]
    asked = observed.query_positions.tolist()
    observers = range(max(0, len(asked) - importance.window), len(asked))
    scores = []
    for j, position in enumerate(observed.positions[b, k].tolist()):
        total, weights, order = 0.0, 0.0, 0
        for i in observers:
            if observed.query_valid is not None and not observed.query_valid[b, i]:
                continue
            order += 1
            if asked[i] < position:
                continue
            weight = order if importance.ramp else 1
            weights += weight * group
            total += sum(weight * float(attention[b, k * group + h, i, j]) ** importance.power for h in range(group))
        scores.append((total / weights) ** (1 / importance.power) if weights else 0.0)
    return scores if importance.shared else slow_pooled(importance, observed, scores, b, k)


def slow_shared(importance, observed, attention, b, k):
    """As `slow_local`, where a layer's heads judge together: the mean over those that hold a row's token, pooled."""
    each = [slow_local(importance, observed, attention, b, head) for head in range(observed.keys.shape[1])]
    scores = []
    for position in observed.positions[b, k]:
        heads = (observed.positions[b] == position) & observed.valid[b]  # [K, T]
        said = [each[head][row] for head, row in heads.nonzero().tolist()]
        scores.append(sum(said) / len(said) if said else 0.0)
    return slow_pooled(importance, observed, scores, b, k)


def slow_pooled(importance, observed, scores, b, k):
    """A head's scores with those of neighboring rows."""
    reach = importance.kernel // 2
    pooled = []
    for j in range(len(scores)):
        around = range(max(0, j - reach), min(j + reach + 1, len(scores)))
        held = [scores[i] for i in around if observed.valid[b, k, i]] or [0.0]
        pooled.append(max(held) if importance.pooling == "max" else sum(held) / len(held))
    return pooled


def slow_received(observed, attention, b, k):
    """Attention that one head's rows have received so far."""
    group = attention.shape[1] // observed.keys.shape[1]
    received = observed.rows.column("received")[b, k].tolist()
    for j in range(len(received)):
        paid = (attention[b, k * group + h, i, j] for h in range(group) for i in range(attention.shape[2]))
        received[j] += sum(map(float, paid)) / group
    return received


def slow_both(importance, observed, attention, b, k):
    """Global and local score of one head's rows together, and the global one alone."""
    rows, seen = range(observed.keys.shape[2]), observed.seen
    seen_from = [max(1, seen - position) for position in observed.positions[b, k].tolist()]
    received = slow_received(observed, attention, b, k)
    mean = [received[j] / seen_from[j] for j in rows]
    whole = [mean[j] * (seen_from[j] / seen) ** importance.recency for j in rows]
    local = slow_local(importance, observed, attention, b, k)
    if importance.combine == "global":
        return whole, mean
    if importance.combine == "local":
        return local, mean
    valid = [j for j in rows if observed.valid[b, k, j]]
    sums = (sum(whole[j] for j in valid), sum(local[j] for j in valid))
    rescaled = [importance.balance * whole[j] * sums[1] / sums[0] if sums[0] else 0.0 for j in rows]
    joined = {
        "max": lambda a, b: max(a, b),
        "sum": lambda a, b: a + b,
        "product": lambda a, b: math.sqrt(a * b),
    }[importance.combine]
    return [joined(rescaled[j], local[j]) for j in rows], mean


def slow_score(importance, observed):
    """Importance of held rows, float64 `[B, K, T]`."""
    attention = slow_attention(observed)
    batch, num_kv_heads, num_rows, _ = observed.keys.shape
    group = attention.shape[1] // num_kv_heads
    result = torch.zeros(batch, num_kv_heads, num_rows, dtype=torch.float64)
    for b in range(batch):
        last = attention[b, :, -1].unflatten(0, (num_kv_heads, group)).mean(dim=1) if attention.shape[2] else None
        for k in range(num_kv_heads):
            match importance:
                case GlobalLocal():
                    scores = slow_both(importance, observed, attention, b, k)[0]
                case WindowAttention(shared=True):
                    scores = slow_shared(importance, observed, attention, b, k)
                case WindowAttention():
                    scores = slow_local(importance, observed, attention, b, k)
                case Accumulated(shared=True):
                    scores = slow_shared_received(observed, attention, b, k)
                case Accumulated():
                    scores = slow_received(observed, attention, b, k)
                case Reconstruction():
                    asking = range(max(0, attention.shape[2] - importance.window), attention.shape[2])
                    paid = [attention[b, k * group + h, i] for h in range(group) for i in asking]
                    scores = [max((float(each[j]) for each in paid), default=0.0) for j in range(num_rows)]
                case KeyNorm():
                    scores = [-math.sqrt(sum(float(x) ** 2 for x in key)) for key in observed.keys[b, k]]
                case KeyDiff():
                    scores = slow_key_difference(observed, b, k)
                case ExpectedAttention():
                    scores = slow_expected(importance, observed, b, k)
                case Recency():
                    scores = observed.positions[b, k].tolist()
                case KeepAll():
                    scores = [0.0] * num_rows
                case LastQuery():
                    scores = []
                    for position in observed.positions[b, k]:
                        heads = (observed.positions[b] == position) & observed.valid[b]  # [K, T]
                        scores.append(float(last[heads].sum()) / max(1, int(heads.sum())) if len(last) else 0.0)
            result[b, k] = torch.tensor(scores, dtype=torch.float64)
    return result


def slow_shared_received(observed, attention, b, k):
    """Attention that a head's rows have received, averaged over the KV heads that hold their tokens."""
    received = [slow_received(observed, attention, b, head) for head in range(observed.keys.shape[1])]
    scores = []
    for position in observed.positions[b, k].tolist():
        holding = ((observed.positions[b] == position) & observed.valid[b]).nonzero().tolist()
        scores.append(sum(float(received[head][row]) for head, row in holding) / max(1, len(holding)))
    return scores


def slow_key_difference(observed, b, k):
    """KeyDiff's score of one head's rows, key by key."""
    keys = observed.keys[b, k].double()
    directions = [key / key.norm() for key, valid in zip(keys, observed.valid_rows()[b, k], strict=True) if valid]
    if not directions:
        return [0.0] * len(keys)
    mean = sum(directions) / len(directions)
    return [-float(key @ mean / (key.norm() * mean.norm())) for key in keys]


def rotation(rotary, position, head_dim):
    """The matrix by which a column is turned to a position, float64 `[D, D]`: the images of the unit vectors."""
    cos, sin = rotary.angles(torch.tensor([position]))
    basis = torch.eye(head_dim)[None, :, None]  # as many heads as dimensions
    return rotary.rotate(basis, cos, sin)[0, :, 0].double().T


def slow_expected(importance, observed, b, k):
    """Expected attention of one head's rows; those of the first tokens have the highest score of their sequence."""
    heads = [slow_expected_of_head(importance, observed, b, head) for head in range(observed.keys.shape[1])]
    highest = max((score for scores in heads for score in scores.values()), default=0.0)
    return [heads[k].get(j, highest) for j in range(observed.keys.shape[2])]


def slow_expected_of_head(importance, observed, b, k):
    """The same from its definition, but for the first tokens: moments of the queries, one by one; then each key."""
    rotary, scaling, head_dim = observed.layer.rotary, observed.layer.scaling, observed.keys.shape[-1]
    valid, positions = observed.valid_rows()[b], observed.positions[b]
    if not valid.any():
        return {}
    start = min(int(positions[h, j]) for h, j in valid.nonzero().tolist()) + importance.skip_first
    counted = [j for j in range(len(valid[k])) if valid[k, j] and int(positions[k, j]) >= start]
    ahead = range(observed.seen, observed.seen + importance.future)
    turn = sum(rotation(rotary, position, head_dim) for position in ahead) / importance.future
    group = observed.queries.shape[1] // observed.keys.shape[1]
    expected = dict.fromkeys(counted, 0.0)
    for h in range(k * group, (k + 1) * group):
        queries = [
            torch.linalg.inv(rotation(rotary, position, head_dim)) @ observed.queries[b, h, i].double()
            for i, position in enumerate(observed.query_positions.tolist())
            if position >= start and (observed.query_valid is None or observed.query_valid[b, i])
        ]
        mean = sum(queries) / len(queries) if queries else torch.zeros(head_dim, dtype=torch.float64)
        spread = torch.zeros(head_dim, head_dim, dtype=torch.float64)
        for query in queries if importance.covariance else []:
            spread += torch.outer(query - mean, query - mean) / len(queries)
        mean, spread = turn @ mean, turn @ spread @ turn.T
        keys = [observed.keys[b, k, j].double() for j in counted]
        powers = [math.exp(scaling * float(mean @ key) + scaling**2 * float(key @ spread @ key) / 2) for key in keys]
        for j, power in zip(counted, powers, strict=True):
            expected[j] += power / sum(powers) / group
    if not importance.value_norm:
        return expected
    norms = observed.values[b, k].double().norm(dim=-1).tolist()
    return {j: (share + importance.epsilon) * norms[j] for j, share in expected.items()}
