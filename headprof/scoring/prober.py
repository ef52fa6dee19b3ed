"""Running one context of probes through a model, and scoring every head on each probe."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain

import torch
from transformers import PreTrainedModel

from headprof.errors import ModelError
from headprof.models.decoder import end_tokens
from headprof.models.shape import HeadShape
from headprof.models.write_path import WritePath, find_write_path
from headprof.probes.build import Probe, ProbeContext
from headprof.scoring.attention_rows import RowReader
from headprof.scoring.estimators import reasoning_score, retrieval_score
from headprof.scoring.shared_context import SharedContext, teacher_forced
from headprof.scoring.write import WriteMeter
from headprof.utils.word_overlap import token_f1


@dataclass(frozen=True)
class ProbeResult:
    """What one probe says about every head.

    Attributes:
        kind: `"retrieval"` or `"reasoning"`: which estimator was used.
        family: the probe's family.
        answered: whether the model gave the right answer.
        scores: float32 `[L, H]`.
        write: what each head writes from the needle towards the answer (`WriteMeter`), in logits, float32 `[L, H]`,
            below zero where that is against it; `None` where it cannot be told, or was not when the probe was asked.
    """

    kind: str
    family: str
    answered: bool
    scores: torch.Tensor
    write: torch.Tensor | None = None


class Prober:
    """Scores the heads of a model on probes; use it as a context, in which the model's attention is wrapped.

    Args:
        model: a causal language model that uses Transformers' attention interface.
        shape: its shape.
        decode: `"teacher"`: the right answer's tokens are fed, and a probe counts as answered when each of them was the
            model's arg-max; `"greedy"`: the model answers by itself, and an answer with F1 above 0.5 counts (Fu et al.
            2025 and Wu et al. 2024).
        tokenizer: needed for `"greedy"` only.
    """

    max_extra_tokens = 8

    def __init__(self, model: PreTrainedModel, shape: HeadShape, decode: str = "teacher", tokenizer=None):
        self.model = model
        self.shape = shape
        self.decode = decode
        self.tokenizer = tokenizer
        self._reader = RowReader(model)
        self._context = SharedContext(model, self._reader.base)
        self._installed = self._reader.installed()
        self._found: WritePath | str | None = None

    def __enter__(self) -> Prober:
        self._installed.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._installed.__exit__(*exception)

    def write_path(self) -> WritePath | str:
        """The way from the model's heads to its logits, or, as a sentence, why it is not known."""
        if self._found is None:
            try:
                self._found = find_write_path(self.model, self.shape)
            except ModelError as error:
                self._found = str(error)
        return self._found

    @torch.inference_mode()
    def run(self, context: ProbeContext, *, anew: bool = True) -> list[ProbeResult]:
        """Prefill the context once, then ask each of its questions over that cache.

        With `anew=False` what the context has in common with the beginning of the one before is not computed again.

        Raises:
            ModelError: the model's numbers overflow, or its attention cannot be read head by head.
        """
        self._context.read(context.context_ids, anew=anew)
        said = [
            probe.answer_ids if self.decode == "teacher" else self._greedy_answer(probe) for probe in context.probes
        ]
        results: list[ProbeResult] = []
        for part in self._context.together(said):
            results += self._score(context.context_ids, context.probes[part], said[part])
        return results

    def _score(
        self, context_ids: Sequence[int], probes: Sequence[Probe], said: Sequence[Sequence[int]]
    ) -> list[ProbeResult]:
        """Score probes in one forward pass over the context's cache."""
        suffixes, rows = teacher_forced([probe.question_ids for probe in probes], said)
        token_ids = torch.tensor((*context_ids, *chain.from_iterable(suffixes)), device=self.model.device)
        scores = torch.zeros(len(probes), self.shape.num_layers, self.shape.num_heads)
        path = self.write_path()
        meter = None
        if isinstance(path, WritePath):
            needles = [probe.needle_span for probe in probes]
            meter = WriteMeter(path, self.shape.num_heads, needles, said, rows, len(context_ids))

        def score_layer(layer: int, number: int, attention: torch.Tensor, values: torch.Tensor) -> None:
            scores[number, layer] = _estimate(probes[number], attention, token_ids, said[number])
            if meter is not None:
                meter.take(layer, number, attention, values)

        with self._reader.reading(rows, score_layer), nullcontext() if meter is None else meter.reading():
            logits = self._context.ask(suffixes, torch.cat(rows))
        choices = logits.argmax(dim=-1).split([len(answer) for answer in said])
        writes = [None] * len(probes) if meter is None else meter.scores()
        return [
            ProbeResult(probe.kind, probe.family, self._is_answered(probe, answer, chosen.tolist()), each, write)
            for probe, answer, chosen, each, write in zip(probes, said, choices, scores, writes, strict=True)
        ]

    def _is_answered(self, probe: Probe, said: Sequence[int], choices: Sequence[int]) -> bool:
        if self.decode == "teacher":
            return tuple(choices) == tuple(said)
        return token_f1(self.tokenizer.decode(said, skip_special_tokens=True), probe.answer) > 0.5

    def _greedy_answer(self, probe: Probe) -> tuple[int, ...]:
        """The model's own answer, at least one token, without its end-of-sequence token."""
        ends = end_tokens(self.model)
        answer: list[int] = []
        pending = list(probe.question_ids)
        while len(answer) < len(probe.answer_ids) + self.max_extra_tokens:
            token = int(self._context.extend(pending).argmax())
            if answer and token in ends:
                break
            answer.append(token)
            pending = [token]
        self._context.rewind()
        return tuple(answer)


def _estimate(probe: Probe, rows: torch.Tensor, token_ids: torch.Tensor, said: Sequence[int]) -> torch.Tensor:
    """Score of each head of a layer on one probe, `[H]`, from the rows `[H, N, T]` that predict what was said."""
    in_span = torch.zeros(rows.shape[-1], dtype=torch.bool, device=rows.device)
    in_span[slice(*probe.answer_span)] = True
    if probe.kind == "reasoning":
        return reasoning_score(rows, in_span)
    return retrieval_score(rows, in_span, token_ids.to(rows.device), torch.tensor(said, device=rows.device))
