"""Running a model over what comes after a prompt while heads see only some of the prompt's rows.

A prompt is read once. Each head's rows are laid down in the order in which its method would give them up, best first,
so that to keep `n` of them is to see the first `n`. What comes then runs in copies that see other numbers of rows: all
of them attend to the one prompt, which is never copied.

Shapes: `L` layers, `H` query heads, `K` KV heads, `g = H // K`, `T` rows of a prompt, `Q` tokens after it, `C` copies,
`D` head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from headprof.compression.cache.prompt_cache import PromptCache
from headprof.compression.cache.ranking_layer import RankingLayer
from headprof.compression.methods.observation import Observation
from headprof.compression.methods.table import Method
from headprof.compression.observers import Observers
from headprof.compression.session import attending_ragged, prefill
from headprof.models.attention_hook import AttentionFunction, wrapped_attention
from headprof.models.copies import copied_from


@dataclass(frozen=True)
class RankedRows:
    """One layer's rows of a prompt, each head's in the order in which it would keep them.

    Attributes:
        keys, values: `[K, T, D]`.
        positions: where in the prompt each row stands, int64 `[K, T]`.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, ranked: Tensor) -> RankedRows:
        """From rows in their own order and what each is worth, float `[K, T]`; of equal ones the earlier is better."""
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        index = order[..., None].expand(keys.shape)
        return cls(keys.gather(1, index), values.gather(1, index), order)


class _RankedLayer(RankingLayer):
    """A layer that keeps a prompt's rows, ranked as a method ranks them."""

    def __init__(self, method: Method, layer_idx: int):
        super().__init__([method.importance], layer_idx)
        self._method = method
        self.rows: RankedRows | None = None

    def filled(self, observed: Observation) -> None:
        super().filled(observed)
        ranked = self.ranked(self._method, None)[0]
        keys, values = (each[0, :, : self.seen] for each in (observed.keys, observed.values))
        self.rows = RankedRows.of(keys, values, ranked)


class _RankedCache(PromptCache):
    """Keeps a prompt's rows, ranked as a method ranks them."""

    def __init__(self, method: Method, num_layers: int):
        super().__init__([_RankedLayer(method, index) for index in range(num_layers)])

    def _noted(self, ids: Tensor | None) -> None:
        """The ids say nothing here."""


@torch.no_grad()
def read_ranked(
    model: PreTrainedModel, method: Method, prompt_ids: Sequence[int], observers: Observers, num_layers: int
) -> list[RankedRows]:
    """Read a prompt, and rank the rows of each layer.

    Args:
        model: the model.
        method: whose importance ranks, and which says what every head keeps in any case.
        prompt_ids: the prompt's tokens.
        observers: tokens after it that only judge; there may be none.
        num_layers: `L`.

    Raises:
        ModelError: the model's attention cannot be reached.
    """
    cache = _RankedCache(method.for_observers(len(observers)) if len(observers) else method, num_layers)
    cache.expect_observers(len(observers), observers.segments)
    ids = torch.tensor([[*prompt_ids, *observers.ids]], device=model.device)
    with attending_ragged(model):
        prefill(model, ids, cache)
    return [layer.rows for layer in cache.layers]


Watch = Callable[[int, Tensor, Callable[[Tensor], Tensor]], Tensor]


class _TailLayer(CacheLayerMixin):
    """Holds nothing: the rows before what is run are seen by the attention function itself."""

    is_sliding = False

    def __init__(self, seen: int):
        super().__init__()
        self._seen = seen
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._seen + query_length, 0

    def get_max_length(self) -> int:
        return -1


