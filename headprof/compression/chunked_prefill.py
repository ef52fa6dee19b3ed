"""Prefill in chunks, layer by layer: exact, and at no time does more than one layer hold the whole prompt.

Serving engines run a chunk of the prompt through all layers, then the next chunk; so every layer must hold the whole
prompt before any can be compressed. Here each decoder layer runs over all chunks before the next layer begins. What
is held beside the compressed layers is one layer's keys and values and the prompt's hidden states, `2 * B * T * hidden`
numbers; everything inside a layer (MLP, attention buffers, masks) has the size of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from headprof.compression.cache.head_cache import PromptCache
from headprof.errors import ModelError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


@contextmanager
def chunked_prefill(model: PreTrainedModel, chunk: int) -> Iterator[Callable[[Callable], Callable]]:
    """Run `model`'s decoder layers over at most `chunk` tokens at a time while the context lasts.

    Yields:
        What to wrap the model's mask function in.

    Raises:
        UsageError: the chunk is not positive.
        ModelError: the model does not keep its decoder layers where Transformers' models do.
    """
    if chunk < 1:
        raise UsageError(f"A prefill chunk of {chunk} tokens cannot be run: give --prefill-chunk at least 1.")
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise ModelError(
            f"{type(model).__name__} does not list its decoder layers, so its prompt cannot be run in chunks: leave "
            "--prefill-chunk away."
        )

    def wrap_mask(make: Callable) -> Callable:
        def pending(**arguments):
            return PendingMask(make, arguments) if arguments["q_length"] > chunk else make(**arguments)

        return pending

    try:
        for layer in layers:
            layer.forward = _in_chunks(layer.forward, chunk)
        yield wrap_mask
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _in_chunks(forward: Callable, chunk: int) -> Callable:
    """A decoder layer's `forward`, run over slices of its tokens that share one cache."""

    def run(hidden_states: torch.Tensor, *args, **kwargs):
        tokens = hidden_states.shape[1]
        if tokens <= chunk:
            return forward(hidden_states, *args, **kwargs)
        cache = kwargs.get("past_key_values")
        if isinstance(cache, PromptCache):
            cache.expect(tokens)
        outputs = []
        step = tokens if cache is None else chunk  # without a cache no chunk could see those before it
        for start in range(0, tokens, step):
            stop = min(start + step, tokens)
            part = _sliced(((hidden_states, *args), kwargs), start, stop, tokens)
            outputs.append(forward(*part[0], **part[1]))
        return _joined(outputs)

    return run


def _sliced(value: Any, start: int, stop: int, tokens: int) -> Any:
    """A layer's arguments for some of its tokens: whatever has as many entries in its second dimension is cut."""
    if isinstance(value, PendingMask):
        return value.of_rows(start, stop)
    if isinstance(value, torch.Tensor):
        return value[:, start:stop] if value.ndim > 1 and value.shape[1] == tokens else value
    if isinstance(value, (tuple, list)):
        return type(value)(_sliced(each, start, stop, tokens) for each in value)
    if isinstance(value, dict):
        return {name: _sliced(each, start, stop, tokens) for name, each in value.items()}
    return value


def _joined(outputs: list[Any]) -> Any:
    if isinstance(outputs[0], torch.Tensor):
        return torch.cat(outputs, dim=1)
    return tuple(_joined(list(parts)) if parts[0] is not None else None for parts in zip(*outputs, strict=True))
