"""The filler text: long, plain, without repetition, and readable from a folder."""

import random
from itertools import islice
from pathlib import Path

import pytest

from headprof.errors import ProbeError, UsageError
from headprof.probes.families import load_families
from headprof.probes.haystack import PARAGRAPH_BREAK, Haystack, join_sentences, split_sentences
from headprof.probes.slots import SPLITS


@pytest.fixture(scope="module")
def composed() -> Haystack:
    return Haystack.composed()


def test_composed_text_is_long_and_never_repeats_a_sentence(composed: Haystack) -> None:
    for seed in range(3):
        sentences = [sentence.strip() for sentence in islice(composed.sentences(random.Random(seed)), 4000)]
        assert sum(len(sentence.split()) for sentence in sentences) > 40_000
        assert len(set(sentences)) == len(sentences)


def test_composed_sentences_are_well_formed(composed: Haystack) -> None:
    for sentence in islice(composed.sentences(random.Random(5)), 2000):
        assert sentence[0].isupper()
        assert sentence.strip().endswith(".")
        assert "{" not in sentence
        assert not any(character.isdigit() for character in sentence)


def test_order_depends_on_the_seed_alone(composed: Haystack) -> None:
    first, again, other = (list(islice(composed.sentences(random.Random(seed)), 50)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_paragraphs_have_four_to_seven_sentences(composed: Haystack) -> None:
    text, _ = join_sentences(list(islice(composed.sentences(random.Random(0)), 300)))
    for paragraph in text.split(PARAGRAPH_BREAK)[:-1]:
        assert 4 <= paragraph.count(".") <= 7


def test_filler_never_uses_the_vocabulary_of_needles(composed: Haystack) -> None:
    words = {
        word
        for sentence in islice(composed.sentences(random.Random(7)), 20_000)
        for word in sentence.lower().replace(",", " ").replace(".", " ").split()
    }
    lists = load_families()[0].lists
    plain = ("name", "city", "adjective", "creature", "object", "building", "job", "sport", "language", "food", "ship")
    for name in (*plain, "project", "material", "goods"):
        for split in SPLITS:
            assert not words.intersection(value.lower() for value in lists.values(name, split)), name


def test_join_gives_the_offset_of_each_sentence() -> None:
    text, starts = join_sentences(["One.", "Two." + PARAGRAPH_BREAK, "Three."])
    assert text == "One. Two.\n\nThree."
    assert [text[start:].split(".")[0] for start in starts] == ["One", "Two", "Three"]


def test_split_keeps_every_word_and_the_paragraphs() -> None:
    text = 'It rained.  "Did it?"\nYes, it did!\n\nA line without a stop'
    assert split_sentences(text) == ["It rained.", '"Did it?"', "Yes, it did!\n\n", "A line without a stop\n\n"]


def test_endless_sentences_are_cut() -> None:
    pieces = split_sentences(" ".join(f"w{n}" for n in range(130)) + ".")
    assert [len(piece.split()) for piece in pieces] == [60, 60, 10]
    assert " ".join(" ".join(pieces).split()) == " ".join(f"w{n}" for n in range(130)) + "."


def test_folder_is_read_in_order_and_wraps(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("A0 x. A1 x. A2 x. A3 x. A4 x.", encoding="utf-8")
    (tmp_path / "b" / "c.txt").write_text("B0 x. B1 x. B2 x. B3 x. B4 x.", encoding="utf-8-sig")
    (tmp_path / "ignored.md").write_text("C0 x.", encoding="utf-8")
    expected = [f"{letter}{digit} x." for letter in "AB" for digit in range(5)]
    read = [sentence.strip() for sentence in islice(Haystack.from_folder(tmp_path).sentences(random.Random(3)), 20)]
    start = expected.index(read[0])
    assert read == [expected[(start + step) % 10] for step in range(20)]


def test_folder_errors_name_the_mend(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        Haystack.from_folder(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"holds no \.txt file"):
        Haystack.from_folder(tmp_path)
    (tmp_path / "short.txt").write_text("Only this. And this.", encoding="utf-8")
    with pytest.raises(ProbeError, match="hold 2 sentences"):
        Haystack.from_folder(tmp_path)
    (tmp_path / "short.txt").write_bytes("caf\xe9.".encode("latin-1"))
    with pytest.raises(ProbeError, match="not UTF-8"):
        Haystack.from_folder(tmp_path)
