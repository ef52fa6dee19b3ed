"""What the file of a surrogate must be: looked at in its header first, and once it is read.

Shapes: `L` layers, `K` KV heads, `D` head dimension, `F` features of a row, `U` hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from headprof.errors import ProfileError
from headprof.models.shape import HeadShape
from headprof.profile.row_features import RowFeatures
from headprof.utils.records import parse_json, plain
from headprof.utils.tensor_files import Stored

FORMAT = "headprof.surrogate"
FORMAT_VERSION = "1"
PARTS = ("mean", "scale", "linear", "hidden", "hidden_bias", "output", "output_bias")
"""Tensors beside `partner`, the features'."""
_HALF = ("linear", "hidden", "hidden_bias", "output")
"""Parts that are kept in float16; the others are float32."""
_LARGEST = 1e15
_MOST_UNITS = 2**14
_LONGEST_NAME = 1000


def check_stored(stored: Mapping[str, Stored], shape: HeadShape) -> None:
    """Look at what a file says of a surrogate's tensors; raises `ValueError` saying which is wrong."""
    if missing := [name for name in ("partner", *PARTS) if name not in stored]:
        raise ValueError(f"it lacks the tensor {missing[0]}")
    if unknown := sorted(stored.keys() - {"partner", *PARTS}):
        raise ValueError(f"it holds an unknown tensor {plain(unknown[0])}")
    heads, hidden = (shape.num_layers, shape.num_kv_heads), stored["hidden"].shape
    if len(hidden) != 4 or not 1 <= hidden[3] <= _MOST_UNITS or not 1 <= hidden[2] <= 2 * shape.head_dim:
        raise ValueError("its hidden is not the weights of a layer of units for each KV head")
    sizes = {
        "partner": (shape.head_dim,),
        "hidden": (*heads, *hidden[2:]),
        "output_bias": heads,
        **dict.fromkeys(("hidden_bias", "output"), (*heads, hidden[3])),
        **dict.fromkeys(("mean", "scale", "linear"), (*heads, hidden[2])),
    }
    for name, size in sizes.items():
        dtype = "I32" if name == "partner" else "F16" if name in _HALF else "F32"
        if stored[name] != Stored(dtype, size):
            found = stored[name]
            raise ValueError(f"its {name} is {found.dtype} {list(found.shape)} where {dtype} {list(size)} belongs")


def check_parts(tensors: Mapping[str, Tensor]) -> RowFeatures:
    """Look at a surrogate's numbers; raises `ValueError` saying which cannot be."""
    partner = tensors["partner"].tolist()
    if any(not 0 <= other < len(partner) or partner[other] != each for each, other in enumerate(partner)):
        raise ValueError("its partner does not pair the dimensions of a key")
    features = RowFeatures(tuple(partner))
    if features.count != tensors["hidden"].shape[2]:
        raise ValueError(
            f"its hidden has {tensors['hidden'].shape[2]} features where its partner says {features.count}"
        )
    for name in PARTS:
        if not bool((tensors[name].float().abs() < _LARGEST).all()):
            raise ValueError(f"its {name} holds what is no number")
    if not bool((tensors["scale"] > 0).all()):
        raise ValueError("its scale is not above 0 throughout")
    return features


def shape_of(metadata: Mapping[str, str]) -> HeadShape:
    """The shape of the model that a surrogate is for; raises `ValueError` where its file does not say."""
    try:
        return HeadShape.from_dict(parse_json(metadata["fingerprint"]))
    except (KeyError, ValueError) as error:
        raise ValueError("its fingerprint is missing or unreadable") from error


def named_model(metadata: Mapping[str, str]) -> str | None:
    """The model that a file says it is for, if that is a name to be shown."""
    name = metadata.get("model", "")
    return name if name.isprintable() and 0 < len(name) <= _LONGEST_NAME else None


def check_format(path: Path, metadata: Mapping[str, str], mend: str) -> None:
    """Raise `ProfileError` for a file that is no surrogate or of another version; `mend` says what to do."""
    if metadata.get("format") != FORMAT:
        raise ProfileError(f"{path} is a safetensors file but not a surrogate: choose another, or {mend}.")
    if (version := metadata.get("format_version")) != FORMAT_VERSION:
        raise ProfileError(
            f"The surrogate {path} has format version {plain(str(version))} where this headprof reads "
            f"{FORMAT_VERSION}: update headprof, or {mend}."
        )
