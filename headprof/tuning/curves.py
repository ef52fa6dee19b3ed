"""Influence curves: what the right answer loses when one KV head keeps `n` rows of a prompt, measured head by head.

A prompt is read once. What comes after it runs once up to each layer, and from there on in copies: one for each KV head
of that layer and each number of rows, all other heads keeping what they keep in any case. That is everything, or
what some budgets give them: where all others are whole, they stand in for a head that is not, and what it loses alone
says little of what all of them lose together.

Shapes: `A` answers, `L` layers, `K` KV heads, `N` numbers of rows, the last of them all of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headprof._version import __version__
from headprof.errors import UsageError
from headprof.models.fingerprints import tokenizer_fingerprint, weights_fingerprint
from headprof.models.loading import LoadedModel
from headprof.profile.influence import InfluenceCurves
from headprof.tuning.answer_curves import answer_losses
from headprof.tuning.asked import AnswerLosses, Asked
from headprof.tuning.curve_results import CurvesFile
from headprof.tuning.exams import Exam, Exams
from headprof.tuning.hidden_rows import hiding
from headprof.tuning.reading import PromptReader
from headprof.utils.bootstrap import standard_error
from headprof.utils.resuming import KeptResults
from headprof.utils.team import Team

GRID = (4, 8, 16, 32, 64, 128, 256, 512)
"""Numbers of rows that a head keeps; all of the prompt comes after them."""


@dataclass(frozen=True, eq=False)
class CurveSettings:
    """At which numbers of rows what is measured.

    Attributes:
        grid: numbers of rows, ascending; all of a prompt is added.
        base: rows that all other heads keep meanwhile, int64 `[L, K]`; `None` for all.
        tolerance: between numbers of rows whose divergences differ by no more, in nats a token, it is interpolated.
    """

    grid: tuple[int, ...] = GRID
    base: Tensor | None = None
    tolerance: float = 0.002

    def check(self, length: int) -> None:
        """
        Raises:
            UsageError: such curves cannot be measured on prompts of so many tokens.
        """
        grid = self.grid
        ascending = all(low < high for low, high in pairwise(grid))
        if not grid or grid[0] < 1 or grid[-1] >= length or not ascending:
            raise UsageError(
                f"A head cannot keep {', '.join(map(str, grid)) or 'none'} of {length} tokens in turns: give ascending "
                "numbers below that."
            )


@dataclass(frozen=True, eq=False)
class MeasuredCurves:
    """What was measured.

    Attributes:
        answers: of all exams, in order.
        grid: numbers of rows, `N`.
        base: rows that the other heads kept, int64 `[L, K]`; `None` for all.
    """

    answers: Sequence[AnswerLosses]
    grid: tuple[int, ...]
    base: Tensor | None

    @property
    def base_loss(self) -> float:
        """Mean divergence where each head keeps what it keeps in any case, in nats a token."""
        return sum(float(answer.base[0]) for answer in self.answers) / max(1, len(self.answers))

    def curves(self, part: str = "divergence") -> InfluenceCurves:
        """Means over all answers, with standard errors over contexts.

        Args:
            part: `"divergence"`, or `"drop"` of log-probability.
        """
        measured = torch.stack([getattr(answer, part) for answer in self.answers]).double()  # [A, L, K, N]
        lost = measured - measured[..., -1:]
        errors = standard_error(lost.flatten(1), [answer.cluster for answer in self.answers]).view(lost.shape[1:])
        return InfluenceCurves(lost.mean(dim=0).float(), errors, torch.tensor(self.grid))


def measure_curves(
    loaded: LoadedModel,
    exams: Exams,
    how: CurveSettings | None = None,
    *,
    batch: int | None = None,
    results_path: Path | None = None,
    resume: bool = False,
    team: Team | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> MeasuredCurves:
    """Measure what each head loses at each number of rows.

    Args:
        loaded: the model.
        exams: what is asked, and who judges rows.
        how: at which numbers of rows, and what others keep; `None` for the usual.
        batch: copies that run at once; `None` to choose by the free memory.
        results_path: where what each answer loses is kept, written now and then and when interrupted; `None` for
            nowhere.
        resume: begin with what `results_path` holds, if it is there.
        team: the processes that share the work; each must call this with the same arguments.
        on_progress: called after each layer of each exam, by process 0, with the number done and the number of all.

    Raises:
        UsageError: the grid does not ascend from 1, the model's context is too short to judge a prompt, or
            `results_path` is of a run with other settings.
        ModelError: the model's attention or layers cannot be reached, or its numbers overflow.
        InterruptedRun: Ctrl-C; what there is has been written.
    """
    how = CurveSettings() if how is None else how
    how.check(exams.settings.length)
    team = team or Team()
    file = CurvesFile(results_path) if results_path is not None and team.rank == 0 else None
    kept: KeptResults[int, list[AnswerLosses]] = KeptResults(run_key(loaded, exams, how), file)
    kept.start(resume, team)
    layers, reader = loaded.shape.num_layers, PromptReader(loaded, exams.judge.of_table)
    with kept.keeping():
        mine: dict[int, list[AnswerLosses]] = {}
        for number in team.claim([number for number in range(len(exams)) if number not in kept.results]):
            done = len(kept.results) * layers

            def report(part: float, done: int = done) -> None:
                if team.rank == 0:
                    on_progress(done + int(part * layers), len(exams) * layers)

            mine[number] = examine(loaded, reader, exams, exams[number], how, batch, report)
            kept.add({number: mine[number]})
        for theirs in team.gather(mine):
            kept.add(theirs)
    found = [answer for number in range(len(exams)) for answer in kept.results[number]]
    return MeasuredCurves(found, (*how.grid, exams.settings.length), how.base)


def run_key(loaded: LoadedModel, exams: Exams, how: CurveSettings) -> dict[str, Any]:
    """Everything that an answer's losses depend on, as JSON has it."""
    return {
        "version": __version__,
        "model": loaded.name,
        "fingerprint": loaded.shape.to_dict(),
        "dtype": str(loaded.model.dtype),
        "weights": weights_fingerprint(loaded.model),
        "tokenizer": tokenizer_fingerprint(loaded.tokenizer),
        "question": exams.judge.situation,
        "judge": exams.judge.method,
        "settings": asdict(exams.settings),
        "grid": [*how.grid],
        "tolerance": how.tolerance,
        "others keep": None if how.base is None else how.base.tolist(),
    }


