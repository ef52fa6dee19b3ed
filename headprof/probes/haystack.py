"""Filler text in which needles are hidden: composed from the shipped themes, or read from a folder of `.txt` files."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from headprof.errors import ProbeError, UsageError
from headprof.utils.assets import asset_dir
from headprof.utils.files import read_text

PARAGRAPH_BREAK = "\n\n"
_MIN_FOLDER_SENTENCES = 8
# Verse, tables and lists hold "sentences" without end, which no short context could take.
_MAX_WORDS = 60
_SENTENCES_PER_PARAGRAPH = (4, 7)
# A theme that fails this often in a row to make a new sentence has been used up.
_MAX_REDRAWS = 200
_SENTENCE = re.compile(r"\S.*?[.!?][\"')\]]*(?=\s|$)|\S.*$", re.DOTALL)
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class _Theme:
    """Sentence templates on one subject, and the values that fill them."""

    sentences: tuple[str, ...]
    slots: Mapping[str, Sequence[str]]


class _Deck:
    """Deals items in seeded random order, and deals every item before it deals one again."""

    def __init__(self, items: Sequence[str], rng: random.Random) -> None:
        self._items = list(items)
        self._rng = rng
        self._left: list[str] = []

    def draw(self) -> str:
        if not self._left:
            self._left = self._rng.sample(self._items, len(self._items))
        return self._left.pop()


class _ThemeWriter:
    """Writes sentences on one theme; templates and slot values are dealt from decks, so that they recur late."""

    def __init__(self, theme: _Theme, rng: random.Random) -> None:
        self._templates = _Deck(theme.sentences, rng)
        self._slots = {name: _Deck(values, rng) for name, values in theme.slots.items()}

    def sentence(self) -> str:
        text = _SLOT.sub(lambda match: self._slots[match[1]].draw(), self._templates.draw())
        return text[0].upper() + text[1:]


class Haystack:
    """A source of filler sentences. Make one with `composed` or `from_folder`.

    Sentences come without surrounding blanks, but the last one of a paragraph ends with `PARAGRAPH_BREAK`, so that
    `join_sentences` restores the paragraphs.
    """

    def __init__(self, *, themes: Sequence[_Theme] = (), text: Sequence[str] = ()) -> None:
        self._themes = tuple(themes)
        self._text = tuple(text)

    @classmethod
    def composed(cls) -> Haystack:
        """The shipped haystack: plain prose composed from `data/haystack`; no sentence recurs in 40,000."""
        folder = asset_dir("data") / "haystack"
        common = json.loads((folder / "common.json").read_text(encoding="utf-8"))
        themes = []
        for path in sorted(folder.glob("*.json")):
            if path.stem == "common":
                continue
            raw = json.loads(path.read_text(encoding="utf-8"))
            themes.append(_Theme(tuple(raw["sentences"]), {**common, **raw["slots"]}))
        return cls(themes=themes)

    @classmethod
    def from_folder(cls, path: str | Path) -> Haystack:
        """All `.txt` files below `path`, in the order of their names, as one running text.

        Raises:
            UsageError: the folder does not exist or holds no `.txt` file.
            ProbeError: a file is not UTF-8, or together they hold fewer than 8 sentences.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise UsageError(f"The haystack folder {folder} does not exist; give a folder that holds .txt files.")
        files = sorted(file for file in folder.rglob("*.txt") if file.is_file())
        if not files:
            raise UsageError(f"The haystack folder {folder} holds no .txt file; put the filler text there as .txt.")
        sentences = [sentence for file in files for sentence in split_sentences(read_text(file, ProbeError))]
        if len(sentences) < _MIN_FOLDER_SENTENCES:
            raise ProbeError(
                f"The .txt files in {folder} hold {len(sentences)} sentences in all, fewer than "
                f"{_MIN_FOLDER_SENTENCES}; add more filler text."
            )
        return cls(text=sentences)

    @property
    def given_text(self) -> tuple[str, ...]:
        """The sentences of a folder, in order; none of the shipped haystack."""
        return self._text

    def sentences(self, rng: random.Random) -> Iterator[str]:
        """Endless filler sentences in an order that `rng` decides.

        The composed haystack never repeats a sentence before a theme is used up; a folder is read on from a random
        sentence, and from its beginning again after its end.
        """
        return self._read(rng) if self._text else self._compose(rng)

    def _read(self, rng: random.Random) -> Iterator[str]:
        start = rng.randrange(len(self._text))
        for position in count(start):
            yield self._text[position % len(self._text)]

    def _compose(self, rng: random.Random) -> Iterator[str]:
        writers = [_ThemeWriter(theme, rng) for theme in self._themes]
        seen: set[str] = set()
        while True:
            for writer in rng.sample(writers, len(writers)):
                length = rng.randint(*_SENTENCES_PER_PARAGRAPH)
                for number in range(length):
                    sentence = _new_sentence(writer, seen)
                    yield sentence + (PARAGRAPH_BREAK if number == length - 1 else "")


def join_sentences(sentences: Sequence[str]) -> tuple[str, list[int]]:
    """Running text of `sentences`, and the character offset at which each begins."""
    starts, parts, length = [], [], 0
    for sentence in sentences:
        starts.append(length)
        part = sentence if sentence.endswith("\n") else sentence + " "
        parts.append(part)
        length += len(part)
    return "".join(parts).rstrip(), starts


def split_sentences(text: str) -> list[str]:
    """Cut running text after `.`, `!` or `?`, and at the latest after 60 words.

    Blank lines end a paragraph, other line breaks become blanks.
    """
    sentences = []
    for paragraph in re.split(r"\n\s*\n", text):
        found = [piece for sentence in _SENTENCE.findall(" ".join(paragraph.split())) for piece in _pieces(sentence)]
        if found:
            sentences += [*found[:-1], found[-1] + PARAGRAPH_BREAK]
    return sentences


def _pieces(sentence: str) -> list[str]:
    words = sentence.split()
    return [" ".join(words[at : at + _MAX_WORDS]) for at in range(0, len(words), _MAX_WORDS)]


def _new_sentence(writer: _ThemeWriter, seen: set[str]) -> str:
    for _ in range(_MAX_REDRAWS):
        sentence = writer.sentence()
        if sentence not in seen:
            break
    else:
        seen.clear()
        sentence = writer.sentence()
    seen.add(sentence)
    return sentence
