"""A compressed document on disk: compress once, ask in later processes, many times.

A file is safetensors: `layers.{l}.keys` and `.values` `[rows, D]`, `.positions` int32 `[rows]`, `.lengths` int32
`[B, K]`; where rows carry them `.bias` (merged or fitted rows) and `.received` (attention so far), float32 `[rows]`;
where some are packed `.packed` int32 `[B, K]`, how many of each head, and what holds their keys and values by the names
of its parts (see `kernels.quantised_rows`, `thinned_rows`, `low_rank_rows` and `latent_rows`); where the next
compression needs them `.queries` `[B, H, N, D]`, those of the last tokens, and `.judges` bool `[B, N]`, false for
padding among these; `scores` float32 `[L, K]`, by which heads share the budget while text is generated
(`[S, L, K]` where budgets were learned), or in their place `shares` `[L, K]` or `[B, L, K]`, where what the document
holds decided how many rows each head kept; where they are known, `ids` int32 `[B, tokens seen]`, the document's tokens,
which logits processors may look at; `protected` bool `[B, tokens seen]`, true for tokens that every head keeps, if
there are any; where heads may bring back rows that they have evicted, `.recalled` int32 `[B, K]`, how many each may,
and these rows in clusters (see `document_tier`); and `surrogate.NAME`, the tensors of the surrogate by which the method
judges rows, if it does, so that what comes after the document is judged alike wherever the file is read. Its metadata
name the model (shape, weights and tokenizer fingerprints), the method and its parameters, the budgets, the profile and
the surrogate, the tokens seen, how each layer makes logits of those queries, and a checksum over all of it; where rows
and tokens seen do not tell how many more tokens a layer takes before it is compressed again, `left` says it for each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.cache.head_layer import HeadCacheLayer
from headprof.compression.cache.recent_queries import RecentQueries
from headprof.compression.cache.second_tier import joined_tiers, without_slots
from headprof.compression.cache.whole_cache import own_cache, whole_cache
from headprof.compression.document_checks import SURROGATE, DocumentFacts, check_numbers, check_stored
from headprof.compression.document_origin import (
    FORMAT,
    FORMAT_VERSION,
    MEND,
    READABLE,
    Origin,
    check_origin,
    header_facts,
)
from headprof.compression.document_tier import TIER_ROWS, saved_tier, tier_parts
from headprof.compression.kernels.packed_kinds import as_facts, from_facts
from headprof.compression.kernels.packed_rows import PackedRows
from headprof.compression.methods.given_budget import Budget
from headprof.compression.methods.observation import AttentionLayer
from headprof.compression.methods.table import find_method
from headprof.compression.plan import CompressionPlan
from headprof.compression.protected import ProtectedTokens
from headprof.compression.ranks_check import check_ranks
from headprof.compression.rows import COLUMNS, Rows
from headprof.errors import CacheError
from headprof.models.decoder import layer_device, sliding_windows
from headprof.models.fingerprints import tokenizer_fingerprint, weights_fingerprint, weights_fingerprints
from headprof.models.output_projection import projecting_modules
from headprof.models.rotary import rotary_of
from headprof.models.token_kinds import TokenKinds
from headprof.profile.surrogate import Surrogate
from headprof.profile.surrogate_checks import check_parts
from headprof.utils.files import atomic_write
from headprof.utils.tensor_files import checksum, open_tensors

if TYPE_CHECKING:
    from headprof.models.loading import LoadedModel


def save_document(
    cache: HeadCache, path: str | Path, loaded: LoadedModel, notes: Mapping[str, str] | None = None
) -> None:
    """Write a compressed cache atomically; free space is left out.

    Where several processes hold the model, each must call this, and the first one writes.

    Args:
        cache: filled from a document, on any device.
        path: the file.
        loaded: the model and tokenizer that filled it.
        notes: more metadata, such as the document's name.

    Raises:
        CacheError: the method has no name by which it would be found again, or it is a stack of caches of which only
            some bring back rows.
        HeadprofError: the disk refused.
    """
    from safetensors.torch import save_file

    if not cache.plan.name:
        raise CacheError(
            "A document compressed by a method without a name could not be continued: give the method a name by an "
            "entry point of the group headprof.methods."
        )

    whole, weights = whole_cache(cache), weights_fingerprint(loaded.model)
    if whole is not None:
        tensors = _tensors(whole)
        metadata = _metadata(whole, loaded, weights)
        metadata |= notes or {}
        metadata["checksum"] = checksum(tensors, metadata)
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    loaded.shard.of_first(None)  # no process goes on before the file is there


def _budget_facts(budget: Budget) -> dict[str, Any]:
    """A budget as the file has it: a threshold only where there is one."""
    return {name: value for name, value in asdict(budget).items() if value is not None}


def _tensors(cache: HeadCache) -> dict[str, torch.Tensor]:
    """What a file holds of a cache, by its names there, on the CPU."""
    tensors: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(cache.head_layers):
        parts = _parts(layer).items()
        tensors |= {f"layers.{index}.{name}": part.cpu().contiguous() for name, part in parts if part is not None}
    plan = cache.plan
    tensors["scores"] = plan.scores.float().contiguous()
    if plan.shares is not None:
        tensors["shares"] = plan.shares.float().contiguous()
    if plan.surrogate is not None:
        tensors |= {f"{SURROGATE}{name}": part for name, part in plan.surrogate.tensors().items()}
    if (ids := cache.token_ids) is not None:
        tensors["ids"] = ids.to("cpu", torch.int32).contiguous()
    if (protected := cache.protected) is not None:
        tensors["protected"] = protected.marks(cache.batch_size, cache.get_seq_length())
    return tensors


def _metadata(cache: HeadCache, loaded: LoadedModel, weights: str) -> dict[str, str]:
    """What a file says of a cache that a model with these weights has filled."""
    plan = cache.plan
    packed = [as_facts(layer.storage.rows.packed) for layer in cache.head_layers]
    options = _options(plan)
    metadata = {
        "format": FORMAT,
        "format_version": _version(cache, any(packed) or "representation" in options),
        "model": loaded.name,
        "fingerprint": json.dumps(loaded.shape.to_dict()),
        "weights": weights,
        "tokenizer": tokenizer_fingerprint(loaded.tokenizer),
        "method": plan.name,
        "options": json.dumps(options),
        "budget": json.dumps(_budget_facts(plan.budget)),
        "decode_budget": json.dumps(plan.decode_budget and _budget_facts(plan.decode_budget)),
        "buffer": json.dumps(plan.buffer),
        "profile": plan.profile_digest,
        **({} if plan.surrogate is None else {"surrogate": plan.surrogate.digest()}),
        "tokens_seen": str(cache.get_seq_length()),
        "logits": json.dumps([_logits(layer.held.recent) for layer in cache.head_layers]),
    }
    left = [layer.schedule.left_to_note(layer.seen, layer.storage) for layer in cache.head_layers]
    if any(each is not None for each in left):
        metadata["left"] = json.dumps(left)
    if padding := cache.head_layers[0].schedule.padding:
        metadata["padding"] = json.dumps(padding)
    if any(packed):
        metadata["packed"] = json.dumps(packed)
    return metadata


def _version(cache: HeadCache, of_representation: bool) -> str:
    """The oldest format that says all of a cache, or of its method."""
    plan = cache.plan
    if plan.method.recall.is_on or find_method(plan.name).recall.is_on:
        return FORMAT_VERSION
    if of_representation:
        return READABLE[2]
    new = plan.shares, plan.surrogate, cache.protected
    beyond_third = plan.scores.ndim > 2 or any(each is not None for each in new)
    return READABLE[1] if beyond_third else READABLE[0]


def _options(plan: CompressionPlan) -> dict[str, Any]:
    """A method's parameters as the file has them.

    That rows are held in full, and are not brought back, is said only where the method's name says otherwise.
    """
    options = plan.method.options()
    if not plan.method.recall.is_on and not find_method(plan.name).recall.is_on:
        options = {name: value for name, value in options.items() if not hasattr(plan.method.recall, name)}
    if plan.method.representation.is_full and find_method(plan.name).representation.is_full:
        options.pop("representation", None)
    return options


def _logits(recent: RecentQueries) -> dict[str, Any]:
    """How a layer makes logits of its remembered queries, as the file has it; where there are none it is left open."""
    if not len(recent):
        return {"scaling": 1.0}
    layer = recent.layer
    return {"scaling": layer.scaling, "softcap": layer.softcap, "sliding_window": layer.sliding_window}


def _parts(layer: HeadCacheLayer) -> dict[str, torch.Tensor | None]:
    """A layer's tensors by their names in the file."""
    rows = layer.storage.compact()
    tier = joined_tiers(layer.tiers)
    if tier is not None and tier.num_heads != layer.storage.num_heads:
        raise CacheError("Of this stack of caches only some bring back rows: save each of them by itself.")
    if tier is not None:
        rows = without_slots(rows, tier.slots)
    lengths = torch.tensor(rows.known_lengths(), dtype=torch.int32)
    queries, valid = layer.held.recent.joined()
    return {
        "keys": rows.keys,
        "values": rows.values,
        "positions": rows.positions,
        "lengths": lengths.reshape(layer.batch_size, layer.num_kv_heads),
        **rows.columns,
        "queries": queries,
        "judges": valid,
        **_packed_parts(layer, rows.packed),
        **({} if tier is None else tier_parts(tier, layer.batch_size)),
    }


