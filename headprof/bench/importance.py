"""What the global score of a prompt costs beside the attention that reads it, for one layer, in one run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from headprof.bench.measure import Progress, median_seconds, require_at_least
from headprof.compression.methods.observation import AttentionLayer, Observation
from headprof.compression.methods.received_attention import received_attention
from headprof.compression.rows import Rows
from headprof.models.published import find_shape


@dataclass(frozen=True)
class ImportanceTimes:
    """Seconds for one layer's prompt, medians.

    Attributes:
        shape, length: whose heads, and how many tokens.
        samples: queries that the score asks; 0 for all.
        attention: PyTorch's causal attention over the prompt (FlashAttention on a CUDA device in 16 bits).
        score: the attention that each key received, summed.
    """

    shape: str
    length: int
    samples: int
    attention: float
    score: float

    @property
    def ratio(self) -> float:
        """The score's time as a share of the attention's."""
        return self.score / self.attention


def run_importance_bench(
    shape: str,
    lengths: tuple[int, ...],
    samples: tuple[int, ...],
    *,
    repeats: int = 5,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    on_progress: Progress = lambda text, done, total: None,
) -> list[ImportanceTimes]:
    """Attend over random queries and keys, and score them, in turn.

    Args:
        shape: a name in `SHAPES`.
        lengths: prompt lengths in tokens.
        samples: queries that the score asks, beside the last 16; 0 for all.
        repeats: timed runs, after one that is not, of which the median counts.
        device, dtype: of queries and keys.
        seed: of these.
        on_progress: called before each length.

    Raises:
        UsageError: there is no such shape, or a number is too small.
    """
    find_shape(shape)
    require_at_least(1, lengths=lengths, repeats=repeats)
    require_at_least(0, samples=samples)
    times = []
    for done, length in enumerate(lengths):
        on_progress(f"Scoring {length} tokens", done, len(lengths))
        observed = _random_layer(shape, length, device, dtype, seed)
        works = [partial(_attend, observed), *(partial(_score, observed, count) for count in samples)]
        attention, *scores = median_seconds(works, repeats, observed.keys.device)
        times += [
            ImportanceTimes(shape, length, count, attention, score)
            for count, score in zip(samples, scores, strict=True)
        ]
    return times


def _random_layer(shape: str, length: int, device: str, dtype: torch.dtype, seed: int) -> Observation:
    """A prompt of one layer, with all its queries."""
    numbers = find_shape(shape)
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = numbers["num_attention_heads"], numbers["num_key_value_heads"]
    query, key, value = (
        torch.randn(1, heads, length, numbers["head_dim"], generator=generator).to(device, dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    valid = torch.ones(1, length, dtype=torch.bool, device=device)
    return Observation(query, Rows.of_prompt(key, value), valid, AttentionLayer(key.shape[-1] ** -0.5))


def _attend(observed: Observation) -> torch.Tensor:
    return scaled_dot_product_attention(
        observed.queries, observed.keys, observed.values, is_causal=True, enable_gqa=True
    )


def _score(observed: Observation, samples: int) -> torch.Tensor:
    """The score of a new observation each time: one that has been scored remembers the result."""
    return received_attention(replace(observed, shared={}), samples, last=16)
