"""From single answers to a table: shares with 95 % intervals, per method and budget."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from headprof.evaluation.perplexity import Loss
from headprof.evaluation.probing import Answer
from headprof.evaluation.statistics import wilson_interval


@dataclass(frozen=True)
class Cell:
    """One method at one budget.

    Attributes:
        method, budget: as in the answers.
        correct, asked: counts of probes.
        low, high: 95 % Wilson interval of the share, from 0 to 1.
        cache_bytes: mean bytes of the cache after the prompt.
    """

    method: str
    budget: str
    correct: int
    asked: int
    low: float
    high: float
    cache_bytes: float

    @property
    def share(self) -> float:
        return self.correct / self.asked


def tabulate(answers: Iterable[Answer]) -> list[Cell]:
    """One cell per method and budget, in the order of first appearance."""
    groups: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer.method, answer.budget].append(answer)
    cells = []
    for (method, budget), group in groups.items():
        correct = sum(answer.correct for answer in group)
        low, high = wilson_interval(correct, len(group))
        mean_bytes = sum(answer.cache_bytes for answer in group) / len(group)
        cells.append(Cell(method, budget, correct, len(group), low, high, mean_bytes))
    return cells


def results_csv(results: Iterable[Answer | Loss]) -> str:
    """Every single result, a line each, with a header; nothing if there is none."""
    rows = [asdict(result) for result in results]
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
