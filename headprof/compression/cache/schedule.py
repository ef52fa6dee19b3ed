"""When a layer is compressed, and to what."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headprof.compression.methods.importance import Importance
from headprof.compression.methods.observation import Assessment, Observation
from headprof.compression.methods.reduction import Choice, largest
from headprof.compression.plan import CompressionPlan
from headprof.compression.rows import Rows


class LayerSchedule:
    """When one layer is compressed, and to what, by a plan.

    A prompt is compressed once it has been attended over. While text is generated, the layer is compressed again when a
    head would outgrow its budget by more than the plan's buffer; in a batch that is at the same time for all sequences,
    so a short one that still had room may go on otherwise than it would alone.

    Attributes:
        plan: for the whole model.
        layer_idx: the layer's number.
    """

    def __init__(self, plan: CompressionPlan, layer_idx: int):
        self.plan = plan
        self.layer_idx = layer_idx
        self.begin_anew()

    def begin_anew(self) -> None:
        """Look again at what the heads hold, since that has changed otherwise than by new tokens."""
        self._left: int | None = None

    @property
    def importance(self) -> Importance:
        return self.plan.method.importance

    @property
    def goes_on(self) -> bool:
        """Whether the layer is compressed again while text is generated."""
        return self.plan.compresses_while_generating

    @property
    def left(self) -> int | None:
        """Tokens that still come before the layer is compressed again, as far as has been looked."""
        return self._left

    def compressed(self, observed: Observation, assessment: Assessment, counts: torch.Tensor) -> Rows:
        """What the heads keep of their rows, flat.

        Args:
            observed: the rows.
            assessment: what the importance says of them.
            counts: rows allotted to each head, int64 `[B, K]`.
        """
        method = self.plan.method
        ranked, counts = method.ranked(assessment.importance, counts, observed.valid)
        weights = assessment.importance if assessment.weights is None else assessment.weights
        rows = observed.rows.with_columns(assessment.columns) if self.goes_on else observed.rows
        return method.reduction.reduce(rows, Choice(largest(ranked, counts, self.importance.noise), ranked, weights))

    def prompt_counts(self, lengths: torch.Tensor) -> torch.Tensor:
        """Tokens allotted to each head of prompts of so many tokens, padding not counted, `[B]`: int64 `[B, K]`."""
        rows = [self.plan.allocation(length)[self.layer_idx] for length in lengths.tolist()]
        return torch.stack(rows).to(lengths.device)

    def targets(self, seen: int) -> torch.Tensor:
        """Rows that each head is compressed to after so many tokens, int64 `[K]`."""
        return self.plan.decode_allocation(seen)[self.layer_idx]

    def is_due(self, count: int, seen: int, lengths: Sequence[int]) -> bool:
        """Whether `count` more tokens would put a head beyond its target and the buffer.

        Args:
            count: tokens that are about to come.
            seen: tokens of the sequence before them.
            lengths: rows that each head holds, `B * K` numbers.
        """
        if self._left is None or count > self._left:
            self.look(seen, lengths)
        return self._left is not None and count > self._left

    def look(self, seen: int, lengths: Sequence[int]) -> None:
        """See how much is left; until the next look it is counted down."""
        self._left = self.until_due(seen, lengths)

    def left_after(self, seen: int, lengths: Sequence[int]) -> int:
        """What `left` is, or what a look would see where nobody has looked."""
        return self.until_due(seen, lengths) if self._left is None else self._left

    def left_to_note(self, seen: int, lengths: Sequence[int]) -> int | None:
        """What `left` is where a look now would see something else, since targets have moved; `None` where not.

        Rows and tokens seen do not tell it, so whoever takes the rows elsewhere takes it too, and calls `resume`.
        """
        return self._left if self._left is not None and self._left != self.until_due(seen, lengths) else None

    def resume(self, left: int | None) -> None:
        """Go on counting down from what was noted; from the next look if that is `None`."""
        self._left = left

    def advance(self, count: int) -> None:
        """Note that `count` tokens have come, or have been taken out if it is below 0."""
        if self._left is not None:
            self._left -= count

    def until_due(self, seen: int, lengths: Sequence[int]) -> int:
        """How many more tokens the heads take before one of them has outgrown its target and the buffer."""
        buffer, targets = self.plan.buffer, self.targets(seen)
        assert buffer is not None
        heads = len(targets)
        if self.plan.method.budget.spreads:  # then a layer's heads have but a sum to keep to
            held = max(sum(lengths[start : start + heads]) for start in range(0, len(lengths), heads))
            return (int(targets.sum()) + buffer * heads - held) // heads
        allowed = (targets + buffer).tolist() * (len(lengths) // heads)
        return min(most - length for most, length in zip(allowed, lengths, strict=True))
