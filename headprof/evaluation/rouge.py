"""ROUGE-L as the package `rouge` 1.0.1 computes it, which LongBench and LooGLE use."""

from __future__ import annotations

from collections.abc import Sequence


def rouge_l_parts(prediction: str, reference: str) -> tuple[float, float]:
    """Precision and recall of the words that any sentence of one has in order in common with any of the other."""
    predicted, expected = _sentences(prediction), _sentences(reference)
    shared = {word for right in expected for said in predicted for word in longest_common_subsequence(right, said)}
    return _share(shared, predicted), _share(shared, expected)


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


def _sentences(text: str) -> list[list[str]]:
    """Words by sentence; the blank behind a last full stop is a sentence of one empty word, as `rouge` has it."""
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def _share(words: set[str], sentences: Sequence[Sequence[str]]) -> float:
    """How many of the different words of these sentences the given ones are; 0 where there are none."""
    whole = {word for sentence in sentences for word in sentence}
    return len(words) / len(whole) if whole else 0.0
