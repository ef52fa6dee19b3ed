"""What a call of `generate` is given while this package's caches are in use.

`generate` makes its own cache, of the kind that a setting names, and takes the ids of all tokens that a cache has seen,
those that are not computed again included. Here a fresh cache of ours goes in the place of that, and the ids of new
tokens alone will do for a filled one: those before them, which the cache has noted, are put in front, so that logits
processors and streamers see what they would have seen without a cache.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headprof.errors import CacheError, UsageError
from headprof.models.decoder import require_plain_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_IDLE: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "prefix_allowed_tokens_fn": (None,),
    "logits_processor": (None, []),
}
"""Arguments of `generate` that look at all ids, and their values that do not."""


_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
"""Arguments of `generate` by which tokens are guessed before they are computed."""


def takes_tokens(cache: Any) -> bool:
    """Whether a cache is one of this package's, which note the tokens that they have seen."""
    return hasattr(cache, "note_tokens")


def setting(model: PreTrainedModel, arguments: dict[str, Any], name: str) -> Any:
    """A setting of a call of `generate`: its argument, else its `generation_config`'s, else the model's."""
    for source in (arguments.get(name), getattr(arguments.get("generation_config"), name, None)):
        if source is not None:
            return source
    return getattr(model.generation_config, name, None)


def with_our_caches(
    model: PreTrainedModel, generate: Callable, new_cache: Callable[[], Any] | None, own_kind: str | None
) -> Callable:
    """`model.generate`, to which caches of ours may be given.

    Args:
        model: the model.
        generate: its own.
        new_cache: makes the cache to begin with where none is given; `None` to leave that to Transformers.
        own_kind: the model's own setting `cache_implementation`, which is hidden from `generate` while this is in use.
    """
    names = list(inspect.signature(generate).parameters)

    @wraps(generate)
    def run(*args, **arguments):
        arguments |= dict(zip(names, args, strict=False))
        # An adapter whose `generate` this runs in takes the place of this method.
        require_plain_prompts(getattr(model.prepare_inputs_for_generation, "__self__", None))
        cache: Any = arguments.get("past_key_values")
        if cache is None and new_cache is not None and setting(model, arguments, "use_cache") is not False:
            cache = arguments["past_key_values"] = new_cache()
        if not takes_tokens(cache):
            if cache is None and own_kind is not None and setting(model, arguments, "cache_implementation") is None:
                arguments["cache_implementation"] = own_kind
            return generate(**arguments)
        _refuse_assistance(model, arguments)
        _refuse_chunks(model, arguments, cache)
        _leave_kind_away(arguments, own_kind)
        return _continued(model, generate, cache, arguments) if cache.get_seq_length() else generate(**arguments)

    return run


