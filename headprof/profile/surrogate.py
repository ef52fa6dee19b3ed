"""A surrogate of reconstruction importance: from a row's own key and value to the log of what it is worth.

After KVzap (arXiv 2601.07891), which predicts the log of KVzip's importance from hidden states; here it is predicted
from the row itself, so that rows that are held can be judged at any time. Shapes: `L` layers, `K` KV heads, `D` head
dimension, `F` features of a row, `U` hidden units.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

from headprof.errors import ProfileError
from headprof.models.fingerprints import are_alike, weights_fingerprints
from headprof.models.rotary import Rotary
from headprof.models.shape import HeadShape
from headprof.profile.commands import surrogate_command
from headprof.profile.finding import profile_dirs, profile_filename
from headprof.utils.files import atomic_write
from headprof.utils.records import parse_json, parse_object, plain
from headprof.utils.tensor_files import (
    CHECKSUM_NAMES,
    Stored,
    is_altered,
    open_tensors,
    with_checksum,
    with_sorted_header,
)

if TYPE_CHECKING:
    from headprof.models.loading import LoadedModel

FORMAT = "headprof.surrogate"
FORMAT_VERSION = "1"
SUFFIX = ".surrogate.safetensors"
_LARGEST_FILE = 2**30
_LARGEST = 1e15
_MOST_UNITS = 2**14
_LONGEST_NAME = 1000


_PARTS = ("mean", "scale", "linear", "hidden", "hidden_bias", "output", "output_bias")
_HALF = ("linear", "hidden", "hidden_bias", "output")
"""Parts that are kept in float16; the others are float32."""
_FARTHEST = 8.0
"""Standard deviations from the mean beyond which a feature counts no more: a line goes on too far there."""


@dataclass(frozen=True)
class RowFeatures:
    """What a surrogate looks at in a row.

    A rotary embedding turns the dimensions of a key in pairs, so the length of each pair does not depend on the row's
    position; nor does what is not turned. Where a model turns keys in another way, or none that can be told, keys are
    taken as they are.

    Attributes:
        partner: for each dimension of a key the one with which it is turned, itself if it is not, `D` numbers.
    """

    partner: tuple[int, ...]

    @classmethod
    def as_they_are(cls, head_dim: int) -> RowFeatures:
        """Keys as they are, turned or not."""
        return cls(tuple(range(head_dim)))

    @classmethod
    def of_layers(cls, rotaries: Sequence[Rotary | None], head_dim: int) -> RowFeatures:
        """What does not depend on positions in all of a model's layers; keys as they are where none can be told.

        Args:
            rotaries: of each layer, as `rotary_of` finds it.
            head_dim: `D`.
        """
        kinds = {(rotary is None, rotary and rotary.layer_type): rotary for rotary in rotaries}
        found = {None if rotary is None else rotary.partners(head_dim) for rotary in kinds.values()}
        partner = found.pop() if len(found) == 1 else None
        return cls.as_they_are(head_dim) if partner is None else cls(partner)

    @property
    def count(self) -> int:
        """How many a row has, `F`."""
        pairs = sum(self.partner[each] > each for each in range(len(self.partner)))
        return 2 * len(self.partner) - pairs

    def of(self, keys: Tensor, values: Tensor) -> Tensor:
        """Features of rows `[..., D]` each, float32 `[..., F]`."""
        keys = keys.float()
        first, second, single = _indices(self.partner, keys.device)
        parts = [(keys[..., first].square() + keys[..., second].square()).sqrt(), keys[..., single], values.float()]
        return torch.cat(parts, dim=-1)


@lru_cache(maxsize=16)
def _indices(partner: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The dimensions that are turned in pairs, the first of each and the second, and the others."""
    first = [each for each, other in enumerate(partner) if other > each]
    single = [each for each, other in enumerate(partner) if other == each]
    with torch.inference_mode(False):
        lists = (first, [partner[each] for each in first], single)
        tensors = (torch.tensor(each, dtype=torch.int64) for each in lists)
        first_at, second_at, single_at = (each.to(device, non_blocking=True) for each in tensors)
        return first_at, second_at, single_at


