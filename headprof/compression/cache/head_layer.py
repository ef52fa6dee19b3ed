"""A cache layer in which every head holds its own rows: Transformers' contract."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol
from weakref import ReferenceType

import torch
from torch import Tensor

from headprof.compression.cache.held_rows import FOLD, HeldRows
from headprof.compression.cache.prompt_layer import PromptLayer
from headprof.compression.cache.ranking_layer import Verdict
from headprof.compression.cache.recent_queries import RecentQueries
from headprof.compression.cache.schedule import LayerSchedule
from headprof.compression.cache.second_tier import SecondTier, with_slots
from headprof.compression.cache.storage import SLACK, RowStorage
from headprof.compression.hook import mark
from headprof.compression.kernels.backends import make_plans
from headprof.compression.kernels.ragged_rows import RaggedRows
from headprof.compression.methods.importance import assessed
from headprof.compression.methods.observation import Assessment, AttentionLayer, Observation
from headprof.compression.plan import BUFFER, CompressionPlan
from headprof.compression.rows import HeadCounts, Rows
from headprof.compression.step_cache import StepLayer
from headprof.errors import CacheError


class Owner(Protocol):
    """A cache that wants to know when all of its layers have been filled."""

    layers: list[Any]

    def all_filled(self) -> None: ...


class HeadCacheLayer(PromptLayer):
    """One layer, in which every head holds its own rows.

    They come from the prompt, as soon as the layer has attended over it; later tokens are appended to every head. When
    that is too much, and what is kept then, its schedule says.

    Attributes:
        schedule: when the layer is compressed, and to what.
        slack: rows of free space behind each head.
        verdict: what has been decided on the prompt that comes, if it is read for the second time; else `None`.
        owner: whom to tell that the layer has been filled from a prompt, if it is that cache's last one.
    """

    owner: ReferenceType[Owner] | None = None

    def __init__(self, layer_idx: int, plan: CompressionPlan, slack: int = SLACK):
        super().__init__()
        self.layer_idx = layer_idx
        self.schedule = LayerSchedule(plan, layer_idx)
        self.slack = slack
        self.reset()

    def reset(self) -> None:
        self._held: HeldRows | None = None
        self.verdict: Verdict | None = None
        self.batch_size = 0
        self.seen = 0
        self.is_initialized = self.unread = False
        self.schedule.begin_anew()
        self.schedule.protected, self.schedule.padding = None, ()
        self.forget_prompt()

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` after any pass leaves no trace: not if the layer may be compressed in it."""
        return self.is_initialized and not self.schedule.goes_on

    @property
    def plan(self) -> CompressionPlan:
        return self.schedule.plan

    @property
    def held(self) -> HeldRows:
        """What the layer holds, once there is anything."""
        assert self._held is not None
        return self._held

    @property
    def storage(self) -> RowStorage:
        """The rows, once there are any."""
        return self.held.storage

    @property
    def lengths(self) -> list[int]:
        """Rows that each head holds, `B * K` numbers."""
        return self.held.lengths

    @property
    def nbytes(self) -> int:
        """Bytes of memory that this layer holds (see `HeldRows.nbytes`)."""
        return 0 if self._held is None else self._held.nbytes

    @property
    def tiers(self) -> tuple[SecondTier, ...]:
        """What its heads have evicted and may bring back."""
        return () if self._held is None else self._held.tiers

    def hold(
        self, rows: Rows, recent: RecentQueries | None = None, needed: int = 0, tier: SecondTier | None = None
    ) -> None:
        """Hold these rows, just compressed, instead of what the layer held.

        Args:
            rows: of `batch_size * num_kv_heads` heads, flat, without those that are brought back.
            recent: queries to remember; `None` for those that are.
            needed: rows of free space behind each head with which these may take the place of those before.
            tier: what all heads have evicted and may bring back; `None` where that is gone.
        """
        rows = rows if tier is None else with_slots(rows, tier.slots)
        if recent is None:
            recent = RecentQueries() if self._held is None else self._held.recent
        storage = None if self._held is None else self._held.storage
        if storage is None or not storage.replace(rows, needed):
            storage = RowStorage(rows, self.seen, self.slack)
        self._held = HeldRows(storage, self.num_kv_heads, recent, tiers=() if tier is None else (tier,))
        self.schedule.begin_anew()
        self.is_initialized = True

    def _hold_compressed(self, observed: Observation, said: Assessment, counts: HeadCounts, **options: Any) -> None:
        """Hold of observed rows what is kept of them by what an importance has said; options are those of `hold`."""
        rows, tier = self.schedule.compressed(observed, said, counts, self.tiers)
        self.hold(rows, tier=tier, **options)

    def take(self, held: HeldRows) -> None:
        """Hold what has been held elsewhere since `release`; when to compress it again is as it was."""
        self._held = held

    def release(self) -> None:
        """Hold nothing until `take`."""
        self._held = None

    # The prompt.

    @property
    def weighs_norms(self) -> bool:
        return self.verdict is None and self.schedule.importance.norms

    def queries_needed(self) -> int | None:
        if self.verdict is not None and self.verdict.by_observers:
            return 0
        return self.schedule.prompt_queries

    def filled(self, observed: Observation) -> None:
        said = assessed(self.schedule.importance, observed) if self.verdict is None else self.verdict.assessment
        self.compress(observed, said)

    def compress(self, observed: Observation, assessment: Assessment) -> None:
        """Keep of the prompt what the plan allots, or a verdict, by what the importance says of it."""
        verdict, self.verdict = self.verdict, None
        self.schedule.note_padding(observed.lengths or (), self.seen)
        if verdict is None:
            counts = self.schedule.prompt_counts(observed, self.seen)
        else:
            counts = verdict.head_counts(observed.valid.device)
        self._hold_compressed(observed, assessment, counts, recent=RecentQueries(layer=observed.layer))
        judged_by_others = self.observers > 0 or (verdict is not None and verdict.by_observers)
        if self.schedule.goes_on and not judged_by_others:
            self._remember(observed)
        owner = None if self.owner is None else self.owner()
        if owner is not None and owner.layers[-1] is self:
            owner.all_filled()

    def _remember(self, observed: Observation) -> None:
        """Keep the prompt's last queries if the rows will be scored again before enough new ones have come."""
        needed = self.schedule.recent_queries or 0
        # What the content decided on is the target from now on, so that the buffer is all that is left.
        until_due = (
            (self.plan.buffer or 0) if self.plan.follows_content else self.schedule.until_due(self.seen, self.storage)
        )
        short = needed - max(0, until_due)
        if short > 0:
            query = observed.queries[:, :, max(0, observed.queries.shape[2] - short) :]
            valid = observed.valid[:, -query.shape[2] :] if observed.padded else None
            self.held.recent.add(query, valid, needed)

    # What is generated.

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Take the keys and values of new tokens, `[B, K, Q, D]`; what comes back is marked with this layer."""
        if not self.is_initialized:
            return self.gather(key_states, value_states)
        count = key_states.shape[2]
        self.make_ready(count)
        self.storage.append(key_states, value_states)
        self._count_rows(count)
        self.unread = True
        return mark(key_states, self), value_states

    def make_ready(self, count: int) -> None:
        """Do what has to be done before `count` more tokens come: compress again, add up, make room."""
        if self.schedule.goes_on:
            self._make_room(count)
            if (at_hand := self.schedule.at_hand) is not None:
                self.held.fold(at_hand, self.seen)
        if count > self.storage.free:
            self._widen(count)
            self.held.widen(self.slack, self.seen)

    def _count_rows(self, count: int) -> None:
        self.storage.note(count)
        self.schedule.advance(count)
        self.seen += count

    def readings(self, query: Tensor, scaling: float) -> Iterator[tuple[Tensor, RaggedRows]]:
        """The newest tokens' queries, `[B, H, Q, D]`, in parts, each with the rows that it reads: its own the last."""
        self.unread = False
        return self.held.readings(query, scaling, self.seen)

    def hide_newest(self, visible: Tensor) -> None:
        """Of the newest tokens only these are no padding, bool `[B, Q]`: hide the others from every query."""
        self.storage.hide_newest(visible)

    def observe(self, query: Tensor, valid: Tensor | None, layer: AttentionLayer) -> None:
        """Remember the queries of the newest tokens as far as the next compression needs them.

        Args:
            query: of tokens whose keys have been appended, `[B, H, Q, D]`.
            valid: false for padding, bool `[B, Q]`; `None` if there is none.
            layer: how they attended.
        """
        if self._observes:
            self.held.recent.add(query, valid, self.schedule.recent_queries, self._usual_queries)
            self.held.recent.layer = layer

    @property
    def _observes(self) -> bool:
        return self.schedule.goes_on and self.schedule.recent_queries != 0

    @property
    def _usual_queries(self) -> int:
        """How many are remembered where all are: then they are folded."""
        return (self.schedule.at_hand or 0) + FOLD

    # A decode step that is run by the device alone: `prepare`, then the step over what `for_step` says, then `passed`.

    def prepare(self) -> None:
        """Get ready for one more token, so that nothing moves while it comes."""
        self.make_ready(1)
        if self._observes and self.schedule.recent_queries is None:
            self.held.recent.reserve(len(self.held.recent) + 1)

    def settle(self) -> None:
        """Make room for all that comes before the next compression, or for a usual buffer's tokens if that is less."""
        wanted, rooms = self.schedule.rooms_ahead(self.seen, self.storage, BUFFER)
        if not self.storage.has_room(wanted, rooms):
            self.held.widen(wanted, self.seen, rooms)

    def for_step(self) -> StepLayer:
        """What a step reads and writes."""
        rows = replace(self.storage.in_place(), in_use=None)
        make_plans(rows)
        return StepLayer(rows, *(self.held.recent.for_writing() if self._observes else (None, None, None)))

    def passed(self) -> None:
        """Note that the token has come."""
        self._count_rows(1)
        if self._observes:
            self.held.recent.note(1, self.schedule.recent_queries)

    def take_back(self) -> None:
        """Undo a step, so that the same one can be run once more."""
        self.storage.drop_newest(1)
        self.seen -= 1
        self.schedule.advance(-1)
        if self._observes:
            self.held.recent.take_back(1)

    @property
    def in_place(self) -> tuple[object, ...]:
        """What a captured step goes by: while these are the same objects, it writes all that is needed, in place."""
        return (self.schedule, self.storage, self.storage.rows, *self.held.recent.tensors)

    def continue_with(self, plan: CompressionPlan) -> None:
        """Compress by another plan from now on."""
        self.schedule = LayerSchedule(plan, self.layer_idx, self.schedule.protected, self.schedule.padding)
        if self._held is not None and not self.schedule.goes_on:
            self._held.recent = self._held.recent.released()

    def _widen(self, count: int) -> None:
        """Have so much free space that rows are laid out anew seldom, but no more than will be used.

        It grows with what is held, and ends where the rows are compressed again. A buffer of the usual size is laid out
        at once; of a larger one, who knows how much of it will ever be used?
        """
        wanted, left = max(2 * count, self.storage.total // (2 * self.storage.num_heads)), self.schedule.left
        if left is not None:
            wanted = max(count, min(left, max(wanted, BUFFER)))
        self.slack = max(self.slack, wanted)

    def _make_room(self, count: int) -> None:
        """Compress if `count` more tokens would be too many."""
        if self.schedule.is_due(count, self.seen, self.storage):
            self._compress_again()
            self.schedule.look(self.seen, self.storage)

    def _compress_again(self) -> None:
        """Reduce every head that holds more than its target to that."""
        schedule = self.schedule
        needed = min(self.plan.buffer or 0, max(self.storage.appended, BUFFER))
        self.slack = max(self.slack, needed)
        ids = self.tokens.first(self.seen, self.batch_size) if schedule.importance.needs_ids else None
        observed = replace(self.held.observed(self.seen), ids=ids)
        counts = schedule.counts_again(observed, self.storage, self.held.slots if self.tiers else ())
        self._hold_compressed(observed, assessed(schedule.importance, observed), counts, needed=needed)
        if schedule.importance.queries is None:
            self.held.recent.forget()

    # What else is done with a cache.

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, or all but the first `tokens_to_remove` if it is above 0.

        Raises:
            CacheError: since they came, the rows have been compressed, or what queries paid to them has been summed;
                what was lost then cannot be given back. The tokens of the last forward pass can always be taken out.
        """
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.seen - tokens_to_remove)
        if count == 0:
            return
        self.require_removable(count)
        self.held.drop_newest(count)
        self.seen -= count
        self.schedule.advance(-count)

    def require_removable(self, count: int) -> None:
        """
        Raises:
            CacheError: so many of the newest tokens cannot be taken out.
        """
        if every := max((tier.recall.recall_every for tier in self.tiers if tier.recall.recall_every > 1), default=0):
            raise CacheError(
                f"Tokens cannot be taken out of a cache that brings back rows every {every} tokens, since those before "
                "are not known any more: give recall_every=1."
            )
        removable = self.held.removable if self.is_initialized else 0
        if count > removable:
            raise CacheError(f"Only the last {removable} tokens can be taken out of a compressed cache, not {count}.")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence `i` go on from what sequence `beam_idx[i]` holds (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch, in this order; one may come more than once."""
        if not self.is_initialized:
            return
        chosen = torch.arange(self.batch_size)[indices.cpu()].tolist()
        self.batch_size = len(chosen)
        self._held = self.held.of_sequences(chosen, self.seen, self.slack)
        self.schedule.choose(chosen)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    @classmethod
    def stacked(cls, layers: Sequence[HeadCacheLayer]) -> HeadCacheLayer:
        """One layer that holds copies of several as a batch; all must have seen the same number of tokens."""
        first, sizes = layers[0], [layer.batch_size for layer in layers]
        if len({layer.seen for layer in layers}) != 1:
            raise ValueError("only layers that have seen the same number of tokens can be stacked")
        stack = first.empty_like(sum(sizes))
        stack._held = HeldRows.stacked([layer.held for layer in layers], sizes, first.seen, first.slack)
        stack.is_initialized = True
        stack.schedule.join([layer.schedule for layer in layers], sizes)
        if any(layer.plan is not first.plan for layer in layers):  # there is no one way to compress them on
            stack.continue_with(replace(first.plan, buffer=None))
        elif any(layer.schedule.left is not None for layer in layers):
            stack.schedule.resume(min(layer.schedule.left_after(layer.seen, layer.storage) for layer in layers))
        return stack

    def empty_like(self, batch_size: int) -> HeadCacheLayer:
        """A layer that has seen as many tokens of as many sequences, but holds none yet."""
        layer = HeadCacheLayer(self.layer_idx, self.plan, self.slack)
        layer.batch_size, layer.seen = batch_size, self.seen
        layer.num_kv_heads, layer.head_dim = self.num_kv_heads, self.head_dim
        layer.dtype, layer.device = self.dtype, self.device
        return layer
