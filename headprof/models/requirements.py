"""What a model must be so that its heads can be reached, as far as it shows without running it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headprof.errors import ModelError
from headprof.models.decoder import decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SERVED = {"full_attention", "sliding_attention"}


def require_attention_layers(model: PreTrainedModel, purpose: str) -> None:
    """Refuse a model some of whose layers are no attention, or not over keys and values of the text's tokens alone.

    Args:
        model: the model.
        purpose: what cannot be done otherwise, to follow "so": "its heads cannot be scored".

    Raises:
        ModelError: it is such a model.
    """
    if other := _other_layers(model):
        raise ModelError(
            f"{type(model).__name__} has {other}, so {purpose}: choose a model with full or sliding attention only."
        )
    for module in decoder_of(model).modules():
        own = getattr(sys.modules.get(type(module).__module__), "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
        if own is not ALL_ATTENTION_FUNCTIONS:
            raise ModelError(
                f"{type(model).__name__} keeps attention functions of its own, so {purpose}: choose a model that uses "
                "Transformers' attention interface."
            )


def _other_layers(model: PreTrainedModel) -> str:
    """What some layers are instead of attention over the text; empty if there are none."""
    config: Any = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ()) | set(getattr(config, "layers_block_type", None) or ())
    if other := sorted(str(kind) for kind in kinds - _SERVED - {"attention"}):
        return f"layers of the kind {', '.join(other)}"
    if getattr(config, "cross_attention_layers", None):
        return "layers that attend to images"
    if getattr(config, "num_kv_shared_layers", None):
        return "layers that read the cache of another layer"
    # What Transformers says of models whose caches cannot be cut back to fewer tokens.
    if getattr(model, "_is_stateful", False):
        return "layers that keep a state instead of keys and values"
    return ""
