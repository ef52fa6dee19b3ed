"""Texts that a model repeats while its budgets are learned: none of them is ever asked about.

Four kinds take turns: prose in which needles of the half of their words that profiles are made from are hidden, a
dialogue, a numbered list, and records, one in each line. All are composed of this project's own sentences by a seeded
generator, or are read on from a folder of the user's own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from headprof.errors import UsageError
from headprof.models.loading import LoadedModel
from headprof.models.prompt_encoder import PromptEncoder
from headprof.probes.build import ProbeBuilder, ProbeSettings
from headprof.probes.haystack import Haystack, join_sentences

KINDS = ("needles", "dialogue", "list", "records")
DEFAULT_LENGTHS = (512, 1024, 2048)
_TOKENS_PER_SENTENCE = 4
"""Fewer than any sentence has, so that there are always enough of them."""
_SPEAKERS = ("Visitor", "Host", "Neighbour")


@dataclass(frozen=True)
class CalibrationSettings:
    """Which texts are repeated.

    Attributes:
        texts: how many.
        lengths: tokens of a text, which take turns; `None` for those of `DEFAULT_LENGTHS` that the model can repeat.
        folder: `.txt` files of the user's to read from; `None` for this project's own.
        seed: of the texts.
    """

    texts: int = 12
    lengths: tuple[int, ...] | None = None
    folder: Path | None = None
    seed: int = 0

    def check(self) -> None:
        """Find mistakes that need no model; raises `UsageError` or `ProbeError`."""
        if self.texts < 1:
            raise UsageError(f"{self.texts} texts teach nothing: ask for at least 1 with --texts.")
        if self.lengths is not None and min(self.lengths) < 32:
            raise UsageError(f"Texts of {min(self.lengths)} tokens teach nothing: give --text-lengths of at least 32.")
        if self.folder is not None:
            Haystack.from_folder(self.folder)


class CalibrationTexts(Sequence[tuple[int, ...]]):
    """The texts as token ids, each with the frame of a document.

    Args:
        loaded: the model.
        settings: which texts.

    Raises:
        UsageError: the model cannot repeat texts of these lengths.
    """

    def __init__(self, loaded: LoadedModel, settings: CalibrationSettings):
        self._loaded, self._settings = loaded, settings
        self._encoder = PromptEncoder(loaded.tokenizer)
        demand = len(self._encoder.repetition_ids([]))
        most = (loaded.max_positions - demand) // 2
        wanted = settings.lengths or tuple(length for length in DEFAULT_LENGTHS if length <= most)
        if not wanted or max(wanted) > most:
            raise UsageError(
                f"{loaded.name} can repeat texts of at most {most} tokens: give --text-lengths up to that."
            )
        self.lengths = wanted
        self._haystack = Haystack.composed() if settings.folder is None else Haystack.from_folder(settings.folder)

    def __len__(self) -> int:
        return self._settings.texts

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        length = self.lengths[index % len(self.lengths)]
        if self._settings.folder is not None:
            return self._cut(self._prose(self._rng(index), length), length)
        kind = KINDS[index % len(KINDS)]
        if kind == "needles":
            return self._needles(index, length)
        return self._cut(self._lines(kind, self._rng(index), length), length)

    def kinds(self) -> tuple[str, ...]:
        """What the texts are, each kind once."""
        return ("folder",) if self._settings.folder is not None else KINDS[: len(self)]

    def _rng(self, index: int) -> random.Random:
        return random.Random(f"{self._settings.seed}/profile/reconstruction/{index}")

    def _cut(self, text: str, length: int) -> tuple[int, ...]:
        return tuple(self._encoder.document_ids(text)[:length])

    def _prose(self, rng: random.Random, length: int) -> str:
        return join_sentences(list(islice(self._haystack.sentences(rng), length // _TOKENS_PER_SENTENCE)))[0]

    def _needles(self, index: int, length: int) -> tuple[int, ...]:
        """Context number `index` of probes of this length, which is at most as long, room for the question left."""
        settings = ProbeSettings(
            probes=10**6, lengths=(length,), needles_per_context=None, seed=self._settings.seed, split="profile"
        )
        builder = ProbeBuilder(self._loaded.tokenizer, settings, max_positions=self._loaded.max_positions)
        return builder.context(index).context_ids

    def _lines(self, kind: str, rng: random.Random, length: int) -> str:
        sentences = islice(self._haystack.sentences(rng), length // _TOKENS_PER_SENTENCE)
        lines = []
        for number, sentence in enumerate(sentences):
            said = sentence.strip()
            if kind == "dialogue":
                lines.append(f"{_SPEAKERS[number % len(_SPEAKERS)]}: {said}")
            elif kind == "list":
                lines.append(f"{number + 1}. {said}")
            else:
                hour, minute = rng.randrange(24), rng.randrange(60)
                lines.append(
                    json.dumps(
                        {
                            "id": rng.randrange(10**4, 10**5),
                            "time": f"{hour:02d}:{minute:02d}",
                            "count": rng.randrange(1, 500),
                            "note": said,
                        }
                    )
                )
        return "\n".join(lines)
