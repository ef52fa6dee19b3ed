"""Which prompt tokens matter to a head: one axis of the table of methods.

Shapes: `B` sequences, `H` query heads, `K` KV heads, `g = H // K` query heads per KV head, `T` prompt tokens,
`D` head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import avg_pool1d, max_pool1d

from headprof.compression.kernels.column_sums import column_sums
from headprof.compression.methods.states import Judgement, PromptStates
from headprof.errors import UsageError


class Importance(Protocol):
    """Scores the prompt's tokens for each KV head of a layer; higher is kept."""

    @property
    def queries(self) -> int | None:
        """How many of the last queries it needs (all, if there are fewer); none for all since it last judged."""
        ...

    @property
    def at_hand(self) -> int | None:
        """Of all queries, how many of the last it must see when it judges; none for all.

        What those before them paid may be added to `PromptStates.received`, which must be all that it asks of them.
        """
        return None

    def score(self, states: PromptStates) -> torch.Tensor:
        """Importance of each row, float32 `[B, K, T]`; any finite value for padding."""
        ...

    def judge(self, states: PromptStates) -> Judgement:
        """The score, and what goes with it."""
        return Judgement(self.score(states))


@dataclass(frozen=True)
class WindowAttention(Importance):
    """Attention from the last queries of the prompt, pooled over neighboring tokens (SnapKV, Li et al. 2024).

    Each token's score is the mean over the group's query heads and over those observing queries that can see it, so
    that tokens inside the window are judged on the same scale as the rest.

    Attributes:
        window: number of observing queries.
        kernel: width of the pooling over tokens, odd; 1 for none.
        pooling: what a token takes from its neighbors: the paper's `"max"`, or the `"mean"`.
        power: of the mean over queries and heads. The paper's 1 is the plain mean; with 2, the root of the mean
            square, one query or head that looks hard at a token outweighs many that glance.
        ramp: count the observing queries by their order, 1 for the oldest up to `window` for the last.
    """

    window: int = 16
    kernel: int = 7
    pooling: str = "max"
    power: float = 1.0
    ramp: bool = False

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UsageError(f"A window of {self.window} queries judges nothing: give a --window of at least 1.")
        if self.kernel < 1:
            raise UsageError(f"A kernel of {self.kernel} tokens averages nothing: give an odd --kernel, 1 or more.")
        if self.kernel % 2 == 0:
            raise UsageError(
                f"A kernel of {self.kernel} has no middle: give an odd --kernel, such as {self.kernel + 1}."
            )
        if self.pooling not in ("max", "mean"):
            raise UsageError(f"There is no pooling {self.pooling!r}: choose max or mean.")
        if self.power <= 0:
            raise UsageError(f"A mean to the power of {self.power} does not exist: give a power above 0.")

    @property
    def queries(self) -> int:
        return self.window

    def score(self, states: PromptStates) -> torch.Tensor:
        return self.pooled(self.attention(states), states)

    def pooled(self, attention: torch.Tensor, states: PromptStates) -> torch.Tensor:
        """Each row's score from its own and its neighbors' attention, `[B, K, T]`; padding is nobody's neighbor."""
        padding = self.kernel // 2
        if self.pooling == "max":
            return max_pool1d(attention, self.kernel, stride=1, padding=padding)
        mean = avg_pool1d(attention, self.kernel, stride=1, padding=padding, count_include_pad=False)
        if bool(states.valid.all()):
            return mean
        valid = states.valid_rows().float()
        share = avg_pool1d(valid, self.kernel, stride=1, padding=padding, count_include_pad=False)
        return mean / share.clamp(min=0.5 / self.kernel)

    def attention(self, states: PromptStates) -> torch.Tensor:
        """Each row's mean attention, before pooling, float32 `[B, K, T]`."""
        rows = states.last_rows(self.window)  # [B, K, g, window, T]
        window, device = rows.shape[3], rows.device
        if window == 0:
            return rows.sum(dim=(2, 3))
        weights = torch.arange(1.0, window + 1, device=device) if self.ramp else torch.ones(window, device=device)
        attention = (rows**self.power * weights[:, None]).sum(dim=3).mean(dim=2)
        if states.judges is not None:
            weights = weights * states.judges[:, -window:]
        # A row is judged by the weights of the queries from its own on; by none if it is newer than all.
        weight_from = weights.flip(-1).cumsum(-1).flip(-1).expand(rows.shape[0], window)
        weight_from = torch.nn.functional.pad(weight_from, (0, 1)).clamp(min=1e-30)
        first_judge = (states.row_positions() - states.query_places()[-window]).clamp(0, window)
        weight = weight_from.gather(1, first_judge.flatten(1)).view(first_judge.shape)
        return (attention / weight) ** (1 / self.power)


