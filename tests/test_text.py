"""Texts and numbers as people write them."""

import pytest

from headprof.errors import UsageError
from headprof.utils.units import human_bytes, parse_lengths
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


@pytest.mark.parametrize(("text", "lengths"), [("1k,4k", (1024, 4096)), ("300", (300,)), (" 2K , 5", (2048, 5))])
def test_parse_lengths(text, lengths):
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize("text", ["", "0", "k", "1.5k", "1k,,2k", "-3"])
def test_lengths_that_make_no_sense(text):
    with pytest.raises(UsageError, match="cannot be read"):
        parse_lengths(text)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (58_700_000, "58.7 MB"), (2.5e12, "2.5e+03 GB")]
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text
