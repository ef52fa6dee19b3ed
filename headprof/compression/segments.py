"""Observers that do not see one another: the last tokens of a prompt, in segments that each follow the document.

A document is repeated in parts, each as if it were the only one: a segment's tokens attend to the document and to their
own segment up to themselves, and their positions begin right after the document. So they are read in one prefill, layer
by layer, and a document needs room in the model's context for itself and its longest segment alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headprof.compression.chunks import PendingMask, sliced
from headprof.errors import CacheError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headprof.models.attention_hook import AttentionFunction


@dataclass(frozen=True)
class SegmentMask:
    """What stands for a mask in a pass over segments: of each part the attention function makes its own.

    Attributes:
        whole: made for any rows of a prompt that is the document and one segment.
    """

    whole: PendingMask


@dataclass(frozen=True)
class Part:
    """Some queries of a slice of a prompt, all of the document or all of one segment.

    Attributes:
        queries: which of the slice's.
        own: their segment's keys up to the last of them; empty for the document.
        start, stop: positions of these queries, and so the rows of the mask.
    """

    queries: slice
    own: slice
    start: int
    stop: int

    def seen(self, states: Tensor, document: int) -> Tensor:
        """Of keys or values `[B, K, tokens, D]` those that some of the queries see: `[B, K, stop, D]`."""
        if self.own.start == self.own.stop:
            return states[:, :, : self.stop]
        return torch.cat([states[:, :, :document], states[:, :, self.own]], dim=2)


def parts_of(start: int, stop: int, document: int, segments: Sequence[int]) -> Iterator[Part]:
    """The parts of a slice of a prompt, in order.

    Args:
        start, stop: the slice's tokens, `[start, stop)` of the prompt.
        document: tokens before the segments.
        segments: tokens of each.
    """
    begin = 0
    for number, length in enumerate((document, *segments)):
        first, last = max(start, begin), min(stop, begin + length)
        if first < last:
            ahead = begin if number == 0 else begin - document  # of a token's place in the prompt to its position
            own = slice(begin, last) if number else slice(0, 0)
            yield Part(slice(first - start, last - start), own, first - ahead, last - ahead)
        begin += length


def segment_positions(tokens: int, segments: Sequence[int], device: torch.device) -> Tensor:
    """Positions of a prompt that ends with segments, int64 `[1, tokens]`."""
    document = tokens - sum(segments)
    parts = [torch.arange(document), *(torch.arange(document, document + length) for length in segments)]
    return torch.cat(parts)[None].to(device)


def require_positions(model: PreTrainedModel) -> None:
    """
    Raises:
        ModelError: the model cannot be told positions, or numbers them otherwise than from 0.
    """
    taken = "position_ids" in inspect.signature(model.forward).parameters
    embeddings = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    if not taken or any(getattr(each, "padding_idx", None) is not None for each in embeddings):  # RoBERTa begins later
        raise ModelError(
            f"{type(model).__name__} takes no position_ids from 0 on, so it cannot repeat a document in segments: "
            "set segment to the document's length, so that it is repeated at once (--set segment=...)."
        )


def require_no_padding(mask: Any) -> None:
    """
    Raises:
        CacheError: a prompt with segments has padding, or a mask of the user's own.
    """
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2 and bool(mask.all())):
        raise CacheError("Observers in segments follow a document without padding: read each document by itself.")


def attend_in_parts(
    base: AttentionFunction,
    module: torch.nn.Module,
    states: tuple[Tensor, Tensor, Tensor],
    mask: Any,
    segments: tuple[int, Sequence[int]],
    options: dict[str, Any],
) -> Tensor:
    """What an attention function gives for a slice of a prompt with segments, `[B, Q, H, D]`.

    Args:
        base: the function.
        module: the attention module.
        states: queries of the slice, `[B, H, Q, D]`; keys and values up to its end, `[B, K, tokens, D]`.
        mask: that the module was given.
        segments: tokens of the document, and of each segment.
        options: what else the function takes.

    Raises:
        ModelError: the module was given something else in place of the `SegmentMask`.
    """
    if not isinstance(mask, SegmentMask):
        raise ModelError(
            f"{type(module).__name__} masks its attention otherwise than by Transformers' interface, so that it cannot "
            "repeat a document in segments: set segment to the document's length (--set segment=...)."
        )
    query, key, value = states
    tokens, total, document = query.shape[2], key.shape[2], segments[0]
    outputs = []
    for part in parts_of(total - tokens, total, *segments):
        now = sliced(options, part.queries.start, part.queries.stop, tokens)
        rows = mask.whole.of_rows(part.start, part.stop)
        seen = part.seen(key, document), part.seen(value, document)
        outputs.append(base(module, query[:, :, part.queries], *seen, rows, **now)[0])
    return torch.cat(outputs, dim=1)
