"""The papers' way to score heads: one needle a context, its answer decoded token by token with every layer's attention.

Written from the procedure of Wu et al. 2024 ("Retrieval Head Mechanistically Explains Long-Context Factuality") and Fu
et al. 2025 ("Not All Heads Matter", HeadKV-R2), to be measured beside `headprof.scoring`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from headprof.models.attention_hook import other_attention
from headprof.models.decoder import end_tokens
from headprof.models.shape import HeadShape
from headprof.probes.build import Probe, ProbeContext
from headprof.scoring.prober import ProbeResult
from headprof.utils.word_overlap import token_recall

Prefill = Literal["fast", "attentions"]
Totals = list[list[float]]
"""`[L][H]`"""


class StepwiseProber:
    """Scores the heads of a model as the papers' programs do; results are those of `Prober` with `decode="greedy"`.

    The prompt without its last token is read first. Then every step feeds one token with `output_attentions`, and a
    loop over layers and heads looks at each head's row, until the model ends its answer, breaks the line or has said
    `max_new_tokens`. An answer counts if it has more than half of the right one's words, whatever else is said.

    Scores are divided by the length of the answer's span, however many tokens are said; `retrieval_score` divides by
    the latter, which comes to the same when the answer alone is said. The token that ends an answer adds nothing.

    Args:
        model: a causal language model, in which attention is replaced only while this runs.
        shape: its shape.
        tokenizer: its tokenizer.
        prefill: `"fast"`: the prompt is read with the model's own attention (SDPA, FlashAttention), as with the patched
            modelling files of the papers; `"attentions"`: as an unpatched model gives attention, `T x T` in all layers.
        max_new_tokens: most tokens to say; 50 in the papers.
        stop_after_answer: end also when as many tokens are said as the right answer has, for models with random
            weights, which never end by themselves.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        shape: HeadShape,
        tokenizer: Any,
        *,
        prefill: Prefill = "fast",
        max_new_tokens: int = 50,
        stop_after_answer: bool = False,
    ):
        self.model = model
        self.shape = shape
        self.tokenizer = tokenizer
        self.prefill = prefill
        self.max_new_tokens = max_new_tokens
        self.stop_after_answer = stop_after_answer
        self._ends = end_tokens(model)

    def run(self, context: ProbeContext) -> list[ProbeResult]:
        """Read the context and answer anew for each of its probes."""
        results = []
        for probe in context.probes:
            said, scores = self.decode(context.context_ids, probe)
            answer = self.tokenizer.decode(said, skip_special_tokens=True)
            results.append(ProbeResult(probe.kind, probe.family, token_recall(answer, probe.answer) > 0.5, scores))
        return results

    @torch.inference_mode()
    def decode(self, context_ids: Sequence[int], probe: Probe) -> tuple[list[int], torch.Tensor]:
        """The tokens that the model says, at least one, and what they say about its heads, float32 `[L, H]`."""
        token_ids = [*context_ids, *probe.question_ids]
        add = add_attended if probe.kind == "reasoning" else add_copied
        totals = [[0.0] * self.shape.num_heads for _ in range(self.shape.num_layers)]
        cache = self._read(token_ids[:-1])
        said: list[int] = []
        with other_attention(self.model, "eager"):
            for _ in range(self.max_new_tokens):
                output = self._feed(token_ids[-1:], cache, output_attentions=True)
                token = int(output.logits[0, -1].argmax())
                if said and self._is_over(token, said, probe):
                    break
                add(totals, output.attentions, probe.answer_span, token_ids, token)
                said.append(token)
                token_ids.append(token)
        return said, torch.tensor(totals)

    def _read(self, token_ids: Sequence[int]) -> DynamicCache:
        """A cache that keeps every token, also of layers with a sliding window."""
        cache = DynamicCache()
        if self.prefill == "fast":
            self._feed(token_ids, cache)
        else:
            with other_attention(self.model, "eager"):
                self._feed(token_ids, cache, output_attentions=True)
        return cache

    def _feed(self, token_ids: Sequence[int], cache: DynamicCache, **options: Any) -> Any:
        batch = torch.tensor([list(token_ids)], device=self.model.device)
        return self.model(batch, past_key_values=cache, use_cache=True, logits_to_keep=1, **options)

    def _is_over(self, token: int, said: Sequence[int], probe: Probe) -> bool:
        if self.stop_after_answer and len(said) == len(probe.answer_ids):
            return True
        return token in self._ends or "\n" in self.tokenizer.decode([token])


def add_copied(
    totals: Totals, attentions: Sequence[torch.Tensor], span: tuple[int, int], token_ids: Sequence[int], token: int
) -> None:
    """Add 1, divided by the span's length, to heads whose most attended token lies in the span and is the one said.

    Args:
        totals: added to.
        attentions: of each layer, `[1, H, Q, T]`; the last query counts.
        span: first and end (exclusive) of the answer's tokens.
        token_ids: the `T` tokens that the row can see.
        token: the token said.
    """
    start, stop = span
    for layer, attention in enumerate(attentions):
        for head in range(attention.shape[1]):
            position = int(attention[0, head, -1].topk(1).indices)
            if start <= position < stop and token_ids[position] == token:
                totals[layer][head] += 1 / (stop - start)


def add_attended(
    totals: Totals, attentions: Sequence[torch.Tensor], span: tuple[int, int], token_ids: Sequence[int], token: int
) -> None:
    """Add the attention, divided by the span's length, of the span's tokens that are among a head's top so many.

    Args: as for `add_copied`; `token_ids` and `token` make no difference.
    """
    start, stop = span
    for layer, attention in enumerate(attentions):
        for head in range(attention.shape[1]):
            weights, positions = attention[0, head, -1].topk(stop - start)
            for weight, position in zip(weights.tolist(), positions.tolist(), strict=True):
                if start <= position < stop:
                    totals[layer][head] += weight / (stop - start)
