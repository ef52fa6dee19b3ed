"""Learning from repetition: what each KV head keeps where the rows of all heads are ranked by how a text is repeated.

A text is read, and then once more after "Repeat the previous context exactly." A token is worth to a KV head the
largest attention that any query of its group pays to it meanwhile (KVzip, Kim et al. 2025, arXiv 2505.23416). The
tokens of all heads of all layers are ranked together; how many of the best each head has, as a share of its tokens, is
averaged over texts. What a query head's largest attention to a token is on average is its reconstruction score.

Shapes: `L` layers, `H` query heads, `K` KV heads, `T` tokens of a text, `S` shares.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headprof.errors import ModelError
from headprof.models.loading import LoadedModel
from headprof.profile.head_profile import HeadProfile
from headprof.profile.learning import NOTE
from headprof.scoring.averages import Mean
from headprof.scoring.calibration import CalibrationSettings, repeated_documents
from headprof.scoring.repetition import RepeatedLayer, repeat_document
from headprof.utils.run_record import library_versions, today

SHARES = (0.02, 0.04, 0.08, 0.15, 0.25, 0.4, 0.55, 0.75)
"""What all heads keep together, of the tokens that are not kept by every head in any case."""
FIRST, LAST = 1, 2
"""Tokens at the ends of a text that every head keeps in any case, and that are left out of the ranking."""
RECONSTRUCTION = "reconstruction"
"""The kind of score."""
TEXTS, LENGTHS = 12, (512, 1024, 2048)
"""How many texts are repeated, and of how many tokens, where nothing else is asked for."""


def largest_attention(loaded: LoadedModel, document: Sequence[int], repetition: Sequence[int]) -> Tensor:
    """The largest attention that a query head pays to each token of a document, float32 `[L, H, T]`.

    Raises:
        ModelError: the model's layers do not attend once each, or its numbers overflow.
    """
    of_layers: dict[int, Tensor] = {}

    def take(layer: RepeatedLayer) -> None:
        of_layers[layer.index] = layer.largest

    repeat_document(loaded.model, loaded.shape, document, repetition, take)
    device = of_layers[0].device
    largest = torch.stack([of_layers[index].to(device) for index in range(loaded.shape.num_layers)]).cpu()
    largest = loaded.shard.together(largest, dim=1)
    if not bool(largest.isfinite().all()):
        raise ModelError(f"The numbers of {loaded.name} overflow in {loaded.dtype}: load it with --dtype float32.")
    return largest


def of_groups(largest: Tensor, num_kv_heads: int) -> Tensor:
    """The largest attention that any query head of a group pays, `[L, K, T]`, from that of each, `[L, H, T]`."""
    return largest.unflatten(1, (num_kv_heads, -1)).amax(dim=2)


def head_scores(largest: Tensor) -> Tensor:
    """The reconstruction score of each query head on one text: its largest attention to a token, averaged over tokens.

    The first and the last few tokens are left out, as in the ranking of budgets.

    Args:
        largest: float `[L, H, T]`, as `largest_attention`.

    Returns:
        `[L, H]`, 0 to 1.
    """
    return largest[:, :, FIRST : largest.shape[-1] - LAST].mean(dim=-1)


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


@dataclass(frozen=True, eq=False)
class Learned:
    """What the repetition of some texts tells of a model's heads.

    Attributes:
        kept: the mean of `kept_shares`, float32 `[S, L, K]`.
        scores: reconstruction scores, the mean of `head_scores`, and how sure they are by the texts.
        made: how, for a profile's metadata.
    """

    kept: Tensor
    scores: Mean
    made: dict[str, object]


def learn(
    loaded: LoadedModel, settings: CalibrationSettings, on_text: Callable[[int, int], None] = lambda done, total: None
) -> Learned:
    """Repeat texts, and average over them what each head keeps and what it looks at.

    Args:
        loaded: the model.
        settings: which texts.
        on_text: called with the number of texts that have been repeated, and of all.

    Raises:
        UsageError: the model cannot repeat texts of these lengths.
        ModelError: its numbers overflow, or its attention cannot be read head by head.
    """
    documents, shape = repeated_documents(loaded, settings, LENGTHS), loaded.shape
    count, scores = len(documents.pairs), []
    total = torch.zeros(len(SHARES), shape.num_layers, shape.num_kv_heads, dtype=torch.float64)
    for number, pair in enumerate(documents.pairs):
        on_text(number, count)
        largest = largest_attention(loaded, *pair)
        total += kept_shares(of_groups(largest, shape.num_kv_heads))
        scores.append(head_scores(largest).flatten())
    on_text(count, count)
    made = {"texts": count, "lengths": documents.lengths, "seed": settings.seed}
    made |= {"folder": settings.folder and str(settings.folder), "date": today()}
    mean = Mean.of(torch.stack(scores), range(count), (shape.num_layers, shape.num_heads))
    return Learned((total / count).float(), mean, made)


def with_reconstruction(
    profile: HeadProfile,
    loaded: LoadedModel,
    settings: CalibrationSettings,
    *,
    command: str = "",
    on_text: Callable[[int, int], None] = lambda done, total: None,
) -> HeadProfile:
    """A profile with reconstruction scores and budgets learned from them, in the place of those that it had, if any.

    Raises:
        UsageError, ModelError: as `learn`.
    """
    learned = learn(loaded, settings, on_text)
    note = json.dumps(learned.made | {"command": command})
    return _with_learned(profile, learned.kept, learned.scores, note)


def with_learned_of(profile: HeadProfile, earlier: HeadProfile) -> HeadProfile:
    """A profile with what an earlier one of the same model has learned from repetition, if it has learned any.

    That includes how its budgets were mixed, by whatever reasoning scores.
    """
    table = earlier.scores.get(RECONSTRUCTION)
    scores = None
    if table is not None:
        known = earlier.standard_errors.get(RECONSTRUCTION), earlier.intervals.get(RECONSTRUCTION)
        scores = Mean(table, *known)
    return _with_learned(profile, earlier.kept_shares, scores, earlier.metadata.get(NOTE))


def _with_learned(profile: HeadProfile, kept: Tensor | None, scores: Mean | None, note: str | None) -> HeadProfile:
    """A profile with these budgets, scores and notes on them, each `None` for none, in place of those that it had."""
    parts = (None, None, None) if scores is None else (scores.scores, scores.error, scores.interval)
    old = (profile.scores, profile.standard_errors, profile.intervals)
    tables: list[dict[str, Any]] = [
        {kind: table for kind, table in each.items() if kind != RECONSTRUCTION}
        | ({} if part is None else {RECONSTRUCTION: part})
        for each, part in zip(old, parts, strict=True)
    ]
    metadata = {name: text for name, text in profile.metadata.items() if name != NOTE}
    return replace(
        profile,
        kept_shares=kept,
        scores=tables[0],
        standard_errors=tables[1],
        intervals=tables[2],
        metadata=metadata if note is None else metadata | {NOTE: note},
    )


def reconstruction_profile(
    loaded: LoadedModel,
    settings: CalibrationSettings,
    *,
    command: str = "",
    on_text: Callable[[int, int], None] = lambda done, total: None,
) -> HeadProfile:
    """A profile from repeated texts alone, for which a model need not answer any probe.

    Raises:
        UsageError, ModelError: as `learn`.
    """
    metadata = {
        "seed": str(settings.seed),
        "versions": json.dumps(library_versions()),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "date": today(),
        "command": command,
    }
    grid = torch.zeros(loaded.shape.num_layers, loaded.shape.num_heads)
    empty = HeadProfile(loaded.name, loaded.shape, {RECONSTRUCTION: grid}, metadata=metadata, given=loaded.given)
    return with_reconstruction(empty, loaded, settings, command=command, on_text=on_text)