class HidingModel:
    """A model that runs over what comes after a prompt with some of the prompt's rows hidden (see `hiding`).

    Attributes:
        model: the model.
        rows: of each layer of the prompt that is asked about.
        watch: called in each layer with its number, what attention put out, `[C, Q, H, D]`, and a function that says
            what it would have put out had the heads of the first copy seen so many rows, int64 `[P, K]` to
            `[P, Q, H, D]`; what it returns takes the output's place. `None` for nobody.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.rows: Sequence[RankedRows] = ()
        self.watch: Watch | None = None
        self._counts: Sequence[Tensor] = ()

    @property
    def prompt_length(self) -> int:
        return self.rows[0].positions.shape[-1]

    def logits(self, tail: Sequence[int], last: int, counts: Tensor, layer: int = 0) -> Tensor:
        """What the model says at the last tokens of what comes after the prompt.

        Args:
            tail: token ids, `Q`.
            last: at how many of them, `N`.
            counts: rows that each head sees, int64 `[C, L, K]`; alike in all copies in layers before `layer`.
            layer: from which on copies differ.

        Returns:
            `[C, N, vocabulary]`.
        """
        copies = len(counts)
        alike = (counts == counts[:1]).all(dim=2).all(dim=0).tolist()
        self._counts = [each[:1] if same else each for each, same in zip(counts.unbind(1), alike, strict=True)]
        ids = torch.tensor([[*tail]], device=self.model.device)
        cache = Cache(layers=[_TailLayer(self.prompt_length) for _ in self.rows])
        with copied_from(self.model, layer, copies):
            return self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=last).logits

    def attention(self, base: AttentionFunction) -> AttentionFunction:
        """Attention to the prompt's rows that are not hidden, and to the tokens after it."""

        def attention(module, query, key, value, attention_mask, **kwargs):
            layer = module.layer_idx
            scaling, rows = kwargs.get("scaling"), self.rows[layer]
            how: dict[str, Any] = {
                "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling,
                "softcap": kwargs.get("softcap"),
                "sliding_window": kwargs.get("sliding_window"),
                "sinks": kwargs.get("s_aux"),
            }
            output = attend(query, key, value, rows, self._counts[layer], **how)
            if self.watch is not None:

                def seeing(counts: Tensor) -> Tensor:
                    q, k, v = (each[:1].expand(len(counts), -1, -1, -1) for each in (query, key, value))
                    return attend(q, k, v, rows, counts, **how)

                output = self.watch(layer, output, seeing)
            return output, None

        return attention


@contextmanager
def hiding(model: PreTrainedModel) -> Iterator[HidingModel]:
    """Run a model with rows hidden while the context lasts.

    Raises:
        ModelError: the model's attention cannot be reached.
    """
    hider = HidingModel(model)
    with wrapped_attention(model, hider.attention):
        yield hider


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: RankedRows,
    counts: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of tokens after a prompt to the best of its rows, and to one another.

    Args:
        query: `[C, H, Q, D]`.
        key, value: of the same tokens, `[C, K, Q, D]`.
        rows: of the prompt.
        counts: how many each head sees, int64 `[C, K]`, or `[1, K]` where all copies see as many.
        scaling: factor on the logits.
        softcap: Gemma-2's bound on the logits.
        sliding_window: last tokens that a query sees, itself included; `None` for all.
        sinks: learned logits `[H]` that join the softmax and are dropped (gpt-oss).

    Returns:
        `[C, Q, H, D]`, of the query's type.
    """
    copies, heads, tokens, dim = query.shape
    num_kv_heads = key.shape[1]
    prompt_length, most = rows.positions.shape[-1], min(int(counts.max()), rows.positions.shape[-1])
    counts, device = counts.to(query.device), query.device
    grouped = query.reshape(copies, num_kv_heads, -1, dim)  # [C, K, g * Q, D]
    keys, values, where = rows.keys[:, :most], rows.values[:, :most], rows.positions[:, :most]
    # All copies' queries against the one prompt at once: [K, C * g * Q, most].
    together = grouped.transpose(0, 1).reshape(num_kv_heads, -1, dim)
    before = (together @ keys.transpose(1, 2)).view(num_kv_heads, copies, -1, tokens, most).transpose(0, 1)
    own = (grouped @ key.transpose(2, 3)).view(copies, num_kv_heads, -1, tokens, tokens)
    index = torch.arange(tokens, device=device)
    seen = (torch.arange(most, device=device) < counts[..., None])[:, :, None]  # [C or 1, K, 1, most]
    causal = index <= index[:, None]
    if sliding_window is not None:
        oldest = prompt_length + index - sliding_window  # of each query, the newest that it does not see
        seen = seen & (where[:, None] > oldest[:, None])
        causal = causal & (index > index[:, None] - sliding_window)
    logits = torch.cat([before, own], dim=-1).float() * scaling  # [C, K, g, Q, most + Q]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    visible = torch.cat([seen.expand(-1, -1, tokens, -1), causal.expand(*seen.shape[:2], -1, -1)], dim=-1)
    logits = logits.masked_fill(~visible[:, :, None], float("-inf"))
    if sinks is not None:
        column = sinks.float().view(num_kv_heads, -1, 1, 1).expand(copies, num_kv_heads, -1, tokens, 1)
        logits = torch.cat([logits, column], dim=-1)
    paid = logits.softmax(dim=-1)[..., : most + tokens].to(value.dtype)
    to_prompt = paid[..., :most].transpose(0, 1).reshape(num_kv_heads, -1, most) @ values
    output = to_prompt.view(num_kv_heads, copies, -1, dim).transpose(0, 1)
    output = output + paid[..., most:].reshape(copies, num_kv_heads, -1, tokens) @ value
    return output.reshape(copies, heads, tokens, dim).transpose(1, 2)