@torch.no_grad()
def examine(
    loaded: LoadedModel,
    reader: PromptReader,
    exams: Exams,
    exam: Exam,
    how: CurveSettings,
    batch: int | None = None,
    on_part: Callable[[float], None] = lambda part: None,
) -> list[AnswerLosses]:
    """What each answer to one exam loses; arguments as for `measure_curves`, and `on_part` is told the share done.

    Raises:
        UsageError: the model's context is too short to judge the prompt.
        ModelError: the model's attention or layers cannot be reached, or its numbers overflow.
    """
    model, layers, found = loaded.model, loaded.shape.num_layers, []
    rows = reader.read(exam.prompt, exams.observers(loaded, exam), exam.shared)
    with hiding(model) as hider:
        hider.rows = rows
        for number, answer in enumerate(exam.answers):
            asked = Asked(loaded, hider, answer, batch)
            base = asked.whole if how.base is None else how.base.minimum(asked.whole)
            at_base = torch.zeros(2) if how.base is None else asked.lost(base[None])[0]

            def report(done: int, number: int = number) -> None:
                on_part((number + done / layers) / len(exam.answers))

            divergence, drop = answer_losses(asked, base, at_base, how.grid, how.tolerance, report)
            found.append(AnswerLosses(answer.kind, exam.cluster, divergence, drop, at_base))
    return found
