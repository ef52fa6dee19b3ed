"""LooGLE (Li et al., ACL 2024): questions about documents of more than 24,000 tokens that were written after 2022.

Rows come in two layouts: one row a document, with all its questions in `qa_pairs` (as first published), or one row a
question (as on the hub now). Both give one example a question, in the same order. Lengths of the answers are the
benchmark's; the wording of the prompts is this project's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import count, islice
from typing import Any

from headprof.evaluation.tasks.example import Example, Task, TaskRequest, split_template
from headprof.evaluation.tasks.prompts import own_prompts
from headprof.evaluation.tasks.sources import Row, Source, parsed, read_rows

DATASET = "bigai-nlco/LooGLE"
LICENSE = "CC BY-SA 4.0"

METRICS_AND_LENGTHS = {
    "shortdep_qa": ("rouge_l", 300),
    "longdep_qa": ("rouge_l", 500),
    "shortdep_cloze": ("cloze", 50),
    "summarization": ("rouge_l", 500),
}
"""Metric of each task, and how many tokens are generated."""

_MASK = re.compile(r"<mask-(\d+)>")


def examples(name: str, request: TaskRequest) -> Iterator[Example]:
    """The examples of task `name` (`"shortdep_qa"`).

    Raises:
        UsageError: the rows cannot be had, or lack a field.
    """
    template_before, template_after = split_template(own_prompts("loogle")[name], f"The prompt of {name}")
    metric, max_new_tokens = METRICS_AND_LENGTHS[name]
    rows = read_rows(Source(DATASET, name, "test", _files(name), "loogle"), request.data_dir)
    asked = ((row, *pair) for row in rows for pair in _questions(row, name))
    for number, (row, question, answers) in zip(count(1), islice(asked, request.limit)):
        yield Example(
            task=f"loogle/{name}",
            name=str(number),
            group="",
            before=template_before,
            document=row.text("context" if "context" in row else "input"),
            after=template_after.replace("{input}", question),
            reply="",
            answers=answers,
            classes=(),
            metric=f"loogle.{metric}",
            max_new_tokens=max_new_tokens,
            chat=True,
        )


def _files(name: str) -> tuple[str, ...]:
    names = ("longdep_summarization", name) if name == "summarization" else (name,)  # as it was called at first
    return tuple(f"{folder}{file}" for file in names for folder in ("data/", "LooGLE-testdata/", ""))


def _questions(row: Row, name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Questions and their answers of one row; a summary has no question."""
    if name == "summarization":
        yield "", (row.text("answer" if "answer" in row else "output"),)
        return
    if "question" in row:
        pairs = [{"Q": row.text("question"), "A": row.values.get("answer")}]
    else:
        pairs = parsed(row.values.get("qa_pairs"))
        if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, Mapping) for pair in pairs):
            raise row.lacks("qa_pairs", "a list of questions")
    for pair in pairs:
        question, answer = pair.get("Q"), pair.get("A")
        if not isinstance(question, str) or answer is None:
            raise row.lacks("qa_pairs" if "qa_pairs" in row else "answer", "a question and its answer")
        yield question, _entities(answer) if name == "shortdep_cloze" else (str(answer),)


def _entities(answer: Any) -> tuple[str, ...]:
    """What each mask stands for, by the masks' numbers, from a list or from `{"<mask-0>": ...}`."""
    answer = parsed(answer)
    if isinstance(answer, Mapping):
        masks = {int(match[1]): str(value) for key, value in answer.items() if value and (match := _MASK.search(key))}
        return tuple(masks.get(number, "") for number in range(max(masks, default=-1) + 1))
    return tuple(map(str, answer)) if isinstance(answer, list | tuple) else (str(answer),)


TASKS = tuple(Task(f"loogle/{name}", DATASET, LICENSE, partial(examples, name)) for name in METRICS_AND_LENGTHS)