def _packed_parts(layer: HeadCacheLayer, packed: PackedRows | None) -> Mapping[str, torch.Tensor]:
    """How many rows of each head are packed, and what holds them; nothing where none are."""
    if packed is None:
        return {}
    counts = torch.tensor(packed.counts, dtype=torch.int32).reshape(layer.batch_size, layer.num_kv_heads)
    return {"packed": counts, **packed.parts}


def load_document(path: str | Path, loaded: LoadedModel) -> tuple[HeadCache, dict[str, str]]:
    """Read a compressed cache for the model that made it.

    Continue it inside `attending_ragged(loaded.model)` or `compressed(...)`, with the tokens that follow the document.

    Returns:
        The cache, on the model's devices, and the file's metadata. Of a model that several processes hold each has its
        own heads' rows.

    Raises:
        CacheError: the file is missing, damaged, altered, no compressed cache, of another version, or made with
            another model, tokenizer or dtype.
        ModelError: it was judged with norms, for which the model's output projections cannot be had.
        UsageError: its rows cannot be shared by the processes that hold the model together.
    """
    path = Path(path)
    tensors, metadata, facts = _read(path, loaded)
    check_ranks(facts.method, f"The document {path}", loaded.shard.size, is_made=True)
    plan = _saved_plan(loaded, facts, tensors["scores"], tensors.get("shares"))
    if facts.method.importance.needs_surrogate:
        plan = _judging_by(plan, _saved_surrogate(path, tensors, metadata, loaded))
    if plan.method.importance.needs_token_kinds:
        plan = _knowing(plan, TokenKinds.of_tokenizer(loaded.tokenizer))
    layers = [HeadCacheLayer(index, plan) for index in range(loaded.shape.num_layers)]
    weighs = plan.method.importance.norms
    modules = (
        projecting_modules(loaded.model, loaded.shape, f"The document {path}, judged with norms,") if weighs else ()
    )
    for layer, logits in zip(layers, facts.logits, strict=True):
        prefix, device = f"layers.{layer.layer_idx}.", layer_device(loaded.model, layer.layer_idx)
        own = {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}
        own = {name: part if name in TIER_ROWS else part.to(device) for name, part in own.items()}
        module = modules[layer.layer_idx] if modules else None
        how = AttentionLayer(**logits, rotary=rotary_of(loaded.model, layer.layer_idx), module=module)
        _restore(layer, own, facts, how)
        layer.schedule.padding = facts.padding
        layer.schedule.resume(facts.left[layer.layer_idx])
    cache = HeadCache.of_layers(layers)
    cache.goes_on_protecting(ProtectedTokens.of(tensors.get("protected")))
    if "ids" in tensors:
        cache.with_tokens(_saved_ids(path, tensors["ids"], cache, loaded))
    return own_cache(cache, loaded.shard), metadata


