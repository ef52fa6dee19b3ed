"""Decode steps that the device runs by itself: captured once as a CUDA graph, then replayed.

A step of a large model is a thousand and more launches, each of which takes a CPU longer than the GPU. Where a step
over a `HeadCache` writes to the same addresses as the one before it, which is nearly always (see `RowStorage`), it need
not be issued anew: the launches are captured, with the ids and positions of the newest tokens in buffers of their own,
and replayed at once. What the host has to do between steps (compressing again, counting) it does before and after.

A graph of the very kernels that would have been launched gives the very numbers, takes a second to make, and holds for
every model that the cache serves; `torch.compile` takes a minute, rounds otherwise, and is there for whoever asks for
it (`step="compiled"`): the compiled step is then captured in the same way.

Never trusted blindly: the first graphs of a model are run beside the plain step, and a model in which they differ, or
which looks at its numbers from the host, goes on without.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial, wraps
from inspect import signature
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from headprof.compression.cuda_graphs import Recording, recording_for
from headprof.compression.step_cache import StepCache
from headprof.errors import ModelError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

STEPS = ("auto", "eager", "graph", "compiled")
"""How a decode step may be run: `auto` is `graph` on a CUDA device, else `eager`."""

_STEADY = 2
"""Steps over one layout before it is captured: the first may have to prepare kernels."""
_COMPARED = 2
"""Runs of a captured step that are compared with plain ones: the second shows what was true of the first alone."""
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Distance of a compiled step's logits from plain ones, as a share of these, that rounding explains, by their type."""
_ROUNDING_OF_HALF = 0.25
"""The same in bfloat16 and float16, whose roundings a compiler leaves out between fused operators, layer by layer."""
_PASSED_ON = {
    "input_ids",
    "position_ids",
    "attention_mask",
    "past_key_values",
    "use_cache",
    "return_dict",
    "logits_to_keep",
    "cache_position",
}
"""Arguments of a model's forward pass with which a step can be captured; others that are given have it run plainly."""

_trusted: WeakKeyDictionary[Any, set[bool]] = WeakKeyDictionary()
"""Models of which a captured step was right when it was compared, by whether steps are compiled."""


def check_step(step: str, device: torch.device | None = None) -> None:
    """
    Raises:
        UsageError: there is no such way to run a step, or not on this device.
    """
    if step not in STEPS:
        raise UsageError(f"There is no way {step!r} to run a decode step: use {', '.join(STEPS)}.")
    if step == "graph" and device is not None and device.type != "cuda":
        raise UsageError(
            f"Only a CUDA device replays captured steps, not {device.type!r}: leave step='graph' (--step graph) away."
        )


class Linked(Protocol):
    """Where the attention function looks whether it is in a step that the device runs by itself."""

    step: StepCache | None

    @property
    def is_looking(self) -> bool:
        """Whether the link between the model and its cache is still being looked at."""
        ...

    @property
    def own_hooks(self) -> int:
        """Hooks inside the model by which that is done."""
        ...


