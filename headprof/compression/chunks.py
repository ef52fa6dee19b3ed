"""Prefill in chunks, layer by layer: what each chunk of a prompt is given.

Serving engines run a chunk of the prompt through all layers, then the next chunk; so every layer must hold the whole
prompt before any can be compressed. Here each decoder layer runs over all chunks before the next layer begins (see
`hook`). It is exact, and what is held beside the compressed layers is one layer's keys and values and the prompt's
hidden states, `2 * B * T * hidden` numbers; everything inside a layer (MLP, attention buffers, masks) has the size of a
chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class PendingMask:
    """A mask that is made chunk by chunk; the model hands it on to its layers as it would the mask itself."""

    make: Callable[..., Any]
    arguments: dict[str, Any]

    def of_rows(self, start: int, stop: int) -> Any:
        """The mask of the new tokens `[start, stop)` over all tokens up to `stop`."""
        given = self.arguments
        kv_length = given["kv_length"] - given["q_length"] + stop
        padding = given.get("attention_mask")
        return self.make(
            **given
            | {
                "q_length": stop - start,
                "q_offset": given.get("q_offset", 0) + start,
                "kv_length": kv_length,
                "attention_mask": None if padding is None else padding[:, :kv_length],
            }
        )


def sliced(value: Any, start: int, stop: int, tokens: int) -> Any:
    """A layer's arguments for some of its tokens: whatever has as many entries in its second dimension is cut."""
    if isinstance(value, PendingMask):
        return value.of_rows(start, stop)
    if isinstance(value, torch.Tensor):
        return value[:, start:stop] if value.ndim > 1 and value.shape[1] == tokens else value
    if isinstance(value, (tuple, list)):
        return type(value)(sliced(each, start, stop, tokens) for each in value)
    if isinstance(value, dict):
        return {name: sliced(each, start, stop, tokens) for name, each in value.items()}
    return value


def joined(outputs: list[Any]) -> Any:
    """A layer's outputs for the whole prompt, from those for its slices."""
    if isinstance(outputs[0], torch.Tensor):
        return torch.cat(outputs, dim=1)
    return tuple(joined(list(parts)) if parts[0] is not None else None for parts in zip(*outputs, strict=True))
