"""From what a head writes to the logits: the straight way through a model's residual stream, followed and checked.

A head's output is projected, may pass a norm of its own and a factor, is added to the residual stream, and meets the
final norm and the unembedding. With the scales of the norms held at what they were, all of that is linear. Modelling
files name and arrange these parts in many ways, so nothing is taken on trust: a model reads a few tokens, and what it
did must come to what the parts that were found say.

Shapes: `L` layers, `H` query heads, `D` head dimension, `E` hidden size, `N` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from headprof.errors import ModelError
from headprof.models.attention_hook import AttentionFunction, wrapped_attention
from headprof.models.decoder import decoder_of, find_decoder_layers
from headprof.models.output_projection import (
    output_weights,
    projecting_modules,
    projection_of,
    stacked_output_weights,
)
from headprof.models.shape import HeadShape
from headprof.models.tensor_parallel import in_full

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 8
"""Read to see what the model does."""
_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class HeldNorm:
    """A norm whose scale is held: `x` becomes `scale * (x - mean) * weight + bias`, without the mean for RMSNorm.

    Attributes:
        module: the norm.
        weight: by which it multiplies, float32 `[E]`; one more than its parameter in Gemma's models.
        bias: that it adds, float32 `[E]`; `None` for none.
        centered: whether it takes the mean away.
    """

    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    centered: bool

    def back(self, directions: Tensor) -> Tensor:
        """Directions `[..., E]` behind the norm as directions before it, but for its scale."""
        weighed = directions * self.weight.to(directions.device)
        return weighed - weighed.mean(dim=-1, keepdim=True) if self.centered else weighed

    def scales(self, before: Tensor, after: Tensor) -> Tensor:
        """The scale of each row, float32 `[...]`, from what the norm was given and what it made of it, `[..., E]`."""
        shape = self._unscaled(before.float())
        rest = after.float() if self.bias is None else after.float() - self.bias.to(after.device)
        return (shape * rest).sum(dim=-1) / shape.square().sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)

    def made(self, before: Tensor, after: Tensor) -> Tensor:
        """What the norm makes of rows if it is of this form, to be compared with `after`."""
        made = self.scales(before, after)[:, None] * self._unscaled(before.float())
        return made if self.bias is None else made + self.bias

    def _unscaled(self, rows: Tensor) -> Tensor:
        if self.centered:
            rows = rows - rows.mean(dim=-1, keepdim=True)
        return rows * self.weight.to(rows.device)


@dataclass(frozen=True, eq=False)
class LayerPath:
    """What becomes of the heads' outputs in one layer before they are added to the residual stream.

    Attributes:
        attention: the module that holds the output projection.
        norm: that the projected outputs pass (Gemma-2, Gemma-3, OLMo-2); `None` for none.
        factor: by which they are multiplied (Granite).
    """

    attention: nn.Module
    norm: HeldNorm | None
    factor: float


@dataclass(frozen=True, eq=False)
class WritePath:
    """The way from the heads of every layer to the logits. Caps on logits are left out: they keep the order.

    Attributes:
        layers: one for each.
        norm: the final one.
        unembedding: `[vocabulary, E]`.
        factor: by which the unembedded is multiplied.
    """

    layers: tuple[LayerPath, ...]
    norm: HeldNorm
    unembedding: Tensor
    factor: float

    def directions(self, tokens: Tensor) -> Tensor:
        """Of each token `[...]` the direction in the residual stream that raises its logit, float32 `[..., E]`.

        The final norm's scale, which differs from position to position, is left out.
        """
        return self.factor * self.norm.back(self.unembedding[tokens.to(self.unembedding.device)].float())

    def head_directions(self, layer: int, directions: Tensor, num_heads: int) -> Tensor:
        """The same for the outputs of a layer's heads, float32 `[H, N, D]`; the scale of its own norm is left out."""
        path = self.layers[layer]
        before = path.factor * (directions if path.norm is None else path.norm.back(directions))
        weights = output_weights(path.attention, num_heads)
        return torch.einsum("hde,ne->hnd", weights, before.to(weights.device))

    def block_directions(self, layers: Sequence[int], directions: Tensor, num_heads: int) -> Tensor:
        """`head_directions` of several layers on one device and `B` sequences: `[l, B, H, N, D]` of `[B, N, E]`."""
        paths = [self.layers[layer] for layer in layers]
        weights = stacked_output_weights([path.attention for path in paths], num_heads)
        before = self._before(paths, directions.to(weights.device))
        made = before.flatten(-3, -2) @ weights  # [l, B * N, H * D]
        return made.view(len(paths), *directions.shape[:2], num_heads, -1).transpose(2, 3)

    @staticmethod
    def _before(paths: Sequence[LayerPath], directions: Tensor) -> Tensor:
        """Directions `[B, N, E]` behind each layer's own norm, `[l, B, N, E]`, or as they are where none has one."""
        if all(path.norm is None and path.factor == 1 for path in paths):
            return directions
        return torch.stack([e.factor * (directions if e.norm is None else e.norm.back(directions)) for e in paths])

    def bytes_per_layer(self) -> int:
        """What `block_directions` takes for each layer: its weights, as they are and in float32."""
        weight = next(projection_of(self.layers[0].attention).parameters())
        return weight.numel() * (weight.itemsize + 4)

    @contextmanager
    def reading_scales(self, rows: Tensor) -> Iterator[Callable[[], Tensor]]:
        """Note the scales of norms at some rows of a forward pass in this context.

        Args:
            rows: of the only sequence `[N]`, or of each, `[B, N]`.

        Yields:
            What gives, after the pass, the product of the scales between a layer's heads and the logits, on the device
            of the final norm: `[L, N]`, or `[L, B, N]`.
        """
        found: dict[nn.Module, Tensor] = {}

        def at_rows(hidden: Tensor) -> Tensor:
            at = rows.to(hidden.device, non_blocking=True)
            return hidden[0, at] if at.ndim == 1 else hidden.take_along_dim(at[..., None], dim=1)

        def note(norm: HeldNorm) -> Callable:
            def hook(module: nn.Module, given: tuple, kwargs: dict, output: Any) -> None:
                found[module] = norm.scales(at_rows(_first(given, kwargs)), at_rows(output))

            return hook

        norms = [self.norm, *(each.norm for each in self.layers if each.norm is not None)]
        with ExitStack() as stack:
            for norm in norms:
                stack.enter_context(norm.module.register_forward_hook(note(norm), with_kwargs=True))

            def scales() -> Tensor:
                last = found[self.norm.module]
                if len(found) == 1:
                    return last.expand(len(self.layers), *last.shape)
                return torch.stack(
                    [last if e.norm is None else last * found[e.norm.module].to(last.device) for e in self.layers]
                )

            yield scales


