"""Plugging into Transformers' attention interface: wrap a model's attention function, and put it back.

Nothing is registered on import, no modelling file is copied, and a wrapped model is exactly as it was when its context
ends (see `changing`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headprof.errors import ModelError
from headprof.models.changing import Change, Changes, changed
from headprof.models.decoder import decoder_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

AttentionFunction = Callable[..., "tuple[torch.Tensor, torch.Tensor | None]"]
"""`(module, query [B, H, Q, D], key [B, K, T, D], value, attention_mask, ...) -> (output [B, Q, H, D], weights)`"""


def eager_attention(module: torch.nn.Module, *args, **kwargs):
    """The attention function that a modelling file keeps for itself, under the name every such file gives it."""
    modeling_file: Any = sys.modules[type(module).__module__]
    return modeling_file.eager_attention_forward(module, *args, **kwargs)


def _free_name(implementation: str) -> str:
    """A name that nothing in force uses."""
    number = 0
    while (name := f"headprof-{number}|{implementation}") in ALL_ATTENTION_FUNCTIONS:
        number += 1
    return name


def _attention_function(model: PreTrainedModel, implementation: str) -> AttentionFunction:
    if implementation == "eager":
        return eager_attention
    if implementation not in ALL_ATTENTION_FUNCTIONS:
        raise ModelError(
            f"The attention {implementation!r} of this {type(model).__name__} is not known to Transformers: set "
            'another by `model.set_attn_implementation("sdpa")`.'
        )
    return ALL_ATTENTION_FUNCTIONS[implementation]


def _same(make: Callable) -> Callable:
    return make


def wrap_attention(
    changes: Changes,
    model: PreTrainedModel,
    wrap: Callable[[AttentionFunction], AttentionFunction],
    wrap_mask: Callable[[Callable], Callable] = _same,
) -> None:
    """Replace the attention function `f` of a model's decoder by `wrap(f)`.

    What makes its masks is replaced by `wrap_mask` of it. Only the text decoder is touched, no vision tower.

    Raises:
        ModelError: the model's attention cannot be replaced, because its code does not use the attention interface.
    """
    decoder = decoder_of(model)
    previous = decoder.config._attn_implementation
    name = _free_name(previous)
    changes.set(ALL_ATTENTION_FUNCTIONS, name, wrap(_attention_function(model, previous)))
    # Transformers looks here for whether an attention function has masks made for it; one that has none gets none.
    masks: Any = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    if previous in masks:
        changes.set(masks, name, wrap_mask(masks[previous]))
    use_attention(changes, decoder, name)
    if decoder.config._attn_implementation != name:
        raise ModelError(
            f"{type(model).__name__} does not use Transformers' attention interface, so its heads cannot be "
            "reached: choose a model whose Transformers code supports it."
        )


def use_attention(changes: Changes, decoder: Any, implementation: str) -> None:
    """Let a decoder use another attention of Transformers."""
    for config in _configs(decoder):
        changes.keep(vars(config), "_attn_implementation_internal")
    decoder.set_attn_implementation(implementation)


def _configs(decoder: Any) -> Iterator[Any]:
    """All configurations in which Transformers notes a decoder's attention, each once."""
    waiting = [module.config for module in decoder.modules() if hasattr(module, "set_attn_implementation")]
    found: set[int] = set()
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found.add(id(config))
            waiting += [part for name in config.sub_configs if (part := getattr(config, name, None)) is not None]
            yield config


@dataclass(eq=False)
class _Wrapped:
    model: PreTrainedModel
    wrap: Callable[[AttentionFunction], AttentionFunction]
    kind = None

    def make(self, changes: Changes, in_force: Sequence[Change]) -> None:
        wrap_attention(changes, self.model, self.wrap)


def wrapped_attention(
    model: PreTrainedModel, wrap: Callable[[AttentionFunction], AttentionFunction]
) -> AbstractContextManager[None]:
    """Run `model`'s decoder with its attention function `f` replaced by `wrap(f)` while the context lasts.

    Contexts nest, and two models may be wrapped at once.

    Raises:
        ModelError: the model's attention cannot be replaced, or another thread holds the model.
    """
    return changed(model, _Wrapped(model, wrap))


@dataclass(eq=False)
class _Other:
    model: PreTrainedModel
    implementation: str
    kind = None

    def make(self, changes: Changes, in_force: Sequence[Change]) -> None:
        use_attention(changes, decoder_of(self.model), self.implementation)


def other_attention(model: PreTrainedModel, implementation: str) -> AbstractContextManager[None]:
    """Run `model`'s decoder with another attention of Transformers, such as `"eager"`, while the context lasts.

    Raises:
        ModelError: another thread holds the model.
    """
    return changed(model, _Other(model, implementation))
