"""Perplexity of a text's continuation when what came before is held in a compressed cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headprof.compression.cache.fan_out import FanOutCache
from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.protected import ProtectedTokens
from headprof.compression.session import attending_ragged, prefill
from headprof.errors import UsageError
from headprof.evaluation.kept_tokens import KeptTokens
from headprof.evaluation.methods_at_budgets import Candidate
from headprof.evaluation.texts import Text
from headprof.models.loading import require_finite
from headprof.models.text_encoder import TextEncoder
from headprof.utils.intervals import mean_interval

CHUNK = 64
"""Tokens of a continuation that are fed at once, unless told otherwise."""


@dataclass(frozen=True)
class PerplexitySettings:
    """Which part of which texts to predict; all in tokens but `documents` and `skip`.

    Attributes:
        prefix: how much of a text is read before, and compressed.
        continuation: how much after it is predicted.
        documents: how many texts to take; `None` for all that are long enough.
        skip: how many of those to leave out first, so that tuning and testing can use different ones.
        chunk: how much of the continuation is fed at once.

    Raises:
        UsageError: a number is too small.
    """

    prefix: int
    continuation: int
    documents: int | None = None
    skip: int = 0
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        least = {"prefix": 1, "continuation": 1, "documents": 1, "skip": 0, "chunk": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise UsageError(f"The perplexity task cannot use {name} {value}: give at least {bound}.")


@dataclass(frozen=True)
class Document:
    """Token ids of a text: what is read and compressed, and what is to be predicted.

    `protected` are those of the prefix that every head keeps.
    """

    name: str
    prefix: tuple[int, ...]
    continuation: tuple[int, ...]
    protected: ProtectedTokens | None = field(default=None, repr=False)  # which the digests of texts do not depend on


@dataclass(frozen=True)
class Loss:
    """How well one candidate predicts one document's continuation.

    Attributes:
        document: number of the document, from 0.
        name: the document's.
        method, budget: the candidate's.
        tokens: length of the continuation.
        nll: negative log-likelihood of all its tokens, in nats.
        cache_bytes: bytes that the cache held after the continuation.
    """

    document: int
    name: str
    method: str
    budget: str
    tokens: int
    nll: float
    cache_bytes: int

    @property
    def per_token(self) -> float:
        return self.nll / self.tokens


@dataclass(frozen=True)
class PerplexityCell:
    """One method at one budget. Intervals are of 95 % over documents, and `None` where there is but one.

    Attributes:
        method, budget: as in the losses.
        documents, tokens: how many were predicted.
        perplexity: `exp(nll / tokens)` over all documents together.
        interval: of the perplexity. Documents differ far more than methods do, so it is wide.
        ratio: perplexity as a multiple of the full cache's: the geometric mean over documents; `None` without `full`.
        ratio_interval: of the ratio; each document is compared with itself, so it is narrow.
        cache_bytes: mean bytes of the cache after the continuation.
    """

    method: str
    budget: str
    documents: int
    tokens: int
    perplexity: float
    interval: tuple[float, float] | None
    ratio: float | None
    ratio_interval: tuple[float, float] | None
    cache_bytes: float


def select_documents(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[Text],
    settings: PerplexitySettings,
    max_positions: int,
    kept: KeptTokens | None = None,
) -> list[Document]:
    """The first texts that are long enough, in order, cut to `prefix + continuation` tokens.

    Raises:
        UsageError: too few texts are long enough, or the model cannot read so many tokens; or what is `kept` cannot be
            looked for.
    """
    kept = kept or KeptTokens()
    needed = settings.prefix + settings.continuation
    if needed > max_positions:
        raise UsageError(
            f"A prefix of {settings.prefix} and a continuation of {settings.continuation} tokens exceed the "
            f"{max_positions} that the model can read: lower one of them."
        )
    wanted = None if settings.documents is None else settings.skip + settings.documents
    plain = TextEncoder(tokenizer)
    found: list[Document] = []
    longest = 0
    for text in texts:
        if len(found) == wanted:
            break
        ids = plain.whole(text.text)
        longest = max(longest, len(ids))
        if len(ids) >= needed:
            is_asked = len(found) >= settings.skip
            protected = kept.find_at_start(plain, text.text, settings.prefix) if is_asked else None
            parts = tuple(ids[: settings.prefix]), tuple(ids[settings.prefix : needed])
            found.append(Document(text.name, *parts, protected))
    if not found:
        raise UsageError(
            f"No text has the {needed} tokens of prefix and continuation, the longest has {longest}: lower one of "
            "them or give longer texts."
        )
    if len(found) < (wanted or settings.skip + 1):
        raise UsageError(
            f"Only {len(found)} texts have {needed} tokens or more, too few to skip {settings.skip} and take "
            f"{settings.documents or 1}: ask for fewer with --documents, for shorter ones with --lengths, or give more."
        )
    return found[settings.skip :]


@torch.inference_mode()
def measure_perplexity(
    model: PreTrainedModel,
    documents: Sequence[Document],
    candidates: Sequence[Candidate],
    on_document: Callable[[list[Loss]], None] = lambda _: None,
    *,
    chunk: int = CHUNK,
    fill: Callable[[list[int]], list[HeadCache]] | None = None,
) -> list[Loss]:
    """Predict every document's continuation under every candidate, after one prefill of its prefix for all of them.

    The continuation is fed in chunks over the compressed prefix, so each of its tokens but the first is predicted from
    what the cache still holds; the first one too with `fill`. Logits of one chunk, `[chunk, vocabulary]`, are in memory
    at a time.

    Args:
        model: the model that predicts.
        documents: from `select_documents`.
        candidates: methods at budgets; one with the method `full` is what the others are compared with.
        on_document: called with each document's losses, one per candidate.
        chunk: tokens of the continuation that are fed at once.
        fill: gives a cache for each candidate that holds these tokens, in the place of a plain prefill: those of a
            prefix but for the last, which is fed with the continuation.

    Raises:
        UsageError: a budget cannot be met.
    """
    for candidate in candidates:  # before any work
        for document in documents:
            candidate.plan.check(len(document.prefix), document.protected)
    losses: list[Loss] = []
    with attending_ragged(model):
        for number, document in enumerate(documents):
            last_logits = None
            if fill is not None:
                caches = fill(list(document.prefix[:-1]))
            else:
                caches = [HeadCache(candidate.plan).protect(document.protected) for candidate in candidates]
                prefix = torch.tensor([document.prefix], device=model.device)
                last_logits = prefill(model, prefix, FanOutCache(list(caches)))
            batch = [  # `pop`, so that a candidate's cache is freed before the next one grows
                _loss(model, number, document, candidate, caches.pop(0), last_logits, chunk) for candidate in candidates
            ]
            on_document(batch)
            losses += batch
    return losses


def _loss(
    model: PreTrainedModel,
    number: int,
    document: Document,
    candidate: Candidate,
    cache: HeadCache,
    last_logits: torch.Tensor | None,
    chunk: int,
) -> Loss:
    """Feed a document's continuation over its compressed prefix.

    `last_logits` are those of the prefix, `[1, vocabulary]`; without them its last token is fed first.
    """
    ids = torch.tensor([[*document.prefix[-1:], *document.continuation]], device=model.device)
    fed, predicted, total = ids[:, :-1], ids[0, 1:], 0.0
    if last_logits is not None:
        total = _nll(last_logits, predicted[:1])
        fed, predicted = fed[:, 1:], predicted[1:]
    for start in range(0, len(predicted), chunk):
        part = slice(start, start + chunk)
        total += _nll(model(fed[:, part], past_key_values=cache, use_cache=True).logits[0], predicted[part])
    require_finite(torch.tensor(total), model.dtype)
    held = cache.plan.shard.total(cache.nbytes)
    return Loss(number, document.name, candidate.method, candidate.budget, len(document.continuation), total, held)


def _nll(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Sum over `tokens` `[N]` of the negative log-likelihood under `logits` `[N, vocabulary]`, in nats."""
    return cross_entropy(logits.float(), tokens, reduction="sum").item()


