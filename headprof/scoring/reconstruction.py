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

from headprof.models.loading import LoadedModel
from headprof.models.prompt_encoder import PromptEncoder
from headprof.profile.head_profile import HeadProfile
from headprof.scoring.attention_rows import RowReader
from headprof.scoring.repeated_texts import CalibrationSettings, CalibrationTexts
from headprof.scoring.shared_context import SharedContext
from headprof.utils.run_record import today

SHARES = (0.02, 0.04, 0.08, 0.15, 0.25, 0.4, 0.55, 0.75)
"""What all heads keep together, of the tokens that are not kept by every head in any case."""
FIRST, LAST = 1, 2
"""Tokens at the ends of a text that every head keeps in any case, and that are left out of the ranking."""
_BLOCK = 256
"""Observing tokens that are read at once."""


class Repeater:
    """Lets a model repeat texts; use it as a context, in which the model's attention is wrapped.

    Args:
        loaded: the model.

    Raises:
        ModelError: some of the model's layers are no attention.
    """

    def __init__(self, loaded: LoadedModel):
        self._shape = loaded.shape
        self._reader = RowReader(loaded.model)
        self._context = SharedContext(loaded.model, self._reader.base)
        self._installed = self._reader.installed()

    def __enter__(self) -> Repeater:
        self._installed.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._installed.__exit__(*exception)

    @torch.inference_mode()
    def scores(self, text: Sequence[int], observers: Sequence[int]) -> Tensor:
        """The largest attention that any of the observers pays to each token of a text, float32 `[L, K, T]`.

        Raises:
            ModelError: the model's numbers overflow, or its attention cannot be read head by head.
        """
        shape, tokens = self._shape, len(text)
        found = torch.zeros(shape.num_layers, shape.num_kv_heads, tokens)

        def take(layer: int, _: int, attention: Tensor) -> None:
            paid = attention[:, :, :tokens].unflatten(0, (shape.num_kv_heads, shape.group_size))
            found[layer] = found[layer].maximum(paid.amax(dim=(1, 2)).cpu())

        self._context.read(text)
        for start in range(0, len(observers), _BLOCK):
            part = observers[start : start + _BLOCK]
            with self._reader.reading([torch.arange(len(part))], take):
                self._context.extend(part)
        return found


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
    texts, encoder = CalibrationTexts(loaded, settings), PromptEncoder(loaded.tokenizer)
    total = torch.zeros(len(SHARES), loaded.shape.num_layers, loaded.shape.num_kv_heads, dtype=torch.float64)
    on_text(0, len(texts))
    with Repeater(loaded) as repeater:
        for number in range(len(texts)):
            text = texts[number]
            total += kept_shares(repeater.scores(text, encoder.repetition_ids(text)))
            on_text(number + 1, len(texts))
    made = {"texts": len(texts), "kinds": texts.kinds(), "lengths": texts.lengths, "seed": settings.seed}
    return (total / len(texts)).float(), made | {"date": today()}


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
