"""Running a model over what comes after a prompt while heads see only some of the prompt's rows.

A prompt has been read once, and each head's rows ranked (see `reading`), so that to keep `n` of them is to see the
first `n`. What comes then runs in copies that see other numbers of rows: all of them attend to the one prompt, which is
never copied.

Shapes: `L` layers, `H` query heads, `K` KV heads, `g = H // K`, `T` rows of a prompt, `Q` tokens after it, `C` copies,
`D` head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from headprof.models.attention_hook import AttentionFunction, wrapped_attention
from headprof.models.copies import copied_from
from headprof.models.tensor_parallel import HeadShard
from headprof.tuning.reading import RankedRows


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


Watch = Callable[[int, Tensor, Callable[[Tensor], Tensor]], Tensor]


class HidingModel:
    """A model that runs over what comes after a prompt with some of the prompt's rows hidden (see `hiding`).

    Attributes:
        model: the model.
        rows: of each layer of the prompt that is asked about; of the heads that this process has.
        watch: called in each layer with its number, what attention put out, `[C, Q, H, D]`, and a function that says
            what it would have put out had the heads seen so many rows, int64 `[1, K]`; what it returns takes the
            output's place. `None` for nobody.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.rows: Sequence[RankedRows] = ()
        self.watch: Watch | None = None
        self._shard = HeadShard.of_model(model)
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
        copies, counts = len(counts), self._shard.own(counts)
        alike = (counts == counts[:1]).all(dim=2).all(dim=0).tolist()
        self._counts = [each[:1] if same else each for each, same in zip(counts.unbind(1), alike, strict=True)]
        ids = self._side_by_side([tail])
        with copied_from(self.model, layer, copies):
            return self.model(ids, past_key_values=self._cache(), use_cache=True, logits_to_keep=last).logits

    def answers(self, tails: Sequence[Sequence[int]], lasts: Sequence[int], counts: Tensor) -> list[Tensor]:
        """What the model says after the prompt to several things at once, none of which sees another.

        Args:
            tails: token ids of what comes after the prompt, each by itself, at least one of each.
            lasts: of each, at how many of its last tokens, `N`, at least one.
            counts: rows that each head sees, int64 `[L, K]`.

        Returns:
            Of each, `[N, vocabulary]`.
        """
        self._counts = self._shard.own(counts)[:, None].unbind()
        ids, lengths = self._side_by_side(tails), [len(tail) for tail in tails]
        first = min(length - last for length, last in zip(lengths, lasts, strict=True))
        logits = self.model(
            ids, past_key_values=self._cache(), use_cache=True, logits_to_keep=ids.shape[1] - first
        ).logits
        ends = [length - first for length in lengths]
        return [each[end - last : end] for each, end, last in zip(logits, ends, lasts, strict=True)]

    def _side_by_side(self, tails: Sequence[Sequence[int]]) -> Tensor:
        """Token ids `[C, Q]`; shorter tails are filled up at their ends, which nothing before sees."""
        longest = max(map(len, tails))
        rows = [[*tail, *[tail[-1]] * (longest - len(tail))] for tail in tails]
        return torch.tensor(rows, device=self.model.device)

    def _cache(self) -> Cache:
        return Cache(layers=[_TailLayer(self.prompt_length) for _ in self.rows])

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
                output = self.watch(layer, output, lambda counts: attend(query, key, value, rows, counts, **how))
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
