"""What an answer is worth, as each benchmark scores it.

A metric takes the prediction, the right answers and the task's labels, and gives a number from 0 to 1. Of several right
answers the one that gives most counts, except where a metric needs all of them (`cloze`, `contains_all`). A blank
prediction scores 0, and so does a blank right answer. Definitions follow the benchmarks' evaluation code, down to what
it does unlike the textbooks; each docstring says where.

Each task has one metric. Of those that LooGLE reports it is the recall of ROUGE-L, and for masks the exact match.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from functools import wraps
from typing import Any

from headprof.evaluation.chinese_words import plain_words, segment
from headprof.evaluation.rouge import rouge_l_parts
from headprof.utils.word_overlap import harmonic_mean, normalize_answer, overlap_f1

Scorer = Callable[..., float]
"""`(prediction, references, classes=()) -> float`."""

LABEL_ENDS = (".", "<context>", "<example>")
"""Where the part of a prediction ends that counts for BABILong."""

_NUMBER = re.compile(r"\d+")
_PARAGRAPH = re.compile(r"Paragraph (\d+)")
_PARAGRAPH_ZH = re.compile(r"段落(\d+)")
_CONTROL = re.compile(r"[\x00-\x1f]")
_NO_CODE = ("`", "#", "//")


def first_line(prediction: str) -> str:
    """All that counts of predictions for LongBench's trec, triviaqa, samsum and lsht; newlines before it do not."""
    return prediction.lstrip("\n").partition("\n")[0]


def possible_labels(labels: Sequence[str], question: str) -> tuple[str, ...]:
    """The labels that may answer a question of BABILong: those that do not stand in it, in either case."""
    return tuple(label for label in labels if label.lower() not in question.lower())


