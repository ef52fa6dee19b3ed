"""What the global score of a prompt costs beside the attention that reads it, for one layer, in one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch.nn.functional import scaled_dot_product_attention

from headprof.bench.generate import now
from headprof.compression.importance import PromptStates, received_attention
from headprof.errors import UsageError
from headprof.random_models import SHAPES


@dataclass(frozen=True)
class ScoreTimes:
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


def run_score_bench(
    shape: str,
    lengths: tuple[int, ...],
    samples: tuple[int, ...],
    *,
    repeats: int = 5,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] = lambda text, done, total: None,
) -> list[ScoreTimes]:
    """Attend over random queries and keys, and score them, in turn.

    Args:
        shape: a name in `SHAPES`.
        lengths: prompt lengths in tokens.
        samples: queries that the score asks, beside the last 16; 0 for all.
        repeats: timed runs, after one that is not, of which the median counts.
        device, dtype: of queries and keys.
        seed: of these.
        on_progress: called before each case.

    Raises:
        UsageError: there is no such shape, or a number is too small.
    """
    if shape not in SHAPES:
        raise UsageError(f"There is no model shape {shape!r}: choose one of {', '.join(SHAPES)}.")
    if min(*lengths, repeats) < 1 or min(samples) < 0:
        raise UsageError("Lengths and repeats must be at least 1, and samples at least 0: raise the one that is less.")
    numbers = SHAPES[shape]
    times = []
    for done, length in enumerate(lengths):
        on_progress(f"Scoring {length} tokens", done, len(lengths))
        generator = torch.Generator().manual_seed(seed)

        def draw(heads: int, length: int = length, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(1, heads, length, numbers["head_dim"], generator=generator).to(device, dtype)

        query, key, value = (draw(numbers[f"num_{each}_heads"]) for each in ("attention", "key_value", "key_value"))
        valid = torch.ones(1, length, dtype=torch.bool, device=device)
        works: list[Callable[[], object]] = [
            lambda query=query, key=key, value=value: scaled_dot_product_attention(  # type: ignore[misc]
                query, key, value, is_causal=True, enable_gqa=True
            )
        ]
        works += [
            lambda query=query, key=key, valid=valid, count=count: received_attention(  # type: ignore[misc]
                PromptStates(query, key, valid, scaling=key.shape[-1] ** -0.5), count, last=16
            )
            for count in samples
        ]
        seconds: list[list[float]] = [[] for _ in works]
        for run in range(repeats + 1):
            for work, taken in zip(works, seconds, strict=True):
                start = now(key.device)
                work()
                if run:
                    taken.append(now(key.device) - start)
        attention, *scores = map(median, seconds)
        times += [
            ScoreTimes(shape, length, *case) for case in zip(samples, [attention] * len(scores), scores, strict=True)
        ]
    return times
