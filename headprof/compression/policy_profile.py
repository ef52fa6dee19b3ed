"""Which of FastGen's policies each head of a model takes of a text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headprof.compression.cache.prompt_cache import RankingCache
from headprof.compression.encoding import encoded_document
from headprof.compression.keeping import Keeping
from headprof.compression.methods.recovery_budget import RecoveryBudget
from headprof.compression.session import attending_ragged, make_plan, prefill
from headprof.models.loading import LoadedModel
from headprof.models.shape import HeadShape

METHOD = "fastgen"


@dataclass(frozen=True)
class HeadPolicies:
    """What a model's heads need of a text.

    Attributes:
        model_name: the model's.
        shape: the model's.
        policies: of each KV head the number in `methods.policy_order.POLICIES`, int64 `[L, K]`.
        recovery: the share of its attention that each head's rows recover at least.
        tokens: of the text, with what the model's chat format writes around it.
    """

    model_name: str
    shape: HeadShape
    policies: Tensor
    recovery: float
    tokens: int


@torch.inference_mode()
def head_policies(
    loaded: LoadedModel, document: str, recovery: float | None = None, prefill_chunk: int | None = None
) -> HeadPolicies:
    """The policy that each KV head takes of a document, as `fastgen` compresses it; nothing of it is kept.

    Args:
        loaded: the model.
        document: the text.
        recovery: share of a head's attention that its rows recover at least, above 0, up to 1; `None` for the method's.
        prefill_chunk: as for `headprof.compressed`.

    Raises:
        UsageError: the recovery is no such share, or the document is empty or longer than the model's context.
    """
    plan = make_plan(loaded.model, method=METHOD, budget="100%", tokenizer=loaded.tokenizer, recovery=recovery)
    method, budget = plan.method, plan.method.budget
    assert isinstance(budget, RecoveryBudget)
    ids = torch.tensor([encoded_document(loaded, document, Keeping())[0]], device=loaded.device)
    said = RankingCache([method.importance], loaded.shape.num_layers)
    with attending_ragged(loaded.model, prefill_chunk=prefill_chunk):
        prefill(loaded.model, ids, said)
    taken = [
        budget.policies(layer.ranked(method, None), layer.said[method.importance].weights).cpu()
        for layer in said.layers
    ]
    return HeadPolicies(loaded.name, loaded.shape, torch.cat(taken), budget.recovery, ids.shape[1])
