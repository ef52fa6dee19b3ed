"""Learned budgets moved to where they lose less: of all heads at once, by what gradients say of each.

Around the budgets of a share, one pass over a right answer and one back tell what each head's last rows are worth: how
much what the head's attention puts out would change with fewer or more rows is known exactly, and the gradient there
tells what that does to the divergence from the full cache (attribution patching: Syed et al. 2023, arXiv 2310.10348).
At the best budgets a further row is worth as much in every head, so that a head's rows are in proportion to what
changing them by a share of themselves is worth; each round moves budgets towards that. Heads that stand in for one
another are seen as they are at these budgets, not as they would be if each were cut alone.

The budgets that do best on probes that moved none of them are kept. Shapes: `S` shares, `L` layers, `K` KV heads, `T`
rows of a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from headprof.compression.continuing import divergences
from headprof.compression.methods.allocation import normalized, water_filled
from headprof.compression.methods.table import find_method
from headprof.compression.observers import repeating_observers
from headprof.models.loading import LoadedModel
from headprof.models.prompt_encoder import PromptEncoder
from headprof.probes.build import ProbeBuilder, ProbeSettings, needles_for
from headprof.profile.head_profile import HeadProfile
from headprof.profile.learning import NOTE
from headprof.tuning.exams import PROBE, Answering
from headprof.tuning.hidden_rows import HidingModel, hiding
from headprof.tuning.mixing import LARGEST, with_shares
from headprof.tuning.reading import PromptReader, RankedRows
from headprof.utils.records import parse_object

JUDGE = find_method("learned-kvzip")
"""Whose budgets these are: it ranks rows, and says what every head keeps."""
_NEARBY = 2**0.5
"""By what factor a head's rows are fewer or more, to see what they are worth."""
_LOGITS = 2**27
"""Of the attention of how many queries to how many rows, in all layers, a pass back keeps at most what it needs: about
12 bytes of each."""
_MOST = 4.0
"""By what factor a head's share moves at most in a round, before `RefineSettings.steps`."""


@dataclass(frozen=True)
class RefineSettings:
    """How budgets are moved.

    Attributes:
        contexts: documents by whose questions they are moved.
        checks: further documents, by whose questions the best of all rounds is chosen.
        steps: of each round, how far budgets go towards what rows are worth, as an exponent, 0 to 1.
        length: tokens of a document.
        seed: of the probes.
    """

    contexts: int = 6
    checks: int = 2
    steps: tuple[float, ...] = (0.5, 0.4, 0.3, 0.3)
    length: int = 1024
    seed: int = 9


@dataclass(frozen=True)
class Refining:
    """What was found.

    Attributes:
        shares: of all tokens, `S`.
        heads: what share of its tokens each head keeps at these, float64 `[S, L, K]`; only proportions matter.
        losses: mean divergence from the full cache on the probes that moved nothing, nats a token: of each share, with
            the budgets of before and after each round.
        probes: how many moved budgets, and how many chose among them.
    """

    shares: tuple[float, ...]
    heads: Tensor
    losses: tuple[tuple[float, ...], ...]
    probes: tuple[int, int]

    def notes(self) -> dict[str, object]:
        """The same for a profile's metadata, without the budgets."""
        losses = [[round(loss, 5) for loss in row] for row in self.losses]
        return {"refine_losses": losses, "refine_probes": list(self.probes)}


@dataclass(frozen=True, eq=False)
class _Document:
    """A document that has been read, its rows ranked, and what is asked about it.

    `full` is what the full cache says at each answer's tokens, log-probabilities `[N, vocabulary]`, `query_heads` how
    many a layer has.
    """

    rows: Sequence[RankedRows]
    answers: Sequence[Answering]
    full: Sequence[Tensor]
    query_heads: int

    @property
    def tokens(self) -> int:
        return self.rows[0].positions.shape[-1]


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
        ModelError: the model's attention cannot be reached.
    """
    kept = profile.reconstruction.double()
    shares = [share for share in kept.mean(dim=(1, 2)).tolist() if share < LARGEST]
    total = len(shares) * (len(settings.steps) + 1)
    on_round(0, total)
    documents = _read(loaded, settings)
    moving, checking = documents[: settings.contexts], documents[settings.contexts :]
    allot = partial(_allotted, always_kept=JUDGE.always_kept)
    found, losses = [], []
    with hiding(loaded.model) as hider:
        for number, share in enumerate(shares):
            tried, lost = [normalized(kept[number])], []
            for step in (*settings.steps, None):
                counts = partial(allot, tried[-1], share)
                lost.append(_mean_loss(hider, checking, counts))
                if step is not None:
                    worth = torch.stack([_worth(hider, each, counts(each.tokens)) for each in moving]).mean(dim=0)
                    tried.append(moved(tried[-1], worth, step))
                on_round(number * (len(settings.steps) + 1) + len(lost), total)
            found.append(tried[lost.index(min(lost))])
            losses.append(tuple(lost))
    asked = [sum(len(each.answers) for each in part) for part in (moving, checking)]
    return Refining(tuple(shares), torch.stack(found), tuple(losses), (asked[0], asked[1]))


def moved(shares: Tensor, worth: Tensor, step: float) -> Tensor:
    """Heads' shares of a budget, a step nearer to being in proportion to what their rows are worth.

    Args:
        shares: float64 `[L, K]`, zero or more, of which the sum is one.
        worth: what is lost less where a head's rows are more by a share of themselves, over that share, `[L, K]`; what
            is below zero counts as nothing.
        step: how far, as an exponent of the ratio of both, 0 to 1.
    """
    wanted = normalized(worth.double().clamp(min=0))
    ratio = (wanted / shares.clamp(min=1e-12)).clamp(1 / _MOST, _MOST)
    return normalized(shares * ratio**step)


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


def _read(loaded: LoadedModel, settings: RefineSettings) -> list[_Document]:
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
        with hiding(loaded.model) as hider:
            full = _full(hider, rows, answers)
        documents.append(_Document(rows, answers, full, loaded.shape.num_heads))
    return documents


@torch.no_grad()
def _full(hider: HidingModel, rows: Sequence[RankedRows], answers: Sequence[Answering]) -> list[Tensor]:
    """What the full cache says at each answer's tokens, log-probabilities `[N, vocabulary]`."""
    hider.rows, whole = rows, torch.full((len(rows), len(rows[0].keys)), rows[0].positions.shape[-1])
    return [each.float().log_softmax(dim=-1) for each in _said(hider, answers, whole)]


