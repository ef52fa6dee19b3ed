"""The kinds of packed rows, as files and the operators for compiled code have them: tensors and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from headprof.compression.kernels import quantised_rows, thinned_rows
from headprof.compression.kernels.latent_rows import LatentRows
from headprof.compression.kernels.low_rank_rows import LowRankRows
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
    if isinstance(packed, LowRankRows):
        return [packed.before, *packed.tensors], [packed.first, packed.most]
    if isinstance(packed, LatentRows):
        tensors = [packed.before, packed.groups_before, *packed.tensors]
        return tensors, [packed.first, packed.most, packed.bits, packed.group_size]
    raise _unknown(packed)


def from_arguments(tensors: Sequence[Tensor], numbers: Sequence[int]) -> PackedRows | None:
    """The rows of which these are the arguments; how many each head has, only the device knows."""
    if not tensors:
        return None
    before, *parts = tensors
    first, *others = numbers
    match others:
        case []:
            return ThinnedRows(first, before, (), *parts)
        case [most]:
            known = dict(zip(LowRankRows.part_names(), parts, strict=True))
            return LowRankRows(first, before, (), (), most, **known)
        case [bits, group_size]:
            return QuantisedRows(first, before, (), bits, group_size, *parts)
        case _:
            most, bits, group_size = others
            groups_before, *parts = parts
            known = dict(zip(LatentRows.part_names(), parts, strict=True))
            return LatentRows(
                first, before, (), (), most, bits=bits, group_size=group_size, groups_before=groups_before, **known
            )


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
    if isinstance(packed, LatentRows):
        scales = {"bits": packed.bits, "group_size": packed.group_size}
        return {"first": packed.first, "bases": packed.num_bases, **scales}
    if isinstance(packed, LowRankRows):
        return {"first": packed.first, "bases": packed.num_bases}
    raise _unknown(packed)


def is_kind(facts: Mapping[str, Any]) -> bool:
    """Whether there are rows of which a file says just these."""
    return frozenset(facts) in _OF_FACTS


def part_names(facts: Mapping[str, Any]) -> Sequence[str]:
    """The names in a file of the tensors that hold such rows."""
    return _OF_FACTS[frozenset(facts)][1]


def from_facts(facts: Mapping[str, Any], parts: Mapping[str, Tensor], counts: Sequence[int]) -> PackedRows:
    """The rows of which a file holds these tensors, by their names there."""
    known = {name: value for name, value in facts.items() if name != "bases"}
    return _OF_FACTS[frozenset(facts)][0].of_parts(parts, counts, **known)


def _unknown(packed: PackedRows) -> CacheError:
    return CacheError(
        f"{type(packed).__name__} of another package can be neither saved nor compiled: choose representation=full."
    )


_OF_FACTS: Mapping[frozenset[str], tuple[Any, Sequence[str]]] = {
    frozenset(facts): (kind, names)
    for facts, kind, names in (
        (("first", "bits", "group_size"), QuantisedRows, quantised_rows.PARTS),
        (("first",), ThinnedRows, thinned_rows.PARTS),
        (("first", "bases"), LowRankRows, LowRankRows.part_names()),
        (("first", "bases", "bits", "group_size"), LatentRows, LatentRows.part_names()),
    )
}
"""By what a file says of rows one knows their kind, and the names of their tensors."""

ALL_PARTS = tuple(dict.fromkeys(name for _, names in _OF_FACTS.values() for name in names))
"""The names that tensors of packed rows have."""
