"""What each head costs when it alone is silent: a second opinion on every score of a profile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from headprof.models.copies import copied_from
from headprof.models.loading import LoadedModel
from headprof.models.shape import HeadShape
from headprof.probes.build import ProbeContext
from headprof.profile.head_profile import PROBE_KINDS, HeadProfile
from headprof.scoring.shared_context import SharedContext
from headprof.utils.bootstrap import standard_error
from headprof.utils.memory import free_bytes
from headprof.utils.ranks import spearman, top_overlap
from headprof.validation.causal_check import ValidationSettings, asking, build_probes, grade, passes
from headprof.validation.silence import silenced_each

_MEMORY_SHARE = 0.25
"""Of the free memory, that copies of the questions may take."""


@dataclass(frozen=True, eq=False)
class HeadDrops:
    """What each head costs when it alone is silent.

    Attributes:
        drops: kind of probe to the mean drop of the answers' log-probability in nats, float32 `[L, H]`; below zero
            where an answer becomes likelier.
        standard_errors: of these means, over contexts, float32 `[L, H]`.
        probes: number of probes of each kind.
    """

    drops: Mapping[str, torch.Tensor]
    standard_errors: Mapping[str, torch.Tensor]
    probes: Mapping[str, int]


@torch.inference_mode()
def per_head_drops(
    loaded: LoadedModel,
    settings: ValidationSettings,
    batch_heads: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> HeadDrops:
    """Silence one head after the other from the question on, and see what the right answers lose.

    Each context is read once. The questions then run once up to each layer, and from there on in copies that each have
    another head of that layer silent.

    Args:
        loaded: the model.
        settings: which probes to ask; how many heads are silent, and where, does not matter.
        batch_heads: copies that run at once; `None` to choose by the free memory.
        on_progress: called after each layer of each context, with the number done and the number of all.

    Raises:
        UsageError: the settings do not fit the model.
        ModelError: the model's attention cannot be reached.
    """
    contexts = list(build_probes(loaded, settings))
    shape = loaded.shape
    drops = []
    with asking(loaded.model, _CopiedContext) as shared:
        for number, context in enumerate(contexts):
            shared.read(context.context_ids)
            shared.freeze()
            whole = torch.cat([grade(shared.ask(*asked), said)[1] for asked, said in passes(shared, context.probes)])
            batch = batch_heads or _fitting_batch(loaded, context)
            silent_log_probs = torch.empty(len(context.probes), shape.num_layers, shape.num_heads)
            for layer in range(shape.num_layers):
                for heads in torch.arange(shape.num_heads).split(batch):
                    silent_log_probs[:, layer, heads] = _log_probs_without(shared, context, layer, heads, shape)
                on_progress(number * shape.num_layers + layer + 1, len(contexts) * shape.num_layers)
            drops.append(whole[:, None, None] - silent_log_probs)
    return _mean_drops(contexts, torch.cat(drops))


def _log_probs_without(
    shared: _CopiedContext, context: ProbeContext, layer: int, heads: torch.Tensor, shape: HeadShape
) -> torch.Tensor:
    """Log-probability of each answer with each of a layer's `heads` silent alone, `[n, heads]`."""
    silent = torch.zeros(len(heads), shape.num_layers, shape.num_heads, dtype=torch.bool)
    silent[torch.arange(len(heads)), layer, heads] = True
    with silenced_each(shared.model, silent), copied_from(shared.model, layer, len(heads)):
        parts = [
            torch.stack([grade(logits, said)[1] for logits in shared.forward(*asked)], dim=1)
            for asked, said in passes(shared, context.probes)
        ]
    return torch.cat(parts)


def _mean_drops(contexts: Sequence[ProbeContext], drops: torch.Tensor) -> HeadDrops:
    """Means over the probes of each kind, from drops `[n, L, H]`."""
    probes = [(probe.kind, context.index) for context in contexts for probe in context.probes]
    means, errors, asked = {}, {}, {}
    for kind in dict.fromkeys(kind for kind, _ in probes):
        indices = [index for index, (each, _) in enumerate(probes) if each == kind]
        clusters = [probes[index][1] for index in indices]
        means[kind] = drops[indices].mean(dim=0)
        errors[kind] = standard_error(drops[indices].flatten(1), clusters).view_as(means[kind])
        asked[kind] = len(indices)
    return HeadDrops(means, errors, asked)


