"""What a compressed document must be for its parts to be used: looked at in its header first, and once it is read.

A file with the right checksum may still say anything, since anybody can compute one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from headprof.compression.document_packed import (
    PACKED_PARTS,
    check_packed_counts,
    check_packed_numbers,
    check_packed_sizes,
    packed_facts,
)
from headprof.compression.document_tier import TIER_PARTS, bytes_that_stay, check_tier_counts, check_tier_sizes
from headprof.compression.kernels.packed_kinds import ALL_PARTS
from headprof.compression.methods.curve_budget import CURVES, curve_scores_fault
from headprof.compression.methods.given_budget import Budget
from headprof.compression.methods.learned_budget import LEARNED
from headprof.compression.methods.method import Method
from headprof.compression.methods.table import find_method
from headprof.errors import UsageError
from headprof.models.shape import HeadShape
from headprof.profile.faults import LARGEST_SCORE
from headprof.profile.influence import MOST_POINTS
from headprof.profile.kept_shares import MOST_SHARES, kept_shares_fault
from headprof.profile.refined_rows import REFINED_ROWS, refined_rows_fault
from headprof.profile.surrogate_checks import check_parts
from headprof.profile.surrogate_checks import check_stored as check_surrogate
from headprof.utils.memory import free_bytes
from headprof.utils.records import is_whole, make_record, parse_json, parse_object, plain
from headprof.utils.tensor_files import Stored, TensorFile

_NEEDED = ("keys", "values", "positions", "lengths")
_OPTIONAL = ("bias", "received", "queries", "judges")
_PARTS = (*_NEEDED, *_OPTIONAL, *PACKED_PARTS, *TIER_PARTS)
SURROGATE = "surrogate."
"""What the names of a surrogate's tensors begin with."""
_FLOATS = ("F32", "F16", "BF16", "F64")
_MOST_TOKENS = 2**31 - 1
_MOST_HEADS = 2**22
_LONGEST_NAME = 200
_MOST_BYTES = 2.0**63
_LARGEST = 1e15
"""Of numbers that go into products; what a model comes to is far below."""
_UNITS = {"tokens": _MOST_BYTES, "share": 1.0, "share of bytes": 1.0, "bytes": _MOST_BYTES}


@dataclass(frozen=True)
class DocumentFacts:
    """What a document's metadata say.

    Attributes:
        shape: of the model that made it.
        method: with the parameters that it was made with.
        name: of the method.
        budget, decode_budget, buffer: as `CompressionPlan` has them.
        profile_digest: of the head profile; empty without one.
        seen: tokens of the sequence.
        logits: of each layer, what `AttentionLayer` is made of.
        left: of each layer, tokens until it is compressed again, where that was noted; else `None`.
        packed: of each layer, how those of its rows are held that are not held in full; `None` where all are.
        padding: of each sequence, how many tokens of the prompt are padding; empty where none are.
    """

    shape: HeadShape
    method: Method
    name: str
    budget: Budget
    decode_budget: Budget | None
    buffer: int | None
    profile_digest: str
    seen: int
    logits: list[dict[str, Any]]
    left: list[int | None]
    packed: list[dict[str, int] | None]
    padding: tuple[int, ...] = ()


def read_facts(metadata: Mapping[str, str]) -> DocumentFacts:
    """A document's metadata, each in its type and range.

    Raises:
        ValueError: one is missing or cannot be; the message says which.
    """
    try:
        shape = HeadShape.from_dict(parse_json(metadata["fingerprint"]))
        promised_loss(metadata)
        name = _method_name(metadata["method"], metadata["options"])
        return DocumentFacts(
            shape,
            _method(name, metadata["options"]),
            name,
            _budget(parse_json(metadata["budget"])),
            _decode_budget(metadata["decode_budget"]),
            _buffer(parse_json(metadata["buffer"])),
            metadata["profile"],
            _tokens_seen(metadata["tokens_seen"]),
            _logits(parse_json(metadata["logits"]), shape.num_layers),
            _left(parse_json(metadata.get("left", "null")), shape.num_layers),
            packed_facts(metadata, shape.num_layers),
            _padding(parse_json(metadata.get("padding", "[]")), _tokens_seen(metadata["tokens_seen"])),
        )
    except KeyError as error:
        raise ValueError(f"its {error.args[0]} is missing") from None


