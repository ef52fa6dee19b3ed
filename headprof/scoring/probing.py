"""Running one context of probes through a model, and scoring every head on each probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from headprof.probes.build import Probe, ProbeContext
from headprof.scoring.capture import RowReader
from headprof.scoring.estimators import reasoning_score, retrieval_score
from headprof.shape import HeadShape
from headprof.text import token_f1


@dataclass(frozen=True)
class ProbeResult:
    """What one probe says about every head.

    Attributes:
        kind: `"retrieval"` or `"reasoning"`: which estimator was used.
        family: the probe's family.
        answered: whether the model gave the right answer.
        scores: float32 `[L, H]`.
    """

    kind: str
    family: str
    answered: bool
    scores: torch.Tensor


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
        self._installed = self._reader.installed()

    def __enter__(self) -> Prober:
        self._installed.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._installed.__exit__(*exception)

    @torch.inference_mode()
    def run(self, context: ProbeContext) -> list[ProbeResult]:
        """Prefill the context once, then ask each of its questions over that cache."""
        cache = DynamicCache()  # without sliding layers, so that column j of a row is token j of the prompt
        self._forward(context.context_ids, cache, keep=1)
        return [self._probe(context.context_ids, probe, cache) for probe in context.probes]

    def _probe(self, context_ids: Sequence[int], probe: Probe, cache: DynamicCache) -> ProbeResult:
        said = probe.answer_ids if self.decode == "teacher" else self._greedy_answer(probe, cache)
        suffix = (*probe.question_ids, *said[:-1])
        token_ids = torch.tensor((*context_ids, *suffix))
        in_span = torch.zeros(len(token_ids), dtype=torch.bool)
        in_span[slice(*probe.answer_span)] = True
        scores = torch.zeros(self.shape.num_layers, self.shape.num_heads)

        def score_layer(layer: int, rows: torch.Tensor) -> None:
            span = in_span.to(rows.device)
            if probe.kind == "retrieval":
                tokens, answer = token_ids.to(rows.device), torch.tensor(said, device=rows.device)
                scores[layer] = retrieval_score(rows, span, tokens, answer).cpu()
            else:
                scores[layer] = reasoning_score(rows, span).cpu()

        rows_wanted = torch.arange(len(suffix) - len(said), len(suffix))
        with self._reader.reading(rows_wanted, score_layer):
            logits = self._forward(suffix, cache, keep=len(said))
        cache.crop(-len(suffix))
        if self.decode == "teacher":
            answered = logits.argmax(dim=-1).tolist() == list(said)
        else:
            answered = token_f1(self.tokenizer.decode(said, skip_special_tokens=True), probe.answer) > 0.5
        return ProbeResult(probe.kind, probe.family, answered, scores)

    def _greedy_answer(self, probe: Probe, cache: DynamicCache) -> tuple[int, ...]:
        """The model's own answer, at least one token, without its end-of-sequence token."""
        ends = self.model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        answer: list[int] = []
        pending, fed = list(probe.question_ids), 0
        while len(answer) < len(probe.answer_ids) + self.max_extra_tokens:
            fed += len(pending)
            token = int(self._forward(pending, cache, keep=1)[-1].argmax())
            if answer and token in ends:
                break
            answer.append(token)
            pending = [token]
        cache.crop(-fed)
        return tuple(answer)

    def _forward(self, ids: Sequence[int], cache: DynamicCache, keep: int) -> torch.Tensor:
        """Logits of the last `keep` tokens, `[keep, vocabulary]`."""
        batch = torch.tensor([ids], device=self.model.device)
        return self.model(batch, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits[0, -keep:]
