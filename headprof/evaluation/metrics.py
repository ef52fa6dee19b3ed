"""What an answer is worth, as each benchmark scores it.

A metric takes the prediction, the right answers and the task's labels, and gives a number from 0 to 1. Of several right
answers the one that gives most counts, except where a metric needs all of them (`cloze`, `cloze_partial`,
`contains_all`). A blank prediction scores 0, and so does a blank right answer. Definitions follow the benchmarks'
evaluation code, down to what it does unlike the textbooks; each docstring says where.

LooGLE also reports METEOR, BERTScore and the verdict of GPT-4. They are left out: they need WordNet, a second language
model and a paid service.
"""

from __future__ import annotations

import ast
import logging
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache, wraps
from math import exp
from typing import Any

from headprof.errors import UsageError
from headprof.utils.word_overlap import normalize_answer

Scorer = Callable[..., float]
"""`(prediction, references, classes=()) -> float`."""

LABEL_ENDS = (".", "<context>", "<example>")
"""Where the part of a prediction ends that counts for BABILong."""

_NUMBER = re.compile(r"\d+")
_PARAGRAPH = re.compile(r"Paragraph (\d+)")
_PARAGRAPH_ZH = re.compile(r"段落(\d+)")
_NO_CODE = ("`", "#", "//")
_FULL_WIDTH = 0xFEE0  # from an ASCII character to its full-width form
# LongBench's list lacks the opening 《 as well as 〈, 〉 and the full-width stop: where they are words, they count.
_PUNCTUATION_ZH = str.maketrans(
    "",
    "",
    string.punctuation
    + "".join(chr(ord(mark) + _FULL_WIDTH) for mark in string.punctuation if mark != ".")
    + "､、。｡〃》「」｢｣『』【】〔〕〖〗〘〙〚〛｟｠〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏",
)


