"""Fitting a surrogate of reconstruction importance: a model repeats texts, and networks learn what that looks at.

Of each text some rows are kept, with their features and the log of their importance. The last sixth of the texts
measures quality, the sixth before it says when to stop, the others are fitted to. Each KV head gets a ridge regression,
whose penalty the second of these chooses, and a small network fitted to what that leaves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from headprof.errors import ModelError
from headprof.models.fingerprints import weights_fingerprints
from headprof.models.loading import LoadedModel
from headprof.models.rotary import rotary_of
from headprof.profile.row_features import RowFeatures
from headprof.profile.surrogate import Surrogate, predicted, standardized
from headprof.scoring.calibration import CalibrationSettings, repeated_documents
from headprof.scoring.repetition import RepeatedLayer, repeat_document
from headprof.utils.ranks import rank_rows
from headprof.utils.run_record import library_versions, today

FEWEST_TEXTS = 3
LENGTHS = (400, 700, 1000)
PRESETS = {"quick": 36, "standard": 96, "thorough": 240}
"""Number of texts."""

_ROWS_PER_TEXT = 256
_MOST_BYTES = 2**31
"""Of features that are held at once."""
_SHARE = 6
"""Of so many texts one measures quality, and one says when to stop."""
_LEAST = 2.0**-24
"""Importance below which a row is worth nothing: the smallest number of float16."""
_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the ridge, for each row and a feature of variance 1."""
_UNITS, _STEPS, _BATCH, _LOOK = 64, 300, 512, 25
_RATE = 5e-3


@dataclass
class _Samples:
    """Rows of one layer's heads.

    Attributes:
        features: of each text, float32 `[K, N, F]`.
        targets: log importance, float32 `[K, N]`.
    """

    features: list[Tensor]
    targets: list[Tensor]

    def of(self, texts: range) -> tuple[Tensor, Tensor]:
        """Rows of these texts together: features `[K, N, F]`, targets `[K, N]`."""
        return (
            torch.cat([self.features[at] for at in texts], dim=1),
            torch.cat([self.targets[at] for at in texts], dim=1),
        )


def fit_surrogate(
    loaded: LoadedModel,
    settings: CalibrationSettings,
    *,
    command: str = "",
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Surrogate:
    """Fit a surrogate to a model. The same settings give the same one on the same machine.

    Args:
        loaded: the model.
        settings: what to fit to.
        command: to be noted in the file.
        on_progress: called with what is done, how much of it is done, and how much there is.

    Raises:
        UsageError: the settings cannot be, or texts and their repetitions are longer than the model's context.
        ModelError: the model's attention cannot be reached, or its numbers overflow.
    """
    documents = repeated_documents(loaded, settings, LENGTHS, FEWEST_TEXTS)
    rotaries = [rotary_of(loaded.model, layer_idx) for layer_idx in range(loaded.shape.num_layers)]
    features = RowFeatures.of_layers(rotaries, loaded.shape.head_dim)
    layers = _collect(loaded, settings, documents.pairs, features, on_progress)
    fits, stops, holds = _split(len(documents.pairs))
    parts: list[tuple[Tensor, ...]] = []
    for index, samples in enumerate(layers):
        on_progress("Fitting layer", index, len(layers))
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + index)
        fitted = fit_heads(*samples.of(fits), *samples.of(stops), generator, loaded.device)
        parts.append(fitted)
    on_progress("Fitting layer", len(layers), len(layers))
    names = ("mean", "scale", "linear", "hidden", "hidden_bias", "output", "output_bias")
    stacked = {name: torch.stack([each[at] for each in parts]) for at, name in enumerate(names)}
    return Surrogate(
        loaded.name,
        loaded.shape,
        weights_fingerprints(loaded.model),
        str(loaded.dtype).removeprefix("torch."),
        features,
        stacked,
        {
            "settings": json.dumps(
                asdict(settings) | {"lengths": documents.lengths, "folder": settings.folder and str(settings.folder)}
            ),
            "quality": json.dumps(measured(parts, layers, holds)),
            "versions": json.dumps(library_versions()),
            "date": today(),
            "command": command,
        },
    )


