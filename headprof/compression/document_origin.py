"""Where a compressed document comes from, as its header says: which format, which model and which tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from headprof.compression.document_checks import DocumentFacts, read_facts
from headprof.errors import CacheError
from headprof.models.fingerprints import tokenizer_fingerprint, weights_fingerprint
from headprof.models.loading import LoadedModel
from headprof.models.shape import HeadShape
from headprof.utils.records import plain
from headprof.utils.tensor_files import Stored, open_tensors

FORMAT = "headprof.cache"
FORMAT_VERSION = "6"
"""Version 3 knew no `shares`, `protected` and surrogates, 4 no packed rows, 5 no second tier; they are still read, and
written where they say all."""
READABLE = ("3", "4", "5", FORMAT_VERSION)
MEND = "make it again with `headprof compress`"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Origin:
    """By what documents are known that a model has made.

    Attributes:
        name: of the model.
        shape: its heads.
        dtype: in which it was loaded.
        weights, tokenizer: their fingerprints.
    """

    name: str
    shape: HeadShape
    dtype: torch.dtype
    weights: str
    tokenizer: str

    @classmethod
    def of(cls, loaded: LoadedModel) -> Origin:
        """What documents of this model say; where several processes hold it, all of them have to ask."""
        weights, tokenizer = weights_fingerprint(loaded.model), tokenizer_fingerprint(loaded.tokenizer)
        return cls(loaded.name, loaded.shape, loaded.dtype, weights, tokenizer)


def header_facts(path: Path, metadata: Mapping[str, str]) -> DocumentFacts:
    """What the metadata of a file say of the document in it.

    Raises:
        CacheError: the file is no compressed document, of another version, or damaged.
    """
    if metadata.get("format") != FORMAT:
        raise CacheError(f"{path} is a safetensors file but not a compressed document: {MEND}.")
    if (version := metadata.get("format_version")) not in READABLE:
        raise CacheError(
            f"The compressed document {path} has format version {plain(str(version))} where this headprof reads "
            f"{', '.join(READABLE[:-1])} and {READABLE[-1]}: update headprof, or {MEND}."
        )
    try:
        return read_facts(metadata)
    except ValueError as error:
        raise CacheError(f"The compressed document {path} is damaged ({error}): restore it, or {MEND}.") from error


def document_facts(path: Path) -> DocumentFacts:
    """What a document's file says of it; no tensor is read, and no model needed.

    Raises:
        CacheError: the file is missing, damaged, no compressed document, or of another version.
    """
    with open_tensors(path, "compressed document", MEND, CacheError) as file:
        return header_facts(path, file.metadata)


def check_origin(
    path: Path, metadata: Mapping[str, str], shape: HeadShape, dtype: torch.dtype | None, origin: Origin
) -> None:
    """
    Args:
        path: the file.
        metadata: what it says.
        shape, dtype: of the model that made it.
        origin: of the model that is to go on from it.

    Raises:
        CacheError: it was made with another model, tokenizer or dtype.
    """
    made_with = plain(metadata.get("model", "an unnamed one"), 200)
    mend = f"load that model with --model, or {MEND}"
    if differences := shape.differences(origin.shape):
        raise CacheError(
            f"The compressed document {path} was made with another model, {made_with} ({', '.join(differences)}): "
            f"{mend}."
        )
    if dtype != origin.dtype:
        was = str(dtype).removeprefix("torch.")
        raise CacheError(f"The compressed document {path} was made in {was}: load the model with --dtype {was}.")
    if metadata.get("weights") != origin.weights:
        raise CacheError(
            f"The compressed document {path} was made with another model, {made_with} (same shape, other weights): "
            f"{mend}."
        )
    if metadata.get("tokenizer") != origin.tokenizer:
        raise CacheError(
            f"The compressed document {path} was made with another tokenizer or chat template than this one of "
            f"{origin.name}: {mend}."
        )


def document_tokens(path: Path, origin: Origin) -> list[int] | None:
    """The tokens of a document that a model can go on from, as far as its header tells; no row of it is read.

    Args:
        path: the file.
        origin: of the model.

    Returns:
        `None` for a document whose tokens are not known, or that is several sequences, or brings rows back from a
        second tier.

    Raises:
        CacheError: the file is missing, damaged, no compressed document, of another version, or made with another
            model, tokenizer or dtype.
    """
    with open_tensors(path, "compressed document", MEND, CacheError) as file:
        facts = header_facts(path, file.metadata)
        dtype = _DTYPES.get(file.stored.get("layers.0.keys", Stored("", ())).dtype)
        check_origin(path, file.metadata, facts.shape, dtype, origin)
        if facts.method.recall.is_on or file.stored.get("ids") != Stored("I32", (1, facts.seen)):
            return None
        ids = file.read("ids")[0].tolist()
    if not all(0 <= token < origin.shape.vocab_size for token in ids):
        raise CacheError(f"The compressed document {path} holds token ids that the model does not have: {MEND}.")
    return ids
