"""A promise instead of a budget: a document is compressed as far as its measured loss allows.

One prefill fills a cache for each of a grid of budgets, and the full one. What a candidate has lost is measured in nats
a token: how far its next-token distributions are from the full cache's, `KL(full || candidate)`. The document itself is
the exam, since nobody has asked about it yet:

- spans of it, repeated word for word after the demand to do so;
- questions that the model asks itself about each part of it, with the answers of the full cache.

Spans and answers are fed, not generated, so that every candidate sees the same tokens. Candidates are tried from the
largest down, and the smallest is kept before one that breaks the promise: in this order no correction for many trials
is needed, since each is tried only if all before it have passed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.encoding import check_length
from headprof.compression.generation import compress_under_each
from headprof.compression.keeping import Keeping
from headprof.compression.loss_meter import QUESTIONS, LossMeter
from headprof.compression.methods.given_budget import Budget
from headprof.compression.plan import CompressionPlan
from headprof.compression.protected import ProtectedTokens
from headprof.errors import UsageError
from headprof.models.loading import LoadedModel
from headprof.utils.intervals import mean_at_most

SHARES = tuple(2 ** (-step / 2) for step in range(1, 12))
"""Of the document that candidates beside the full cache keep: from 71 % down to 2.2 %, in all 2.4 documents."""
Report = Callable[[str, int, int], None]
"""Takes what is being done, how often it has been, and how often it will be at most."""
CONFIDENCE = 0.9
"""With which the loss is at most what was promised (one-sided)."""


@dataclass(frozen=True)
class Loss:
    """What a candidate has lost, in nats a token.

    Attributes:
        tokens: average tokens per KV head.
        spans, questions: mean divergence over each span and over each answer.
    """

    tokens: int
    spans: tuple[float, ...]
    questions: tuple[float, ...]

    @property
    def measured(self) -> float:
        """The mean over all spans and answers."""
        return fmean(self.spans + self.questions)

    @property
    def at_most(self) -> float:
        """What that mean is at most with `CONFIDENCE`, spans and answers being a sample of what might be asked."""
        return mean_at_most(self.spans + self.questions, CONFIDENCE)


@dataclass(frozen=True)
class Promise:
    """What was promised of a compressed document, and what has been measured.

    Attributes:
        promised: most nats a token that may be lost.
        kept: of the candidate that was chosen.
        tried: of all candidates that were measured, from the largest down.
        document_tokens: what the full cache keeps.
        measured_tokens: that each candidate was judged by.
        protected_tokens: of the document, where so many are protected that nothing but the full cache holds them.
    """

    promised: float
    kept: Loss
    tried: tuple[Loss, ...]
    document_tokens: int
    measured_tokens: int
    protected_tokens: int = 0

    @property
    def keeps_everything(self) -> bool:
        """Whether nothing less than the full cache would do."""
        return self.kept.tokens == self.document_tokens

    @property
    def measured_on(self) -> dict[str, int]:
        """How many spans, answers and tokens."""
        spans, questions = (len(self.kept.spans), len(self.kept.questions)) if self.measured_tokens else (0, 0)
        return {"spans": spans, "questions": questions, "tokens": self.measured_tokens}

    def figures(self) -> dict[str, Any]:
        """The same as numbers, for JSON."""
        candidates = [
            {"tokens_per_head": loss.tokens, "measured_loss": loss.measured, "measured_at_most": loss.at_most}
            for loss in self.tried
        ]
        return {
            "promised_loss": self.promised,
            "measured_loss": self.kept.measured,
            "measured_at_most": self.kept.at_most,
            "measured_on": self.measured_on,
            "candidates": candidates,
        }

    def remarks(self) -> list[str]:
        """What the user should know of how the promise came about."""
        found = []
        if self.protected_tokens:
            found.append(
                f"Of the document's {self.document_tokens} tokens {self.protected_tokens} are protected, which leaves "
                "too few to compress: everything is kept."
            )
        elif self.keeps_everything and not self.measured_tokens:
            found.append("The document is too short to be compressed by this method: everything is kept.")
        elif self.keeps_everything:
            found.append(f"Only the full cache loses at most {self.promised:g} nats a token: everything is kept.")
        if self.measured_tokens and not self.kept.questions:
            found.append(
                "The model asked and answered nothing: the loss is measured on the document's repetition alone."
            )
        return found

    def notes(self) -> dict[str, str]:
        """What a document's file says of it, each value JSON."""
        names = ("promised_loss", "measured_loss", "measured_at_most", "measured_on")
        return {name: json.dumps(value) for name, value in self.figures().items() if name in names}


