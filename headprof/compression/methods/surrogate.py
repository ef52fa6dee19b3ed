"""Importance predicted from a row itself, by what was learned from a model's repetitions.

Shapes: `B` sequences, `K` KV heads, `T` rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from headprof.compression.methods.importance import Importance
from headprof.compression.methods.observation import Observation
from headprof.errors import ProfileError
from headprof.profile.surrogate import Surrogate


@dataclass(frozen=True)
class SurrogateImportance(Importance):
    """What a surrogate predicts of a row's reconstruction importance, from its own key and value (after KVzap).

    "KVzap: Fast, Adaptive, and Faithful KV Cache Pruning", arXiv 2601.07891, predicts the importance of KVzip, which a
    document's own repetition measures, from hidden states. Here it is predicted from the row, so that no query has to
    observe anything: a document costs one plain prefill, and rows can be judged again while text is generated. Keys
    count by what does not depend on their positions (`RowFeatures`).

    Attributes:
        surrogate: of the model; `None` until a plan is made for one.
        layer_idx: the layer whose rows are judged; `None` for those of no layer yet.
    """

    surrogate: Surrogate | None = None
    layer_idx: int | None = field(default=None, repr=False)

    queries = 0
    needs_surrogate = True
    adds_up = True

    @property
    def has_scale(self) -> bool:
        return True

    def with_surrogate(self, surrogate: Any) -> SurrogateImportance:
        return replace(self, surrogate=surrogate)

    def of_layer(self, layer_idx: int) -> SurrogateImportance:
        return replace(self, layer_idx=layer_idx)

    def score(self, observed: Observation) -> Tensor:
        if self.surrogate is None or self.layer_idx is None:
            raise ProfileError("This method judges rows by a surrogate, which it has not: make its plan with one.")
        return self.surrogate.predict(self.layer_idx, observed.keys, observed.values, observed.layer.shard).exp()