def _refuse_assistance(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """
    Raises:
        UsageError: tokens are to be guessed. The first pass would hold guesses beside the prompt, so that they would be
            compressed as a part of it; and over a filled cache it would hold again what the cache has seen.
    """
    for name in _ASSISTED:
        if setting(model, arguments, name):
            raise UsageError(
                f"{name} lets the first pass read guessed tokens together with the prompt, which cannot be compressed "
                "by itself then: leave it away."
            )


def _refuse_chunks(model: PreTrainedModel, arguments: dict[str, Any], cache: Any) -> None:
    """
    Raises:
        UsageError: a prompt is to be read in several passes, of which the first would be compressed as if it were all.
    """
    chunk = setting(model, arguments, "prefill_chunk_size")
    if chunk is not None and not cache.get_seq_length():
        raise UsageError(
            f"prefill_chunk_size={chunk!r} lets only the prompt's first chunk be compressed: leave it away, and give "
            f"`compressed` prefill_chunk={chunk!r}."
        )


def refuse_continuous_batching(*_args: Any, **_kwargs: Any) -> None:
    """What a model's `init_continuous_batching` is while this package's caches are in use.

    Raises:
        UsageError: always.
    """
    raise UsageError(
        "Continuous batching (generate_batch) holds a paged cache of its own, which cannot be compressed: call "
        "`generate` with a batch, or leave `compressed` first."
    )


def _leave_kind_away(arguments: dict[str, Any], own_kind: str | None) -> None:
    """Take the kind of cache out of the arguments, where it is but the usual one or the model's own setting.

    Raises:
        UsageError: another kind is asked for.
    """
    config = arguments.get("generation_config")
    kinds = [arguments.pop("cache_implementation", None), getattr(config, "cache_implementation", None)]
    for kind in kinds:
        if kind not in (None, "dynamic", own_kind):
            raise UsageError(
                f"cache_implementation={kind!r} asks for another cache than the compressed one: leave it away."
            )
    if kinds[1] is not None:
        arguments["generation_config"] = copy.deepcopy(config)
        arguments["generation_config"].cache_implementation = None


def _continued(model: PreTrainedModel, generate: Callable, cache: Any, arguments: dict[str, Any]) -> Any:
    """Generate over a filled cache; what comes back begins with the ids that were given.

    Raises:
        CacheError: it cannot be told which of the ids the cache has seen, or what is asked for would have to look at
            ids that are not known.
    """
    name = "inputs" if arguments.get("inputs") is not None else "input_ids"
    ids = arguments.get(name)
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return generate(**arguments)
    seen, known = cache.get_seq_length(), cache.token_ids
    beams = max(setting(model, arguments, each) or 1 for each in ("num_beams", "num_return_sequences"))
    _check_batch(cache, len(ids), beams)
    mask = arguments.get("attention_mask")
    covered = ids.shape[1] if mask is None else mask.shape[1]
    known = None if known is None else known[::beams].to(ids.device)
    if covered == ids.shape[1] > seen and (known is None or torch.equal(ids[:, :seen], known)):
        return generate(**arguments)  # all tokens, those that the cache has seen included, as Transformers has it
    arguments["attention_mask"] = _whole_mask(ids, mask, seen)
    if known is None:
        _refuse_lookers(model, arguments)
        return generate(**arguments)
    arguments[name] = torch.cat([known, ids], dim=1)
    _count_from_the_start(arguments, seen)
    made = generate(**arguments)
    if isinstance(made, Tensor):
        return made[:, seen:]
    made.sequences = made.sequences[:, seen:]
    return made


def _check_batch(cache: Any, prompts: int, beams: int) -> None:
    held = cache.batch_size
    if held == prompts * beams:
        return
    if held == prompts:
        raise CacheError(
            f"This cache holds {held} sequences where {beams} for each are asked for: let it hold them by "
            f"cache.batch_repeat_interleave({beams})."
        )
    raise CacheError(f"This cache holds {held} sequences where {prompts} are given: give as many.")


def _whole_mask(ids: Tensor, mask: Tensor | None, seen: int) -> Tensor:
    """Which tokens are no padding, of all that the cache has seen and the new ones after them, `[B, seen + N]`."""
    batch, new = ids.shape
    if mask is not None and mask.shape[1] == seen + new:
        return mask
    if new > seen or batch > 1 or (mask is not None and mask.shape[1] != new):
        raise CacheError(
            f"It cannot be told which of these {new} tokens the cache has seen: give those that follow the {seen} it "
            f"has seen, with an attention_mask over all {seen} and them."
        )
    own = torch.ones_like(ids) if mask is None else mask.to(ids.device)
    return torch.cat([own.new_ones(batch, seen), own], dim=1)


def _refuse_lookers(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    for name, idle in _IDLE.items():
        given = setting(model, arguments, name)
        if name == "logits_processor":
            given = [each for each in given or () if getattr(each, "looks_at_ids", True)]
        if given not in idle:
            raise CacheError(
                f"{name} looks at the ids of all tokens, which this cache does not know of those it has seen: leave "
                "it away, or make the compressed document again with `headprof compress`."
            )


def _count_from_the_start(arguments: dict[str, Any], seen: int) -> None:
    """Let what is said of the ids that were given hold with those before them, too."""
    for name in ("max_length", "min_length"):
        if arguments.get(name) is not None:
            arguments[name] += seen
    if arguments.get("streamer") is not None:
        arguments["streamer"] = _Streamer(arguments["streamer"], seen)


class _Streamer:
    """Hands ids on to a streamer, but for those that a cache has seen, with which the prompt begins."""

    def __init__(self, streamer: Any, seen: int):
        self._streamer = streamer
        self._seen = seen

    def put(self, value: Tensor) -> None:
        if self._seen:
            value, self._seen = value[:, self._seen :], 0
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()
