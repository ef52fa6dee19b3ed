"""Words that two answers share, whatever their case, articles and punctuation."""

import pytest

from headprof.utils.word_overlap import normalize_answer, token_f1, token_recall


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("The red door.", "red door", 1.0),
        ("a red door", "the blue door", 0.5),
        ("red red door", "red door", 0.8),
        ("", "", 1.0),
        ("", "red", 0.0),
        ("window", "door", 0.0),
        ("the", "a", 1.0),
        ("Ångström!", "ångström", 1.0),
    ],
)
def test_token_f1(prediction, reference, score):
    assert token_f1(prediction, reference) == pytest.approx(score)
    assert token_f1(reference, prediction) == pytest.approx(score)


def test_token_recall_forgives_what_is_said_beside():
    assert token_recall("The red door. It was painted in May.", "a red door") == 1
    assert token_recall("red", "red red door window") == 0.25
    assert token_recall("", "door") == 0 and token_recall("", "the") == 1 and token_recall("door", "the") == 0


def test_normalize_answer():
    assert normalize_answer("  The  Quick, brown-fox; an ant ") == "quick brownfox ant"