def _said(hider: HidingModel, answers: Sequence[Answering], counts: Tensor) -> list[Tensor]:
    """Logits at each answer's tokens, `[N, vocabulary]`."""
    return hider.answers([each.fed for each in answers], [len(each.reference) for each in answers], counts)


def _allotted(shares: Tensor, share: float, tokens: int, *, always_kept: int) -> Tensor:
    """Rows of each head of a document, int64 `[L, K]`, as `LearnedBudget` gives them at this share of all."""
    budget = max(always_kept, round(share * (tokens - always_kept)) + always_kept)
    upper = torch.full(shares.shape, tokens)
    total = budget * shares.numel()
    return water_filled(shares, floor=always_kept, lower=always_kept, upper=upper, total=total)


def _groups(document: _Document) -> Iterator[tuple[Sequence[Answering], Sequence[Tensor]]]:
    """A document's answers and what the full cache says at them, as many at once as `_LOGITS` allows."""
    longest = max(len(each.fed) for each in document.answers)
    of_one = len(document.rows) * document.query_heads * longest * (document.tokens + longest)
    together = max(1, _LOGITS // of_one)
    for begin in range(0, len(document.answers), together):
        part = slice(begin, begin + together)
        yield document.answers[part], document.full[part]


def _divergences(hider: HidingModel, answers: Sequence[Answering], full: Sequence[Tensor], counts: Tensor) -> Tensor:
    """Of answers from what the full cache says, mean over the tokens of each, nats."""
    pairs = zip(full, _said(hider, answers, counts), strict=True)
    return torch.stack([divergences(own, other).mean() for own, other in pairs])


@torch.no_grad()
def _mean_loss(hider: HidingModel, documents: Sequence[_Document], counts: Callable[[int], Tensor]) -> float:
    """Mean divergence over all answers, nats a token."""
    lost = []
    for each in documents:
        hider.rows = each.rows
        lost += [_divergences(hider, *group, counts(each.tokens)) for group in _groups(each)]
    return float(torch.cat(lost).mean())


class _Levers:
    """Watches a pass: by how much each head's output changes with its rows, and what it can be moved by.

    Args:
        fewer, more: rows of each head between which it changes, int64 `[L, K]`.
    """

    def __init__(self, fewer: Tensor, more: Tensor):
        self._fewer, self._more = fewer, more
        self.moved: list[Tensor] = []
        self.changes: list[Tensor] = []

    def __call__(self, layer: int, output: Tensor, seeing: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            self.changes.append(seeing(self._fewer[layer][None]) - seeing(self._more[layer][None]))
        self.moved.append(torch.zeros_like(output, requires_grad=True))
        return output + self.moved[-1]


def _worth(hider: HidingModel, document: _Document, counts: Tensor) -> Tensor:
    """What each head's rows are worth there, mean over a document's answers, float64 `[L, K]` (see `moved`)."""
    hider.rows = document.rows
    fewer, more = ((counts * factor).round().long().clamp(1, document.tokens) for factor in (1 / _NEARBY, _NEARBY))
    apart = (more.double() / fewer).log().clamp(min=1e-3)
    total = torch.zeros_like(counts, dtype=torch.float64)
    for group in _groups(document):
        hider.watch = levers = _Levers(fewer, more)
        try:
            with torch.enable_grad():
                slopes = torch.autograd.grad(_divergences(hider, *group, counts).sum(), levers.moved)
        finally:
            hider.watch = None
        pairs = zip(slopes, levers.changes, strict=True)
        of_heads = torch.stack([(slope * change).double().sum(dim=(0, 1, 3)) for slope, change in pairs])
        total += of_heads.unflatten(1, (counts.shape[1], -1)).sum(dim=-1).cpu() / apart
    return total / len(document.answers)
