"""What can be wrong with the parts of a head profile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from headprof.models.shape import HeadShape

LARGEST_SCORE = 1e30
"""Beyond all scores; sums of as many as there can be are finite still."""
LONGEST_NAME = 1000
"""Characters of a model's name, and of a note's."""
_LONGEST_NOTE, _MOST_NOTES = 2**16, 1000


def text_fault(model_name: str, metadata: Mapping[str, str]) -> str | None:
    """What is wrong with the texts, which are shown and so have bounds, as a clause; `None` when nothing is."""
    if len(model_name) > LONGEST_NAME:
        return f"its model's name is longer than {LONGEST_NAME} characters"
    if len(metadata) > _MOST_NOTES:
        return f"its metadata have more than {_MOST_NOTES} entries"
    if any(len(name) > LONGEST_NAME or len(text) > _LONGEST_NOTE for name, text in metadata.items()):
        return f"its metadata hold a text of more than {_LONGEST_NOTE} characters"
    return None


def tensor_fault(tensor: Tensor, shape: HeadShape) -> str | None:
    """What is wrong with scores or how sure they are, as the end of a sentence; `None` when nothing is."""
    import torch

    expected = (shape.num_layers, shape.num_heads)
    if tensor.dtype != torch.float32:
        return f"are {str(tensor.dtype).removeprefix('torch.')}, not float32"
    if tuple(tensor.shape) != expected:
        return f"have shape {list(tensor.shape)} where the fingerprint says {list(expected)}"
    if not torch.isfinite(tensor).all():
        return "are not all finite"
    if (tensor < 0).any():
        return "are not all zero or more"
    if (tensor > LARGEST_SCORE).any():
        return f"are not all below {LARGEST_SCORE:g}"
    return None
