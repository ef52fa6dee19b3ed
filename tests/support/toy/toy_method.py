"""A package of somebody else's, with two methods: what an installed one would be, found by its entry points."""

from dataclasses import dataclass

from headprof import Method
from headprof.compression.methods.importance import Importance


@dataclass(frozen=True)
class ValueNorm(Importance):
    """The size of the value, to some power."""

    power: float = 1.0
    queries = 0

    def score(self, observed):
        return observed.values.float().norm(dim=-1) ** self.power


VALUES = Method(ValueNorm())
NO_METHOD = "a word"