def _collect(
    loaded: LoadedModel,
    settings: CalibrationSettings,
    documents: Sequence[tuple[list[int], list[int]]],
    features: RowFeatures,
    on_progress: Callable[[str, int, int], None],
) -> list[_Samples]:
    """Some rows of each document in each layer."""
    shape = loaded.shape
    layers = [_Samples([], []) for _ in range(shape.num_layers)]
    row_bytes = 4 * shape.num_layers * shape.num_kv_heads * (features.count + 1)
    most = max(1, min(_ROWS_PER_TEXT, _MOST_BYTES // (row_bytes * len(documents))))
    for number, (ids, again) in enumerate(documents):
        on_progress("Repeating texts", number, len(documents))
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
        kept = torch.randperm(len(ids), generator=generator)[:most].sort().values

        def take(layer: RepeatedLayer, kept: Tensor = kept) -> None:
            at = kept.to(layer.keys.device)
            found = features.of(layer.keys[:, at], layer.values[:, at]).cpu()
            wanted = layer.importance[:, at].clamp(min=_LEAST).log().cpu()
            if not bool(found.isfinite().all() & wanted.isfinite().all()):
                raise ModelError(
                    f"The numbers of {loaded.name} overflow in {loaded.dtype}: load it with --dtype float32."
                )
            layers[layer.index].features.append(found)
            layers[layer.index].targets.append(wanted)

        repeat_document(loaded.model, shape, ids, again, take)
    on_progress("Repeating texts", len(documents), len(documents))
    return layers


def _split(count: int) -> tuple[range, range, range]:
    """Which texts are fitted to, which say when to stop, and which measure quality."""
    share = max(1, count // _SHARE)
    return range(count - 2 * share), range(count - 2 * share, count - share), range(count - share, count)


def fit_heads(
    features: Tensor,
    targets: Tensor,
    other_features: Tensor,
    other_targets: Tensor,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, ...]:
    """Fit each of a layer's heads.

    Args:
        features, targets: rows to fit to, float32 `[K, N, F]` and `[K, N]`.
        other_features, other_targets: rows of other texts, which choose the penalty and when to stop.
        generator: of the networks' first weights, and of the rows of each step; on the CPU.
        device: where to compute.

    Returns:
        `mean`, `scale`, `linear`, `hidden`, `hidden_bias`, `output`, `output_bias` as `Surrogate` has them for one
        layer, on the CPU; those that files hold in float16 are so rounded.
    """
    features, targets, other_features, other_targets = (
        each.to(device) for each in (features, targets, other_features, other_targets)
    )
    mean, scale = features.mean(dim=1), features.std(dim=1, correction=0)
    scale = scale.where(scale > 1e-6 * (mean.abs() + 1e-6), torch.ones_like(scale))
    rows, others = standardized(features, mean, scale), standardized(other_features, mean, scale)
    linear, bias = _ridge(rows, targets, others, other_targets)
    linear = linear.half().float()
    left = targets - (rows @ linear[..., None])[..., 0] - bias[:, None]
    others_left = other_targets - (others @ linear[..., None])[..., 0] - bias[:, None]
    spread = left.std(dim=1, correction=0).clamp(min=1e-6)[:, None]
    hidden, hidden_bias, output, shift = _network(rows, left / spread, others, others_left / spread, generator)
    output, shift = (output * spread).half(), shift * spread[:, 0]
    found = (mean, scale, linear.half(), hidden.half(), hidden_bias.half(), output, bias + shift)
    return tuple(each.cpu() for each in found)


def _ridge(rows: Tensor, targets: Tensor, others: Tensor, other_targets: Tensor) -> tuple[Tensor, Tensor]:
    """The line of each head with the penalty that does best on other rows: `[K, F]` and its value at 0, `[K]`."""
    centre, level = rows.mean(dim=1).double(), targets.mean(dim=1).double()
    centred = rows.double() - centre[:, None]
    gram = centred.transpose(1, 2) @ centred
    against = centred.transpose(1, 2) @ (targets.double() - level[:, None])[..., None]
    one_each = torch.eye(rows.shape[2], dtype=torch.float64, device=rows.device) * rows.shape[1]
    lines = torch.stack([torch.linalg.solve(gram + penalty * one_each, against)[..., 0] for penalty in _PENALTIES])
    biases = level - (lines * centre).sum(dim=-1)  # [penalties, K]
    found = torch.einsum("knf,pkf->pkn", others.double(), lines) + biases[..., None]
    best = (found - other_targets).square().mean(dim=-1).argmin(dim=0)
    heads = torch.arange(len(best), device=best.device)
    return lines[best, heads].float(), biases[best, heads].float()


def _network(
    rows: Tensor, targets: Tensor, others: Tensor, other_targets: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A network of one hidden layer for each head, by Adam, as it did best on other rows; at first it says 0."""
    heads, count, width = rows.shape
    device = rows.device
    hidden = (torch.randn(heads, width, _UNITS, generator=generator) / width**0.5).to(device)
    weights = [
        hidden,
        *(torch.zeros(heads, _UNITS, device=device) for _ in range(2)),
        torch.zeros(heads, device=device),
    ]
    best, lowest = [each.clone() for each in weights], _losses(weights, others, other_targets)
    with torch.enable_grad(), torch.inference_mode(False):
        weights = [each.clone().requires_grad_() for each in weights]
        optimizer = torch.optim.Adam(weights, lr=_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
        for step in range(1, _STEPS + 1):
            at = torch.randint(count, (min(_BATCH, count),), generator=generator).to(device)
            # Heads share no weight, so that their sum of losses moves each as its own would.
            loss = (_said(weights, rows[:, at]) - targets[:, at]).square().mean(dim=-1).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % _LOOK == 0:
                rounded = [each.detach().half().float() for each in weights[:3]] + [weights[3].detach()]
                losses = _losses(rounded, others, other_targets)
                better = losses < lowest
                lowest = losses.where(better, lowest)
                for kept, now in zip(best, rounded, strict=True):
                    kept[better] = now[better]
    hidden, hidden_bias, output, shift = best
    return hidden, hidden_bias, output, shift


def _said(weights: Sequence[Tensor], rows: Tensor) -> Tensor:
    hidden, hidden_bias, output, shift = weights
    units = torch.nn.functional.gelu(rows @ hidden + hidden_bias[:, None])
    return (units @ output[..., None])[..., 0] + shift[:, None]


@torch.no_grad()
def _losses(weights: Sequence[Tensor], rows: Tensor, targets: Tensor) -> Tensor:
    return (_said(weights, rows) - targets).square().mean(dim=-1)


def measured(parts: Sequence[tuple[Tensor, ...]], layers: Sequence[_Samples], texts: range) -> dict[str, float]:
    """How well held-out rows are predicted, each measure averaged over texts.

    `spearman` is the rank correlation within a head; `head`, `layer` and `model` say what share of the rows that matter
    most, the best 10 % and 25 %, is found when rows are ranked within each head, each layer, or all together.
    """
    sums: dict[str, list[float]] = {}
    for text in texts:
        said = torch.stack(
            [
                predicted([part.float() for part in own], samples.features[text][None])[0]
                for own, samples in zip(parts, layers, strict=True)
            ]
        )  # [L, K, N]
        true = torch.stack([samples.targets[text] for samples in layers])
        found = {"spearman": float(_rank_correlation(said, true).mean())}
        for name, dims in (("head", 2), ("layer", 1), ("model", 0)):
            for share in (0.1, 0.25):
                mine, its = said.flatten(dims), true.flatten(dims)
                found[f"{name}_top_{share:.0%}".replace("%", "")] = float(_recall(mine, its, share).mean())
        for name, value in found.items():
            sums.setdefault(name, []).append(value)
    return {name: round(sum(values) / len(values), 4) for name, values in sums.items()} | {"texts": len(texts)}


def _rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's, over the last dimension; 0 where either is constant."""
    x, y = (rank_rows(each) for each in (a, b))
    x, y = x - x.mean(dim=-1, keepdim=True), y - y.mean(dim=-1, keepdim=True)
    size = (x.norm(dim=-1) * y.norm(dim=-1)).clamp(min=1e-12)
    return (x * y).sum(dim=-1) / size


def _recall(said: Tensor, true: Tensor, share: float) -> Tensor:
    """Which share of the best of `true` is among the best of `said`, over the last dimension."""
    count = max(1, int(share * said.shape[-1]))
    mine, its = (torch.zeros_like(each).scatter(-1, each.topk(count, dim=-1).indices, 1.0) for each in (said, true))
    return (mine * its).sum(dim=-1) / count
