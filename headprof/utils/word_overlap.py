"""Comparing answers as texts."""

from __future__ import annotations

import re
import string
from collections import Counter

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, English articles and extra spaces, as in SQuAD's evaluation."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the words two answers share, from 0 to 1 (SQuAD's F1)."""
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(reference).split()
    if not predicted or not expected:
        return float(predicted == expected)
    shared = sum((Counter(predicted) & Counter(expected)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(expected)
    return 2 * precision * recall / (precision + recall)


def token_recall(prediction: str, reference: str) -> float:
    """Share of the reference's words that the prediction has too, from 0 to 1 (ROUGE-1 recall)."""
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(reference).split()
    if not expected:
        return float(not predicted)
    return sum((Counter(predicted) & Counter(expected)).values()) / len(expected)
