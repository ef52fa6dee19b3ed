"""What each head costs when it alone is silent: a second opinion on every score of a profile."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from headprof.models.copies import copied_from
from headprof.models.loading import LoadedModel
from headprof.models.shape import HeadShape
from headprof.probes.build import ProbeContext
from headprof.profile.kinds import PROBE_KINDS
from headprof.scoring.shared_context import SharedContext
from headprof.utils.bootstrap import standard_error
from headprof.utils.memory import free_bytes
from headprof.utils.team import Team
from headprof.validation.asking import (
    AskedProbe,
    answers,
    asked_probes,
    asking,
    build_probes,
    grade,
    passes,
    read_whole,
)
from headprof.validation.head_sets import CheckedScores
from headprof.validation.settings import ValidationSettings
from headprof.validation.silence import MeanOutputs, silenced_each

_MEMORY_SHARE = 0.25
"""Of the free memory, that copies of the questions may take."""


@dataclass(frozen=True, eq=False)
class HeadDrops:
    """What each head costs when it alone is silent.

    Attributes:
        values: drop of the log-probability of each of `n` answers, in nats, float32 `[n, L, H]`; below zero where an
            answer becomes likelier.
        probes: what was asked, `n` probes.
    """

    values: torch.Tensor
    probes: tuple[AskedProbe, ...]

    @property
    def kinds(self) -> list[str]:
        """The kinds of the probes, retrieval first."""
        return [kind for kind in PROBE_KINDS if any(probe.kind == kind for probe in self.probes)]

    def of_kind(self, kind: str) -> tuple[torch.Tensor, list[int]]:
        """The drops of probes of one kind, float32 `[m, L, H]`, and the context of each."""
        indices = [index for index, probe in enumerate(self.probes) if probe.kind == kind]
        return self.values[indices], [self.probes[index].context for index in indices]

    def mean(self, kind: str) -> torch.Tensor:
        """Over the probes of one kind, float32 `[L, H]`."""
        return self.of_kind(kind)[0].mean(dim=0)

    def standard_error(self, kind: str) -> torch.Tensor:
        """Of the mean, over contexts, float32 `[L, H]`."""
        values, contexts = self.of_kind(kind)
        return standard_error(values.flatten(1), contexts).view_as(values[0])


@torch.inference_mode()
def per_head_drops(
    loaded: LoadedModel,
    settings: ValidationSettings,
    batch_heads: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    team: Team | None = None,
) -> HeadDrops:
    """Silence one head after the other from the question on, and see what the right answers lose.

    Each context is read once. The questions then run once up to each layer, and from there on in copies that each have
    another head of that layer silent.

    Args:
        loaded: the model.
        settings: which probes to ask, and what silent heads put out; how many are silent, and where, does not matter.
        batch_heads: copies that run at once; `None` to choose by the free memory.
        on_progress: called by process 0 after each layer of each context, with the number done and the number of all;
            of several processes, as if the others were as far.
        team: the processes that share the contexts; each must call this with the same arguments.

    Raises:
        UsageError: the settings do not fit the model.
        ModelError: the model's attention cannot be reached.
    """
    contexts = list(build_probes(loaded, settings))
    shape, team = loaded.shape, team or Team()
    told = team.telling(on_progress, len(contexts) * shape.num_layers)
    with asking(loaded.model, _CopiedContext) as shared:

        def lost(context: ProbeContext) -> torch.Tensor:
            instead = read_whole(shared, context, settings.ablate)
            shared.freeze()
            whole = answers(shared, context.probes)[1]
            batch = batch_heads or loaded.shard.of_first(_fitting_batch(loaded, context))
            silent_log_probs = torch.empty(len(context.probes), shape.num_layers, shape.num_heads)
            for layer in range(shape.num_layers):
                for heads in torch.arange(shape.num_heads).split(batch):
                    silent = _only(layer, heads, shape)
                    silent_log_probs[:, layer, heads] = _log_probs_without(shared, context, layer, silent, instead)
                told(layer)
            return whole[:, None, None] - silent_log_probs

        drops = team.each(contexts, lost)
    return HeadDrops(torch.cat(drops), asked_probes(contexts))


def _only(layer: int, heads: torch.Tensor, shape: HeadShape) -> torch.Tensor:
    """For each of a layer's `heads`, that it alone is silent, bool `[heads, L, H]`."""
    silent = torch.zeros(len(heads), shape.num_layers, shape.num_heads, dtype=torch.bool)
    silent[torch.arange(len(heads)), layer, heads] = True
    return silent


def _log_probs_without(
    shared: _CopiedContext, context: ProbeContext, layer: int, silent: torch.Tensor, instead: MeanOutputs | None
) -> torch.Tensor:
    """Log-probability of each answer in copies that each have another head of a layer silent, `[n, copies]`."""
    with silenced_each(shared.model, silent, instead), copied_from(shared.model, layer, len(silent)):
        parts = [
            torch.stack([grade(logits, said)[1] for logits in shared.forward(*asked)], dim=1)
            for asked, said in passes(shared, context.probes)
        ]
    return torch.cat(parts)


def drops_csv(scores: Sequence[CheckedScores], drops: HeadDrops) -> str:
    """A line a head: layer and head; for each kind of probe its score, drop (nats) and standard error; other scores."""
    named = {each.name: each.values for each in scores}
    columns: dict[str, torch.Tensor | None] = {}
    for kind in drops.kinds:
        columns[f"{kind}_score"] = named.pop(kind, None)
        columns |= {f"{kind}_drop": drops.mean(kind), f"{kind}_drop_se": drops.standard_error(kind)}
    columns |= {f"{name}_score": values for name, values in named.items()}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["layer", "head", *columns])
    for layer, head in product(*map(range, drops.values.shape[1:])):
        cells = ["" if each is None else f"{each[layer, head]:.6g}" for each in columns.values()]
        writer.writerow([layer, head, *cells])
    return text.getvalue()


def figures(drops: HeadDrops) -> dict[str, Any]:
    """All of it as plain numbers and texts, for JSON."""
    return {
        "probes": {kind: len(drops.of_kind(kind)[0]) for kind in drops.kinds},
        "drops": {kind: drops.mean(kind).tolist() for kind in drops.kinds},
        "standard_errors": {kind: drops.standard_error(kind).tolist() for kind in drops.kinds},
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