@dataclass(frozen=True, eq=False)
class Surrogate:
    """Predicts the log of a row's reconstruction importance, for each KV head of each layer of one model.

    A line through a row's features, and what a small network with one hidden layer adds to it.

    Attributes:
        model_name: hub id or folder of the model.
        shape: the model's.
        weights: the model's weights, as `weights_fingerprints` gives them.
        dtype: the type in which the model was loaded when this was fitted.
        features: what is looked at.
        parts: on the CPU, of each KV head: `mean` and `scale` of its features, `[L, K, F]`, with which they are
            standardized; `linear` `[L, K, F]`; `hidden` `[L, K, F, U]`, `hidden_bias` `[L, K, U]`, `output`
            `[L, K, U]`; `output_bias` `[L, K]`.
        metadata: provenance as text: settings (JSON), seed, versions, date, command, quality on held-out texts (JSON).
    """

    model_name: str
    shape: HeadShape
    weights: Mapping[str, str]
    dtype: str
    features: RowFeatures
    parts: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    _placed: dict[tuple[int, torch.device], tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    def predict(self, layer_idx: int, keys: Tensor, values: Tensor) -> Tensor:
        """Log importance of rows of one layer, float32 `[B, K, T]`.

        Args:
            layer_idx: the layer's number.
            keys, values: `[B, K, T, D]` of any type; keys at whatever positions.
        """
        return predicted(self._on(layer_idx, keys.device), self.features.of(keys, values))

    def _on(self, layer_idx: int, device: torch.device) -> tuple[Tensor, ...]:
        """One layer's parts in float32 on a device."""
        if (layer_idx, device) not in self._placed:
            with torch.inference_mode(False):
                own = (self.parts[name][layer_idx].float() for name in _PARTS)
                parts = tuple(each.to(device, non_blocking=True) for each in own)
            self._placed[layer_idx, device] = parts
        return self._placed[layer_idx, device]

    @property
    def quality(self) -> dict[str, float]:
        """How well it did on texts that were held out, by name of the measure; empty where that is not known."""
        try:
            found = parse_object(self.metadata.get("quality", "{}"))
        except ValueError:
            return {}
        return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}

    def digest(self) -> str:
        """SHA-256 (hex) of all that predictions depend on."""
        sha = hashlib.sha256(json.dumps([self.shape.to_dict(), self.features.partner], sort_keys=True).encode())
        for name in _PARTS:
            sha.update(name.encode() + self.parts[name].contiguous().numpy().tobytes())
        return sha.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """All that predictions depend on but the shape, as files hold it."""
        partner = torch.tensor(self.features.partner, dtype=torch.int32)
        return {"partner": partner, **{name: self.parts[name].contiguous() for name in _PARTS}}

    def save(self, path: str | Path) -> None:
        """Write it atomically as safetensors; raises `HeadprofError` when the disk refuses."""
        from safetensors.torch import save

        header = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": self.model_name,
            "fingerprint": json.dumps(self.shape.to_dict()),
            "weights": json.dumps(dict(self.weights), sort_keys=True),
            "dtype": self.dtype,
        }
        tensors = self.tensors()
        content = with_sorted_header(save(tensors, metadata=with_checksum(tensors, header | dict(self.metadata))))
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)

    @classmethod
    def load(cls, path: str | Path, given: str | None = None) -> Surrogate:
        """Read a surrogate and check it, for whatever model it is.

        Args:
            path: the file.
            given: how the user named the model, for the command in messages.

        Raises:
            ProfileError: the file is missing, damaged, altered, no surrogate or of another version.
        """
        path = Path(path)
        with open_tensors(path, "surrogate", f"run `{surrogate_command(given)}`", ProfileError) as file:
            metadata = file.metadata
            mend = f"run `{surrogate_command(given or _named(metadata))}`"
            _check_format(path, metadata, mend)
            try:
                shape = _shape_of(metadata)
                if file.size > _LARGEST_FILE:
                    raise ValueError(f"it has {file.size} bytes where a surrogate has at most {_LARGEST_FILE}")
                check_stored(file.stored, shape)
                tensors = file.read_all()
                surrogate = _from_parts(tensors, metadata, shape)
            except ValueError as error:
                raise ProfileError(f"The surrogate {path} is damaged ({error}): restore it, or {mend}.") from error
            if is_altered(tensors, metadata):
                raise ProfileError(f"The surrogate {path} has been altered since it was made: restore it, or {mend}.")
        return surrogate

    def check_model(self, model: Any, shape: HeadShape, given: str | None = None) -> None:
        """
        Args:
            model: that is to be compressed.
            shape: its shape.
            given: how it is named in the command that makes another.

        Raises:
            ProfileError: this is for another model.
        """
        made_for = plain(self.model_name, 200)
        mend = f"make one with `{surrogate_command(given)}`"
        if differences := self.shape.differences(shape):
            raise ProfileError(f"The surrogate is for another model, {made_for} ({', '.join(differences)}): {mend}.")
        own = str(model.dtype).removeprefix("torch.")
        if not are_alike(self.weights, weights_fingerprints(model), {own, self.dtype}):
            raise ProfileError(f"The surrogate is for another model, {made_for} (same shape, other weights): {mend}.")