def promised_loss(metadata: Mapping[str, str]) -> float | None:
    """Nats a token that a document may have lost, if that was promised.

    Raises:
        ValueError: what was promised cannot be.
    """
    value = parse_json(metadata.get("promised_loss", "null"))
    if value is not None and not _is_positive(value):
        raise ValueError("its promised_loss is no number of nats above 0")
    return value


def _left(values: Any, num_layers: int) -> list[int | None]:
    if values is None:
        return [None] * num_layers
    known = isinstance(values, list) and len(values) == num_layers
    if not known or not all(each is None or (type(each) is int and abs(each) < 2**31) for each in values):
        raise ValueError("what it says is left before it is compressed again is no whole number for each layer")
    return values


def _padding(values: Any, seen: int) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(each) is int and 0 <= each <= seen for each in values):
        raise ValueError("its padding is no number of seen tokens for each sequence")
    return tuple(values)


def _method_name(name: str, options: str) -> str:
    """What a method is called now: `kvzip` once shared out each layer's tokens by AdaKV's rule."""
    return "adakv-kvzip" if name == "kvzip" and "safeguard" in parse_object(options) else name


def _method(name: str, options: str) -> Method:
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"the name of its method is longer than {_LONGEST_NAME} characters")
    method, given = find_method(name), parse_object(options)
    try:
        known = method.own_options(given)
        if unknown := [option for option in given if option not in known]:
            raise ValueError(f"its method has no parameter {plain(unknown[0])}")
        return method.with_options(**given)
    except UsageError as error:
        raise ValueError(f"its options cannot be: {str(error).removesuffix('.')}") from None


def _budget(values: Any) -> Budget:
    budget = make_record(Budget, values)
    if budget.unit not in _UNITS:
        raise ValueError(f"its budget has an unknown unit {plain(budget.unit)}")
    if not 0 < budget.amount <= _UNITS[budget.unit]:
        raise ValueError(f"its budget cannot be {budget.amount:g}")
    if budget.above is not None and not 0 <= budget.above < _LARGEST:
        raise ValueError(f"its threshold cannot be {budget.above:g}")
    return budget


def _decode_budget(text: str) -> Budget | None:
    values = parse_json(text)
    if values is None:
        return None
    if (budget := _budget(values)).above is not None:
        raise ValueError("its budget while generating is a threshold")
    return budget


def _buffer(value: Any) -> int | None:
    if value is not None and not is_whole(value, 1, int(_MOST_BYTES)):
        raise ValueError("its buffer is no number of tokens")
    return value


def _tokens_seen(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and 0 < int(text) <= _MOST_TOKENS):
        raise ValueError("its tokens_seen is no number of tokens")
    return int(text)