@dataclass(frozen=True)
class DropAgreement:
    """How alike a kind's scores and drops rank the heads.

    Attributes:
        kind: of scores and of probes.
        spearman: rank correlation over all heads.
        top: number of best heads.
        overlap: share of these that both have in common, 0 to 1.
    """

    kind: str
    spearman: float
    top: int
    overlap: float

    def sentence(self) -> str:
        return (
            f"{self.kind.capitalize()}: over all heads, scores and drops have a rank correlation of "
            f"{self.spearman:.2f}; of their top {self.top} they share {self.overlap:.0%}."
        )


def agreements(profile: HeadProfile, drops: HeadDrops, top: int = 10) -> list[DropAgreement]:
    """Compare a profile's scores with what its heads cost, kind by kind."""
    pairs = [(kind, profile.scores[kind], drops.drops[kind]) for kind in profile.kinds if kind in drops.drops]
    return [DropAgreement(kind, spearman(a, b), top, top_overlap(a, b, top)) for kind, a, b in pairs]


def drops_csv(profile: HeadProfile, drops: HeadDrops) -> str:
    """A line a head: layer, head, and for each kind of probe the score, the drop (nats) and its standard error."""
    kinds = sorted(drops.drops, key=PROBE_KINDS.index)
    lines = [["layer", "head", *(f"{kind}_{part}" for kind in kinds for part in ("score", "drop", "drop_se"))]]
    for layer, head in product(range(profile.shape.num_layers), range(profile.shape.num_heads)):
        line = [str(layer), str(head)]
        for kind in kinds:
            values = (profile.scores.get(kind), drops.drops[kind], drops.standard_errors[kind])
            line += ["" if each is None else f"{each[layer, head]:.6g}" for each in values]
        lines.append(line)
    return "".join(",".join(line) + "\n" for line in lines)


def figures(profile: HeadProfile, drops: HeadDrops) -> dict[str, Any]:
    """All of it as plain numbers and texts, for JSON."""
    return {
        "probes": dict(drops.probes),
        "drops": {kind: each.tolist() for kind, each in drops.drops.items()},
        "standard_errors": {kind: each.tolist() for kind, each in drops.standard_errors.items()},
        "agreement": [asdict(each) for each in agreements(profile, drops)],
    }


class _CopiedContext(SharedContext):
    """A context that any number of copies of the questions read at once."""

    def freeze(self) -> None:
        """Keep nothing of what is asked from now on, until the next context is read."""
        layers: list[Any] = self.cache.layers
        self.cache = DynamicCache()
        self.cache.layers = [_FrozenLayer(layer.keys, layer.values) for layer in layers]


class _FrozenLayer(DynamicLayer):
    """Keys and values of one sequence, which a batch of its continuations sees as its own; none of these is kept."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys: torch.Tensor = keys
        self.values: torch.Tensor = values

    def update(self, key_states, value_states, *args, **kwargs):
        copies = len(key_states)
        keys, values = (held.expand(copies, -1, -1, -1) for held in (self.keys, self.values))
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


def _fitting_batch(loaded: LoadedModel, context: ProbeContext) -> int:
    """How many copies of a context's questions may run at once, at most one for each head of a layer."""
    shape, config, size = loaded.shape, loaded.model.config.get_text_config(), loaded.dtype.itemsize
    asked = sum(len(probe.question_ids) + len(probe.answer_ids) for probe in context.probes)
    total = len(context.context_ids) + asked
    rows = sum(len(probe.answer_ids) for probe in context.probes)
    heads = 2 * total * shape.head_dim * (shape.num_kv_heads + shape.num_heads) * size
    attention = 2 * asked * total * shape.num_heads * size  # where the implementation holds all of it
    states = asked * 16 * config.hidden_size * size
    logits = rows * shape.vocab_size * (size + 8)
    fitting = _MEMORY_SHARE * free_bytes(loaded.device) / (heads + attention + states + logits)
    return max(1, min(int(fitting), shape.num_heads))
