"""Texts to repeat while something is fitted: of all kinds, as long as asked, and nothing that evaluation asks about."""

import ast
from itertools import islice

import pytest
from support.tiny_models import tiny_tokenizer

from headprof.errors import UsageError
from headprof.probes.families import load_families
from headprof.scoring.calibration_texts import KINDS, calibration_texts, kind_of

PLAIN_LISTS = ("name", "city", "object", "building", "job", "sport", "language", "food", "ship", "project")


def test_texts_depend_on_their_place_and_the_seed_alone() -> None:
    tokenizer = tiny_tokenizer()
    first = calibration_texts(tokenizer, (200, 400), 9, seed=3)
    assert first[:4] == calibration_texts(tokenizer, (200, 400), 4, seed=3)
    assert len(set(first)) == 9
    assert not set(first) & set(calibration_texts(tokenizer, (200, 400), 9, seed=4))


@pytest.mark.parametrize("lengths", [(300,), (600, 1500)])
def test_texts_are_as_long_as_asked(lengths: tuple[int, ...]) -> None:
    tokenizer = tiny_tokenizer()
    texts = calibration_texts(tokenizer, lengths, 2 * len(KINDS), seed=0)
    counted = [len(tokenizer(text).input_ids) for text in texts]
    assert max(counted) <= max(lengths)
    nearest = [max(length for length in (0, *lengths) if length <= 1.5 * count) for count in counted]
    assert set(nearest) == set(lengths)
    for kind in KINDS:  # each of them meets each length
        own = {nearest[at] for at in range(len(texts)) if kind_of(at) == kind}
        assert own == set(lengths)


def test_short_texts_are_cut_after_a_word() -> None:
    tokenizer = tiny_tokenizer()
    for length in (1, 3, 10):
        for text in calibration_texts(tokenizer, (length,), len(KINDS), seed=0):
            assert text
            assert len(tokenizer(text).input_ids) <= length


def test_no_value_is_one_that_evaluation_asks_about() -> None:
    texts = calibration_texts(tiny_tokenizer(), (3000,), 2 * len(KINDS), seed=1)
    lists = load_families()[0].lists
    words = {word.strip(".,:;'\"()[]{}|?") for text in texts for word in text.split()}
    for name in PLAIN_LISTS:
        mine, others = (set(lists.values(name, split)) for split in ("profile", "eval"))
        assert not words & (others - mine), name
    assert words & set(lists.values("name", "profile"))
    numbers = {int(word) for word in words if word.isdecimal() and len(word) == 4}
    years = set(range(1900, 2025))
    assert all(number % 2 == 0 for number in numbers - years)


def test_code_can_be_parsed() -> None:
    at = list(KINDS).index("code")
    [text] = islice(calibration_texts(tiny_tokenizer(), (4000,), at + 1, seed=0), at, None)
    whole = text[: text.rindex("def ")]
    assert len(ast.parse(whole).body) > 3


def test_impossible_lengths_are_refused() -> None:
    for lengths in ((), (0,), (100, -1)):
        with pytest.raises(UsageError, match="lengths of at least one token"):
            calibration_texts(tiny_tokenizer(), lengths, 1, seed=0)
