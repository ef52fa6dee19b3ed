"""What an evaluation found: single answers, and the cells of its tables with 95 % intervals."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from headprof.evaluation.perplexity import Loss, PerplexityCell
from headprof.utils.intervals import mean_interval, wilson_interval

PROBE_TASKS = {"niah": "retrieval", "reasoning": "reasoning", "nonliteral": "retrieval"}
"""This project's own tasks, and the kind of probe each one asks."""
_POOLED = ("niah", "reasoning")
"""Those of them that are shown together."""
MULTI = "multi"
"""Its task of many probes to one document."""
OWN_TASKS = (*PROBE_TASKS, MULTI)
ALL_RIGHT = f"{MULTI}, all right"
"""What the documents are called on which every question of `MULTI` is right, in tables."""


@dataclass(frozen=True)
class Answer:
    """What one question came to under one method at one budget.

    Attributes:
        task: `"niah"`, `"longbench/hotpotqa"`.
        question: its name, unique within the task; of `MULTI`, `"3.7"` is the eighth about the fourth document.
        group: the length of the prompts, `"1k"`, for tasks that are asked at several; else empty.
        method: as in the table of methods, `"full"` for the full cache.
        budget: as the user gave it; empty for the full cache.
        score: by the metric of the task, from 0 to 1. Of a probe: 1 if each token of the answer is the arg-max,
            the tokens before it given.
        divergence: Kullback-Leibler divergence of the next-token distributions from the full cache's, in nats, averaged
            over the tokens of the reference answer; `None` if `full` was not among the methods.
        agreement: share of these tokens at which both have the same arg-max; `None` likewise.
        text: what was generated; empty for probes, whose answers are given.
        prompt_tokens: length of the prompt that was compressed.
        cache_bytes: bytes that the cache held after the prompt.
        depth: share of the text that stands before the needle, 0 to 1; `None` where there is no needle.
        family: of a probe; else empty.
        second_tier_bytes: of evicted rows that could be brought back from the host.
    """

    task: str
    question: str
    group: str
    method: str
    budget: str
    score: float
    divergence: float | None
    agreement: float | None
    text: str
    prompt_tokens: int
    cache_bytes: int
    depth: float | None = None
    family: str = ""
    second_tier_bytes: int = 0


@dataclass(frozen=True)
class Cell:
    """One method at one budget on one task; intervals are of 95 %.

    Attributes:
        task: or, for the questions of several tasks together, what they have in common: `"probes"`, `"longbench"`.
        group, method, budget: as in the answers.
        questions: how many.
        score: mean over questions, each counting alike; 0 to 1.
        interval: of the score: Wilson's where all scores are 0 or 1, else Student's; `None` for a single graded
            answer.
        divergence, agreement: means over questions; `None` without the full cache.
        divergence_interval: Student's; `None` for less than two questions.
        cache_bytes, second_tier_bytes: means over questions.
    """

    task: str
    group: str
    method: str
    budget: str
    questions: int
    score: float
    interval: tuple[float, float] | None
    divergence: float | None
    divergence_interval: tuple[float, float] | None
    agreement: float | None
    cache_bytes: float
    second_tier_bytes: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """All that a run found, and what it was.

    Attributes:
        about: how the run was made: `command`, `model`, `dtype`, `device`, `machine`, `date`, `seed`, `versions` (a
            dictionary), `question_known`, `profile`, `settings` (a dictionary) and `sharing` (what the shared prefill
            saved, a dictionary).
        answers: every single one, in the order of the questions.
        losses: of the perplexity task.
        cells: of the tables, from the answers.
        perplexities: the same of the losses.
    """

    about: dict[str, Any]
    answers: list[Answer]
    losses: list[Loss]
    cells: list[Cell]
    perplexities: list[PerplexityCell]


def suite_of(task: str) -> str:
    """What a task's questions may be pooled with: `"probes"`, or the benchmark's name."""
    return "probes" if task in _POOLED else task.partition("/")[0]