def tabulate_losses(losses: Iterable[Loss]) -> list[PerplexityCell]:
    """One cell per method and budget, in the order of first appearance."""
    groups: dict[tuple[str, str], list[Loss]] = defaultdict(list)
    for loss in losses:
        groups[loss.method, loss.budget].append(loss)
    full = {loss.document: loss for (method, _), group in groups.items() if method == "full" for loss in group}
    return [_cell(group, full) for group in groups.values()]


def _cell(group: Sequence[Loss], full: dict[int, Loss]) -> PerplexityCell:
    tokens = sum(loss.tokens for loss in group)
    excess = [loss.per_token - full[loss.document].per_token for loss in group if loss.document in full]
    return PerplexityCell(
        method=group[0].method,
        budget=group[0].budget,
        documents=len(group),
        tokens=tokens,
        perplexity=_exp(sum(loss.nll for loss in group) / tokens),
        interval=_exp_interval([loss.per_token for loss in group]),
        ratio=_exp(fmean(excess)) if excess else None,
        ratio_interval=_exp_interval(excess),
        cache_bytes=fmean(loss.cache_bytes for loss in group),
    )


def _exp(value: float) -> float:
    """As `math.exp`, but infinite where that overflows."""
    return torch.tensor(value, dtype=torch.float64).exp().item()


def _exp_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95 % interval of a mean of logarithms, as the interval of what they are logarithms of."""
    found = mean_interval(values)
    return None if found is None else (_exp(found[0]), _exp(found[1]))
