"""What is known of the forward pass that is under way, and which of its tokens are no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headprof.compression.link_check import LinkCheck
from headprof.compression.methods.observation import Tokens
from headprof.compression.step_cache import StepCache
from headprof.models.output_projection import attention_modules

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


@dataclass
class ForwardPass:
    """What is known of the forward pass that is under way.

    Attributes:
        check: what looks at the first passes.
        step: what stands for the cache in a decode step that the device runs by itself; `None` in any other pass.
        length: tokens of the prompt, padding included.
        real: of each sequence, those that are no padding; `None` where it is not known.
        segments: tokens of each segment that the prompt ends with, if it does (see `segments`).
        norms: of the hidden states that the attention module under way was given, float32 `[B, Q]`; `None` where
            nobody asks.
    """

    check: LinkCheck
    step: StepCache | None = None
    length: int = 0
    real: Sequence[int] | None = None
    segments: tuple[int, ...] = ()
    norms: Tensor | None = None
    _read: tuple[Any, Sequence[int]] = (None, ())
    _watching: list[RemovableHandle] = field(default_factory=list)

    @property
    def is_looking(self) -> bool:
        return self.check.looks_at_steps

    @property
    def own_hooks(self) -> int:
        return self.check.hooks_left

    def begins(self, ids: Any, mask: Any, segments: tuple[int, ...] = ()) -> None:
        """Note how long the sequences of a prompt are; this is the one thing that is asked of the device.

        Args:
            ids: the prompt's tokens, `[B, T]`, or their embeddings, `[B, T, hidden size]`.
            mask: that the model is given, if any.
            segments: tokens of each segment that the prompt ends with.
        """
        self.length, self.segments = ids.shape[1], segments
        if mask is None:
            self.real = [self.length] * len(ids)
        elif isinstance(mask, Tensor) and mask.shape == ids.shape[:2]:
            self.real = mask.ne(0).sum(dim=-1).tolist()
        else:
            self.real = None

    def watch(self, model: PreTrainedModel) -> None:
        """Note the norms of what each attention module is given, until the pass ends."""

        def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            self.norms = hidden.float().norm(dim=-1)

        modules = attention_modules(model).values()
        self._watching = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]

    def ends(self, *_: Any) -> None:
        self.real, self._read, self.segments, self.norms = None, (None, ()), (), None
        for hook in self._watching:
            hook.remove()
        self._watching = []

    def tokens(self, mask: Tensor | None, query: Tensor, key: Tensor, sliding_window: int | None) -> Tokens:
        """Which of a prompt's tokens so far are no padding, from the mask that the attention function got."""
        valid, count = _valid_tokens(mask, key), key.shape[2]
        if self.real is None:  # a mask of the user's own
            return Tokens(valid, own=own_tokens(mask, query))
        windowed = mask is not None and mask.ndim == 4 and sliding_window is not None and sliding_window < count
        if not windowed or count < self.length:  # of a part of the prompt nobody asks
            return Tokens(valid, self.real, self.real)
        if min(self.real) == self.length:
            return Tokens(valid, self.real, [sliding_window or count] * len(valid))
        if self._read[0] is not mask:
            self._read = (mask, valid.sum(dim=-1).tolist())
        return Tokens(valid, self.real, self._read[1])


def _valid_tokens(mask: Tensor | None, key: Tensor) -> Tensor:
    """Which prompt tokens are no padding, bool `[B, T]`, from the mask that the attention function got.

    A sliding layer's mask hides what its last query cannot see; later queries cannot see that either.
    """
    batch, _, num_tokens, _ = key.shape
    if mask is None:
        return torch.ones(batch, num_tokens, dtype=torch.bool, device=key.device)
    if mask.ndim == 2:
        return mask[:, :num_tokens].bool()
    last_row = mask[:, 0, -1, :num_tokens]
    return _visible(last_row).expand(batch, num_tokens)


def own_tokens(mask: Tensor | None, query: Tensor) -> Tensor:
    """Which tokens of a prompt's newest chunk are no padding, bool `[B, Q]`."""
    batch, _, num_new, _ = query.shape
    if mask is None:
        return torch.ones(batch, num_new, dtype=torch.bool, device=query.device)
    return seeing_themselves(mask, num_new).expand(batch, num_new)


def seeing_themselves(mask: Tensor, num_new: int) -> Tensor:
    """Which of the newest tokens are no padding, bool `[B or 1, Q]`: padding does not even see itself."""
    newest = mask[..., -num_new:]
    return newest.bool() if mask.ndim == 2 else _visible(newest[:, 0].diagonal(dim1=1, dim2=2))


def _visible(mask: Tensor) -> Tensor:
    """Boolean from a boolean mask, or from one that is added to the logits."""
    return mask if mask.dtype == torch.bool else mask == 0
