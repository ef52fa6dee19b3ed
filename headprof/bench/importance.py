"""What the global score of a prompt costs beside the attention that reads it, for one layer, in one run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from headprof.bench.measure import Progress, median_seconds, require_at_least
from headprof.compression.methods.importance import PromptStates, received_attention
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
        states, value = _random_layer(shape, length, device, dtype, seed)
        works = [partial(_attend, states, value), *(partial(_score, states, count) for count in samples)]
        # What is shared between a prompt's importances would make all scores but the first a look-up.
        attention, *scores = median_seconds(works, repeats, value.device, before=states.shared.clear)
        times += [
            ImportanceTimes(shape, length, count, attention, score)
            for count, score in zip(samples, scores, strict=True)
        ]
    return times


def _random_layer(
    shape: str, length: int, device: str, dtype: torch.dtype, seed: int
) -> tuple[PromptStates, torch.Tensor]:
    """Queries `[1, H, T, D]` and keys of one layer, and its values `[1, K, T, D]`."""
    numbers = find_shape(shape)
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = numbers["num_attention_heads"], numbers["num_key_value_heads"]
    query, key, value = (
        torch.randn(1, heads, length, numbers["head_dim"], generator=generator).to(device, dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    valid = torch.ones(1, length, dtype=torch.bool, device=device)
    return PromptStates(query, key, valid, scaling=key.shape[-1] ** -0.5), value


def _attend(states: PromptStates, value: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(states.query, states.key, value, is_causal=True, enable_gqa=True)


def _score(states: PromptStates, samples: int) -> torch.Tensor:
    return received_attention(states, samples, last=16)
