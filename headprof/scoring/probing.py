"""Running one context of probes through a model, and scoring every head on each probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

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
        if self.decode == "teacher" and self._shares_passes:
            return self._score_together(context.context_ids, context.probes, cache)
        return [
            result for probe in context.probes for result in self._score_together(context.context_ids, [probe], cache)
        ]

    @property
    def _shares_passes(self) -> bool:
        """Whether the questions of a context may share one forward pass, each hidden from the others by the mask.

        FlashAttention takes no such mask, and layers with a sliding window would need one of their own.
        """
        config = self.model.config.get_text_config()
        layer_types = getattr(config, "layer_types", None)
        if layer_types is None:
            layer_types = ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"]
        return self._reader.base in ("sdpa", "eager") and set(layer_types) == {"full_attention"}

    def _score_together(
        self, context_ids: Sequence[int], probes: Sequence[Probe], cache: DynamicCache
    ) -> list[ProbeResult]:
        """Score probes in one forward pass over the context's cache, which is left as it was."""
        said = [probe.answer_ids if self.decode == "teacher" else self._greedy_answer(probe, cache) for probe in probes]
        suffixes = [(*probe.question_ids, *answer[:-1]) for probe, answer in zip(probes, said, strict=True)]
        stops = list(accumulate(len(suffix) for suffix in suffixes))
        rows = [torch.arange(stop - len(answer), stop) for stop, answer in zip(stops, said, strict=True)]
        token_ids = torch.tensor((*context_ids, *chain.from_iterable(suffixes)))
        scores = torch.zeros(len(probes), self.shape.num_layers, self.shape.num_heads)

        def score_layer(layer: int, attention: torch.Tensor) -> None:
            parts = attention.split([len(answer) for answer in said], dim=1)
            for number, (probe, answer, part) in enumerate(zip(probes, said, parts, strict=True)):
                scores[number, layer] = _estimate(probe, part, token_ids, answer).cpu()

        with self._reader.reading(torch.cat(rows), score_layer):
            logits = self._forward_suffixes(suffixes, cache, torch.cat(rows))
        cache.crop(-stops[-1])
        choices = logits.argmax(dim=-1).tolist()
        starts = [0, *accumulate(len(answer) for answer in said)]
        return [
            ProbeResult(
                probe.kind,
                probe.family,
                answered=self._is_answered(probe, answer, choices[start : start + len(answer)]),
                scores=each,
            )
            for probe, answer, start, each in zip(probes, said, starts, scores, strict=False)
        ]

    def _is_answered(self, probe: Probe, said: Sequence[int], choices: Sequence[int]) -> bool:
        if self.decode == "teacher":
            return tuple(choices) == tuple(said)
        return token_f1(self.tokenizer.decode(said, skip_special_tokens=True), probe.answer) > 0.5

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

    def _forward_suffixes(
        self, suffixes: Sequence[Sequence[int]], cache: DynamicCache, rows: torch.Tensor
    ) -> torch.Tensor:
        """Run suffixes that all continue the cache, side by side; logits of `rows`, `[len(rows), vocabulary]`."""
        if len(suffixes) == 1:
            return self._forward(suffixes[0], cache, keep=len(suffixes[0]))[rows]
        seen = cache.get_seq_length()
        device, dtype = self.model.device, self.model.dtype
        own = torch.block_diag(*(torch.ones(len(suffix), len(suffix)).tril() for suffix in suffixes)).bool()
        visible = torch.cat([torch.ones(len(own), seen, dtype=torch.bool), own], dim=1)
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
        positions = torch.cat([torch.arange(seen, seen + len(suffix)) for suffix in suffixes])
        return self.model(
            torch.tensor([list(chain.from_iterable(suffixes))], device=device),
            attention_mask=mask[None, None].to(device),
            position_ids=positions[None].to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=rows.to(device),
        ).logits[0]

    def _forward(self, ids: Sequence[int], cache: DynamicCache, keep: int) -> torch.Tensor:
        """Logits of the last `keep` tokens, `[keep, vocabulary]`."""
        batch = torch.tensor([ids], device=self.model.device)
        return self.model(batch, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits[0, -keep:]


def _estimate(probe: Probe, rows: torch.Tensor, token_ids: torch.Tensor, said: Sequence[int]) -> torch.Tensor:
    """Score of each head of a layer on one probe, `[H]`, from the rows `[H, N, T]` that predict what was said."""
    in_span = torch.zeros(rows.shape[-1], dtype=torch.bool, device=rows.device)
    in_span[slice(*probe.answer_span)] = True
    if probe.kind == "reasoning":
        return reasoning_score(rows, in_span)
    return retrieval_score(rows, in_span, token_ids.to(rows.device), torch.tensor(said, device=rows.device))
