"""What is common to caches that a prompt is read into, and the one that keeps nothing but what is said of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from headprof.compression.cache.prompt_layer import PromptLayer, outside_context
from headprof.compression.cache.ranking_layer import RankingLayer, Verdict
from headprof.compression.cache.seen_tokens import SeenTokens
from headprof.compression.methods.importance import Importance
from headprof.compression.plan import CompressionPlan
from headprof.compression.protected import ProtectedTokens


class PromptCache(Cache):
    """A cache whose layers are filled from a prompt as soon as they have attended over it.

    Attributes:
        tokens: that it has been given; its layers know them, too.
    """

    layers: list[Any]  # of PromptLayer

    def __init__(self, layers: Sequence[PromptLayer]):
        super().__init__(layers=list(layers))
        self.tokens = SeenTokens()
        self.share_tokens()

    def share_tokens(self) -> None:
        """Let all layers know the tokens that it is given."""
        for layer in self.layers:
            layer.tokens = self.tokens

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """As Transformers' caches.

        Raises:
            CacheError: the layer before has not been compressed, or its rows not been read, so this package's attention
                is not in use.
        """
        before = self.layers[layer_idx - 1]  # before the first one, the last one of the pass before
        if before.unread or (layer_idx and before.seen and not before.is_initialized):
            raise outside_context()
        return self.layers[layer_idx].update(key_states, value_states)

    def note_tokens(self, ids: torch.Tensor | None) -> None:
        """Take the ids of the tokens that come next, `[B, N]`; `None` where they are not known."""
        if ids is not None and self.layers[0].observers:
            ids = ids[:, : max(0, ids.shape[1] - self.layers[0].observers)]
        self._noted(ids)

    def _noted(self, ids: torch.Tensor | None) -> None:
        self.tokens.add(ids)

    def expect(self, prompt_tokens: int) -> None:
        """Announce a prompt that each layer will get in chunks."""
        for layer in self.layers:
            if not layer.is_initialized:
                layer.expected = prompt_tokens

    def expect_observers(self, tokens: int, segments: Sequence[int] = ()) -> None:
        """Announce that the last tokens of the coming prompt only observe those before them.

        So a document can be compressed by what questions about it would look at, before there is a question: let the
        model read the document and a stand-in for a question, and keep the document's tokens only.

        Args:
            tokens: how many observe.
            segments: tokens of each segment of these, if they are in segments that do not see one another; the
                positions of each then begin right after the document.

        Raises:
            ValueError: the segments are of another number of tokens.
        """
        if segments and sum(segments) != tokens:
            raise ValueError(f"segments of {sum(segments)} tokens are not the {tokens} that observe")
        for layer in self.layers:
            layer.observers, layer.segments = tokens, tuple(segments)

    @property
    def segments(self) -> tuple[int, ...]:
        """Tokens of each segment in which the coming prompt's observers are, if they are in segments."""
        return self.layers[0].segments

    @property
    def weighs_norms(self) -> bool:
        """Whether a prompt is judged by norms of hidden states too."""
        return any(layer.weighs_norms for layer in self.layers)

    def before_reading(self, prompt_tokens: int) -> RankingCache | None:
        """A cache to fill from the coming prompt before this one, which is then `judged_by` it; `None` if none.

        Args:
            prompt_tokens: of the prompt, padding included; there are no observers among them.
        """
        return None

    def judged_by(self, ranking: RankingCache) -> None:
        """Take what a cache that `before_reading` gave has found of the prompt, which comes once more."""


class RankingCache(PromptCache):
    """Keeps of a prompt what importances say of its rows, and ranks those of all layers together.

    Args:
        importances: of the methods that rank so.
        num_layers: of the model.
    """

    def __init__(self, importances: Sequence[Importance], num_layers: int):
        self.importances = importances
        super().__init__([RankingLayer(importances, index) for index in range(num_layers)])

    def verdicts(self, plan: CompressionPlan, protected: ProtectedTokens | None = None) -> list[Verdict]:
        """What a plan decides on the rows of each layer, of which every head keeps those that are protected.

        Raises:
            UsageError: the budget is below what every head keeps.
            CacheError: there are no such tokens as those that are protected.
        """
        method, shard = plan.method, plan.shard
        layers: list[RankingLayer] = self.layers
        if protected is not None:
            protected = protected.for_batch(len(layers[0].marked), layers[0].seen)
            plan.check(layers[0].seen, protected)
        ranked = [shard.together(layer.ranked(method, protected), dim=1) for layer in layers]
        rows = sum((each > float("-inf")).sum(dim=(1, 2)).cpu() for each in ranked)
        assert isinstance(rows, torch.Tensor)
        totals = [
            min(plan.total(length), there)
            for length, there in zip(layers[0].known_lengths(), rows.tolist(), strict=True)
        ]
        said = [shard.together(layer.said[method.importance].importance, dim=1) for layer in layers]
        counts = shard.own(method.budget.share_out(said, ranked, totals, method.importance.noise).cpu())
        return [
            Verdict(layer.said[method.importance], counts[:, index], layer.by_observers)
            for index, layer in enumerate(layers)
        ]
