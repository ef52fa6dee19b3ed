"""What is known of a prompt's rows before the first of them goes, for methods that rank those of all layers together.

Shapes: `B` sequences, `K` KV heads, `T` tokens of the prompt, observers left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headprof.compression.cache.prompt_layer import PromptLayer
from headprof.compression.methods.importance import Importance, assessed
from headprof.compression.methods.method import Method
from headprof.compression.methods.observation import Assessment, Observation
from headprof.compression.methods.reduction import ranking
from headprof.compression.protected import ProtectedTokens
from headprof.compression.rows import HeadCounts
from headprof.errors import CacheError


@dataclass(frozen=True)
class Verdict:
    """What has been decided on a layer's rows before they are read again.

    Attributes:
        assessment: what the importance said of them, `[B, K, T]`.
        counts: how many each head keeps, int64 `[B, K]` on the CPU.
        by_observers: whether tokens after the prompt judged it, which are not read again.
    """

    assessment: Assessment
    counts: Tensor
    by_observers: bool

    def head_counts(self, device: torch.device) -> HeadCounts:
        """The counts for a device."""
        return HeadCounts.of(self.counts, device)


class RankingLayer(PromptLayer):
    """A layer that keeps of a prompt nothing but what importances say of its rows.

    Attributes:
        asked: the importances, and what each of them is for this layer.
        said: what each of them said.
        valid: which rows there are, bool `[B, T]`.
        lengths: tokens of each sequence; `None` where the host does not know them.
        by_observers: whether tokens judged that are not among the rows.
    """

    def __init__(self, importances: Collection[Importance], layer_idx: int):
        super().__init__()
        self.asked = {importance: importance.of_layer(layer_idx) for importance in importances}
        self.reset()

    def reset(self) -> None:
        self.said: Mapping[Importance, Assessment] = {}
        self.valid: Tensor | None = None
        self.lengths: Sequence[int] | None = None
        self.is_initialized = self.by_observers = False
        self.seen = 0
        self.forget_prompt()

    @property
    def marked(self) -> Tensor:
        """Which rows there are, once the prompt has been read, bool `[B, T]`."""
        assert self.valid is not None
        return self.valid

    def known_lengths(self) -> Sequence[int]:
        """Tokens of each sequence, for which the host waits where it does not know them."""
        return self.marked.sum(dim=-1).tolist() if self.lengths is None else self.lengths

    def ranked(self, method: Method, protected: ProtectedTokens | None) -> Tensor:
        """What the method's importance said of each row, float32 `[B, K, T]`, as `methods.reduction.ranking` has it.

        Args:
            method: of an importance that was asked.
            protected: tokens that every head keeps beside those that the method does.
        """
        importance = self.said[method.importance].importance
        if protected is not None:
            rows = torch.arange(importance.shape[-1], device=importance.device).expand(importance.shape)
            importance = importance.masked_fill(protected.among(rows), float("inf"))
        return ranking(importance, self.marked, sinks=method.sinks, keep_last=method.keep_last)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.is_initialized:
            raise CacheError("A cache that ranks a prompt's rows holds none of them: continue with another.")
        return self.gather(key_states, value_states)

    @property
    def weighs_norms(self) -> bool:
        return any(importance.norms for importance in self.asked)

    def queries_needed(self) -> int | None:
        return most_queries(importance.queries for importance in self.asked)

    def filled(self, observed: Observation) -> None:
        said = {importance: assessed(own, observed) for importance, own in self.asked.items()}
        self.take(observed, said, self.seen, self.observers)

    def take(self, observed: Observation, said: Mapping[Importance, Assessment], tokens: int, observers: int) -> None:
        """Keep what importances said of the first `tokens` rows; those after them, if any, only observed."""
        self.said = {importance: _first(said[importance], tokens) for importance in self.asked}
        self.valid = observed.valid[..., :tokens].clone()
        self.lengths = observed.lengths
        self.seen, self.by_observers = tokens, observers > 0
        self.is_initialized = True


def most_queries(needed: Iterable[int | None]) -> int | None:
    """How many of the last queries serve all who need so many; `None` for all."""
    counts = list(needed)
    return None if None in counts else max((count for count in counts if count is not None), default=0)


def _first(assessment: Assessment, tokens: int) -> Assessment:
    """The same of the first rows alone, without what it was cut from."""

    def cut(each: Tensor) -> Tensor:
        return each if each.shape[-1] == tokens else each[..., :tokens].clone()

    return replace(
        assessment,
        importance=cut(assessment.importance.float()),
        weights=None if assessment.weights is None else cut(assessment.weights),
        columns={name: cut(column) for name, column in assessment.columns.items()},
    )
