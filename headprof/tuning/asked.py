"""One answer under other and other numbers of rows: how far it is from what the full cache says.

Shapes: `C` copies, `L` layers, `K` KV heads, `N` numbers of rows, or tokens of the answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headprof.compression.continuing import divergences
from headprof.models.loading import LoadedModel, require_finite
from headprof.tuning.exams import Answering
from headprof.tuning.hidden_rows import HidingModel
from headprof.utils.memory import free_bytes

_MEMORY_SHARE = 0.25
"""Of the free memory, that copies may take."""


@dataclass(frozen=True, eq=False)
class AnswerLosses:
    """What one answer loses, for each head and number of rows.

    Attributes:
        kind: of what was asked, as `Answering.kind`.
        cluster: number of its context.
        divergence: from the full cache, mean over the answer's tokens in nats, float32 `[L, K, N]`.
        drop: of the answer's log-probability, mean over its tokens in nats, float32 `[L, K, N]`.
        base: both where each head keeps what it keeps in any case, float32 `[2]`.
    """

    kind: str
    cluster: int
    divergence: Tensor
    drop: Tensor
    base: Tensor


class Asked:
    """One answer after a prompt.

    Args:
        loaded: the model.
        hider: the same, within `hiding`, with the prompt's rows.
        answer: what comes after the prompt.
        batch: copies that run at once; `None` to choose by the free memory.

    Attributes:
        whole: all rows of the prompt for each head, int64 `[L, K]`.

    Raises:
        ModelError: the model's numbers overflow.
    """

    def __init__(self, loaded: LoadedModel, hider: HidingModel, answer: Answering, batch: int | None = None):
        self._hider, self._answer = hider, answer
        self._tokens = torch.tensor(answer.reference, device=loaded.device)
        self._shard = loaded.shard
        self._batch = batch or self._shard.least(_fitting_batch(loaded, hider.prompt_length, answer))
        self.whole = torch.full((loaded.shape.num_layers, loaded.shape.num_kv_heads), hider.prompt_length)
        logits = self._logits(self.whole[None])[0]
        require_finite(logits.amax(), logits.dtype)
        self._full = logits.float().log_softmax(dim=-1)
        self._own = self._said(self._full)

    def lost(self, counts: Tensor, layer: int = 0) -> Tensor:
        """Divergence from the full cache and drop of log-probability, means over the answer's tokens in nats.

        Args:
            counts: rows that each head sees, int64 `[C, L, K]`; alike in all copies in layers before `layer`.
            layer: from which on copies differ.

        Returns:
            float32 `[C, 2]`.
        """
        counts, found = counts.minimum(self.whole), []
        for part in counts.split(self._batch):
            for each in self._logits(part, layer):  # one by one, to hold no second copy of all logits
                drop = (self._own - self._said(each.float().log_softmax(dim=-1))).mean()
                found.append(torch.stack([divergences(self._full, each).mean().float(), drop]))
        return self._shard.agreed(torch.stack(found).cpu())

    def _logits(self, counts: Tensor, layer: int = 0) -> Tensor:
        return self._hider.logits(self._answer.fed, len(self._answer.reference), counts, layer)

    def _said(self, log_probs: Tensor) -> Tensor:
        """What the answer's tokens have of `[N, vocabulary]`, `[N]`."""
        return log_probs.gather(1, self._tokens[:, None])[:, 0]


def _fitting_batch(loaded: LoadedModel, prompt_length: int, answer: Answering) -> int:
    """How many copies of what comes after a prompt may run at once."""
    shape, config, size = loaded.shape, loaded.model.config.get_text_config(), loaded.dtype.itemsize
    tokens = len(answer.fed)
    attention = tokens * (prompt_length + tokens) * shape.num_heads * (2 * size + 16)
    states = tokens * 16 * config.hidden_size * size
    logits = len(answer.reference) * shape.vocab_size * size + 4 * shape.vocab_size
    return max(1, int(_MEMORY_SHARE * free_bytes(loaded.device) / (attention + states + logits)))