@torch.no_grad()
def find_write_path(model: PreTrainedModel, shape: HeadShape) -> WritePath:
    """Find the way from a model's heads to its logits, and see that it is what the model computes.

    Raises:
        ModelError: it is not: there are parts in it that are not known.
    """
    try:
        return _Finder(model, shape).path()
    except _Unknown as fault:
        raise ModelError(
            f"What the heads of {type(model).__name__} write cannot be followed to its logits, because {fault}: they "
            "have no write scores, without which the others are as good."
        ) from None


class _Unknown(Exception):
    """What is not as it would have to be, as a clause."""


@dataclass(frozen=True)
class _Seen:
    """What a module was given and what it made of it, float32 `[N, E]` each."""

    before: Tensor
    after: Tensor


class _Finder:
    """A look at what a model does with a few tokens."""

    def __init__(self, model: PreTrainedModel, shape: HeadShape):
        self.model, self.shape = model, shape
        layers = find_decoder_layers(model)
        if layers is None or len(layers) != shape.num_layers:
            raise _Unknown("its layers are not listed")
        try:
            self.attentions = projecting_modules(model, shape, "A write score")
        except ModelError:
            raise _Unknown("its output projections are not where Transformers' Llama has them") from None
        self.decoder_layers = list(layers)
        self.head = model.get_output_embeddings()
        self.tolerance = max(_TOLERANCE, 4 * torch.finfo(model.dtype).eps)
        if not isinstance(self.head, nn.Module) or not _is_table(getattr(self.head, "weight", None)):
            raise _Unknown("its output layer is not one table of weights")
        if any(part.device.type == "meta" for part in model.parameters()):
            raise _Unknown("some of its weights are loaded only when they are needed")
        self.unembedding = in_full(cast(Tensor, self.head.weight))
        self.attended: dict[nn.Module, Tensor] = {}
        self.seen: dict[nn.Module, _Seen] = {}
        self.logits = self._watch()

    def path(self) -> WritePath:
        layers = tuple(self._layer(index) for index in range(self.shape.num_layers))
        last = self.seen[self.decoder_layers[-1]].after
        children = decoder_of(self.model).children()
        norm = next((each for each in children if _is_norm(each) and self._takes(each, last)), None)
        if norm is None:
            raise _Unknown("what follows its last layer is no norm")
        held = self._held(norm)
        return WritePath(layers, held, self.unembedding, self._factor(self.seen[norm].after))

    def _watch(self) -> Tensor:
        """Read a few tokens, and note what each part does; the logits `[N, vocabulary]`."""

        def wrap(base: AttentionFunction) -> AttentionFunction:
            def attention(module, *args, **kwargs):
                output = base(module, *args, **kwargs)
                self.attended[module] = output[0][0].flatten(1).float().cpu()
                return output

            return attention

        def note(module: nn.Module, given: tuple, kwargs: dict, output: Any) -> None:
            before, after = _first(given, kwargs), output[0] if isinstance(output, tuple) else output
            if isinstance(before, Tensor) and isinstance(after, Tensor) and before.ndim == after.ndim == 3:
                self.seen[module] = _Seen(before[0].float().cpu().clone(), after[0].float().cpu().clone())

        watched = [self.head, *decoder_of(self.model).children(), *self.decoder_layers]
        watched += [child for layer in self.decoder_layers for child in layer.children()]
        watched += [projection_of(each) for each in self.attentions]
        ids = torch.linspace(1, self.shape.vocab_size - 1, _TOKENS).long()[None]
        embedding: Any = self.model.get_input_embeddings()
        with ExitStack() as stack:
            for module in dict.fromkeys(watched):
                stack.enter_context(module.register_forward_hook(note, with_kwargs=True))
            stack.enter_context(wrapped_attention(self.model, wrap))
            return self.model(ids.to(embedding.weight.device), use_cache=False).logits[0].float().cpu()

    def _layer(self, index: int) -> LayerPath:
        layer, attention = self.decoder_layers[index], self.attentions[index]
        projection, name = projection_of(attention), f"layer {index}"
        inside = [child for child in layer.children() if any(part is attention for part in child.modules())]
        if not inside or any(module not in self.seen for module in (layer, inside[0], projection)):
            raise _Unknown(f"its {name} is not called as others are")
        if attention not in self.attended or not self._alike(self.attended[attention], self.seen[projection].before):
            raise _Unknown(f"something lies between attention and output projection of {name}")
        if not self._alike(self.seen[projection].after, self.seen[inside[0]].after):
            raise _Unknown(f"something lies behind the output projection of {name}")
        if index and not self._takes(layer, self.seen[self.decoder_layers[index - 1]].after):
            raise _Unknown(f"something lies before {name}")
        norm, written = self._behind(layer, inside[0])
        others = [
            each for each in layer.children() if each is not inside[0] and not _is_norm(each) and each in self.seen
        ]
        added = sum((self._behind(layer, each)[1] for each in others if any(True for _ in each.parameters())), written)
        seen, factor = self.seen[layer], float(getattr(layer, "residual_multiplier", 1.0))
        if not self._alike(seen.after - seen.before, factor * added, beside=seen.after):
            raise _Unknown(f"{name} adds something else than what its attention and its feed-forward network write")
        return LayerPath(attention, None if norm is None else self._held(norm), factor)

    def _behind(self, layer: nn.Module, part: nn.Module) -> tuple[nn.Module | None, Tensor]:
        """The norm in a layer that takes what a part of it makes, if any, and what is added to the residual stream."""
        made = self.seen[part].after
        norm = next((each for each in layer.children() if _is_norm(each) and self._takes(each, made)), None)
        return norm, made if norm is None else self.seen[norm].after

    def _takes(self, module: nn.Module, rows: Tensor) -> bool:
        return module in self.seen and self._alike(self.seen[module].before, rows)

    def _held(self, norm: nn.Module) -> HeldNorm:
        """A norm in the form that explains what it did."""
        seen, parameters = self.seen[norm], norm.state_dict()
        weight, bias = parameters["weight"].float(), parameters.get("bias")
        bias = None if bias is None else bias.float()
        for centered in (False, True):
            for by in (weight, 1 + weight):
                held = HeldNorm(norm, by, bias, centered)
                on_cpu = HeldNorm(norm, by.cpu(), None if bias is None else bias.cpu(), centered)
                if self._alike(on_cpu.made(seen.before, seen.after), seen.after):
                    return held
        raise _Unknown(f"a norm of it ({type(norm).__name__}) is of no known form")

    def _factor(self, last: Tensor) -> float:
        """By what the unembedded is multiplied."""
        made, cap = (
            self.seen[self.head].after,
            self.model.config.get_text_config().to_dict().get("final_logit_softcapping"),
        )
        weight, bias = self.unembedding.float().cpu(), getattr(self.head, "bias", None)
        expected = last @ weight.T + (0 if bias is None else bias.float().cpu())
        if not self._takes(self.head, last) or not self._alike(made, expected):
            raise _Unknown("its output layer does something else than multiply by its weights")
        if cap:
            if not self._alike(self.logits, cap * torch.tanh(made / cap)):
                raise _Unknown("its logits are bounded in an unknown way")
            return 1.0
        factor = float((made * self.logits).sum() / made.square().sum())
        if factor <= 0 or not self._alike(self.logits, factor * made):
            raise _Unknown("its logits are not in proportion to what its output layer makes")
        return factor

    def _alike(self, found: Tensor, expected: Tensor, beside: Tensor | None = None) -> bool:
        """Whether each row is the same, up to rounding in the model's dtype; `beside` is what was rounded with it."""
        if found.shape != expected.shape:
            return False
        apart, size = (found - expected).norm(dim=-1), torch.maximum(found.norm(dim=-1), expected.norm(dim=-1))
        rounding = 0 if beside is None else 4 * torch.finfo(self.model.dtype).eps * beside.norm(dim=-1)
        return bool((apart <= self.tolerance * size + rounding).all())


def _first(given: tuple, kwargs: Mapping[str, Any]) -> Any:
    return given[0] if given else kwargs.get("hidden_states")


def _is_table(weight: Any) -> bool:
    return isinstance(weight, Tensor) and weight.ndim == 2 and weight.dtype.is_floating_point


def _is_norm(module: nn.Module) -> bool:
    """Whether all that a module has are a weight for each channel, and perhaps a bias."""
    sizes = {name: part.ndim for name, part in module.named_parameters()}
    return "weight" in sizes and sizes.keys() <= {"weight", "bias"} and set(sizes.values()) == {1}
