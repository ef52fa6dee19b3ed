"""The shape of a model's attention, which is also its fingerprint in the files this package writes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from headprof.errors import ModelError
from headprof.utils.records import make_record, shortened

_MOST = 10**9
_LONGEST_NAME = 200

_LABELS = {
    "architecture": "architecture",
    "num_layers": "layers",
    "num_heads": "query heads",
    "num_kv_heads": "KV heads",
    "head_dim": "head dimension",
    "vocab_size": "vocabulary size",
}


@dataclass(frozen=True)
class HeadShape:
    """Everything about a model that a head profile or a compressed cache depends on.

    Attributes:
        architecture: class name of the model, such as `LlamaForCausalLM`.
        num_layers: number of layers, `L`.
        num_heads: number of query heads per layer, `H`.
        num_kv_heads: number of key/value heads per layer, `K`.
        head_dim: width of one head.
        vocab_size: number of rows of the embedding.
    """

    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head, `g = H // K`."""
        return self.num_heads // self.num_kv_heads

    def cache_bytes_per_token(self, bytes_per_element: int) -> int:
        """Bytes that one token takes in a full cache, over all layers and KV heads, keys and values."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_element

    @classmethod
    def from_config(cls, config: Any) -> HeadShape:
        """Read the shape from a Transformers configuration (its text part, for a multimodal model).

        Raises:
            ModelError: there are no attention heads in it, or other ones in each layer.
        """
        text = config.get_text_config()
        names = getattr(config, "architectures", None) or getattr(text, "architectures", None)
        architecture = names[0] if names else text.model_type
        try:
            num_heads = text.num_attention_heads
            return cls(
                architecture=architecture,
                num_layers=text.num_hidden_layers,
                num_heads=num_heads,
                num_kv_heads=getattr(text, "num_key_value_heads", None) or num_heads,
                head_dim=getattr(text, "head_dim", None) or text.hidden_size // num_heads,
                vocab_size=text.vocab_size,
            )
        except (AttributeError, TypeError, ZeroDivisionError, RuntimeError) as error:
            raise ModelError(
                f"{architecture} has no attention heads to profile that are the same in every layer: pass another "
                "Transformer decoder."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HeadShape:
        """Inverse of `to_dict`; raises `ValueError` when a field is missing, of the wrong type or beyond any model."""
        numbers = [field.name for field in fields(cls) if field.name != "architecture"]
        shape = make_record(cls, values, dict.fromkeys(numbers, (0, _MOST)))
        if not shape.architecture.isprintable() or len(shape.architecture) > _LONGEST_NAME:
            raise ValueError(f"its architecture cannot be {shortened(shape.architecture)}")
        return shape

    def differences(self, other: HeadShape) -> list[str]:
        """Say, field by field, how `self` differs from `other`: `["layers 30 instead of 32"]`; empty when equal."""
        return [
            f"{label} {getattr(self, name)} instead of {getattr(other, name)}"
            for name, label in _LABELS.items()
            if getattr(self, name) != getattr(other, name)
        ]