class DecodeSteps:
    """Runs a model's forward pass, and by itself the device's part of a decode step where that can be.

    Args:
        model: the model.
        forward: its forward pass.
        link: to be told of a step.
        step: a name in `STEPS`.
        backend: of the attention.
        record: how to capture; `None` not to.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        forward: Callable[..., Any],
        link: Linked,
        step: str,
        backend: str,
        record: Recording | None,
    ):
        self._model, self._plain, self._link = model, forward, link
        self._asked, self._compiles, self._record, self._backend = step, step == "compiled", record, backend
        self._names = list(signature(forward).parameters)
        self._run = torch.compile(self._forward, fullgraph=True) if self._compiles else self._forward
        inside = [module for module in model.modules() if module is not model]
        self._hooks = [hooks for each in inside for hooks in (each._forward_hooks, each._forward_pre_hooks)]
        self._layout: tuple[object, ...] = ()
        self._steady = 0
        self._step: _Step | None = None
        self._made: Any = None  # kind of answer that the plain pass gives
        self._cache: Callable[[], Any] = _nothing  # whose layout it is, as long as it is there
        self.refused = ""
        """Why steps are run plainly, if they are; empty if not."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = kwargs | dict(zip(self._names, args, strict=False))
        cache: Any = given.get("past_key_values")
        if self._asked not in ("auto", "eager") and getattr(cache, "recalls", False):
            raise UsageError(
                f"A cache that brings back rows from the host runs no step={self._asked!r}, in which the host has no "
                "say: leave it, or --compile, away."
            )
        if self._cache() is None:
            self._forget()
        if self.refused or not self._serves(given, cache):
            return self._plain(*args, **kwargs)
        cache.prepare_step()
        if not self._is_steady(cache):
            answer = self._plain(*args, **kwargs)
            self._made = type(answer) if _is_plain(answer) else None
            return answer
        try:
            return self._by_the_device(given, cache, partial(self._plain, *args, **kwargs))
        except _Refusal as refusal:
            self.refused = str(refusal)
            if self._asked != "auto":
                raise ModelError(
                    f"Decode steps of this {type(self._model).__name__} cannot be run as step={self._asked!r} asks "
                    f"({refusal}): leave it, or --compile, away."
                ) from None
            _log.warning("Decode steps of this %s are run one by one: %s.", type(self._model).__name__, refusal)
            self._step = None
            return self._plain(*args, **kwargs)

    def _forget(self) -> None:
        """Keep nothing of a layout, so that the memory of a cache that is gone can be used by another."""
        self._layout, self._steady, self._step, self._cache = (), 0, None, _nothing

    def _serves(self, given: dict[str, Any], cache: Any) -> bool:
        """Whether this is the pass of one new token over a compressed cache, and nothing else is asked for."""
        ids, positions = given.get("input_ids"), given.get("position_ids")
        return (
            getattr(cache, "runs_steps", False)
            and isinstance(ids, Tensor)
            and ids.ndim == 2
            and ids.shape == (cache.batch_size, 1)
            and (positions is None or (positions.ndim == 2 and positions.shape[1] == 1))
            and "position_ids" in self._names
            and _is_flat(given.get("attention_mask"))
            and given.get("use_cache") is not False
            and given.get("return_dict") is not False
            and all(value is None or name in _PASSED_ON for name, value in given.items())
            and not torch.is_grad_enabled()
            and not self._model.training
            and not self._link.is_looking
            and not self._is_hooked()
        )

    def _is_hooked(self) -> bool:
        """Whether someone has hooks inside the model, which would not run in a captured step."""
        return sum(map(len, self._hooks)) > self._link.own_hooks

    def _is_steady(self, cache: Any) -> bool:
        """Whether this layout has been seen often enough to be captured, if it has not been."""
        layout = cache.layout()
        if not _same(layout, self._layout):
            self._forget()
            self._layout, self._cache = layout, ref(cache)
        self._steady += 1
        if self._step is not None:
            return True
        if self._steady <= _STEADY or self._made is None:
            return False
        cache.settle()  # now room is made for all that comes before the next compression
        self._layout = cache.layout()
        return True

    def _by_the_device(self, given: dict[str, Any], cache: Any, plain: Callable[[], Any]) -> Any:
        if self._step is None:
            layers, slots = cache.step_parts()
            if self._compiles:  # once for caches of all sizes
                for tensor in chain.from_iterable(layer.of_any_length for layer in layers):
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
            self._step = _Step(given["input_ids"], StepCache(layers, slots, self._backend))
        step = self._step
        step.take(given["input_ids"], given.get("position_ids"), cache.get_seq_length())
        logits = self._logits(step)
        cache.step_passed()
        if self._record is not None and step.replay is not None:
            self._compare(step, cache, plain, logits)
        return self._made(logits=logits, past_key_values=cache)

    def _logits(self, step: _Step) -> Tensor:
        if step.replay is not None:
            step.replay()
            return step.logits.clone()
        run = partial(self._in_step, step)
        if self._record is None or (self._compiles and not step.warm):
            step.warm = True
            return self._compiled(run)
        try:
            step.replay, step.logits = self._record(run)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise _Refusal(f"they cannot be captured ({type(error).__name__}: {error})") from error
        step.replay()
        return step.logits.clone()

    def _compiled(self, run: Callable[[], Tensor]) -> Tensor:
        """
        Raises:
            ModelError: the model's step cannot be compiled.
        """
        try:
            try:
                return run()
            except torch._dynamo.exc.FailOnRecompileLimitHit:  # a long process, with caches of many kinds
                torch._dynamo.reset_code(DecodeSteps._forward.__code__)
                return run()
        except torch._dynamo.exc.TorchDynamoException as error:
            first = str(error).strip().splitlines()[0]
            raise ModelError(
                f"A decode step of this {type(self._model).__name__} cannot be compiled as a whole ({first}): leave "
                "step='compiled', or --compile, away."
            ) from error

    def _in_step(self, step: _Step) -> Tensor:
        self._link.step = step.cache
        try:
            return self._run(step.ids, step.positions, step.mask, step.cache)
        finally:
            self._link.step = None

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: StepCache) -> Tensor:
        answer = self._plain(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        cache.finish()
        return answer.logits

    def _compare(self, step: _Step, cache: Any, plain: Callable[[], Any], logits: Tensor) -> None:
        """Run the step plainly too, the first times.

        Raises:
            _Refusal: it answers otherwise.
        """
        trusted = _trusted.setdefault(self._model, set())
        if self._compiles in trusted:
            return
        cache.take_step_back()
        if self._compiles:  # what was compiled looks again whether all that it went by still holds
            again = self._compiled(partial(self._in_step, step))
            cache.step_passed()
            cache.take_step_back()
            if not torch.equal(logits, again):
                raise _Refusal("captured, they answer otherwise")
        expected = plain().logits
        if not (_are_close(logits, expected) if self._compiles else torch.equal(logits, expected)):
            cache.take_step_back()
            raise _Refusal("compiled, they answer otherwise" if self._compiles else "captured, they answer otherwise")
        step.compared += 1
        if step.compared == _COMPARED:
            trusted.add(self._compiles)


class _Refusal(Exception):
    """Why steps cannot be run by the device alone, as a clause."""


class _Step:
    """One layout's step: buffers for what the model is given, and what replays it once it is captured."""

    def __init__(self, ids: Tensor, cache: StepCache):
        with torch.inference_mode(False):
            self.ids = torch.zeros_like(ids)
            self.positions = torch.zeros_like(ids)
            # One key that the query sees: models take a mask of four dimensions as it is, and over a compressed cache
            # one new token needs none.
            self.mask = torch.ones(len(ids), 1, 1, 1, dtype=torch.bool, device=ids.device)
        self.cache = cache
        self.replay: Callable[[], object] | None = None
        self.logits: Tensor = self.ids
        self.warm = False
        self.compared = 0

    def take(self, ids: Tensor, positions: Tensor | None, seen: int) -> None:
        """Put what the model is given into the buffers."""
        self.ids.copy_(ids)
        if positions is None:
            self.positions.fill_(seen)
        else:
            self.positions.copy_(positions.expand_as(self.positions))


def _nothing() -> None:
    """What a reference to nothing says."""


def _is_flat(mask: Any) -> bool:
    return mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)


