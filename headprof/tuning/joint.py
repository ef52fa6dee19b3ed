"""What all heads lose together under some budgets, measured, beside what their curves say.

Shapes: `A` answers, `P` allocations, `L` layers, `K` KV heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headprof.models.loading import LoadedModel
from headprof.tuning.asked import Asked
from headprof.tuning.exams import Exams
from headprof.tuning.hidden_rows import hiding
from headprof.tuning.reading import PromptReader


@torch.no_grad()
def joint_losses(
    loaded: LoadedModel,
    exams: Exams,
    allocations: Tensor,
    on_exam: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """What each answer loses under each allocation, from one prefill a prompt.

    Args:
        loaded: the model.
        exams: what is asked, and who judges rows.
        allocations: rows that each head keeps, int64 `[P, L, K]`; those that a prompt has not are left out.
        on_exam: called with the number of exams that are done, and of all.

    Returns:
        Divergence from the full cache and drop of log-probability, nats a token, float32 `[A, P, 2]`.

    Raises:
        UsageError: the model's context is too short to judge a prompt.
        ModelError: the model's attention or layers cannot be reached, or its numbers overflow.
    """
    found: list[Tensor] = []
    reader = PromptReader(loaded, exams.judge.of_table)
    for number, exam in enumerate(exams):
        on_exam(number, len(exams))
        rows = reader.read(exam.prompt, exams.observers(loaded, exam), exam.shared)
        with hiding(loaded.model) as hider:
            hider.rows = rows
            for answer in exam.answers:
                found.append(Asked(loaded, hider, answer).lost(allocations))
    on_exam(len(exams), len(exams))
    return torch.stack(found)
