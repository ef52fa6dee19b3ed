"""Compressing during prefill: the Python API over any model that Transformers' attention interface serves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.hook import attending
from headprof.compression.methods.curve_budget import CURVES, curve_scores
from headprof.compression.methods.given_budget import Budget
from headprof.compression.methods.learned_budget import LEARNED
from headprof.compression.methods.method import Method
from headprof.compression.methods.table import TUNED, find_method, name_of, parse_settings
from headprof.compression.plan import BUFFER, CompressionPlan
from headprof.compression.protected import Keep, ProtectedTokens
from headprof.compression.ranks_check import check_ranks
from headprof.errors import ModelError, ProfileError, UsageError
from headprof.models.decoder import running_model, sliding_windows
from headprof.models.output_projection import projecting_modules
from headprof.models.requirements import require_attention_layers
from headprof.models.rotary import rotary_of
from headprof.models.shape import HeadShape
from headprof.models.tensor_parallel import HeadShard
from headprof.models.token_kinds import TokenKinds
from headprof.profile.commands import score_command
from headprof.profile.refined_rows import REFINED_ROWS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from headprof.profile.head_profile import HeadProfile
    from headprof.profile.surrogate import Surrogate


def make_plan(
    model: PreTrainedModel,
    profile: HeadProfile | None = None,
    *,
    method: str | Method = "headkv-r2",
    budget: int | str | Budget = 64,
    decode_budget: int | str | Budget | None = None,
    buffer: int | None = BUFFER,
    surrogate: Surrogate | None = None,
    tokenizer: Any = None,
    **options,
) -> CompressionPlan:
    """Put a method, a budget and a profile together for a model.

    Args:
        model: the model whose cache is to be compressed, or a wrapper around it: `torch.compile`'s, an adapter of PEFT.
        profile: its head profile, for methods that need one.
        method: a name in `METHODS` or of an installed package's method, or a `Method` itself. Where the profile says
            what parameters it has (`headkv-tuned`, `headkv-refined`), those in the name, `options`, and those of a
            `Method` that are not the table's, stay as they are.
        budget: tokens per KV head (`64`), share of the prompt (`"1.5%"`) or bytes (`"512MB"`).
        decode_budget, buffer: what the cache may hold while generating, as for `CompressionPlan`.
        surrogate: fitted to the model, for methods that judge rows by one (`kvzap`); `load_surrogate` finds it.
        tokenizer: the model's, for methods that judge rows by what tokens they are (`fastgen`).
        options: parameters of the method's parts, such as `window=8`, `keep_last=4`, `pool_factor=1.1`.

    Raises:
        UsageError: no such method or parameter, one is given twice, the budget cannot be read, or the method needs a
            tokenizer.
        ProfileError: the method needs a profile or a surrogate and there is none, or it belongs to another model.
        ModelError: the model's layers keep or turn something else than the method can deal with.
    """
    model = running_model(model)
    if not isinstance(method, str | Method):
        raise UsageError(f"{method!r} is no method: give a name or a headprof.Method.")
    if isinstance(method, Method):
        base, name = method, name_of(method)
    else:
        base, name = find_method(method), method
        find_method(method, **options)  # no parameter is given twice
    chosen = _tuned(base, method, profile).with_options(**options)
    require_attention_layers(model, "its cache cannot be compressed per head")
    shape = HeadShape.from_config(model.config)
    _check_rotary(model, chosen, name, shape)
    shard = HeadShard.of_model(model)
    check_ranks(chosen, _called(name), shard.size)
    if chosen.representation.needs_turning:
        _find_turning(model, shape)
    if chosen.importance.norms:
        projecting_modules(model, shape, f"{_called(name)} with norms")
    scores, digest = _budget_scores(profile, chosen, name, shape)
    chosen = _with_surrogate(chosen, surrogate, name, model, shape)
    chosen = _with_token_kinds(chosen, tokenizer, name)
    element = torch.empty(0, dtype=model.dtype).element_size()
    return CompressionPlan(
        chosen,
        Budget.parse(budget),
        shape,
        scores,
        element,
        name=name,
        profile_digest=digest,
        decode_budget=None if decode_budget is None else Budget.parse(decode_budget),
        buffer=buffer,
        windows=sliding_windows(model.config),
        shard=shard,
    )


def _tuned(method: Method, given: str | Method, profile: HeadProfile | None) -> Method:
    """A method with the parameters that serve the profile's model best, if it is one that has these.

    Args:
        method: as it was made.
        given: its name, with the parameters that the user gave there, or itself.
        profile: the model's.

    Raises:
        ProfileError: the profile is not tuned.
    """
    if not method.budget.tuned or profile is None:
        return method
    if isinstance(given, str):
        fixed = parse_settings(given.split(":")[1:])
    else:
        usual = find_method(name_of(method) or TUNED).options()
        fixed = {name: value for name, value in method.options().items() if value != usual.get(name)}
    tuned = find_method(TUNED)  # how its budgets follow scores is nothing to a method whose budgets follow none
    found = {
        name: value for name, value in profile.tuned.items() if method.has_option(name) or not tuned.has_option(name)
    }
    return method.with_options(**{**found, **fixed})


def _budget_scores(
    profile: HeadProfile | None, method: Method, name: str, shape: HeadShape
) -> tuple[torch.Tensor, str]:
    """What the method spends its budget by, `[L, K]` or more, and the digest of the profile that it is from."""
    which = method.budget.profile_scores
    if which is None:
        return torch.ones(shape.num_layers, shape.num_kv_heads), ""
    if profile is None:
        raise ProfileError(f"{_called(name)} needs a head profile: make one with `headprof score`, or choose snapkv.")
    _check_profile(profile, shape)
    if which == LEARNED:
        kept = profile.reconstruction
        if getattr(method.budget, "mix", 0):
            if "reasoning" not in profile.scores:
                raise ProfileError(
                    f"{_called(name)} with a mix needs reasoning scores, which the profile lacks: leave mix away."
                )
            kept = torch.cat([kept, profile.kv_head_scores("reasoning")[None]])
        return kept, profile.digest()
    if which == REFINED_ROWS:
        return profile.refined, profile.digest()
    if which.startswith(CURVES):
        return curve_scores(profile.curves_of(which.removeprefix(CURVES))), profile.digest()
    if which not in profile.kinds:
        raise ProfileError(
            f"{_called(name)} spends its budget by {which} scores, which the profile of {profile.model_name} does not "
            f"hold: run `{score_command(profile.called, which)}`, or choose another kind, such as "
            f"scores={profile.kinds[0]}."
        )
    return profile.kv_head_scores(which, getattr(method.budget, "aggregate", "max")), profile.digest()


def _with_surrogate(
    method: Method, surrogate: Surrogate | None, name: str, model: PreTrainedModel, shape: HeadShape
) -> Method:
    """The method, judging by this surrogate if it judges by one.

    Raises:
        ProfileError: it does, and there is none, or it is for another model.
    """
    if not method.importance.needs_surrogate:
        return method
    if surrogate is None:
        raise ProfileError(
            f"{_called(name)} needs a surrogate: make one with `headprof score --surrogate`, or choose kvzip."
        )
    surrogate.check_model(model, shape)
    return replace(method, importance=method.importance.with_surrogate(surrogate))


def _with_token_kinds(method: Method, tokenizer: Any, name: str) -> Method:
    """The method, knowing the kinds of the tokenizer's tokens if it judges by them.

    Raises:
        UsageError: it does, and there is no tokenizer.
    """
    if not method.importance.needs_token_kinds:
        return method
    if tokenizer is None:
        raise UsageError(
            f"{_called(name)} judges rows by what tokens they are: give tokenizer=loaded.tokenizer, or choose h2o."
        )
    kinds = TokenKinds.of_tokenizer(tokenizer)
    return replace(method, importance=method.importance.with_token_kinds(kinds))


def _called(name: str) -> str:
    return f"The method {name!r}" if name else "This method"


def _check_rotary(model: PreTrainedModel, method: Method, name: str, shape: HeadShape) -> None:
    """
    Raises:
        ModelError: the method turns queries to other positions, and some layer's rotary embedding cannot be had.
    """
    if not method.importance.needs_rotary:
        return
    found = [rotary_of(model, layer_idx) for layer_idx in range(shape.num_layers)]
    kinds = {rotary and rotary.layer_type: rotary for rotary in found}
    if not all(rotary is not None and rotary.turns_back(shape.head_dim) for rotary in kinds.values()):
        raise ModelError(
            f"{_called(name)} needs rotary embeddings as Transformers' Llama has them, which {type(model).__name__} "
            "has not: choose another method."
        )


def _find_turning(model: PreTrainedModel, shape: HeadShape) -> None:
    """Try out how keys are turned, for which the host waits, before any layer is compressed."""
    for rotary in {rotary_of(model, layer_idx) for layer_idx in range(shape.num_layers)}:
        if rotary is not None:
            rotary.turning(shape.head_dim)


def _check_profile(profile: HeadProfile, shape: HeadShape) -> None:
    """
    Raises:
        ProfileError: the profile is for a model of another shape.
    """
    if differences := profile.shape.differences(shape):
        raise ProfileError(
            f"The profile is for another model ({', '.join(differences)}): make one with `headprof score`."
        )


def attending_ragged(
    model: PreTrainedModel, *, backend: str = "auto", prefill_chunk: int | None = None, step: str = "auto"
) -> AbstractContextManager[None]:
    """Let `model` fill and read `HeadCache`s passed as `past_key_values`; other caches work as ever.

    Args:
        model: the model.
        backend: the attention over compressed rows, a name in `BACKENDS`, or `"auto"` for the fastest that works here.
        prefill_chunk: run each layer over a prompt in chunks of this many tokens, so that what it needs besides the
            prompt's hidden states does not grow with the prompt; `None` for all at once.
        step: how a decode step is run. `"graph"` captures it as a CUDA graph once nothing in it moves any more, and
            replays that, with the same numbers; `"compiled"` lets `torch.compile` work on it before (a minute, numbers
            differ by rounding), `"eager"` issues it anew each time; `"auto"` is `"graph"` on a CUDA device, else
            `"eager"`.

    Raises:
        UsageError: the backend or the way to run a step cannot be used here, or the chunk is not positive.
        ModelError: the model's attention or layers cannot be reached.
    """
    return attending(model, backend=backend, prefill_chunk=prefill_chunk, step=step)


@contextmanager
def compressed(
    model: PreTrainedModel,
    profile: HeadProfile | None = None,
    *,
    method: str | Method = "headkv-r2",
    budget: int | str | Budget = 64,
    backend: str = "auto",
    prefill_chunk: int | None = None,
    step: str = "auto",
    decode_budget: int | str | Budget | None = None,
    buffer: int | None = BUFFER,
    keep: Keep | None = None,
    surrogate: Surrogate | None = None,
    tokenizer: Any = None,
    **options,
) -> Iterator[CompressionPlan]:
    """Generate with a compressed cache: `with compressed(model, profile, budget=64): model.generate(...)`.

    Every cache that `model.generate` or `model(...)` would start inside the context becomes a `HeadCache`, whichever
    kind the model's settings name. One that is passed to `generate` as `past_key_values` is used as it is, and so is
    one that is passed to `model(...)` and not empty. Of nested contexts the inner one counts. Leaving the context, in
    whatever order and also by an exception, leaves the model exactly as it was. Only one thread at a time enters it.

    Args:
        model, profile, method, budget, decode_budget, buffer, surrogate, tokenizer, options: as for `make_plan`.
        backend, prefill_chunk, step: as for `attending_ragged`.
        keep: tokens of every prompt that all heads keep, as for `HeadCache.protect`.

    Yields:
        The plan, from which `HeadCache(plan)` makes caches to pass in by hand; in these `protect` names what is kept.

    Raises:
        ModelError: no model is known inside the wrapper, its attention or layers cannot be reached, or another thread
            holds it.
        HeadprofError: what `make_plan` raises.
    """
    plan = make_plan(
        model,
        profile,
        method=method,
        budget=budget,
        decode_budget=decode_budget,
        buffer=buffer,
        surrogate=surrogate,
        tokenizer=tokenizer,
        **options,
    )

    protected = ProtectedTokens.of(keep)

    def new_cache() -> HeadCache:
        return HeadCache(plan).protect(protected)

    with attending(model, backend=backend, prefill_chunk=prefill_chunk, step=step, new_cache=new_cache):
        yield plan


@torch.no_grad()
def prefill(model: PreTrainedModel, input_ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Run a prompt `[B, T]` into `cache`; returns the logits of its last token, `[B, vocabulary]`.

    Call it inside `attending_ragged` or `compressed`.
    """
    return model(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