def compress_to_promise(
    loaded: LoadedModel,
    document: str,
    plan: CompressionPlan,
    max_loss: float,
    *,
    questions: int = QUESTIONS,
    observe: str | None = None,
    keep: Sequence[str] = (),
    system: str | None = None,
    keep_system: bool = True,
    backend: str = "auto",
    prefill_chunk: int | None = None,
    step: str = "auto",
    report: Report = lambda what, done, total: None,
) -> tuple[HeadCache, Promise]:
    """A compressed cache of a document that has lost at most `max_loss` nats a token, as far as that can be measured.

    Args:
        loaded: the model.
        document: the text.
        plan: how to compress it; its budget does not count.
        max_loss: mean divergence from the full cache's next-token distributions, above 0.
        questions: how many the model asks itself, each about another part of the document.
        observe, keep, system, keep_system, backend, prefill_chunk: as for `compress_document`.
        step: as for `headprof.compressed`.
        report: called with what is being done, how often it has been and will be at most.

    Returns:
        The smallest cache of the grid before one that breaks the promise, and what was measured. `save_document` takes
        the latter's `notes()`.

    Raises:
        UsageError: the loss is not above 0, the method has no budget, the document is empty, or it leaves no room for
            questions in the model's context; and what `compress_document` raises.
        ModelError: the model's numbers overflow.
    """
    check_max_loss(max_loss)
    how: dict[str, Any] = {"observe": observe, "backend": backend, "prefill_chunk": prefill_chunk}
    how |= {"keeping": Keeping(keep, system, keep_system), "step": step, "report": report}
    candidates = Candidates(loaded, document, plan, questions=questions, **how)
    return candidates.keep(max_loss)


def check_max_loss(max_loss: float) -> None:
    """Raise `UsageError` for a loss that nobody can keep to, or that is none."""
    if not 0 < max_loss < math.inf:
        raise UsageError(f"A loss of {max_loss:g} nats a token cannot be promised: give --max-loss a number above 0.")


def check_promise(max_loss: float | None, given: Sequence[str]) -> None:
    """
    Args:
        max_loss: as the user gave it; `None` if not.
        given: other options that say how to compress, such as `--budget`.

    Raises:
        UsageError: it cannot be promised, or a budget is given too.
    """
    if max_loss is None:
        return
    for option in ("--budget", "--compression-ratio", "--threshold", "--recovery"):
        if option in given:
            raise UsageError(f"A promise finds the budget by itself: leave {option} or --max-loss away.")
    check_max_loss(max_loss)


