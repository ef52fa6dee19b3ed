"""The kinds of packed rows, as files and the operators for compiled code have them: tensors and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from headprof.compression.kernels.packed_rows import PackedRows
from headprof.compression.kernels.quantised_rows import PARTS, QuantisedRows


def as_arguments(packed: PackedRows | None) -> tuple[list[Tensor], list[int]]:
    """What `from_arguments` makes the same rows of; two empty lists for none."""
    if not isinstance(packed, QuantisedRows):
        return [], []
    tensors = [packed.before, packed.groups_before, *packed.tensors]
    return tensors, [packed.first, packed.bits, packed.group_size]


def from_arguments(tensors: Sequence[Tensor], numbers: Sequence[int]) -> PackedRows | None:
    """The rows of which these are the arguments; how many each head has, only the device knows."""
    if not tensors:
        return None
    before, groups_before, *parts = tensors
    first, bits, group_size = numbers
    named = dict(zip(PARTS, parts, strict=True))
    return QuantisedRows(first, before, (), bits, group_size, groups_before, **named)


def as_facts(packed: PackedRows | None) -> dict[str, int] | None:
    """What a file says of packed rows beside their tensors and how many each head has."""
    if not isinstance(packed, QuantisedRows):
        return None
    return {"first": packed.first, "bits": packed.bits, "group_size": packed.group_size}


def from_facts(facts: Mapping[str, Any], parts: Mapping[str, Tensor], counts: Sequence[int]) -> PackedRows:
    """The rows of which a file holds these tensors, by their names there."""
    return QuantisedRows.of_parts(parts, counts, **facts)
