"""Comparing answers as texts."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, English articles and extra spaces, as in SQuAD's evaluation."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def harmonic_mean(precision: float, recall: float) -> float:
    """F1 of the two."""
    return 2 * precision * recall / (precision + recall) if precision and recall else 0.0


def overlap_f1(predicted: Sequence[str], expected: Sequence[str]) -> float:
    """F1 of the words that two answers share, each as often as both have it, from 0 to 1; 0 if one has none."""
    shared = (Counter(predicted) & Counter(expected)).total()
    return harmonic_mean(shared / len(predicted), shared / len(expected)) if shared else 0.0


def token_f1(prediction: str, reference: str) -> float:
    """`overlap_f1` of normalized answers (SQuAD's F1); 1 if neither has any word."""
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(reference).split()
    return overlap_f1(predicted, expected) if predicted and expected else float(predicted == expected)


def token_recall(prediction: str, reference: str) -> float:
    """Share of the reference's words that the prediction has too, from 0 to 1 (ROUGE-1 recall)."""
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(reference).split()
    if not expected:
        return float(not predicted)
    return (Counter(predicted) & Counter(expected)).total() / len(expected)
