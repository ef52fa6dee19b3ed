"""A key/value cache in which every KV head holds its own number of rows, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from weakref import ref

import torch

from headprof.compression.cache.head_layer import HeadCacheLayer
from headprof.compression.cache.prompt_cache import PromptCache, RankingCache
from headprof.compression.cache.storage import SLACK
from headprof.compression.plan import CompressionPlan
from headprof.compression.protected import Keep, ProtectedTokens
from headprof.compression.step_cache import StepLayer
from headprof.errors import CacheError


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
        super().__init__([HeadCacheLayer(index, plan, slack) for index in range(plan.shape.num_layers)])
        self.layers[-1].owner = ref(self)  # which is freed with its last user

    def all_filled(self) -> None:
        """All layers have been filled: go on by what that came to, where the plan does so."""
        if self.plan.goes_by_prompt(self.get_seq_length()):
            self._share_by(self.lengths.transpose(0, 1))

    def _share_by(self, counts: torch.Tensor) -> None:
        """Go on by what this process's heads have kept, int64 `[B, L, K]`, and those of others."""
        self.continue_with(self.plan.sharing_by(self.plan.shard.together(counts)))

    @classmethod
    def of_layers(cls, layers: Sequence[HeadCacheLayer]) -> HeadCache:
        """A cache of layers that are filled already."""
        cache = cls(layers[0].plan)
        cache.layers = list(layers)
        cache.layers[-1].owner = ref(cache)
        cache.share_tokens()
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
        """Whether it holds a prompt, so that a new token is a decode step, and the device can run that by itself."""
        return bool(self.head_layers[-1].is_initialized) and not self.recalls

    @property
    def recalls(self) -> bool:
        """Whether it brings back rows from the host."""
        return any(layer.tiers for layer in self.head_layers)

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

        They are those that the model was given inside `compressed`; `None` where it was given something else.
        """
        known = self.tokens.joined()
        if known is None or tuple(known.shape) != (self.batch_size, self.get_seq_length()):
            return None
        return known

    def with_tokens(self, ids: torch.Tensor | None) -> HeadCache:
        """The same cache, which has seen the tokens `ids`, `[B, T]`."""
        self.tokens.replace(ids)
        return self

    def reset(self) -> None:
        self.tokens.replace(None)
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
        known = self.token_ids
        for layer in self.head_layers:
            layer.reorder_cache(beam_idx)
        self._follow(beam_idx)
        self.with_tokens(None if known is None else known[beam_idx.to(known.device)])

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

    def is_ranked_first(self, prompt_tokens: int) -> bool:
        """Whether another cache has to be filled from a coming prompt of so many tokens before (`before_reading`)."""
        first = self.head_layers[0]
        fresh = not first.seen and not first.observers and first.verdict is None
        return fresh and self.plan.ranks_together(prompt_tokens)

    def before_reading(self, prompt_tokens: int) -> RankingCache | None:
        if not self.is_ranked_first(prompt_tokens):
            return None
        return RankingCache([self.plan.method.importance], len(self.layers))

    def judged_by(self, ranking: RankingCache) -> None:
        verdicts = ranking.verdicts(self.plan, self.protected)
        self._share_by(torch.stack([each.counts for each in verdicts], dim=1))
        for layer, verdict in zip(self.head_layers, verdicts, strict=True):
            layer.verdict = verdict

    def continue_with(self, plan: CompressionPlan) -> None:
        """Compress by another plan from now on, for the same model."""
        self.plan = plan
        for layer in self.head_layers:
            layer.continue_with(plan)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the cache holds in this process; free space, positions and remembered queries included.

        Left out are token ids, which of them are protected, and where each head's rows begin and end and how many are
        packed, 16 to 24 bytes a head of each layer.
        """
        return sum(layer.nbytes for layer in self.head_layers)

    @property
    def second_tier_bytes(self) -> int:
        """Bytes of evicted rows that may be brought back, on the host or in the memory map of a file."""
        return sum(tier.host_bytes for layer in self.head_layers for tier in layer.tiers)

    @property
    def lengths(self) -> torch.Tensor:
        """Rows held by each head that this process has, int64 `[L, B, K]`."""
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
