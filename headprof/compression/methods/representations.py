"""All representations, by their names."""

from __future__ import annotations

from headprof.compression.methods.latent import Latent
from headprof.compression.methods.low_rank import LowRank
from headprof.compression.methods.quantisation import Int2, Int4, Int8
from headprof.compression.methods.representation import Full, Representation
from headprof.compression.methods.thinning import Thin
from headprof.errors import UsageError

REPRESENTATIONS: dict[str, Representation] = {
    each.name: each for each in (Full(), Int8(), Int4(), Int2(), Thin(), LowRank(), Latent())
}
"""All there are."""


def find_representation(name: object) -> Representation:
    """The representation of this name.

    Raises:
        UsageError: there is none.
    """
    if not isinstance(name, str) or name not in REPRESENTATIONS:
        raise UsageError(f"There is no representation {name!r}: choose one of {', '.join(REPRESENTATIONS)}.")
    return REPRESENTATIONS[name]