def _is_plain(answer: Any) -> bool:
    """Whether logits and a cache are all that a model answers."""
    return hasattr(answer, "keys") and set(answer.keys()) <= {"logits", "past_key_values"} and "logits" in answer


def _same(layout: tuple[object, ...], other: tuple[object, ...]) -> bool:
    return len(layout) == len(other) and all(one is two for one, two in zip(layout, other, strict=True))


def _are_close(logits: Tensor, expected: Tensor) -> bool:
    """Whether these differ by no more than another order of the same roundings explains."""
    distance = torch.linalg.vector_norm(logits.float() - expected.float())
    share = _ROUNDING.get(expected.dtype, _ROUNDING_OF_HALF)
    return bool(distance <= share * torch.linalg.vector_norm(expected.float()))


def with_decode_steps(
    model: PreTrainedModel, forward: Callable[..., Any], link: Linked, step: str, backend: str
) -> Callable[..., Any] | None:
    """A model's forward pass, whose decode steps are run as `step` says (see `STEPS`); `None` if plainly.

    Raises:
        ModelError: steps are to be captured and cannot be.
    """
    if step == "eager":
        return None
    record = recording_for(model)
    if record is None and step == "graph":
        raise ModelError(
            "Steps of a model on several devices cannot be captured: leave step='graph' (--step graph) away."
        )
    if record is None and step != "compiled":
        return None
    steps = DecodeSteps(model, forward, link, step, backend, record)

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return steps(*args, **kwargs)

    return run