def predicted(parts: Sequence[Tensor], features: Tensor) -> Tensor:
    """Log importance of rows, float32 `[B, K, T]`.

    Args:
        parts: of one layer, in the order of `_PARTS`, float32.
        features: `[B, K, T, F]`, float32.
    """
    mean, scale, linear, hidden, hidden_bias, output, output_bias = parts
    standard = standardized(features, mean, scale)
    units = gelu(standard @ hidden + hidden_bias[:, None])
    return (standard @ linear[..., None] + units @ output[..., None])[..., 0] + output_bias[:, None]


def standardized(features: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Features `[..., K, N, F]` as `predicted` has them before it predicts."""
    return ((features - mean[:, None]) / scale[:, None]).clamp(-_FARTHEST, _FARTHEST)


def surrogate_path(profile: Path) -> Path:
    """Where a surrogate is kept: `NAME.surrogate.safetensors` beside the profile `NAME.safetensors`."""
    return profile.with_name(f"{profile.name.removesuffix('.safetensors')}{SUFFIX}")


def find_surrogate(
    model_name: str, explicit: Path | None = None, given: str | None = None, profile: Path | None = None
) -> Path:
    """The file of a model's surrogate: `explicit` when given, else beside `profile`, or where profiles are found.

    Args:
        model_name: the model's name, as its profile records it.
        explicit: the file, if the user named one.
        given: how the user named the model, for the command in the message.
        profile: the head profile that the user named.

    Raises:
        ProfileError: there is none; the message names the command that makes it.
    """
    command = surrogate_command(given or model_name)
    if explicit is not None:
        if explicit.is_file():
            return explicit
        raise ProfileError(f"There is no surrogate file at {explicit}: check the path, or run `{command}`.")
    name = profile_filename(model_name)
    places = [folder / name for folder in profile_dirs()]
    for place in places if profile is None else [profile, *places]:
        if (path := surrogate_path(place)).is_file():
            return path
    raise ProfileError(f"There is no surrogate for {model_name}: run `{command}`.")


def load_surrogate(loaded: LoadedModel, explicit: Path | None = None, profile: Path | None = None) -> Surrogate:
    """The surrogate that `find_surrogate` finds for a model.

    Raises:
        ProfileError: there is none, it is damaged, or it is for another model.
    """
    given = loaded.given or loaded.name
    surrogate = Surrogate.load(find_surrogate(loaded.name, explicit, loaded.given, profile), given)
    surrogate.check_model(loaded.model, loaded.shape, given)
    return surrogate


def check_stored(stored: Mapping[str, Stored], shape: HeadShape) -> None:
    """Look at what a file says of a surrogate's tensors; raises `ValueError` saying which is wrong."""
    if missing := [name for name in ("partner", *_PARTS) if name not in stored]:
        raise ValueError(f"it lacks the tensor {missing[0]}")
    if unknown := sorted(stored.keys() - {"partner", *_PARTS}):
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
    for name in _PARTS:
        if not bool((tensors[name].float().abs() < _LARGEST).all()):
            raise ValueError(f"its {name} holds what is no number")
    if not bool((tensors["scale"] > 0).all()):
        raise ValueError("its scale is not above 0 throughout")
    return features


def _from_parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], shape: HeadShape) -> Surrogate:
    features = check_parts(tensors)
    try:
        weights = parse_object(metadata["weights"])
        name, dtype = metadata["model"], metadata["dtype"]
    except KeyError as error:
        raise ValueError(f"its {error.args[0]} is missing") from None
    if not all(isinstance(each, str) for each in weights.values()):
        raise ValueError("its weights are no fingerprints")
    own = ("format", "format_version", "model", "fingerprint", "weights", "dtype", *CHECKSUM_NAMES)
    notes = {key: text for key, text in metadata.items() if key not in own}
    return Surrogate(name, shape, weights, dtype, features, {each: tensors[each] for each in _PARTS}, notes)


def _shape_of(metadata: Mapping[str, str]) -> HeadShape:
    try:
        return HeadShape.from_dict(parse_json(metadata["fingerprint"]))
    except (KeyError, ValueError) as error:
        raise ValueError("its fingerprint is missing or unreadable") from error


def _named(metadata: Mapping[str, str]) -> str | None:
    name = metadata.get("model", "")
    return name if name.isprintable() and 0 < len(name) <= _LONGEST_NAME else None


def _check_format(path: Path, metadata: Mapping[str, str], mend: str) -> None:
    if metadata.get("format") != FORMAT:
        raise ProfileError(f"{path} is a safetensors file but not a surrogate: choose another, or {mend}.")
    if (version := metadata.get("format_version")) != FORMAT_VERSION:
        raise ProfileError(
            f"The surrogate {path} has format version {plain(str(version))} where this headprof reads "
            f"{FORMAT_VERSION}: update headprof, or {mend}."
        )