@dataclass(frozen=True)
class LastQuery(Importance):
    """Attention from the last token of the prompt, averaged over all heads of the layer (TOVA, Oren et al. 2024).

    All KV heads of the layer get the same scores; of rows that not all of them hold, those that do have a say.
    """

    queries = 1

    def score(self, states: PromptStates) -> torch.Tensor:
        attention = states.last_rows(1).sum(dim=3).mean(dim=2)  # [B, K, T]
        if states.positions is None:
            return attention.mean(dim=1, keepdim=True).expand(states.key.shape[:3])
        places, row = torch.unique(states.positions.long(), return_inverse=True)
        of_place = attention.new_zeros(2, attention.shape[0], len(places))
        of_place[0].scatter_add_(1, row.flatten(1), (attention * states.valid_rows()).flatten(1))
        of_place[1].scatter_add_(1, row.flatten(1), states.valid_rows().float().flatten(1))
        mean = of_place[0] / of_place[1].clamp(min=1)
        return mean.gather(1, row.flatten(1)).view(attention.shape)


@dataclass(frozen=True)
class Accumulated(Importance):
    """Attention summed over all queries so far, averaged over the group (H2O, Zhang et al. 2023)."""

    queries = None
    at_hand = 0

    def score(self, states: PromptStates) -> torch.Tensor:
        return received_attention(states)

    def judge(self, states: PromptStates) -> Judgement:
        received = self.score(states)
        return Judgement(received, received=received)


def received_attention(states: PromptStates, samples: int = 0, last: int = 0) -> torch.Tensor:
    """Attention that each row has received from all queries so far, averaged over the group, float32 `[B, K, T]`.

    Args:
        states: a prompt's, with all its queries, or held rows with the queries that came since they were last judged.
        samples: of a prompt's queries count about so many, evenly spaced, each for those that it stands for; 0 for all.
        last: so many of the last queries count in any case.
    """
    key = ("received", samples, last)
    if key not in states.shared:
        states.shared[key] = _received_attention(states, samples, last)
    return states.shared[key]


def _received_attention(states: PromptStates, samples: int, last: int) -> torch.Tensor:
    if states.positions is not None:
        paid = states.last_rows(states.query.shape[2]).sum(dim=3).mean(dim=2)
        return paid if states.received is None else paid + states.received
    num_tokens = states.key.shape[2]
    places, weights = sampled_queries(num_tokens, samples, last)
    places, weights = places.to(states.key.device), weights.to(states.key.device)
    query = states.query if len(places) == num_tokens else states.query[:, :, places]
    return column_sums(
        query,
        states.key,
        places,
        states.valid,
        scaling=states.scaling,
        softcap=states.softcap,
        sliding_window=states.sliding_window,
        weights=weights,
    )