def tabulate(answers: Iterable[Answer]) -> list[Cell]:
    """A cell per task, group, method and budget, in the order of first appearance.

    Where a suite has several tasks, cells of all of them together follow those of its tasks. Those of `MULTI` are
    followed by cells of whole documents, `ALL_RIGHT`.
    """
    answers = list(answers)
    tasks: dict[str, set[str]] = defaultdict(set)
    for answer in answers:
        tasks[suite_of(answer.task)].add(answer.task)
    cells: list[Cell] = []
    for suite, members in tasks.items():
        own = [answer for answer in answers if answer.task in members]
        cells += _cells((answer.task, answer) for answer in own)
        if len(members) > 1:
            cells += _cells((suite, answer) for answer in own)
        if suite == MULTI:
            cells += _cells((ALL_RIGHT, answer) for answer in whole_documents(own))
    return cells


def counted(task: str) -> str:
    """What the number of a cell of this task counts, in words."""
    return "documents" if task == ALL_RIGHT else "questions"


def multi_name(document: int, number: int) -> str:
    """What a question of `MULTI` is called: by its document, and its number in that."""
    return f"{document}.{number}"


def whole_documents(answers: Iterable[Answer]) -> list[Answer]:
    """An answer for each document of `MULTI` under each candidate: 1 if all that was asked about it is right, else 0.

    There is no divergence, which is that of the questions.
    """
    documents: dict[tuple[str, ...], list[Answer]] = defaultdict(list)
    for answer in answers:
        document = answer.question.partition(".")[0]
        documents[document, answer.group, answer.method, answer.budget].append(answer)
    return [
        replace(
            about[0],
            task=ALL_RIGHT,
            question=key[0],
            score=float(all(answer.score == 1 for answer in about)),
            divergence=None,
            agreement=None,
            depth=None,
            family="",
        )
        for key, about in documents.items()
    ]


def _cells(named: Iterable[tuple[str, Answer]]) -> list[Cell]:
    tables: dict[tuple[str, str], dict[tuple[str, str], list[Answer]]] = {}
    for task, answer in named:
        table = tables.setdefault((task, answer.group), {})
        table.setdefault((answer.method, answer.budget), []).append(answer)
    return [_cell(task, group) for (task, _), table in tables.items() for group in table.values()]


def _cell(task: str, group: Sequence[Answer]) -> Cell:
    divergences = [answer.divergence for answer in group if answer.divergence is not None]
    agreements = [answer.agreement for answer in group if answer.agreement is not None]
    scores = [answer.score for answer in group]
    return Cell(
        task=task,
        group=group[0].group,
        method=group[0].method,
        budget=group[0].budget,
        questions=len(group),
        score=fmean(scores),
        interval=score_interval(scores),
        divergence=fmean(divergences) if divergences else None,
        divergence_interval=mean_interval(divergences),
        agreement=fmean(agreements) if agreements else None,
        cache_bytes=fmean(answer.cache_bytes for answer in group),
        second_tier_bytes=fmean(answer.second_tier_bytes for answer in group),
    )


def score_interval(scores: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean of scores from 0 to 1: Wilson's if all are 0 or 1, else Student's within these bounds.

    `None` for a single graded score.
    """
    if all(score in (0, 1) for score in scores):
        return wilson_interval(int(sum(scores)), len(scores))
    found = mean_interval(scores)
    return None if found is None else (max(0.0, found[0]), min(1.0, found[1]))


def main_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Those to show first: of a suite with several tasks, the cells of all of them together."""
    pooled = {cell.task for cell in cells} - {cell.task for cell in cells if suite_of(cell.task) != cell.task}
    return [cell for cell in cells if cell.task in pooled or suite_of(cell.task) not in pooled]


def summary(found: Evaluation) -> dict[str, Any]:
    """What a run was and the cells of its tables, as JSON has them; the single answers are left out."""
    return {
        "about": found.about,
        "cells": [asdict(cell) for cell in found.cells],
        "perplexities": [asdict(cell) for cell in found.perplexities],
    }


def results_csv(results: Iterable[Any]) -> str:
    """A line for each result, with a header; nothing if there is none.

    A text that a spreadsheet would take for a formula has an apostrophe before it, as spreadsheets write it.
    """
    rows = [{name: _no_formula(value) for name, value in asdict(result).items()} for result in results]
    text = io.StringIO()
    if rows:
        # Texts in quotes: the module leaves a carriage return bare, which ends a line for those who read it.
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def _no_formula(value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
