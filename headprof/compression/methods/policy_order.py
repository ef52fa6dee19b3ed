"""Importance by which of FastGen's policies keeps a row: special tokens, punctuation, heavy hitters, the newest.

Shapes: `B` sequences, `K` KV heads, `T` rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from headprof.compression.methods.observation import Assessment, Observation
from headprof.compression.methods.received_attention import Accumulated
from headprof.compression.methods.reduction import largest
from headprof.errors import UsageError
from headprof.models.token_kinds import PUNCTUATION, SPECIAL, TokenKinds

POLICIES = ("special", "punctuation", "heavy hitters", "local", "full")
"""By what each policy keeps beside what those before it keep, from the smallest to the full cache."""

_BITS = 24
"""Rows of one policy are worth this many powers of two more than those of the next larger one."""


@dataclass(frozen=True)
class PolicyOrder(Accumulated):
    """Rows in the order of the policies that keep them (FastGen, Ge et al. 2024, arXiv 2310.01801).

    First come special tokens, then punctuation, then heavy hitters, the rows that have received most attention so far,
    then the last ones, then all others; among those of one kind what has received most attention comes first. Each of
    the paper's policies, which add one kind after the other, is thus a number of best rows, which `RecoveryBudget`
    chooses. While text is generated, the held rows stand in the same order, heavy hitters and the last ones being
    shares of what a head holds; the tokens of the text are special or punctuation like those of the prompt.

    Attributes:
        heavy: share of a sequence's rows that are heavy hitters, the special ones and punctuation not among them; 0 to
            1, rounded down.
        local: share of its rows that are its last ones, of whatever kind; 0 to 1, rounded down.
        kinds: of the tokenizer's tokens; `None` until a plan is made for one.
    """

    heavy: float = 0.3
    local: float = 0.3
    kinds: TokenKinds | None = field(default=None, repr=False)

    needs_ids = needs_token_kinds = True
    orders_by_policy = True

    def __post_init__(self) -> None:
        for name in ("heavy", "local"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"A {name} of {getattr(self, name)} is no share of the rows: give 0 to 1.")

    def with_token_kinds(self, kinds: TokenKinds | None) -> PolicyOrder:
        return replace(self, kinds=kinds)

    def assess(self, observed: Observation) -> Assessment:
        said = super().assess(observed)
        present = observed.valid_rows()
        attention = said.importance * present
        share = attention / attention.sum(dim=-1, keepdim=True).clamp(min=1e-30)
        worth = share.clamp(2.0 ** (1 - _BITS), 1.0) * torch.exp2(_BITS * self._tiers(observed, attention, present))
        return Assessment(worth, attention, said.columns)

    def _tiers(self, observed: Observation, attention: Tensor, present: Tensor) -> Tensor:
        """How many of the policies keep each row beside the full cache, float32 `[B, K, T]`: 4 for special tokens."""
        kinds, held = self._kinds(observed), present.sum(dim=-1)
        plain = present & (kinds < PUNCTUATION)
        quota = _shares(self.heavy, held).minimum(plain.sum(dim=-1))
        most = int(self.heavy * present.shape[-1])
        heavy = plain & largest(attention.masked_fill(~plain, float("-inf")), quota, self.noise, most=most)
        from_end = present.flip(-1).cumsum(dim=-1).flip(-1)
        tiers = (from_end <= _shares(self.local, held)[..., None]).float()
        for number, marked in ((2, heavy), (3, kinds == PUNCTUATION), (4, kinds == SPECIAL)):
            tiers = tiers.masked_fill(marked, float(number))
        return tiers

    def _kinds(self, observed: Observation) -> Tensor:
        if self.kinds is None:
            raise UsageError(
                "This method judges rows by the kinds of their tokens, which it has not: make its plan with a "
                "tokenizer."
            )
        ids = observed.ids_of_rows()
        if ids is None:
            raise UsageError(
                "This method judges rows by what tokens they are, which is not known here: give the model input_ids, "
                "or choose h2o."
            )
        return self.kinds.of_ids(ids)


def _shares(share: float, counts: Tensor) -> Tensor:
    """So large a share of each of these numbers, int64, rounded down."""
    return (counts.double() * share).long()


def kept_by(policy: int, ranked: Tensor) -> Tensor:
    """Which rows a policy keeps, and those that every head keeps, bool `[B, K, T]`.

    Args:
        policy: its number in `POLICIES`.
        ranked: what a `PolicyOrder` says of the rows, as `reduction.ranking` has it.
    """
    tier = len(POLICIES) - 1 - policy
    return ranked >= 2.0 ** (_BITS * tier + 1 - _BITS)
