"""Several caches that take their next tokens in one forward pass, each of which goes on exactly as it would alone.

The sequences of a `HeadCache` have one length and are compressed again at the same time. Here each has its own: its
rows lie beside those of the others while nothing but new tokens comes, and when it is due it is taken out, compressed
by itself, and put back. So no answer depends on what else is answered beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.cache.head_layer import HeadCacheLayer
from headprof.compression.cache.held_rows import FOLD, HeldRows
from headprof.compression.cache.prompt_cache import PromptCache
from headprof.compression.cache.prompt_layer import PromptLayer
from headprof.compression.cache.recent_queries import RecentQueries
from headprof.compression.cache.storage import RowStorage
from headprof.compression.hook import mark
from headprof.compression.kernels.ragged_rows import RaggedRows
from headprof.compression.methods.observation import AttentionLayer
from headprof.compression.plan import BUFFER
from headprof.compression.rows import Rows
from headprof.errors import CacheError


@dataclass(frozen=True)
class _Apart:
    """What a member held besides its rows when they were laid beside those of the others."""

    recent: RecentQueries
    appended: int
    settled: int
    hides: bool
    columns: frozenset[str]


class TogetherLayer(PromptLayer):
    """The same layer of several caches of one sequence each, all filled.

    Between `part` and the next token the members hold their rows themselves; at any other time this layer does.

    Attributes:
        members: the layers, which have one plan.
    """

    def __init__(self, members: Sequence[HeadCacheLayer]):
        super().__init__()
        self.members = list(members)
        first = self.members[0]
        self.batch_size, self.num_kv_heads, self.head_dim = len(self.members), first.num_kv_heads, first.head_dim
        self.dtype, self.device = first.dtype, first.device
        self.is_initialized = True
        self.seen = max(member.seen for member in self.members)
        self._apart: list[_Apart] = []
        self._storage: RowStorage | None = None
        self._recent = RecentQueries()
        self._fed = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Take the keys and values of one new token of each member, `[B, K, 1, D]`."""
        storage = self._ready()
        storage.append(key_states, value_states)
        storage.note(1)
        self._fed += 1
        self.seen += 1
        for member in self.members:
            member.seen += 1
            member.schedule.advance(1)
        self.unread = True
        return mark(key_states, self), value_states

    def readings(self, query: Tensor, scaling: float) -> Iterator[tuple[Tensor, RaggedRows]]:
        """The queries with the rows of all members, for attention."""
        assert self._storage is not None
        self.unread = False
        yield query, self._storage.in_place()

    def hide_newest(self, visible: Tensor) -> None:
        raise NotImplementedError("one token of each sequence has no padding")

    def observe(self, query: Tensor, valid: Tensor | None, layer: AttentionLayer) -> None:
        """Remember the newest queries, `[B, H, 1, D]`, as far as the next compression needs them."""
        schedule = self.members[0].schedule
        if schedule.goes_on and schedule.recent_queries != 0:
            self._recent.add(query, valid, schedule.recent_queries, (schedule.at_hand or 0) + FOLD)
            self._recent.layer = layer

    @property
    def nbytes(self) -> int:
        """Bytes of memory that all members hold, as `HeadCacheLayer.nbytes` counts them."""
        if self._storage is None:
            return sum(member.nbytes for member in self.members)
        recents = [self._recent, *(apart.recent for apart in self._apart)]
        tensors = [*self._storage.rows.tensors, *(tensor for recent in recents for tensor in recent.tensors)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def _ready(self) -> RowStorage:
        """Where one more token of each member goes, after those that are due have been compressed again."""
        storage = self._storage
        if storage is None or storage.free < 1 or any(map(self._is_due, range(self.batch_size))):
            self.part()
            for member in self.members:
                member.make_ready(1)
            storage = self._join()
        return storage

    def _is_due(self, number: int) -> bool:
        """Whether a member has more to do before its next token than to make room."""
        schedule = self.members[number].schedule
        if not schedule.goes_on:
            return False
        at_hand = schedule.at_hand
        remembered = len(self._apart[number].recent) + len(self._recent)
        return schedule.left is None or schedule.left < 1 or (at_hand is not None and remembered >= at_hand + FOLD)

    def _join(self) -> RowStorage:
        """Lay the members' rows side by side, with room for what comes before the first of them is due."""
        helds = [member.held for member in self.members]
        self._apart = [
            _Apart(held.recent, held.storage.appended, held.settled, held.storage.hides, frozenset(rows.columns))
            for held, rows in ((held, held.storage.rows) for held in helds)
        ]
        lefts = [member.schedule.left for member in self.members]
        slack = max(1, min(BUFFER if left is None else left for left in [*lefts, BUFFER]))
        seen = [member.seen for member in self.members for _ in range(self.num_kv_heads)]
        rows = Rows.joined([held.storage.compact() for held in helds])
        self._storage = RowStorage(rows, seen, slack, hides=any(held.storage.hides for held in helds))
        for member in self.members:
            member.release()
        return self._storage

    def part(self) -> None:
        """Give each member its own rows and queries back."""
        if self._storage is None:
            return
        rows, heads = self._storage.compact(), self.num_kv_heads
        query, _ = self._recent.joined()
        for number, (member, apart) in enumerate(zip(self.members, self._apart, strict=True)):
            own = rows.of_heads(range(number * heads, (number + 1) * heads))
            for name in own.columns.keys() - apart.columns:
                own = own.without(name)
            appended = apart.appended + self._fed
            storage = RowStorage(own, member.seen, member.slack, appended, hides=apart.hides)
            if query is not None:
                self._hand_on(apart.recent, query[number : number + 1])
            member.take(HeldRows(storage, heads, apart.recent, apart.settled))
        self._storage, self._recent, self._fed = None, RecentQueries(), 0

    def _hand_on(self, recent: RecentQueries, query: Tensor) -> None:
        """Let a member remember queries, as if they had come one by one."""
        needed = self.members[0].schedule.recent_queries
        recent.add(query, None, needed)
        if needed is not None:
            recent.keep_last(needed)
        recent.layer = self._recent.layer


class TogetherCache(PromptCache):
    """Caches of one sequence each, of one plan, that take one token each in a forward pass.

    Their tokens stand at positions of their own, so give the model `position_ids`. After `part` each can be used alone
    again.

    Attributes:
        caches: in the order of the batch.
    """

    runs_steps = False

    def __init__(self, caches: Sequence[HeadCache]):
        """
        Raises:
            CacheError: one of them brings back rows from the host.
        """
        if any(cache.recalls for cache in caches):
            raise CacheError(
                "Caches that bring back rows from the host are not continued together: continue one after the other."
            )
        self.caches = list(caches)
        super().__init__([TogetherLayer(layers) for layers in zip(*(c.head_layers for c in caches), strict=True)])

    @property
    def positions(self) -> Tensor:
        """Of the next token of each, int64 `[B, 1]`."""
        return torch.tensor([[cache.get_seq_length()] for cache in self.caches])

    @property
    def nbytes(self) -> int:
        """Bytes of memory that all caches hold (see `HeadCache.nbytes`)."""
        return sum(layer.nbytes for layer in self.layers)

    def part(self) -> None:
        """Let each cache hold its own rows again."""
        for layer in self.layers:
            layer.part()

    def _noted(self, ids: Tensor | None) -> None:
        for number, cache in enumerate(self.caches):
            cache._noted(None if ids is None else ids[number : number + 1])