def _logits(values: Any, num_layers: int) -> list[dict[str, Any]]:
    if not isinstance(values, list) or len(values) != num_layers:
        raise ValueError("its logits are not those of its layers")
    for layer in values:
        if not isinstance(layer, dict) or not {"scaling"} <= layer.keys() <= {"scaling", "softcap", "sliding_window"}:
            raise ValueError("its logits are not those of its layers")
        softcap, window = layer.get("softcap"), layer.get("sliding_window")
        if not _is_positive(layer["scaling"]) or not (softcap is None or _is_positive(softcap)):
            raise ValueError("its logits have a factor or a bound that is no number above 0")
        if not (window is None or is_whole(window, 1, _MOST_TOKENS)):
            raise ValueError("its logits have a sliding_window that is no number of tokens")
    return values


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def check_stored(file: TensorFile, facts: DocumentFacts) -> None:
    """Look at the sizes of a document's tensors; of their numbers only `lengths` is read.

    Raises:
        ValueError: one is missing, unknown or not of the size that the others and the metadata call for, or there is
            not the memory for all of them.
    """
    if (read := file.size - bytes_that_stay(file.stored)) > free_bytes("cpu"):
        raise ValueError(f"its {read / 1e9:.1f} GB are more than the memory that is free")
    shape, stored = facts.shape, dict(file.stored)
    grid = (shape.num_layers, shape.num_kv_heads)
    scores = stored.pop("scores", Stored("", ()))
    if scores.dtype != "F32" or scores.shape[-2:] != grid or not _right_number(scores.shape[:-2], facts.method):
        raise ValueError("its scores are not float32, one for each KV head")
    surrogate = {name: stored.pop(name) for name in list(stored) if name.startswith(SURROGATE)}
    if facts.method.importance.needs_surrogate:
        check_surrogate({name.removeprefix(SURROGATE): part for name, part in surrogate.items()}, shape)
    elif surrogate:
        raise ValueError("it holds a surrogate, by which its method judges nothing")
    first = stored.get("layers.0.lengths", Stored("", ()))
    batch = first.shape[0] if len(first.shape) == 2 else 0
    if not 1 <= batch * shape.num_kv_heads <= _MOST_HEADS:
        raise ValueError("its lengths are not those of sequences and KV heads")
    if facts.padding and len(facts.padding) != batch:
        raise ValueError("its padding is no number for each sequence")
    if stored.pop("shares", None) not in (None, Stored("F32", grid), Stored("F32", (batch, *grid))):
        raise ValueError("its shares are not float32, one for each KV head")
    if stored.pop("ids", None) not in (None, Stored("I32", (batch, facts.seen))):
        raise ValueError("its ids are not one for each token that was seen")
    prefixes = [f"layers.{layer}." for layer in range(min(shape.num_layers, len(stored)))]
    if stored.pop("protected", None) not in (None, Stored("BOOL", (batch, facts.seen))):
        raise ValueError("its protected are not one mark for each token that was seen")
    if unknown := sorted(stored.keys() - {p + part for p in prefixes for part in _PARTS}):
        raise ValueError(f"it holds an unknown tensor {plain(unknown[0])}")
    for number, prefix in enumerate(prefixes):
        own = {part: stored[prefix + part] for part in _PARTS if prefix + part in stored}
        _check_layer(prefix, own, facts, batch)
        check_packed_sizes(prefix, own, facts.packed[number], facts.shape, batch)
        check_tier_sizes(prefix, own, facts.method.recall.is_on, facts.shape, batch)
    if len(prefixes) != shape.num_layers:
        raise ValueError("it lacks layers")
    for number, prefix in enumerate(prefixes):
        lengths = file.read(f"{prefix}lengths")
        _check_lengths(prefix, lengths, stored[f"{prefix}positions"].shape[0], facts.seen)
        if facts.method.recall.is_on:
            recalled, sizes = (file.read(f"{prefix}{part}") for part in ("recalled", "tier_sizes"))
            check_tier_counts(prefix, recalled, sizes, stored[f"{prefix}tier_positions"].shape[0], facts.seen)
        if (packed := facts.packed[number]) is not None:
            own = {part: stored[prefix + part] for part in PACKED_PARTS if prefix + part in stored}
            check_packed_counts(prefix, own, packed, file.read(f"{prefix}packed"), lengths)


def _right_number(leading: tuple[int, ...], method: Method) -> bool:
    """Whether there are as many scores for each KV head as its method goes by."""
    which = method.budget.profile_scores or ""
    if which.startswith(CURVES):
        return len(leading) == 2 and leading[0] == 2 and 1 <= leading[1] <= MOST_POINTS
    if which in (LEARNED, REFINED_ROWS):
        return len(leading) == 1 and 1 <= leading[0] <= MOST_SHARES + 1
    return not leading


