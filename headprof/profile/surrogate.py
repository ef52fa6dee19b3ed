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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

from headprof.errors import ProfileError
from headprof.models.fingerprints import are_alike, weights_fingerprints
from headprof.models.shape import HeadShape
from headprof.models.tensor_parallel import WHOLE, HeadShard
from headprof.profile.commands import surrogate_command
from headprof.profile.row_features import RowFeatures
from headprof.profile.surrogate_checks import (
    FORMAT,
    FORMAT_VERSION,
    PARTS,
    check_format,
    check_parts,
    check_stored,
    named_model,
    shape_of,
)
from headprof.utils.files import atomic_write
from headprof.utils.records import parse_object, plain
from headprof.utils.tensor_files import CHECKSUM_NAMES, is_altered, open_tensors, with_checksum, with_sorted_header

_LARGEST_FILE = 2**30
_FARTHEST = 8.0
"""Standard deviations from the mean beyond which a feature counts no more: a line goes on too far there."""


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

    def predict(self, layer_idx: int, keys: Tensor, values: Tensor, shard: HeadShard = WHOLE) -> Tensor:
        """Log importance of rows of one layer, float32 `[B, K, T]`.

        Args:
            layer_idx: the layer's number.
            keys, values: `[B, K, T, D]` of any type; keys at whatever positions.
            shard: which of the layer's heads they are of.
        """
        parts = [shard.own(part, dim=0) for part in self._on(layer_idx, keys.device)]
        return predicted(parts, self.features.of(keys, values))

    def _on(self, layer_idx: int, device: torch.device) -> tuple[Tensor, ...]:
        """One layer's parts in float32 on a device."""
        if (layer_idx, device) not in self._placed:
            with torch.inference_mode(False):
                own = (self.parts[name][layer_idx].float() for name in PARTS)
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
        for name in PARTS:
            sha.update(name.encode() + self.parts[name].contiguous().numpy().tobytes())
        return sha.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """All that predictions depend on but the shape, as files hold it."""
        partner = torch.tensor(self.features.partner, dtype=torch.int32)
        return {"partner": partner, **{name: self.parts[name].contiguous() for name in PARTS}}

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
            mend = f"run `{surrogate_command(given or named_model(metadata))}`"
            check_format(path, metadata, mend)
            try:
                shape = shape_of(metadata)
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
        parts: of one layer, in the order of `PARTS`, float32.
        features: `[B, K, T, F]`, float32.
    """
    mean, scale, linear, hidden, hidden_bias, output, output_bias = parts
    standard = standardized(features, mean, scale)
    units = gelu(standard @ hidden + hidden_bias[:, None])
    return (standard @ linear[..., None] + units @ output[..., None])[..., 0] + output_bias[:, None]


def standardized(features: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Features `[..., K, N, F]` as `predicted` has them before it predicts."""
    return ((features - mean[:, None]) / scale[:, None]).clamp(-_FARTHEST, _FARTHEST)


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
    return Surrogate(name, shape, weights, dtype, features, {each: tensors[each] for each in PARTS}, notes)
