"""A key/value cache in which every KV head holds its own number of rows, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import ref

import torch
from transformers.cache_utils import Cache

from headprof.compression.cache.head_layer import HeadCacheLayer
from headprof.compression.cache.prompt_layer import PromptLayer, outside_context
from headprof.compression.cache.ranking_layer import RankingLayer, Verdict, most_queries
from headprof.compression.cache.storage import SLACK
from headprof.compression.methods.global_budget import ranked_together
from headprof.compression.methods.importance import Importance, assessed
from headprof.compression.methods.observation import Assessment, Observation
from headprof.compression.plan import CompressionPlan
from headprof.compression.protected import Keep, ProtectedTokens
from headprof.compression.step_cache import StepLayer
from headprof.errors import CacheError

_MOST_PARTS = 256
"""Pieces of token ids, one of each forward pass, before they are laid together."""


class FanOutLayer(PromptLayer):
    """The same layer of several caches, filled from one prefill; methods of one importance share what it says.

    Args:
        layers: of the caches.
        ranking: of a cache that takes no more than what its importances say of the prompt, if there is one.
    """

    def __init__(self, layers: list[HeadCacheLayer], ranking: RankingLayer | None = None):
        super().__init__()
        self.layers = layers
        self.ranking = ranking

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if self.is_initialized or any(layer.seen for layer in self.layers):
            raise CacheError("A fan-out cache takes one prompt: continue with one of the caches it filled.")
        return self.gather(key_states, value_states)

    @property
    def weighs_norms(self) -> bool:
        return any(layer.weighs_norms for layer in self._taking)

    @property
    def _taking(self) -> list[PromptLayer]:
        return [*self.layers, *([] if self.ranking is None else [self.ranking])]

    def queries_needed(self) -> int | None:
        return most_queries(layer.queries_needed() for layer in self._taking)

    def filled(self, observed: Observation) -> None:
        said: dict[Importance, Assessment] = {}

        def says(importance: Importance) -> Assessment:
            if importance not in said:
                said[importance] = assessed(importance, observed)
            return said[importance]

        for layer in self.layers:
            verdict = layer.verdict
            layer.lazy_initialization(observed.keys, observed.values)
            layer.seen, layer.observers = self.seen, self.observers
            layer.compress(observed, says(layer.schedule.importance) if verdict is None else verdict.assessment)
            layer.forget_prompt()
        if self.ranking is not None:
            known = {importance: says(own) for importance, own in self.ranking.asked.items()}
            self.ranking.take(observed, known, self.seen, self.observers)
        self.is_initialized = True


class PromptCache(Cache):
    """A cache whose layers are filled from a prompt as soon as they have attended over it."""

    layers: list[Any]  # of PromptLayer

    def __init__(self, layers: Sequence[PromptLayer]):
        super().__init__(layers=list(layers))

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
        raise NotImplementedError

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

    def _noted(self, ids: torch.Tensor | None) -> None:
        """The ids are those of the next pass, too."""

    def verdicts(self, plan: CompressionPlan, protected: ProtectedTokens | None = None) -> list[Verdict]:
        """What a plan decides on the rows of each layer, of which every head keeps those that are protected.

        Raises:
            UsageError: the budget is below what every head keeps.
            CacheError: there are no such tokens as those that are protected.
        """
        method = plan.method
        layers: list[RankingLayer] = self.layers
        if protected is not None:
            protected = protected.for_batch(len(layers[0].marked), layers[0].seen)
            plan.check(layers[0].seen, protected)
        ranked = [layer.ranked(method, protected) for layer in layers]
        rows = sum((each > float("-inf")).sum(dim=(1, 2)).cpu() for each in ranked)
        assert isinstance(rows, torch.Tensor)
        totals = [
            min(plan.total(length), there)
            for length, there in zip(layers[0].known_lengths(), rows.tolist(), strict=True)
        ]
        counts = ranked_together(ranked, totals, method.importance.noise).cpu()
        return [
            Verdict(layer.said[method.importance], counts[:, index], layer.by_observers)
            for index, layer in enumerate(layers)
        ]


class HeadCache(PromptCache):
    """A Transformers cache that keeps of a prompt what a method and a budget allot to each KV head.

    Pass it as `past_key_values` inside `with headprof.compressed(model, ...)`; new tokens keep their true positions,
    since `get_seq_length` is the number of tokens seen.

    Args:
        plan: from `headprof.make_plan`, or what `headprof.compressed` yields.
        slack: rows of free space behind each head. When they are used up, the rows are laid out anew with half as much
            again, or with what is left of the buffer, so that long generations copy the cache seldom.
    """

    def __init__(self, plan: CompressionPlan, slack: int = SLACK):
        self.plan = self._given = plan
        self._tokens: list[torch.Tensor] = []
        super().__init__([HeadCacheLayer(index, plan, slack) for index in range(plan.shape.num_layers)])
        self.layers[-1].owner = ref(self)  # which is freed with its last user

    def all_filled(self) -> None:
        """All layers have been filled: go on by what that came to, where the plan does so."""
        if self.plan.goes_by_prompt(self.get_seq_length()):
            self.continue_with(self.plan.after_prompt(self.lengths.transpose(0, 1), self.protected))

    @classmethod
    def of_layers(cls, layers: Sequence[HeadCacheLayer]) -> HeadCache:
        """A cache of layers that are filled already."""
        cache = cls(layers[0].plan)
        cache.layers = list(layers)
        cache.layers[-1].owner = ref(cache)
        return cache

    @property
    def head_layers(self) -> list[HeadCacheLayer]:
        """The layers, by the name of their kind."""
        return self.layers

    @property
    def batch_size(self) -> int:
        """Sequences that it holds."""
        return self.head_layers[0].batch_size

    # Tokens that every head keeps.

    def protect(self, keep: Keep | ProtectedTokens | None) -> HeadCache:
        """Let every head keep some tokens of the coming prompt, whatever its method says of them; the same cache.

        They count as rows that are always kept: no head's budget is below them, they are never merged with others, and
        they stay while text is generated. In a layer with a sliding window they stay as long as it can see them.

        Args:
            keep: spans `[start, stop)` of token positions, padding counted, alike in all sequences; or bool `[T]` or
                `[B, T]`. `None` for none.

        Raises:
            CacheError: a prompt has been read already.
            UsageError: it is neither spans nor marks.
        """
        if self.get_seq_length():
            raise CacheError("Tokens can be protected only before the prompt is read: call protect on a new HeadCache.")
        self.goes_on_protecting(keep if isinstance(keep, ProtectedTokens) else ProtectedTokens.of(keep))
        return self

    def goes_on_protecting(self, tokens: ProtectedTokens | None) -> None:
        """Keep these whenever heads are compressed from now on, as far as they hold them."""
        for layer in self.head_layers:
            layer.schedule.protected = tokens

    @property
    def protected(self) -> ProtectedTokens | None:
        """Tokens that every head keeps beside those that its method does."""
        return self.head_layers[0].schedule.protected

    # Decode steps that the device runs by itself (see `decode_steps`).

    @property
    def runs_steps(self) -> bool:
        """Whether it holds a prompt, so that a new token is a decode step."""
        return bool(self.head_layers[-1].is_initialized)

    def prepare_step(self) -> None:
        """Get ready for one more token of every sequence: afterwards nothing moves while it comes."""
        for layer in self.head_layers:
            layer.prepare()

    def settle(self) -> None:
        """Have room for all that comes before the next compression, within bounds."""
        for layer in self.head_layers:
            layer.settle()

    def layout(self) -> tuple[object, ...]:
        """What a step writes to: while these are the same objects, no address has changed."""
        return tuple(each for layer in self.head_layers for each in layer.in_place)

    def step_parts(self) -> tuple[list[StepLayer], torch.Tensor | None]:
        """What a step reads and writes of each layer, and where each layer's next query goes, int64 `[L]`, if any."""
        layers = [layer.for_step() for layer in self.head_layers]
        if layers[0].slot is None:
            return layers, None
        with torch.inference_mode(False):
            slots = torch.cat([each.slot.to(layers[0].slot.device) for each in layers if each.slot is not None])
        for each, layer, slot in zip(layers, self.head_layers, slots.split(1), strict=True):
            each.slot = slot
            layer.held.recent.goes_by(slot)
        return layers, slots

    def step_passed(self) -> None:
        """Note that the device has run a step."""
        for layer in self.head_layers:
            layer.passed()

    def take_step_back(self) -> None:
        """Undo the last step, so that the same one can be run once more."""
        for layer in self.head_layers:
            layer.take_back()

    @property
    def token_ids(self) -> torch.Tensor | None:
        """The tokens that it has seen, int64 `[B, get_seq_length()]`, so that it can be told what they were.

        They are those that the model was given inside `compressed`; `None` where it was given something else, or since
        beams have been reordered.
        """
        if len(self._tokens) > 1:
            self._tokens = [torch.cat(self._tokens, dim=1)]
        known = self._tokens[0] if self._tokens else None
        if known is None or tuple(known.shape) != (self.batch_size, self.get_seq_length()):
            return None
        return known

    def with_tokens(self, ids: torch.Tensor | None) -> HeadCache:
        """The same cache, which has seen the tokens `ids`, `[B, T]`."""
        self._tokens = [] if ids is None else [ids]
        return self

    def _noted(self, ids: torch.Tensor | None) -> None:
        if ids is None or (self._tokens and len(ids) != len(self._tokens[0])):
            self._tokens = []
            return
        self._tokens.append(ids)
        if len(self._tokens) > _MOST_PARTS:
            self._tokens = [torch.cat(self._tokens, dim=1)]

    def reset(self) -> None:
        self._tokens = []
        super().reset()
        if self.plan.shares is not None:  # which were those of what it held
            self.continue_with(replace(self._given, shares=None, _known=[]))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, or all but the first `tokens_to_remove` if it is above 0.

        Raises:
            CacheError: they cannot be taken out (see `HeadCacheLayer.crop`); nothing has been changed then.
        """
        seen = self.get_seq_length()
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, seen - tokens_to_remove)
        if count == 0:
            return
        for layer in self.head_layers:
            layer.require_removable(count)
        known = self.token_ids
        for layer in self.head_layers:
            layer.crop(-count)
        self.with_tokens(None if known is None else known[:, : seen - count])

    def activate_past_recording(self) -> None:
        """Get ready for tokens of which some are taken out again, as in assisted decoding.

        Raises:
            CacheError: nothing has been read: prompt and guessed tokens would come in one pass, and be compressed as
                one prompt.
        """
        if self.get_seq_length() == 0:
            raise CacheError(
                "Assisted decoding reads the prompt together with guessed tokens, so it cannot be compressed alone: "
                "leave assistant_model, prompt_lookup_num_tokens and the like away."
            )
        super().activate_past_recording()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let sequence `i` go on from what sequence `beam_idx[i]` holds (beam search)."""
        self._tokens = []
        for layer in self.head_layers:
            layer.reorder_cache(beam_idx)
        self._follow(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences of the batch, in this order; one may come more than once."""
        known = self.token_ids
        super().batch_select_indices(indices)
        self._follow(indices)
        self.with_tokens(None if known is None else known[indices.to(known.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch."""
        known = self.token_ids
        self._follow(torch.arange(self.batch_size).repeat_interleave(repeats))
        super().batch_repeat_interleave(repeats)
        self.with_tokens(None if known is None else known.repeat_interleave(repeats, dim=0))

    def _follow(self, indices: torch.Tensor) -> None:
        """Let the plan be for these sequences of the batch, as the rows are."""
        if (plan := self.plan.of_sequences(indices)) is not self.plan:
            self.plan = plan
            for layer in self.head_layers:
                layer.schedule.plan = plan

    def before_reading(self, prompt_tokens: int) -> RankingCache | None:
        first = self.head_layers[0]
        if first.seen or first.observers or first.verdict is not None or not self.plan.ranks_together(prompt_tokens):
            return None
        return RankingCache([self.plan.method.importance], len(self.layers))

    def judged_by(self, ranking: RankingCache) -> None:
        verdicts = ranking.verdicts(self.plan, self.protected)
        self.continue_with(self.plan.sharing_by(torch.stack([each.counts for each in verdicts], dim=1)))
        for layer, verdict in zip(self.head_layers, verdicts, strict=True):
            layer.verdict = verdict

    def continue_with(self, plan: CompressionPlan) -> None:
        """Compress by another plan from now on, for the same model."""
        self.plan = plan
        for layer in self.head_layers:
            layer.continue_with(plan)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the cache holds; free space, positions and remembered queries included.

        Left out are token ids, which of them are protected, and where each head's rows begin and end, 16 bytes a head
        of each layer.
        """
        return sum(layer.nbytes for layer in self.head_layers)

    @property
    def lengths(self) -> torch.Tensor:
        """Rows held by each head, int64 `[L, B, K]`."""
        return torch.stack([torch.tensor(layer.lengths).reshape(layer.batch_size, -1) for layer in self.head_layers])


def stack_caches(caches: Sequence[HeadCache]) -> HeadCache:
    """One cache with a batch entry for each entry of several caches of the same prompt, whatever their methods.

    One forward pass then continues them all.
    """
    stack = HeadCache.of_layers(
        [HeadCacheLayer.stacked(layers) for layers in zip(*(cache.head_layers for cache in caches), strict=True)]
    )
    known = [cache.token_ids for cache in caches]
    parts = [ids for ids in known if ids is not None]
    return stack.with_tokens(torch.cat(parts) if len(parts) == len(known) else None)


class FanOutCache(PromptCache):
    """Fills several caches from one prefill: the model runs over the prompt once for all of them.

    Args:
        caches: to be filled; at least one, or a `ranking`.
        ranking: what takes from the same prefill what others need to know before the prompt is read to fill them.
    """

    def __init__(self, caches: list[HeadCache], ranking: RankingCache | None = None):
        self.caches = caches
        taking: list[RankingLayer | None] = [None] * len(caches[0].layers) if ranking is None else ranking.layers
        of_caches = [[cache.head_layers[index] for cache in caches] for index in range(len(taking))]
        super().__init__([FanOutLayer(own, other) for own, other in zip(of_caches, taking, strict=True)])

    def before_reading(self, prompt_tokens: int) -> RankingCache | None:
        if self.layers[0].observers:
            return None
        found = [ranking for cache in self.caches if (ranking := cache.before_reading(prompt_tokens)) is not None]
        importances = dict.fromkeys(each for ranking in found for each in ranking.importances)
        return RankingCache([*importances], len(self.layers)) if found else None

    def judged_by(self, ranking: RankingCache) -> None:
        for cache in self.caches:
            if cache.before_reading(ranking.get_seq_length()) is not None:
                cache.judged_by(ranking)

    def _noted(self, ids: torch.Tensor | None) -> None:
        for cache in self.caches:
            cache._noted(ids)