def _read(path: Path, loaded: LoadedModel) -> tuple[dict[str, torch.Tensor], dict[str, str], DocumentFacts]:
    """A file's tensors and metadata, and what these say; nothing large is read before its size is known to be right.

    Raises:
        CacheError: as `load_document`.
    """
    with open_tensors(path, "compressed document", MEND, CacheError) as file:
        metadata = file.metadata
        facts = header_facts(path, metadata)
        try:
            check_stored(file, facts)
        except ValueError as error:
            raise CacheError(f"The compressed document {path} is damaged ({error}): restore it, or {MEND}.") from error
        tensors = file.read_all()
    if checksum(tensors, metadata) != metadata.get("checksum"):
        raise CacheError(f"The compressed document {path} has been altered since it was made: restore it, or {MEND}.")
    try:
        check_numbers(tensors, facts)
    except ValueError as error:
        raise CacheError(f"The compressed document {path} is damaged ({error}): restore it, or {MEND}.") from error
    check_origin(path, metadata, facts.shape, tensors["layers.0.keys"].dtype, Origin.of(loaded))
    return tensors, metadata, facts


def _saved_ids(path: Path, ids: torch.Tensor, cache: HeadCache, loaded: LoadedModel) -> torch.Tensor:
    """The document's tokens, int64 `[B, tokens seen]`."""
    size = loaded.shape.vocab_size
    right_shape = ids.dtype == torch.int32 and tuple(ids.shape) == (cache.batch_size, cache.get_seq_length())
    if not right_shape or bool(((ids < 0) | (ids >= size)).any()):
        raise CacheError(f"The compressed document {path} holds token ids that are not those of its tokens: {MEND}.")
    return ids.long().to(loaded.device)