def sampled_queries(num_tokens: int, samples: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which queries of a prompt are asked, int64 `[N]`, and how many each stands for, float32 `[N]`.

    The last `last` are all asked; of those before them every `stride`-th, for the `stride` that end with it.
    """
    before = max(0, num_tokens - last)
    stride = -(-before // samples) if samples else 1
    if stride <= 1:
        return torch.arange(num_tokens), torch.ones(num_tokens)
    spaced = torch.arange(before - 1, -1, -stride).flip(0)
    stands_for = torch.diff(spaced, prepend=torch.tensor([-1]))
    places = torch.cat([spaced, torch.arange(before, num_tokens)])
    return places, torch.cat([stands_for, torch.ones(num_tokens - before, dtype=torch.int64)]).float()


@dataclass(frozen=True)
class GlobalLocal(WindowAttention):
    """Attention from the whole prompt and from its end together (EMS, Li et al. 2024, "Global-Local Importance").

    A token's global score is the mean attention from all queries from its own on; a sum would favor early tokens, which
    more queries see. Its local score is `WindowAttention`'s. The global scores are rescaled to the local ones' mean
    over a head's tokens before the two are joined. While text is generated, the window is that of the queries since the
    rows were last judged.

    Attributes:
        combine: how they are joined: the paper's `"max"`, `"sum"`, `"product"` (geometric mean), or `"global"` or
            `"local"` for one alone.
        balance: factor on the global score before they are joined.
        samples: queries of the prompt that the global score asks, evenly spaced beside all of the window; 0 for all.
        recency: exponent on the share of the sequence from which a token is seen: 0 for the mean, 1 for H2O's sum.
        emphasis: rows that merge are weighed by their mean attention from all queries, and so many times that from the
            window. Without it, what only the window looks at, such as the answer to a question, is drowned in a
            cluster by what the whole text looks at. With one score alone, rows are weighed by that one.
    """

    combine: str = "max"
    balance: float = 1.0
    samples: int = 1024
    recency: float = 0.0
    emphasis: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.combine not in ("max", "sum", "product", "global", "local"):
            raise UsageError(
                f"Global and local scores cannot be joined by {self.combine!r}: choose max, sum, product, global or "
                "local."
            )
        if self.balance <= 0:
            raise UsageError(f"A balance of {self.balance} leaves no global score: give more than 0, or combine=local.")
        if self.emphasis < 0:
            raise UsageError(f"An emphasis of {self.emphasis} would weigh rows below nothing: give 0 or more.")
        if self.samples < 0:
            raise UsageError(f"There are no {self.samples} queries to ask: give samples of at least 1, or 0 for all.")

    @property
    def queries(self) -> int | None:  # type: ignore[override]
        return None

    @property
    def at_hand(self) -> int:
        return self.window

    def score(self, states: PromptStates) -> torch.Tensor:
        return self.judge(states).importance

    def judge(self, states: PromptStates) -> Judgement:
        received = received_attention(states, self.samples, self.window)
        valid = states.valid_rows()
        seen = states.key.shape[2] if states.seen is None else states.seen
        seen_from = (seen - states.row_positions()).clamp(min=1).float()
        whole = received / seen_from
        local = self.attention(states)
        joined = self._joined(whole * (seen_from / seen) ** self.recency, self.pooled(local, states), valid)
        alone = {"global": whole, "local": local}
        weights = alone[self.combine] if self.combine in alone else whole + self.emphasis * local
        return Judgement(joined, weights=weights, received=received)

    def _joined(self, whole: torch.Tensor, local: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        if self.combine == "global":
            return whole
        if self.combine == "local":
            return local
        whole = whole * (self.balance * _mean(local, valid) / _mean(whole, valid).clamp(min=1e-30))
        if self.combine == "max":
            return torch.maximum(whole, local)
        return whole + local if self.combine == "sum" else (whole * local).sqrt()


def _mean(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean of each head's valid entries, `[B, K, 1]`."""
    return (values * valid).sum(dim=-1, keepdim=True) / valid.sum(dim=-1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class KeyNorm(Importance):
    """Minus the L2 norm of the key: tokens with small keys draw most attention (Devoto et al. 2024)."""

    queries = 0

    def score(self, states: PromptStates) -> torch.Tensor:
        return -states.key.float().norm(dim=-1)


@dataclass(frozen=True)
class Recency(Importance):
    """Later tokens matter more (StreamingLLM, Xiao et al. 2024, which keeps the first four as sinks)."""

    queries = 0

    def score(self, states: PromptStates) -> torch.Tensor:
        return states.row_positions().float()
