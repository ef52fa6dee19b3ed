"""Learning budgets: what each KV head keeps where the rows of all heads are ranked by how a text is repeated.

A text is read, and then once more after "Repeat the previous context exactly." A token is worth to a KV head the
largest attention that any query of its group pays to it meanwhile (KVzip, Kim et al. 2025, arXiv 2505.23416). The
tokens of all heads of all layers are ranked together; how many of the best each head has, as a share of its tokens, is
averaged over texts.

Shapes: `L` layers, `H` query heads, `K` KV heads, `T` tokens of a text, `S` shares.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from headprof.errors import ModelError
from headprof.models.loading import LoadedModel
from headprof.profile.head_profile import HeadProfile
from headprof.scoring.calibration import CalibrationSettings, repeated_documents
from headprof.scoring.repetition import RepeatedLayer, repeat_document
from headprof.utils.run_record import today

SHARES = (0.02, 0.04, 0.08, 0.15, 0.25, 0.4, 0.55, 0.75)
"""What all heads keep together, of the tokens that are not kept by every head in any case."""
FIRST, LAST = 1, 2
"""Tokens at the ends of a text that every head keeps in any case, and that are left out of the ranking."""
TEXTS, LENGTHS = 12, (512, 1024, 2048)
"""How many texts are repeated, and of how many tokens, where nothing else is asked for."""


def reconstruction_scores(loaded: LoadedModel, document: Sequence[int], repetition: Sequence[int]) -> Tensor:
    """The largest attention that any query of a group pays to each token of a document, float32 `[L, K, T]`.

    Raises:
        ModelError: the model's layers do not attend once each, or its numbers overflow.
    """
    scores = torch.zeros(loaded.shape.num_layers, loaded.shape.num_kv_heads, len(document))

    def take(layer: RepeatedLayer) -> None:
        scores[layer.index] = layer.importance.cpu()

    repeat_document(loaded.model, loaded.shape, document, repetition, take)
    if not bool(scores.isfinite().all()):
        raise ModelError(f"The numbers of {loaded.name} overflow in {loaded.dtype}: load it with --dtype float32.")
    return scores


def kept_shares(scores: Tensor, shares: Sequence[float] = SHARES) -> Tensor:
    """What share of a text's tokens each head keeps where all keep such shares together, float64 `[S, L, K]`.

    The first and the last few tokens are left out. Each mean over the heads is the share, rounded to whole tokens.

    Args:
        scores: float `[L, K, T]`, higher is kept; of equal ones the earlier layer, then head, then token is.
        shares: ascending, 0 to 1.
    """
    free = scores[:, :, FIRST : scores.shape[-1] - LAST]
    tokens, heads = free.shape[-1], free.shape[0] * free.shape[1]
    best_first = free.flatten().argsort(descending=True, stable=True) // tokens
    counts = [best_first[: round(share * heads * tokens)].bincount(minlength=heads) for share in shares]
    return torch.stack(counts).view(len(shares), *free.shape[:2]).double() / tokens


def check_texts(loaded: LoadedModel, settings: CalibrationSettings) -> None:
    """Find mistakes before the work that comes before learning.

    Raises:
        UsageError: the model cannot repeat texts of these lengths, or the user's folder holds too few.
    """
    repeated_documents(loaded, settings, LENGTHS)


def learn_shares(
    loaded: LoadedModel, settings: CalibrationSettings, on_text: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Tensor, dict[str, object]]:
    """The mean of `kept_shares` over texts, and how it was made.

    Args:
        loaded: the model.
        settings: which texts.
        on_text: called with the number of texts that have been repeated, and of all.

    Returns:
        float32 `[S, L, K]`, and settings for a profile's metadata.

    Raises:
        UsageError: the model cannot repeat texts of these lengths.
        ModelError: its numbers overflow, or its attention cannot be read head by head.
    """
    documents = repeated_documents(loaded, settings, LENGTHS)
    count = len(documents.pairs)
    total = torch.zeros(len(SHARES), loaded.shape.num_layers, loaded.shape.num_kv_heads, dtype=torch.float64)
    for number, pair in enumerate(documents.pairs):
        on_text(number, count)
        total += kept_shares(reconstruction_scores(loaded, *pair))
    on_text(count, count)
    made = {"texts": count, "lengths": documents.lengths, "seed": settings.seed}
    made |= {"folder": settings.folder and str(settings.folder), "date": today()}
    return (total / count).float(), made


def with_reconstruction(
    profile: HeadProfile,
    loaded: LoadedModel,
    settings: CalibrationSettings,
    *,
    command: str = "",
    on_text: Callable[[int, int], None] = lambda done, total: None,
) -> HeadProfile:
    """A profile with budgets learned from reconstruction, in the place of those that it had, if any.

    Raises:
        UsageError, ModelError: as `learn_shares`.
    """
    kept, made = learn_shares(loaded, settings, on_text)
    noted = json.dumps(made | {"command": command})
    return replace(profile, kept_shares=kept, metadata={**profile.metadata, "reconstruction": noted})
