"""The kinds of packed rows, as files and the operators for compiled code have them: tensors and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from headprof.compression.kernels import low_rank_rows, quantised_rows, thinned_rows
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
            return LowRankRows(first, before, (), (), most, *parts)
        case _:
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
    if isinstance(packed, LowRankRows):
        return {"first": packed.first, "bases": len(packed.key_basis)}
    raise _unknown(packed)


def is_kind(facts: Mapping[str, Any]) -> bool:
    """Whether there are rows of which a file says just these."""
    return frozenset(facts) in _KINDS


def part_names(facts: Mapping[str, Any]) -> Sequence[str]:
    """The names in a file of the tensors that hold such rows."""
    return _NAMES[frozenset(facts)]


def from_facts(facts: Mapping[str, Any], parts: Mapping[str, Tensor], counts: Sequence[int]) -> PackedRows:
    """The rows of which a file holds these tensors, by their names there."""
    known = {name: value for name, value in facts.items() if name != "bases"}
    return _KINDS[frozenset(facts)].of_parts(parts, counts, **known)


def _unknown(packed: PackedRows) -> CacheError:
    return CacheError(
        f"{type(packed).__name__} of another package can be neither saved nor compiled: choose representation=full."
    )


_QUANTISED, _THINNED, _LOW_RANK = (
    frozenset(names) for names in (("first", "bits", "group_size"), ("first",), ("first", "bases"))
)
"""By what a file says of rows one knows their kind."""
_KINDS: Mapping[frozenset[str], Any] = {_QUANTISED: QuantisedRows, _THINNED: ThinnedRows, _LOW_RANK: LowRankRows}
_NAMES = {_QUANTISED: quantised_rows.PARTS, _THINNED: thinned_rows.PARTS, _LOW_RANK: low_rank_rows.PARTS}

ALL_PARTS = tuple(dict.fromkeys(name for names in _NAMES.values() for name in names))
"""The names that tensors of packed rows have."""
