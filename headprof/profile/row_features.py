"""What a surrogate looks at in a row: numbers that do not depend on the row's position, as far as that can be had.

Shapes: `D` head dimension, `F` features of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from headprof.models.rotary import Rotary


@dataclass(frozen=True)
class RowFeatures:
    """What a surrogate looks at in a row.

    A rotary embedding turns the dimensions of a key in pairs, so the length of each pair does not depend on the row's
    position; nor does what is not turned. Where a model turns keys in another way, or none that can be told, keys are
    taken as they are.

    Attributes:
        partner: for each dimension of a key the one with which it is turned, itself if it is not, `D` numbers.
    """

    partner: tuple[int, ...]

    @classmethod
    def as_they_are(cls, head_dim: int) -> RowFeatures:
        """Keys as they are, turned or not."""
        return cls(tuple(range(head_dim)))

    @classmethod
    def of_layers(cls, rotaries: Sequence[Rotary | None], head_dim: int) -> RowFeatures:
        """What does not depend on positions in all of a model's layers; keys as they are where none can be told.

        Args:
            rotaries: of each layer, as `rotary_of` finds it.
            head_dim: `D`.
        """
        kinds = {(rotary is None, rotary and rotary.layer_type): rotary for rotary in rotaries}
        found = {None if rotary is None else rotary.partners(head_dim) for rotary in kinds.values()}
        partner = found.pop() if len(found) == 1 else None
        return cls.as_they_are(head_dim) if partner is None else cls(partner)

    @property
    def count(self) -> int:
        """How many a row has, `F`."""
        pairs = sum(self.partner[each] > each for each in range(len(self.partner)))
        return 2 * len(self.partner) - pairs

    def of(self, keys: Tensor, values: Tensor) -> Tensor:
        """Features of rows `[..., D]` each, float32 `[..., F]`."""
        keys = keys.float()
        first, second, single = _indices(self.partner, keys.device)
        parts = [(keys[..., first].square() + keys[..., second].square()).sqrt(), keys[..., single], values.float()]
        return torch.cat(parts, dim=-1)


@lru_cache(maxsize=16)
def _indices(partner: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The dimensions that are turned in pairs, the first of each and the second, and the others."""
    first = [each for each, other in enumerate(partner) if other > each]
    single = [each for each, other in enumerate(partner) if other == each]
    with torch.inference_mode(False):
        lists = (first, [partner[each] for each in first], single)
        tensors = (torch.tensor(each, dtype=torch.int64) for each in lists)
        first_at, second_at, single_at = (each.to(device, non_blocking=True) for each in tensors)
        return first_at, second_at, single_at
