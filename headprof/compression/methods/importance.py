"""Which rows matter to a head: one axis of the table of methods, and those that ask little of the queries.

Shapes: `B` sequences, `K` KV heads, `T` rows, `D` head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from headprof.compression.methods.observation import NOISE, Assessment, Observation
from headprof.compression.rows import COLUMNS
from headprof.errors import UsageError
from headprof.models.token_kinds import TokenKinds


class Importance(Protocol):
    """Scores the rows of each KV head of a layer; higher is kept.

    The same `score` serves a prompt and, while text is generated, the rows that are still held.
    """

    needs_rotary: bool = False
    """Whether it turns queries or keys to other positions (`Observation.layer.rotary`)."""

    asks_for_repetition: bool = False
    """Whether a document that is compressed before there is a question is to be judged by its own repetition."""

    segment: int | None = None
    """In parts of how many tokens a long document is repeated, for who takes account of `Observation.segments`."""

    norms: bool = False
    """Whether it wants `Observation.query_norms`, and the output projection of each layer's attention."""

    needs_surrogate: bool = False
    """Whether it judges rows by what was fitted to the model (`headprof.profile.surrogate`)."""

    needs_ids: bool = False
    """Whether it asks what tokens rows are (`Observation.ids`)."""

    needs_token_kinds: bool = False
    """Whether it asks of which kinds a tokenizer's tokens are (`headprof.models.token_kinds`)."""

    orders_by_policy: bool = False
    """Whether its best rows are those of one policy after the other (`policy_order`)."""

    adds_up: bool = False
    """Whether scores are attention, or as much as that, so that the sum of some rows' is a share of all rows'."""

    noise: float = NOISE
    """Scores that differ by so small a share of themselves are equal, and the earlier row is kept."""

    @property
    def has_scale(self) -> bool:
        """Whether a score means the same whatever the prompt and the head, so that a threshold can be set on it."""
        return False

    @property
    def queries(self) -> int | None:
        """How many of the last queries it needs (all, if there are fewer); `None` for all since it last scored."""
        ...

    @property
    def at_hand(self) -> int | None:
        """Of all queries, how many of the last it must see when it scores; `None` for all.

        What those before them paid may be added to the column `received`, which must be all that it asks of them.
        """
        return None

    def with_surrogate(self, surrogate: Any) -> Importance:
        """The same by this surrogate, for those who need one."""
        return self

    def with_token_kinds(self, kinds: TokenKinds | None) -> Importance:
        """The same by the kinds of a tokenizer's tokens, for those who need them."""
        return self

    def of_layer(self, layer_idx: int) -> Importance:
        """The same for rows of one layer; most judge those of all layers alike."""
        return self

    def score(self, observed: Observation) -> Tensor:
        """Importance of each row, float32 `[B, K, T]`; any finite value for padding."""
        ...

    def assess(self, observed: Observation) -> Assessment:
        """The score, and what goes with it."""
        return Assessment(self.score(observed))


def check_importance(importance: Any) -> None:
    """
    Raises:
        UsageError: that is no importance, or one of which it cannot be told whether it equals another.
    """
    if Importance not in type(importance).__mro__:
        raise UsageError(f"{importance!r} is no importance: give an object of a class that inherits from Importance.")
    try:
        hash(importance)
    except TypeError:
        name = type(importance).__name__
        raise UsageError(f"The importance {name} can be changed: make it a frozen dataclass.") from None


def assessed(importance: Importance, observed: Observation) -> Assessment:
    """What an importance says; somebody else's is looked at, this project's own are tested instead.

    Raises:
        UsageError: a score is missing, of another shape or type, or not finite, or a column is unknown.
    """
    assessment = importance.assess(observed)
    if not type(importance).__module__.startswith("headprof."):
        _check_assessment(importance, assessment, observed)
    return assessment


def _check_assessment(importance: Importance, assessment: Any, observed: Observation) -> None:
    name, shape = type(importance).__name__, observed.keys.shape[:3]
    score = getattr(assessment, "importance", None)
    if not isinstance(score, Tensor) or score.shape != shape or not score.is_floating_point():
        found = f"{list(score.shape)} {score.dtype}" if isinstance(score, Tensor) else type(score).__name__
        raise UsageError(f"The importance {name} scores rows by {found}: return a float tensor {list(shape)}.")
    if not bool(score.isfinite().all()):
        raise UsageError(f"The importance {name} gives scores that are not finite: return numbers for padding too.")
    if unknown := sorted(set(assessment.columns) - set(COLUMNS)):
        raise UsageError(
            f"The importance {name} carries on an unknown column {unknown[0]!r}: use {', '.join(COLUMNS)}."
        )


@dataclass(frozen=True)
class KeepAll(Importance):
    """Every row matters: the full cache, whatever the budget."""

    queries = 0

    def score(self, observed: Observation) -> Tensor:
        return observed.keys.new_zeros(observed.keys.shape[:3], dtype=torch.float32)


@dataclass(frozen=True)
class KeyNorm(Importance):
    """Minus the L2 norm of the key: tokens with small keys draw most attention (Devoto et al. 2024)."""

    queries = 0

    def score(self, observed: Observation) -> Tensor:
        return -observed.keys.float().norm(dim=-1)


@dataclass(frozen=True)
class KeyDiff(Importance):
    """How unlike a key is to the mean direction of its head's keys (KeyDiff, Park et al. 2025, arXiv 2504.15364).

    Minus the cosine similarity to the mean of the normalized keys; padding is left out of the mean.
    """

    queries = 0

    def score(self, observed: Observation) -> Tensor:
        keys, valid = observed.keys.float(), observed.valid_rows()[..., None]
        mean = (normalize(keys, dim=-1) * valid).sum(dim=2, keepdim=True) / valid.sum(dim=2, keepdim=True).clamp(min=1)
        return -cosine_similarity(keys, mean, dim=-1)


@dataclass(frozen=True)
class Recency(Importance):
    """Later tokens matter more (StreamingLLM, Xiao et al. 2024, which keeps the first four as sinks)."""

    queries = 0
    noise = 0.0

    def score(self, observed: Observation) -> Tensor:
        return observed.positions.float()