class Candidates:
    """A document compressed to each budget of a grid; what each has lost is measured when it is first asked for.

    Arguments and errors are those of `compress_to_promise`; `keeping` has what no budget may cost.

    Attributes:
        caches: from the full one down.
        tokens: average tokens per KV head of each.
        meter: what they are measured by; `None` if there is nothing but the full one.
        protected_tokens: as in `Promise`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        document: str,
        plan: CompressionPlan,
        *,
        questions: int = QUESTIONS,
        observe: str | None = None,
        keeping: Keeping = Keeping(),
        backend: str = "auto",
        prefill_chunk: int | None = None,
        step: str = "auto",
        report: Report = lambda what, done, total: None,
    ):
        if plan.method.keeps_everything:
            raise UsageError("The full cache loses nothing: leave --max-loss away, or choose a method with a budget.")
        if plan.method.budget.follows_content:
            raise UsageError(
                "This method spends what it needs, whatever the budget, so that none can be found for a promise: leave "
                "--max-loss away, or choose a method with a budget."
            )
        if not document.strip():
            raise UsageError("The document is empty, so that nothing of it can be lost: give one with text in it.")
        check_length(loaded, document)
        keeping.check(document)
        encoder = keeping.encoder(loaded.tokenizer)
        document_ids, protected = keeping.document(encoder, document)
        self._report = report
        self._losses: list[Loss] = []
        plans = _grid(plan, len(document_ids), protected)
        blocked = protected is not None and not plans[1:] and bool(_grid(plan, len(document_ids), None)[1:])
        self.protected_tokens = max(protected.count(0)) if protected is not None and blocked else 0
        meter = LossMeter(loaded, encoder, document_ids, questions, backend=backend, step=step) if plans[1:] else None
        if meter is not None and meter.num_spans < 2:  # a single one does not tell how far others may be from it
            plans, meter = plans[:1], None
        self.tokens = [each.budget.tokens(len(document_ids), 1) for each in plans]
        self.caches = compress_under_each(
            loaded,
            document,
            plans,
            keeping,
            observe=observe,
            backend=backend,
            prefill_chunk=prefill_chunk,
            on_layer=lambda done, total: report("Compressing, layer", done, total),
        )
        self.meter = meter
        if meter is not None:
            meter.examine(self.caches[0], lambda done, total: report("Asking itself, question", done, total))

    def loss(self, number: int) -> Loss:
        """What a candidate has lost; those before it are measured too."""
        for each in range(len(self._losses), number + 1):
            self._report("Measuring, budget", each, len(self.caches))
            spans, answers = ((0.0,), (0.0,)) if self.meter is None else self.meter.losses(self.caches[each])
            self._losses.append(Loss(self.tokens[each], spans, answers))
        return self._losses[number]

    def keep(self, max_loss: float) -> tuple[HeadCache, Promise]:
        """The smallest before one that breaks the promise, and what was measured."""
        check_max_loss(max_loss)
        kept = 0
        while kept + 1 < len(self.caches) and self.loss(kept + 1).at_most <= max_loss:
            kept += 1
        tried = range(min(kept + 2, len(self.caches)))
        losses = tuple(self.loss(each) for each in tried)
        measured_tokens = 0 if self.meter is None else self.meter.tokens
        found = Promise(max_loss, losses[kept], losses, self.tokens[0], measured_tokens, self.protected_tokens)
        return self.caches[kept], found


def _grid(plan: CompressionPlan, document_tokens: int, protected: ProtectedTokens | None) -> list[CompressionPlan]:
    """The plan under each budget that serves, from the whole document down; what comes later is compressed likewise.

    Raises:
        UsageError: not even the full cache can be had, since what the plan holds while generating cannot.
    """
    method = plan.method.with_options(representation="full", cluster=0)
    full = replace(plan, method=method, budget=Budget(1.0, "share"), _known=[])
    full.check(document_tokens, protected)
    sizes = dict.fromkeys(round(share * document_tokens) for share in SHARES)
    tried = [replace(plan, budget=Budget(float(size), "tokens"), _known=[]) for size in sizes if size > 0]
    smaller = [each for each in tried if each.budget.amount < document_tokens]
    return [full, *(each for each in smaller if _serves(each, document_tokens, protected))]


def _serves(plan: CompressionPlan, document_tokens: int, protected: ProtectedTokens | None) -> bool:
    """Whether a budget covers what every head keeps."""
    try:
        plan.check(document_tokens, protected)
    except UsageError:
        return False
    return True
