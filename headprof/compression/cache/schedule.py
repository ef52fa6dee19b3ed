"""When a layer is compressed, and to what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch

from headprof.compression.cache.second_tier import SecondTier, evicted_rows, joined_tiers
from headprof.compression.methods.all_heads import by_content
from headprof.compression.methods.importance import Importance
from headprof.compression.methods.observation import Assessment, Observation
from headprof.compression.methods.reduction import Choice, largest
from headprof.compression.plan import CompressionPlan
from headprof.compression.protected import ProtectedTokens
from headprof.compression.rows import HeadCounts, Rows
from headprof.errors import UsageError


class Sizes(Protocol):
    """How many rows a layer's heads hold."""

    hides: bool
    """Whether some of them may be hidden."""

    @property
    def lengths(self) -> Sequence[int]:
        """Of each head, `B * K` numbers."""
        ...

    @property
    def num_heads(self) -> int:
        """How many heads there are, `B * K`, which the host always knows."""
        ...

    def sums(self, num_kv_heads: int) -> Sequence[int]:
        """Of the heads of each sequence together, `B` numbers."""
        ...


class LayerSchedule:
    """When one layer is compressed, and to what, by a plan.

    A prompt is compressed once it has been attended over. While text is generated, the layer is compressed again when a
    head would outgrow its budget by more than the plan's buffer; in a batch that is at the same time for all sequences,
    so one that still had room may go on otherwise than it would alone.

    Attributes:
        plan: for the whole model.
        layer_idx: the layer's number.
        importance: of the plan's method, for the layer.
        protected: tokens that every head keeps, or `None`.
        padding: how many of a prompt's tokens are padding, of each sequence; empty where none are.
        goes_on: whether the layer is compressed again while text is generated.
        prompt_queries: how many of a prompt's last queries importance, reduction and representation need; `None` for
            all.
        recent_queries: how many of the newest queries they need while text is generated; `None` for all since they were
            last.
        at_hand: of all queries, how many of the last must be at hand; `None` for all that are remembered.
    """

    def __init__(
        self,
        plan: CompressionPlan,
        layer_idx: int,
        protected: ProtectedTokens | None = None,
        padding: tuple[int, ...] = (),
    ):
        self.layer_idx = layer_idx
        self.protected = protected
        self.padding = padding
        self.plan = plan
        self.begin_anew()

    @property
    def plan(self) -> CompressionPlan:
        return self._plan

    @plan.setter
    def plan(self, plan: CompressionPlan) -> None:
        # What each decode step asks of each layer is worked out once.
        self._plan, method = plan, plan.method
        self.importance: Importance = method.importance.of_layer(self.layer_idx)
        self.goes_on = plan.compresses_while_generating
        asked, held = self.importance.queries, method.representation.queries
        self.prompt_queries = _most(asked, method.reduction.prompt_queries, held)
        self.recent_queries = _most(asked, method.reduction.recent_queries, held)
        self.at_hand = _most(self.importance.at_hand, method.reduction.recent_queries, held)

    @property
    def window(self) -> int | None:
        """Tokens that the layer's queries see; `None` for all."""
        return self.plan.windows[self.layer_idx] if self.plan.windows else None

    def note_padding(self, lengths: Sequence[int], seen: int) -> None:
        """Know of a prompt whose sequences have these lengths, and `seen` tokens with their padding."""
        padding = tuple(seen - length for length in lengths)
        self.padding = padding if any(padding) else ()

    def choose(self, chosen: Sequence[int]) -> None:
        """Go on with these sequences of the batch, in this order; one may come more than once."""
        if self.protected is not None:
            self.protected = self.protected.of_sequences(chosen)
        if self.padding:
            self.padding = tuple(self.padding[number] for number in chosen)

    def join(self, parts: Sequence[LayerSchedule], sizes: Sequence[int]) -> None:
        """Go on with the sequences of several, so many of each."""
        self.protected = ProtectedTokens.joined([part.protected for part in parts], sizes)
        padding = [part.padding or (0,) * size for part, size in zip(parts, sizes, strict=True)]
        self.padding = sum(padding, ()) if any(map(any, padding)) else ()

    def begin_anew(self) -> None:
        """Look again at what the heads hold, since that has changed otherwise than by new tokens."""
        self._left: int | None = None

    @property
    def left(self) -> int | None:
        """Tokens that still come before the layer is compressed again, as far as has been looked."""
        return self._left

    def compressed(
        self,
        observed: Observation,
        assessment: Assessment,
        counts: HeadCounts,
        tiers: Sequence[SecondTier] = (),
    ) -> tuple[Rows, SecondTier | None]:
        """What the heads keep of their rows, flat, as it is held; and what they may bring back, if they may.

        Args:
            observed: the rows.
            assessment: what the importance says of them.
            counts: rows allotted to each head.
            tiers: what may be brought back so far.
        """
        method = self.plan.method
        rows, choice, allotted = self._chosen(observed, assessment, counts)
        assert choice.observed is not None
        reduced = method.reduction.reduce(rows, choice)
        held = method.representation.hold(reduced, choice.observed, first=method.sinks, newest=method.keep_last)
        if not method.recall.is_on:
            return held, None
        gone = choice.observed.valid_rows() & ~choice.kept
        slots = (allotted - choice.head_counts.counts).flatten().tolist()
        return held, evicted_rows(method.recall, observed.rows, gone, slots, self.window, joined_tiers(tiers))

    def _chosen(
        self, observed: Observation, assessment: Assessment, counts: HeadCounts
    ) -> tuple[Rows, Choice, torch.Tensor]:
        """Rows, which of them stay, and how many each head is allotted, int64 `[B, K]`.

        Where others are brought back, only so many stay as leave room for these.
        """
        method = self.plan.method
        valid = observed.valid if observed.padded else None
        past = self._past(observed)
        protected, shard = self._protected(observed), self.plan.shard
        ranked, counts = method.ranked(assessment.importance, counts, valid, protected, past, shard)
        weights = assessment.importance if assessment.weights is None else assessment.weights
        if observed.is_prompt and self.plan.follows_content:
            counts = HeadCounts.looked_up(self._by_content(ranked, weights, counts.counts))
        allotted = counts.counts
        if method.recall.is_on:
            counts = HeadCounts.looked_up(method.recall.staying(allotted, (ranked == float("inf")).sum(dim=-1)))
        rows = observed.rows.with_columns(assessment.columns) if self.goes_on else observed.rows
        kept = largest(ranked, counts.counts, self.importance.noise, most=counts.most)
        if past is not None:  # nor is it merged, or fitted to
            weights = weights.masked_fill(past, 0.0)
            observed = replace(observed, valid=observed.valid_rows() & ~past, padded=True, shared={})
        return rows, Choice(kept, ranked, weights, counts, observed), allotted

    def _by_content(self, ranked: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """How many of a prompt's rows each head keeps by what they are, int64 `[B, K]`; `counts` are the most."""
        if (above := self.plan.budget.above) is not None:
            return counts.minimum((ranked > above).sum(dim=-1))
        return by_content(self.plan.method.budget, self.plan.shard, ranked, weights, counts)

    def _past(self, observed: Observation) -> torch.Tensor | None:
        """Which held rows the next token cannot see, bool `[B, K, T]`; `None` where it sees all."""
        window = self.window
        if window is None or observed.is_prompt:  # of a prompt what cannot be seen is no row
            return None
        return observed.positions <= observed.num_seen - window

    def _protected(self, observed: Observation) -> torch.Tensor | None:
        """Which rows every head keeps, bool `[B, K, T]`: those that the next token can see."""
        if self.protected is None:
            return None
        rows, past = self.protected.among(observed.positions), self._past(observed)
        return rows if past is None else rows & ~past

    def prompt_counts(self, observed: Observation, seen: int) -> HeadCounts:
        """Tokens allotted to each head of a prompt, of which `seen` may be kept.

        Raises:
            UsageError: the budget does not cover what every head keeps, or what is allotted depends on other layers,
                too, and these have not been looked at.
            CacheError: there are no such tokens as those that are protected.
        """
        visible = observed.valid.sum(dim=-1).tolist() if observed.visible is None else observed.visible
        lengths = visible if observed.lengths is None else observed.lengths
        if any(self.plan.ranks_together(length) for length in lengths):
            raise UsageError(
                f"The method {self.plan.name or 'of a global budget'!r} ranks the rows of all layers together, for "
                "which a document that observers follow is read once more without them: use "
                "`headprof.compress_document`, or choose adakv-kvzip or headkv-kvzip."
            )
        if self.protected is None:
            protected = [0] * len(lengths)
        else:
            self.protected = self.protected.for_batch(len(lengths), seen)
            self.plan.check_later(seen, self.protected)
            protected = self.plan.protected_of_prompt(self.protected, seen)
            protected *= len(lengths) // len(protected)
        pairs = zip(lengths, protected, strict=True)
        allotted = self.plan.shard.own(torch.stack([self.plan.allocation(*pair)[self.layer_idx] for pair in pairs]))
        return HeadCounts.of(allotted.minimum(torch.tensor(visible)[:, None]), observed.valid.device)

    def counts_again(self, observed: Observation, held: Sizes, slots: Sequence[int] = ()) -> HeadCounts:
        """Rows that each head keeps of those it holds; `slots` of them, `B * K` numbers, are not among the observed."""
        batch, heads = observed.keys.shape[:2]
        targets, device = self.targets(observed.num_seen, batch), observed.valid.device
        real = observed.valid_rows().sum(dim=-1).cpu() if held.hides else None  # of padding nobody has counted
        if real is not None and slots:
            real = real + torch.tensor(slots).view(batch, heads)
        if self.plan.method.budget.spreads:
            sums = torch.tensor(held.sums(heads)) if real is None else real.sum(dim=-1)
            total = int(targets.sum(dim=-1).minimum(sums).sum())
            return replace(HeadCounts.of(targets, device), total=total, lengths=None)
        held_now = torch.tensor(held.lengths).view(batch, heads) if real is None else real
        return HeadCounts.of(targets.minimum(held_now), device)

    def targets(self, seen: int, batch: int = 1) -> torch.Tensor:
        """Rows that each head of so many sequences is compressed to after so many tokens, int64 `[B, K]`.

        Padding in the prompt is no token of a sequence.
        """
        protected = self.plan.protected_later(self.protected)
        if len(set(protected)) <= 1 and not self.padding:
            targets = self._targets(seen, max(protected, default=0))
            return targets.repeat(max(1, batch // len(targets)), 1)
        padding, protected = self.padding or (0,) * batch, protected or [0]
        protected *= len(padding) // len(protected)
        each = [self._targets(seen - own, count) for own, count in zip(padding, protected, strict=True)]
        return torch.stack([own[number % len(own)] for number, own in enumerate(each)])

    def _targets(self, seen: int, protected: int) -> torch.Tensor:
        """The same where so many tokens of each sequence are protected; one row, if they are alike."""
        allotted = self.plan.decode_allocation(seen, protected)
        return self.plan.shard.own(allotted[..., self.layer_idx, :].view(-1, self.plan.shape.num_kv_heads))

    def is_due(self, count: int, seen: int, held: Sizes) -> bool:
        """Whether `count` more tokens would put a head beyond its target and the buffer.

        Args:
            count: tokens that are about to come.
            seen: tokens of the sequence before them.
            held: rows that the heads hold.
        """
        if self._left is None or count > self._left:
            self.look(seen, held)
        return self._left is not None and count > self._left

    def look(self, seen: int, held: Sizes) -> None:
        """See how much is left; until the next look it is counted down."""
        self._left = self.until_due(seen, held)

    def left_after(self, seen: int, held: Sizes) -> int:
        """What `left` is, or what a look would see where nobody has looked."""
        return self.until_due(seen, held) if self._left is None else self._left

    def left_to_note(self, seen: int, held: Sizes) -> int | None:
        """What `left` is where a look now would see something else, since targets have moved; `None` where not.

        Rows and tokens seen do not tell it, so whoever takes the rows elsewhere takes it too, and calls `resume`.
        """
        return self._left if self._left is not None and self._left != self.until_due(seen, held) else None

    def resume(self, left: int | None) -> None:
        """Go on counting down from what was noted; from the next look if that is `None`."""
        self._left = left

    def advance(self, count: int) -> None:
        """Note that `count` tokens have come, or have been taken out if it is below 0."""
        if self._left is not None:
            self._left -= count

    def rooms_ahead(self, seen: int, held: Sizes, usual: int) -> tuple[int, list[int]]:
        """What the heads need for all that comes before the next compression, and for what they hold after it.

        Args:
            seen: tokens of the sequence so far.
            held: rows that the heads hold.
            usual: tokens that room is made for where more may come, or no end of them.

        Returns:
            Rows of free space behind each head, and rows that each head needs room for; none where heads share them.
        """
        if self._left is None or self.plan.buffer is None:
            return usual, []
        targets = self.targets(seen, held.num_heads // self.own_heads)
        buffer, left = min(self.plan.buffer, usual), max(0, min(self._left, usual))
        if not self.plan.method.budget.spreads:
            return left, (targets + buffer).flatten().tolist()
        spare = max(self._spare(targets, buffer, held))
        return max(left, -(-spare // self.plan.shape.num_kv_heads)), []

    def until_due(self, seen: int, held: Sizes) -> int:
        """How many more tokens the heads take before one of them has outgrown its target and the buffer.

        Where several processes have them, each must ask at the same time.
        """
        buffer = self.plan.buffer
        assert buffer is not None
        targets = self.targets(seen, held.num_heads // self.own_heads)
        if self.plan.method.budget.spreads:  # then a layer's heads have but a sum to keep to
            return min(self._spare(targets, buffer, held)) // self.plan.shape.num_kv_heads
        allowed = (targets + buffer).flatten().tolist()
        return self.plan.shard.least(min(most - length for most, length in zip(allowed, held.lengths, strict=True)))

    def _spare(self, targets: torch.Tensor, buffer: int, held: Sizes) -> list[int]:
        """Rows that all heads of each sequence together may take on until they have outgrown targets and buffer."""
        heads = targets.shape[1]
        allowed = (targets.sum(dim=-1) + buffer * heads).tolist()
        return self.plan.shard.sums([most - there for most, there in zip(allowed, held.sums(heads), strict=True)])

    @property
    def own_heads(self) -> int:
        """KV heads of the layer that this process has."""
        return self.plan.shard.count(self.plan.shape.num_kv_heads)


def _most(*counts: int | None) -> int | None:
    """The largest of several numbers of queries, of which `None` stands for all."""
    known = [count for count in counts if count is not None]
    return max(known) if len(known) == len(counts) else None