def _check_layer(prefix: str, own: Mapping[str, Stored], facts: DocumentFacts, batch: int) -> None:
    """Names, types and sizes of one layer's tensors."""
    if missing := [part for part in _NEEDED if part not in own]:
        raise ValueError(f"it lacks the tensor {prefix}{missing[0]}")
    shape, keys = facts.shape, own["keys"]
    rows = (math.prod(own["positions"].shape),)
    in_full = keys.shape[:1] if "packed" in own else rows
    queries = own.get("queries", Stored("", ()))
    newest = queries.shape[2:3]
    wanted = {
        "keys": (_FLOATS, (*in_full, shape.head_dim)),
        "values": ((keys.dtype,), (*in_full, shape.head_dim)),
        "positions": (("I32",), rows),
        "lengths": (("I32",), (batch, shape.num_kv_heads)),
        "bias": (("F32",), rows),
        "received": (("F32",), rows),
        "queries": (_FLOATS, (batch, shape.num_heads, *newest, shape.head_dim)),
        "judges": (("BOOL",), (batch, *newest)),
    }
    for part, (dtypes, sizes) in wanted.items():
        if (stored := own.get(part)) is None:
            continue
        if stored.dtype not in dtypes or stored.shape != sizes:
            raise ValueError(
                f"its {prefix}{part} are {stored.dtype} {list(stored.shape)} where {list(sizes)} of {dtypes[0]} belong"
            )
    if "judges" in own and "queries" not in own:
        raise ValueError(f"its {prefix}judges are of no queries")
    if newest and newest[0] > facts.seen:
        raise ValueError(f"its {prefix}queries are more than the tokens that were seen")


def _check_lengths(prefix: str, lengths: torch.Tensor, rows: int, seen: int) -> None:
    if int(lengths.min()) < 0 or int(lengths.max()) > seen or int(lengths.long().sum()) != rows:
        raise ValueError(f"its {prefix}lengths are not those of the {rows} rows there are")


def check_numbers(tensors: Mapping[str, torch.Tensor], facts: DocumentFacts) -> None:
    """Look at the numbers themselves; raises `ValueError` naming a tensor that holds what cannot be."""
    if facts.method.importance.needs_surrogate:
        check_parts({name.removeprefix(SURROGATE): part for name, part in tensors.items() if SURROGATE in name})
    if facts.method.budget.profile_scores == LEARNED:
        learned = tensors["scores"][:-1] if getattr(facts.method.budget, "mix", 0) else tensors["scores"]
        if fault := kept_shares_fault(learned, facts.shape):
            raise ValueError(f"its scores {fault}")
    if facts.method.budget.profile_scores == REFINED_ROWS and (
        fault := refined_rows_fault(tensors["scores"], facts.shape)
    ):
        raise ValueError(f"its scores {fault}")
    if (facts.method.budget.profile_scores or "").startswith(CURVES) and (
        fault := curve_scores_fault(tensors["scores"])
    ):
        raise ValueError(f"its scores {fault}")
    for name in ("scores", "shares"):
        numbers = tensors.get(name)
        if numbers is not None and not ((numbers >= 0) & (numbers <= LARGEST_SCORE)).all():
            raise ValueError(f"its {name} are not all numbers that heads can have")
    tier = ("tier_keys", "tier_values", "tier_centroids", "tier_positions")
    parts = ("keys", "values", "queries", "received", "positions", "bias", *tier, *ALL_PARTS)
    names = chain.from_iterable((f"layers.{layer}.{part}" for part in parts) for layer in range(facts.shape.num_layers))
    for name in names:
        if name in tensors and not _is_sound(name.rpartition(".")[2], tensors[name], facts):
            raise ValueError(f"its {name} hold what cannot be")
    for number, packed in enumerate(facts.packed):
        if packed is not None:
            check_packed_numbers(f"layers.{number}.", tensors, packed, facts.shape.head_dim)


def _is_sound(part: str, numbers: torch.Tensor, facts: DocumentFacts) -> bool:
    if numbers.numel() == 0:
        return True
    if part in ("positions", "tier_positions"):
        return int(numbers.min()) >= 0 and int(numbers.max()) < facts.seen
    if part == "bias":  # a row that is hidden has minus infinity
        return bool((numbers < _LARGEST).all())
    return bool((numbers.abs() < _LARGEST).all())