@dataclass(frozen=True)
class Metric:
    """How answers of certain tasks are scored.

    Attributes:
        score: `(prediction, references, classes=()) -> float` from 0 to 1.
        benchmark: whose evaluation code it follows.
        tasks: names of the tasks it is for, without the benchmark's.
    """

    score: Scorer
    benchmark: str
    tasks: tuple[str, ...]

    def __call__(self, prediction: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
        return self.score(prediction, references, classes)


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
def exact_match(prediction: str, reference: str) -> float:
    """Whether both are the same but for case, punctuation, English articles and spaces (SQuAD)."""
    return float(normalize_answer(prediction) == normalize_answer(reference))


@_of_one_reference
def qa_f1(prediction: str, reference: str) -> float:
    """F1 over shared words, normalised as for `exact_match` (LongBench's `qa_f1_score`).

    An answer of articles and punctuation alone has no words and scores 0, whatever is predicted.
    """
    return _overlap_f1(normalize_answer(prediction).split(), normalize_answer(reference).split())


@_of_one_reference
def qa_f1_zh(prediction: str, reference: str) -> float:
    """F1 over shared words of Chinese, in lower case and without punctuation (LongBench's `qa_f1_zh_score`).

    Raises:
        UsageError: jieba, which finds the words, is not installed.
    """
    return _overlap_f1(_words_zh(prediction), _words_zh(reference))


@_of_one_reference
def rouge_l(prediction: str, reference: str) -> float:
    """F1 of summary-level ROUGE-L (Lin 2004) as the package `rouge` 1.0.1 computes it (LongBench's `rouge_score`).

    That is: sentences end at each full stop; case and other punctuation count; and a word counts once, however often
    it occurs. Unlike there, long sentences do not fail, which the benchmark scores 0.
    """
    return _f1(*_rouge_l(prediction, reference))


@_of_one_reference
def rouge_l_zh(prediction: str, reference: str) -> float:
    """`rouge_l` over words of Chinese (LongBench's `rouge_zh_score`); the Chinese full stop ends no sentence.

    Raises:
        UsageError: jieba, which finds the words, is not installed.
    """
    return _f1(*_rouge_l(" ".join(_segment(prediction)), " ".join(_segment(reference))))


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
def rouge_1_recall(prediction: str, reference: str) -> float:
    """Share of the reference's distinct words that are in the prediction (LooGLE, by the package `rouge`)."""
    return _rouge_n_recall(prediction, reference, 1)


@_of_one_reference
def rouge_2_recall(prediction: str, reference: str) -> float:
    """Share of the reference's distinct pairs of neighbouring words that are in the prediction (LooGLE)."""
    return _rouge_n_recall(prediction, reference, 2)


@_of_one_reference
def rouge_l_recall(prediction: str, reference: str) -> float:
    """The recall that goes into `rouge_l`, which is all that LooGLE's code reports: long predictions gain by it."""
    return _rouge_l(prediction, reference)[1]


@_of_one_reference
def bleu_1(prediction: str, reference: str) -> float:
    """Precision of words, split at spaces, times the brevity penalty (Papineni et al. 2002; LooGLE)."""
    return _bleu(prediction, reference, 1)


@_of_one_reference
def bleu_4(prediction: str, reference: str) -> float:
    """Precision of runs of four words times the brevity penalty.

    LooGLE's BLEU-4 is that of length four alone, not the mean over lengths 1 to 4, and is not smoothed: answers of
    fewer than four words score 0.
    """
    return _bleu(prediction, reference, 4)


def cloze(prediction: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Share of masks for which exactly the right name is given (LooGLE's exact match).

    LooGLE divides the right masks of all questions by all their masks; the mean of this over questions weights each
    question, not each mask, the same.

    Args:
        prediction: a dictionary like `{"<mask-0>": "Ann"}` and nothing else; other texts score 0.
        references: number `n` is what `<mask-n>` stands for; empty where there is no such mask.
        classes: ignored.
    """
    return _share_of_masks(prediction, references, lambda given, name: given == name)


def cloze_partial(prediction: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """`cloze`, where a name that has a word in common with the right one is enough (LooGLE's partial match)."""
    return _share_of_masks(prediction, references, lambda given, name: not set(given.split()).isdisjoint(name.split()))


def contains_all(prediction: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Share of the references that the prediction contains, in either case (RULER's `string_match_all`)."""
    found = [_contains(prediction, reference) for reference in references]
    return sum(found) / len(found) if found else 0.0


@_of_one_reference
def contains_any(prediction: str, reference: str) -> float:
    """Whether the prediction contains a reference, in either case (RULER's `string_match_part`)."""
    return float(_contains(prediction, reference))


_LOOGLE_TEXTS = ("shortdep_qa", "longdep_qa", "summarization")

METRICS: dict[str, Metric] = {
    "squad.exact_match": Metric(exact_match, "squad", ()),
    "longbench.qa_f1": Metric(
        qa_f1,
        "longbench",
        ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"),
    ),
    "longbench.qa_f1_zh": Metric(qa_f1_zh, "longbench", ("multifieldqa_zh",)),
    "longbench.rouge_l": Metric(rouge_l, "longbench", ("gov_report", "qmsum", "multi_news", "samsum")),
    "longbench.rouge_l_zh": Metric(rouge_l_zh, "longbench", ("dureader", "vcsum")),
    "longbench.classification": Metric(classification, "longbench", ("trec", "lsht")),
    "longbench.retrieval": Metric(retrieval, "longbench", ("passage_retrieval_en",)),
    "longbench.retrieval_zh": Metric(retrieval_zh, "longbench", ("passage_retrieval_zh",)),
    "longbench.count": Metric(count, "longbench", ("passage_count",)),
    "longbench.code_sim": Metric(code_sim, "longbench", ("lcc", "repobench-p")),
    "babilong.label": Metric(label_match, "babilong", tuple(f"qa{number}" for number in range(1, 21))),
    "loogle.rouge_1": Metric(rouge_1_recall, "loogle", _LOOGLE_TEXTS),
    "loogle.rouge_2": Metric(rouge_2_recall, "loogle", _LOOGLE_TEXTS),
    "loogle.rouge_l": Metric(rouge_l_recall, "loogle", _LOOGLE_TEXTS),
    "loogle.bleu_1": Metric(bleu_1, "loogle", _LOOGLE_TEXTS),
    "loogle.bleu_4": Metric(bleu_4, "loogle", _LOOGLE_TEXTS),
    "loogle.qa_f1": Metric(qa_f1, "loogle", ("longdep_qa",)),  # as in HeadKV's evaluation
    "loogle.cloze": Metric(cloze, "loogle", ("shortdep_cloze",)),
    "loogle.cloze_partial": Metric(cloze_partial, "loogle", ("shortdep_cloze",)),
    "ruler.all": Metric(
        contains_all,
        "ruler",
        (
            *("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery"),
            *("variable_tracking", "common_words", "frequent_words"),
        ),
    ),
    "ruler.any": Metric(contains_any, "ruler", ("qa_1", "qa_2")),
}
"""All metrics by name; a task may have several, of which `Example.metric` names the one it is judged by."""


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision and recall else 0.0


def _overlap_f1(predicted: list[str], expected: list[str]) -> float:
    shared = sum((Counter(predicted) & Counter(expected)).values())
    return _f1(shared / len(predicted), shared / len(expected)) if shared else 0.0


def _words_zh(text: str) -> list[str]:
    plain = ("".join(word.lower().translate(_PUNCTUATION_ZH).split()) for word in _segment(text))
    return [word for word in plain if word]


def _segment(text: str) -> list[str]:
    return _tokenizer_zh().lcut(text)


@cache
def _tokenizer_zh() -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # of what newer Pythons dislike in it
            import jieba
    except ImportError:
        raise UsageError(
            "Answers in Chinese are split into words by jieba, which is not installed: pip install headprof[eval]."
        ) from None
    jieba.setLogLevel(logging.WARNING)  # it reports at length how it loads its dictionary
    return jieba.Tokenizer()


def _sentences(text: str) -> list[list[str]]:
    """Words by sentence; the blank behind a last full stop is a sentence of one empty word, as `rouge` has it."""
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def _rouge_l(prediction: str, reference: str) -> tuple[float, float]:
    """Precision and recall of the words that any sentence of one has in order in common with any of the other."""
    predicted, expected = _sentences(prediction), _sentences(reference)
    shared = {word for right in expected for said in predicted for word in longest_common_subsequence(right, said)}
    return _share(shared, {word for said in predicted for word in said}), _share(
        shared, {word for right in expected for word in right}
    )


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """The longest run of words, with gaps, that both have; of several, the one that `rouge` chooses."""
    lengths = [[0] * (len(second) + 1)]  # lengths[i][j]: of the first i and the first j words
    for word in first:
        above, row = lengths[-1], [0]
        for j, other in enumerate(second):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        lengths.append(row)
    common = []
    i, j = len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            common.append(first[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return common[::-1]


def _rouge_n_recall(prediction: str, reference: str, n: int) -> float:
    predicted, expected = (
        [word for sentence in _sentences(text) for word in sentence] for text in (prediction, reference)
    )
    wanted = set(_ngrams(expected, n))
    return _share(wanted & set(_ngrams(predicted, n)), wanted)


def _share(part: set[Any], whole: set[Any]) -> float:
    return len(part) / len(whole) if whole else 0.0


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def _bleu(prediction: str, reference: str, n: int) -> float:
    predicted, expected = prediction.split(), reference.split()
    counts = Counter(_ngrams(predicted, n))
    matched = (counts & Counter(_ngrams(expected, n))).total()
    if not matched:
        return 0.0
    return matched / counts.total() * min(1.0, exp(1 - len(expected) / len(predicted)))


def _labels_of(reference: str) -> set[str]:
    """The labels of a right answer of BABILong: one, or several with commas; `n,w` is one."""
    return set(reference.split(",")) if len(reference) > len("n,w") else {reference}


def _share_of_labels(found: Sequence[str], reference: str) -> float:
    rivals = [label for label in found if label == reference or label not in reference]
    return 1 / len(rivals) if reference in rivals else 0.0


def _share_of_numbers(prediction: str, pattern: re.Pattern[str], reference: str) -> float:
    right, numbers = pattern.search(reference), _NUMBER.findall(prediction)
    return numbers.count(right[1]) / len(numbers) if right and numbers else 0.0


def _share_of_masks(prediction: str, references: Sequence[str], matches: Callable[[str, str], bool]) -> float:
    names = {f"<mask-{number}>": name for number, name in enumerate(references) if name.strip()}
    given = _dictionary(prediction)
    right = [isinstance(given.get(mask), str) and matches(given[mask], name) for mask, name in names.items()]
    return sum(right) / len(right) if right else 0.0


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


def _contains(prediction: str, reference: str) -> bool:
    return bool(reference.strip()) and reference.lower() in prediction.lower()
