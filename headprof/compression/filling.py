"""Reading a document once for several caches, and what observes it; once more for those that must know all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headprof.compression.cache.fan_out import FanOutCache
from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.observers import Observers
from headprof.compression.session import prefill


@dataclass(frozen=True)
class Reading:
    """One pass over a document.

    Attributes:
        tokens: that were read, observers included.
        caches: how many it served.
        logits: of its last token, `[1, vocabulary]`.
    """

    tokens: int
    caches: int
    logits: torch.Tensor


def read_document_into(
    model: Any, caches: Sequence[HeadCache], document_ids: Sequence[int], observers: Observers
) -> list[Reading]:
    """Fill caches with a document in one prefill, inside `attending_ragged`.

    Those of methods that rank the rows of all layers together are filled from a second one, of the document alone.

    Args:
        model: the model.
        caches: empty, each of a plan for so many observers (`CompressionPlan.for_observers`), which they leave behind.
        document_ids: the document's tokens.
        observers: what observes them and is not kept.

    Raises:
        UsageError: a budget cannot be met.
    """
    tokens = len(document_ids)
    ids = torch.tensor([[*document_ids, *observers.ids]], device=model.device)
    # What nothing observes is not read apart: the model itself sees to both readings then.
    judged = [cache for cache in caches if len(observers) and cache.is_ranked_first(tokens)]
    ranking = FanOutCache(judged).before_reading(tokens) if judged else None
    first = caches[0] if len(caches) == 1 and not judged else FanOutCache(_without(caches, judged), ranking)
    first.expect_observers(len(observers), observers.segments)
    readings = [Reading(ids.shape[1], len(caches), prefill(model, ids, first))]
    if ranking is not None:
        alone = FanOutCache(judged)
        alone.judged_by(ranking)
        readings.append(Reading(tokens, len(judged), prefill(model, ids[:, :tokens], alone)))
    for cache in caches:
        cache.continue_with(cache.plan.after_observers())
    return readings


def count_readings(caches: Sequence[HeadCache], tokens: int) -> int:
    """How often a document of so many tokens is read for these caches."""
    return 2 if any(cache.is_ranked_first(tokens) for cache in caches) else 1


def _without(caches: Sequence[HeadCache], others: Sequence[HeadCache]) -> list[HeadCache]:
    return [cache for cache in caches if not any(cache is other for other in others)]