def _saved_plan(
    loaded: LoadedModel, facts: DocumentFacts, scores: torch.Tensor, shares: torch.Tensor | None
) -> CompressionPlan:
    """The plan by which the document was compressed, for what comes after it."""
    # A buffer beyond what the model can read asks for memory that nothing would ever fill.
    buffer = None if facts.buffer is None else min(facts.buffer, max(1, loaded.max_positions))
    return CompressionPlan(
        facts.method,
        facts.budget,
        loaded.shape,
        scores,
        torch.empty(0, dtype=loaded.dtype).element_size(),
        name=facts.name,
        profile_digest=facts.profile_digest,
        decode_budget=facts.decode_budget,
        buffer=buffer,
        windows=sliding_windows(loaded.model.config),
        shares=shares,
    )


def _saved_surrogate(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], loaded: LoadedModel
) -> Surrogate:
    """The surrogate by which the document's rows were judged."""
    parts = {name.removeprefix(SURROGATE): part for name, part in tensors.items() if name.startswith(SURROGATE)}
    features = check_parts(parts)
    own = str(loaded.dtype).removeprefix("torch.")
    surrogate = Surrogate(
        loaded.name,
        loaded.shape,
        weights_fingerprints(loaded.model),
        own,
        features,
        {name: part for name, part in parts.items() if name != "partner"},
    )
    if surrogate.digest() != metadata.get("surrogate"):
        raise CacheError(f"The compressed document {path} holds another surrogate than it says: restore it, or {MEND}.")
    return surrogate


def _judging_by(plan: CompressionPlan, surrogate: Surrogate) -> CompressionPlan:
    method = plan.method
    return replace(plan, method=replace(method, importance=method.importance.with_surrogate(surrogate)))


def _knowing(plan: CompressionPlan, kinds: TokenKinds) -> CompressionPlan:
    method = plan.method
    return replace(plan, method=replace(method, importance=method.importance.with_token_kinds(kinds)))


def _restore(
    layer: HeadCacheLayer, parts: Mapping[str, torch.Tensor], facts: DocumentFacts, how: AttentionLayer
) -> None:
    """Give a layer back what `_parts` took from it."""
    keys, lengths = parts["keys"], parts["lengths"]
    layer.batch_size, layer.num_kv_heads, layer.head_dim = *lengths.shape, keys.shape[-1]
    layer.dtype, layer.device, layer.seen = keys.dtype, keys.device, facts.seen
    columns = {name: parts[name] for name in COLUMNS if name in parts}
    recent = RecentQueries(layer=how)
    if "queries" in parts:
        recent = RecentQueries(parts["queries"], parts.get("judges"), how)
    rows = Rows(keys, parts["values"], parts["positions"], lengths.flatten().tolist(), columns)
    if (packed := facts.packed[layer.layer_idx]) is not None:
        rows = replace(rows, packed=from_facts(packed, parts, parts["packed"].flatten().tolist()))
    recall = facts.method.recall
    layer.hold(rows, recent, tier=saved_tier(parts, recall, layer.schedule.window) if recall.is_on else None)
    layer.storage.hides = "bias" in columns and bool(columns["bias"].isneginf().any())
