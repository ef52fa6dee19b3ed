"""Learned budgets moved to where they lose less, for documents whose questions are not known (see `moving`).

Shapes: `S` shares, `L` layers, `K` KV heads, `T` rows of a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headprof.compression.methods.allocation import normalized
from headprof.compression.methods.table import find_method
from headprof.compression.observers import repeating_observers
from headprof.models.loading import LoadedModel
from headprof.models.prompt_encoder import PromptEncoder
from headprof.probes.build import ProbeBuilder, ProbeSettings, needles_for
from headprof.profile.head_profile import HeadProfile
from headprof.profile.learning import NOTE
from headprof.tuning.exams import PROBE, Answering
from headprof.tuning.hidden_rows import hiding
from headprof.tuning.mixing import LARGEST, with_shares
from headprof.tuning.moving import Mover, MoveSettings, ReadPrompt, allotted, counting, require_gradients
from headprof.tuning.reading import PromptReader
from headprof.utils.records import parse_object

JUDGE = find_method("learned-kvzip")
"""Whose budgets these are: it ranks rows, and says what every head keeps."""


@dataclass(frozen=True)
class RefineSettings(MoveSettings):
    """How learned budgets are moved; a prompt is a document about which several questions are asked.

    Attributes:
        contexts: documents by whose questions they are moved.
    """

    checks: int = 2
    seed: int = 9
    contexts: int = 6


@dataclass(frozen=True)
class Refining:
    """What was found.

    Attributes:
        shares: of all tokens, `S`.
        heads: what share of its tokens each head keeps at these, float64 `[S, L, K]`; only proportions matter.
        losses: mean divergence from the full cache on the probes that moved nothing, nats a token: of each share, with
            the budgets before and the moved ones, which are kept only if they lose less.
        probes: how many moved budgets, and how many saw whether that has helped.
    """

    shares: tuple[float, ...]
    heads: Tensor
    losses: tuple[tuple[float, float], ...]
    probes: tuple[int, int]

    def notes(self) -> dict[str, object]:
        """The same for a profile's metadata, without the budgets."""
        losses = [[round(loss, 5) for loss in row] for row in self.losses]
        return {"refine_losses": losses, "refine_probes": list(self.probes)}


def refine(
    loaded: LoadedModel,
    profile: HeadProfile,
    settings: RefineSettings = RefineSettings(),
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> Refining:
    """Move a profile's learned budgets, at the shares at which something is lost.

    Args:
        loaded: the model.
        profile: with learned budgets.
        settings: how.
        on_round: called with the number of rounds that are done, and of all.

    Raises:
        UsageError: such documents do not fit into the model's context, or cannot be repeated there.
        ProfileError: the profile holds no learned budgets.
        ModelError: the model's attention cannot be reached, or several processes hold it.
    """
    require_gradients(loaded)
    kept = profile.reconstruction.double()
    shares = [share for share in kept.mean(dim=(1, 2)).tolist() if share < LARGEST]
    told = counting(on_round, len(shares) * len(settings.steps))
    documents = _read(loaded, settings)
    moving, checking = documents[: settings.contexts], documents[settings.contexts :]
    with hiding(loaded.model) as hider:
        mover = Mover(hider, moving, checking, settings.steps, told)
        found = [mover.move(normalized(kept[at]), _allotting(share)) for at, share in enumerate(shares)]
    heads = torch.stack([each for each, _ in found]) if found else kept[:0]
    return Refining(tuple(shares), heads, tuple(lost for _, lost in found), mover.asked)


def with_refining(
    profile: HeadProfile,
    loaded: LoadedModel,
    settings: RefineSettings = RefineSettings(),
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> HeadProfile:
    """A profile whose learned budgets are moved to where they lose less; its metadata says what that brought.

    Raises:
        UsageError, ProfileError, ModelError: as `refine`.
    """
    found = refine(loaded, profile, settings, on_round)
    kept = with_shares(profile.reconstruction, dict(enumerate(found.heads)))
    noted = parse_object(profile.metadata[NOTE]) | found.notes()
    return replace(profile, kept_shares=kept, metadata={**profile.metadata, NOTE: json.dumps(noted)})


def _read(loaded: LoadedModel, settings: RefineSettings) -> list[ReadPrompt]:
    """The documents, each read once."""
    count = settings.contexts + settings.checks
    asked = ProbeSettings(
        probes=count * needles_for(settings.length),
        lengths=(settings.length,),
        needles_per_context=None,
        seed=settings.seed,
    )
    builder = ProbeBuilder(loaded.tokenizer, asked, max_positions=loaded.max_positions)
    reader, encoder = PromptReader(loaded, JUDGE), PromptEncoder(loaded.tokenizer)
    documents = []
    for context in (builder.context(number) for number in range(count)):
        observers = repeating_observers(loaded, encoder, context.context_ids, JUDGE)
        rows = reader.read(context.context_ids, observers)
        answers = [Answering(PROBE, probe.question_ids, probe.answer_ids) for probe in context.probes]
        documents.append(ReadPrompt.of(loaded, rows, answers))
    return documents


def _allotting(share: float) -> Callable[[Tensor, int], Tensor]:
    """Rows of each head of a document, int64 `[L, K]`, as `LearnedBudget` gives them at this share of all."""

    def of_document(shares: Tensor, tokens: int) -> Tensor:
        least = JUDGE.always_kept
        return allotted(shares, max(least, round(share * (tokens - least)) + least), tokens, least)

    return of_document
