"""The kinds of packed rows, as files and the operators for compiled code have them: tensors and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from headprof.compression.kernels import quantised_rows, thinned_rows
from headprof.compression.kernels.packed_rows import PackedRows
from headprof.compression.kernels.quantised_rows import QuantisedRows
from headprof.compression.kernels.thinned_rows import ThinnedRows
from headprof.errors import CacheError


def as_arguments(packed: PackedRows | None) -> tuple[list[Tensor], list[int]]:
    """What `from_arguments` makes the same rows of; two empty lists for none.

    Raises:
        CacheError: they are of a kind that is not known here.
    """
    if packed is None:
        return [], []
    if isinstance(packed, QuantisedRows):
        tensors = [packed.before, packed.groups_before, *packed.tensors]
        return tensors, [packed.first, packed.bits, packed.group_size]
    if isinstance(packed, ThinnedRows):
        return [packed.before, *packed.tensors], [packed.first]
    raise _unknown(packed)


def from_arguments(tensors: Sequence[Tensor], numbers: Sequence[int]) -> PackedRows | None:
    """The rows of which these are the arguments; how many each head has, only the device knows."""
    if not tensors:
        return None
    before, *parts = tensors
    first, *others = numbers
    if not others:
        return ThinnedRows(first, before, (), *parts)
    bits, group_size = others
    return QuantisedRows(first, before, (), bits, group_size, *parts)


def as_facts(packed: PackedRows | None) -> dict[str, int] | None:
    """What a file says of packed rows beside their tensors and how many each head has.

    Raises:
        CacheError: they are of a kind that is not known here.
    """
    if packed is None:
        return None
    if isinstance(packed, QuantisedRows):
        return {"first": packed.first, "bits": packed.bits, "group_size": packed.group_size}
    if isinstance(packed, ThinnedRows):
        return {"first": packed.first}
    raise _unknown(packed)


def part_names(facts: Mapping[str, Any]) -> Sequence[str]:
    """The names in a file of the tensors that hold such rows."""
    return quantised_rows.PARTS if "bits" in facts else thinned_rows.PARTS


def from_facts(facts: Mapping[str, Any], parts: Mapping[str, Tensor], counts: Sequence[int]) -> PackedRows:
    """The rows of which a file holds these tensors, by their names there."""
    kind = QuantisedRows if "bits" in facts else ThinnedRows
    return kind.of_parts(parts, counts, **facts)


def _unknown(packed: PackedRows) -> CacheError:
    return CacheError(
        f"{type(packed).__name__} of another package can be neither saved nor compiled: choose representation=full."
    )


ALL_PARTS = (*quantised_rows.PARTS, *thinned_rows.PARTS)
"""The names that tensors of packed rows have."""