def _of_one_reference(score: Callable[[str, str], float]) -> Scorer:
    """A metric from what a prediction is worth beside a single right answer."""

    @wraps(score)
    def best(prediction: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
        if not prediction.strip():
            return 0.0
        return max((score(prediction, reference) for reference in references if reference.strip()), default=0.0)

    return best


@_of_one_reference
def qa_f1(prediction: str, reference: str) -> float:
    """F1 over shared words but for case, punctuation and English articles (LongBench's `qa_f1_score`).

    An answer of articles and punctuation alone has no words and scores 0, whatever is predicted.
    """
    return overlap_f1(normalize_answer(prediction).split(), normalize_answer(reference).split())


@_of_one_reference
def qa_f1_zh(prediction: str, reference: str) -> float:
    """F1 over shared words of Chinese, in lower case and without punctuation (LongBench's `qa_f1_zh_score`).

    Raises:
        UsageError: jieba, which finds the words, is not installed.
    """
    return overlap_f1(plain_words(prediction), plain_words(reference))


@_of_one_reference
def rouge_l(prediction: str, reference: str) -> float:
    """F1 of summary-level ROUGE-L (Lin 2004) as the package `rouge` 1.0.1 computes it (LongBench's `rouge_score`).

    That is: sentences end at each full stop; case and other punctuation count; and a word counts once, however often
    it occurs. Unlike there, long sentences do not fail, which the benchmark scores 0.
    """
    return harmonic_mean(*rouge_l_parts(prediction, reference))


@_of_one_reference
def rouge_l_zh(prediction: str, reference: str) -> float:
    """`rouge_l` over words of Chinese (LongBench's `rouge_zh_score`); the Chinese full stop ends no sentence.

    Raises:
        UsageError: jieba, which finds the words, is not installed.
    """
    return harmonic_mean(*rouge_l_parts(" ".join(segment(prediction)), " ".join(segment(reference))))


def classification(prediction: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """1 over the number of labels that the prediction contains, if the right one is among them (LongBench).

    Labels that are part of the right one do not count. Case matters.
    """
    found = [label for label in classes if label in prediction]
    return max((_share_of_labels(found, reference) for reference in references if reference.strip()), default=0.0)


@_of_one_reference
def retrieval(prediction: str, reference: str) -> float:
    """Share of the prediction's numbers that are the one of the right answer, `Paragraph 12` (LongBench).

    A right answer without such a number scores 0.
    """
    return _share_of_numbers(prediction, _PARAGRAPH, reference)


@_of_one_reference
def retrieval_zh(prediction: str, reference: str) -> float:
    """`retrieval` where the right answer is written `段落12`."""
    return _share_of_numbers(prediction, _PARAGRAPH_ZH, reference)


@_of_one_reference
def count(prediction: str, reference: str) -> float:
    """Share of the prediction's numbers that are the right one, digit for digit (LongBench's `count_score`)."""
    numbers = _NUMBER.findall(prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


@_of_one_reference
def code_sim(prediction: str, reference: str) -> float:
    """Likeness in whole percent of the first line that holds neither a backtick nor a comment (LongBench).

    Likeness is `difflib`'s, which the benchmark's fuzzywuzzy uses. Where python-Levenshtein is installed as well, it
    computes another number, so published figures may differ.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in _NO_CODE)), "")
    if not line:
        return 0.0
    return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100


def label_match(prediction: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Whether the right label is the only one in the prediction's first sentence, in either case (BABILong).

    A right answer of several labels, `football,milk`, wants just these. Labels are looked for as they are, so that
    `none` holds `one` too and is never right, as in the benchmark.

    Args:
        prediction: what is generated; only what comes before a full stop or a further example counts.
        references: right labels.
        classes: the labels that may be answered: `possible_labels` of the task's.
    """
    answer = re.split("|".join(map(re.escape, LABEL_ENDS)), prediction.lower(), maxsplit=1)[0]
    found = {label.lower() for label in classes if label.lower() in answer}
    return float(any(found == _labels_of(reference.lower()) for reference in references if reference.strip()))


@_of_one_reference
def rouge_l_recall(prediction: str, reference: str) -> float:
    """The recall that goes into `rouge_l`, which is all that LooGLE's code reports: long predictions gain by it."""
    return rouge_l_parts(prediction, reference)[1]


def cloze(prediction: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Share of masks for which exactly the right name is given (LooGLE's exact match).

    LooGLE divides the right masks of all questions by all their masks; the mean of this over questions weights each
    question, not each mask, the same.

    Args:
        prediction: a dictionary like `{"<mask-0>": "Ann"}` and nothing else; other texts score 0.
        references: number `n` is what `<mask-n>` stands for; empty where there is no such mask.
        classes: ignored.
    """
    names = {f"<mask-{number}>": name for number, name in enumerate(references) if name.strip()}
    given = _dictionary(prediction)
    right = [given.get(mask) == name for mask, name in names.items()]
    return sum(right) / len(right) if right else 0.0


def contains_all(prediction: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Share of the references that the prediction contains, in either case (RULER's `string_match_all`).

    Control characters, line breaks among them, are taken out of the prediction first, as kvpress does.
    """
    found = _contained(prediction, references)
    return sum(found) / len(found) if found else 0.0


def contains_any(prediction: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Whether the prediction contains one of the references, likewise (RULER's `string_match_part`)."""
    return float(any(_contained(prediction, references)))


def _contained(prediction: str, references: Sequence[str]) -> list[bool]:
    said = _CONTROL.sub("", prediction).lower()
    return [bool(reference.strip()) and reference.lower() in said for reference in references]


METRICS: dict[str, Scorer] = {
    "longbench.qa_f1": qa_f1,
    "longbench.qa_f1_zh": qa_f1_zh,
    "longbench.rouge_l": rouge_l,
    "longbench.rouge_l_zh": rouge_l_zh,
    "longbench.classification": classification,
    "longbench.retrieval": retrieval,
    "longbench.retrieval_zh": retrieval_zh,
    "longbench.count": count,
    "longbench.code_sim": code_sim,
    "babilong.label": label_match,
    "loogle.rouge_l": rouge_l_recall,
    "loogle.cloze": cloze,
    "ruler.all": contains_all,
    "ruler.any": contains_any,
}
"""All metrics by name; `Example.metric` is the one of a task."""


def _labels_of(reference: str) -> set[str]:
    """The labels of a right answer of BABILong: one, or several with commas; `n,w` is one."""
    return set(reference.split(",")) if len(reference) > len("n,w") else {reference}


def _share_of_labels(found: Sequence[str], reference: str) -> float:
    rivals = [label for label in found if label == reference or label not in reference]
    return 1 / len(rivals) if reference in rivals else 0.0


def _share_of_numbers(prediction: str, pattern: re.Pattern[str], reference: str) -> float:
    right, numbers = pattern.search(reference), _NUMBER.findall(prediction)
    return numbers.count(right[1]) / len(numbers) if right and numbers else 0.0


def _dictionary(text: str) -> dict[Any, Any]:
    """The dictionary that a text is the source code of; an empty one if it is none.

    The benchmark evaluates the text as a program, which nobody should do with what a model writes.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd backslashes
            value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
