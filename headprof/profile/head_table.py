"""What every table of head scores has, in whatever format: a text, heads by layer and number, a grid, numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from headprof.errors import ProfileError
from headprof.utils.files import read_text as read_users_text
from headprof.utils.records import shortened

if TYPE_CHECKING:
    from torch import Tensor

    from headprof.models.shape import HeadShape

_LARGEST_FILE = 2**28
_HEAD_KEY = re.compile(r"(\d{1,5})-(\d{1,5})")


def read_text(path: Path) -> str:
    """A file's text; raises `ProfileError` when it is none, no regular file, too large or cannot be read."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ProfileError(f"{path} is no regular file: give the JSON or CSV file of the head scores.")
    if path.is_file() and path.stat().st_size > _LARGEST_FILE:
        raise ProfileError(f"{path} is larger than {_LARGEST_FILE} bytes: give the file of the head scores alone.")
    return read_users_text(path, ProfileError)


def parse_head_key(path: Path, key: str) -> tuple[int, int]:
    """Layer and head of `"17-3"`; raises `ProfileError` for another text."""
    match = _HEAD_KEY.fullmatch(key)
    if match is None:
        raise ProfileError(f"{path} names a head {shortened(key)}: write it as layer-head, both from 0, such as 17-3.")
    return int(match[1]), int(match[2])


def grid_size(path: Path, heads: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Layers and heads per layer that the heads' numbers imply; raises `ProfileError` when one of them is missing."""
    present = set(heads)
    num_layers = 1 + max(layer for layer, _ in present)
    num_heads = 1 + max(head for _, head in present)
    if len(present) != num_layers * num_heads:
        grid = ((layer, head) for layer in range(num_layers) for head in range(num_heads))
        layer, head = next(head for head in grid if head not in present)
        raise ProfileError(
            f"{path} has no score for head {layer}-{head} among {num_layers} layers of {num_heads} heads: "
            "give every layer the same heads."
        )
    return num_layers, num_heads


def check_grid(path: str | Path, grid: Iterable[int], shape: HeadShape) -> None:
    """Raise `ProfileError` when layers and heads per layer are not the model's."""
    num_layers, num_heads = grid
    if (num_layers, num_heads) != (shape.num_layers, shape.num_heads):
        raise ProfileError(
            f"{path} has {num_layers} layers of {num_heads} heads where the model has {shape.num_layers} of "
            f"{shape.num_heads}: choose the model it was made for with --model."
        )


def short_floats(values: Tensor) -> list[list[str]]:
    """Each number `[L, H]` as the shortest text that reads back to the same float32."""
    return [[str(number) for number in row] for row in values.detach().cpu().float().numpy()]
