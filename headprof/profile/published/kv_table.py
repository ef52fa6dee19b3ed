"""What tables of KV heads have in common, in whatever form they are published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headprof.errors import ProfileError
from headprof.profile.faults import LARGEST_SCORE

if TYPE_CHECKING:
    from torch import Tensor

    from headprof.models.shape import HeadShape

LARGEST_FILE = 2**26
"""Bytes of a file of numbers; that of a hundred layers of a hundred heads takes some 200 kB as text."""


def check_size(path: Path, largest: int = LARGEST_FILE) -> None:
    """Raise `ProfileError` when a file is larger than any file of head scores."""
    if path.stat().st_size > largest:
        raise ProfileError(f"{path} is larger than {largest} bytes: give the file of the head scores alone.")


def check_kv_grid(path: Path, sizes: tuple[int, ...], shape: HeadShape) -> None:
    """Raise `ProfileError` when layers and KV heads are not the model's."""
    if sizes != (shape.num_layers, shape.num_kv_heads):
        raise ProfileError(
            f"{path} has {sizes[0]} layers of {sizes[1]} heads where the model has {shape.num_layers} of "
            f"{shape.num_kv_heads} KV heads: choose the model it was made for with --model."
        )


def check_head(path: Path, name: str, head: tuple[int, int], sizes: tuple[int, int]) -> None:
    """Raise `ProfileError` when the model has no such head.

    Args:
        path, name: for the message.
        head: layer and number.
        sizes: layers, and heads in each.
    """
    if head[0] >= sizes[0] or head[1] >= sizes[1]:
        raise ProfileError(
            f"{path} names a head {name}, which a model with {sizes[0]} layers of {sizes[1]} heads does not have: "
            "choose the model it was made for with --model."
        )


def check_numbers(path: Path, table: Tensor, least: float = 0, most: float = LARGEST_SCORE) -> None:
    """Raise `ProfileError` when one of the numbers is none, or out of range; names the last two places as a head."""
    wrong = ~((table >= least) & (table <= most))
    if wrong.any():
        where = wrong.nonzero()[0].tolist()
        raise ProfileError(
            f"{path} has {float(table[tuple(where)]):g} for head {where[-2]}-{where[-1]}: give numbers from {least:g} "
            f"to {most:g}."
        )


def filled(path: Path, values: Mapping[tuple[int, int], float], shape: HeadShape) -> Tensor:
    """Numbers by layer and KV head as float64 `[L, K]`; raises `ProfileError` when a head of the model has none."""
    import torch

    heads = [(layer, head) for layer in range(shape.num_layers) for head in range(shape.num_kv_heads)]
    for layer, head in heads:
        if (layer, head) not in values:
            raise ProfileError(f"{path} has nothing for head {layer}-{head}: give every KV head of the model a number.")
    table = torch.tensor([values[head] for head in heads], dtype=torch.float64)
    return table.view(shape.num_layers, shape.num_kv_heads)


def is_number(value: Any) -> bool:
    """Whether a value of JSON or YAML is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
