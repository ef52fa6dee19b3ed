"""Running one sequence up to a decoder layer, and copies of it from there on, each with something else changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from headprof.models.decoder import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def copied_from(model: PreTrainedModel, layer: int, copies: int) -> Iterator[None]:
    """Run one sequence up to a decoder layer, and copies of it from there on.

    Raises:
        ModelError: the model does not list its decoder layers.
    """
    hook = decoder_layers(model)[layer].register_forward_pre_hook(
        lambda module, arguments: (arguments[0].expand(copies, -1, -1), *arguments[1:])
    )
    try:
        yield
    finally:
        hook.remove()
