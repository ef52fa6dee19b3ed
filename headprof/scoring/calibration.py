"""Documents that a model repeats while something is fitted to it, with their repetitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headprof.errors import ProbeError, UsageError
from headprof.models.loading import LoadedModel
from headprof.models.prompt_encoder import PromptEncoder
from headprof.scoring.calibration_texts import WORDS, calibration_texts, first_parts
from headprof.utils.files import read_text

_LEAST_TOKENS = 32


@dataclass(frozen=True)
class CalibrationSettings:
    """Which texts are repeated.

    Attributes:
        texts: how many.
        lengths: of them in tokens, which take turns; `None` for usual ones, as far as the model can repeat them.
        seed: of the texts, and of what is fitted to them.
        folder: with `.txt` files of the user's in place of this project's texts; `None` for these.
    """

    texts: int
    lengths: tuple[int, ...] | None = None
    seed: int = 0
    folder: Path | None = None

    def check(self, fewest: int = 1) -> None:
        """Find mistakes that need no model.

        Raises:
            UsageError: there are fewer texts than `fewest`, they are too short, or there is no such folder.
        """
        if self.texts < fewest:
            raise UsageError(
                f"Too little can be learned from {self.texts} texts: ask for --texts of at least {fewest}."
            )
        if self.lengths is not None and min(self.lengths, default=0) < _LEAST_TOKENS:
            raise UsageError(
                f"Texts of fewer than {_LEAST_TOKENS} tokens say little of what is looked at: raise --text-lengths."
            )
        if self.folder is not None and not self.folder.is_dir():
            raise UsageError(f"There is no folder {self.folder}: give one that holds .txt files with --text-folder.")


@dataclass(frozen=True)
class RepeatedDocuments:
    """Documents as token ids, with the frame of a document, each with the demand to repeat it and its repetition.

    Attributes:
        pairs: of a document and what follows it.
        lengths: that were asked for.
    """

    pairs: Sequence[tuple[list[int], list[int]]]
    lengths: tuple[int, ...]


def repeated_documents(
    loaded: LoadedModel, settings: CalibrationSettings, usual_lengths: tuple[int, ...], fewest: int = 1
) -> RepeatedDocuments:
    """The documents for a model, the same for the same settings.

    Args:
        loaded: the model.
        settings: which texts.
        usual_lengths: in tokens, where the settings leave them open.
        fewest: less than so many texts are refused.

    Raises:
        UsageError: the model cannot repeat texts of these lengths, or the user's folder holds too few.
    """
    settings.check(fewest)
    encoder = PromptEncoder(loaded.tokenizer)
    lengths = settings.lengths or tuple(each for each in usual_lengths if each <= _repeatable(loaded, encoder))
    if not lengths or max(lengths) > _repeatable(loaded, encoder):
        raise UsageError(
            f"{loaded.name} can repeat texts of at most {_repeatable(loaded, encoder)} tokens: give --text-lengths up "
            "to that."
        )
    if settings.folder is None:
        texts = calibration_texts(loaded.tokenizer, lengths, settings.texts, settings.seed)
    else:
        texts = _users_texts(encoder, settings, lengths, fewest)
    documents = [encoder.document_ids(text) for text in texts]
    return RepeatedDocuments([(ids, encoder.repetition_ids(ids)) for ids in documents], lengths)


def _repeatable(loaded: LoadedModel, encoder: PromptEncoder) -> int:
    """Most tokens of a text that the model can read twice, with what frames it."""
    return (loaded.max_positions - len(encoder.document_ids("")) - encoder.demand_lengths()[0]) // 2


def _users_texts(
    encoder: PromptEncoder, settings: CalibrationSettings, lengths: Sequence[int], fewest: int
) -> list[str]:
    """The `.txt` files of a folder, in pieces of the lengths asked for."""
    folder = settings.folder
    assert folder is not None
    texts: list[str] = []
    for file in sorted(path for path in folder.rglob("*.txt") if path.is_file()):
        words, start = WORDS.findall(read_text(file, ProbeError)), 0
        while start < len(words) and len(texts) < settings.texts:
            length = lengths[len(texts) % len(lengths)]
            piece = words[start : start + length]
            fits = len(encoder.texts.ids("".join(piece))) <= length
            count = len(piece) if fits else max(1, first_parts(piece, length, encoder.texts))
            texts.append("".join(words[start : start + count]).strip())
            start += count
    texts = [text for text in texts if len(encoder.texts.ids(text)) >= _LEAST_TOKENS]
    if len(texts) < fewest:
        raise UsageError(
            f"The .txt files in {folder} hold {len(texts)} texts of such lengths, fewer than {fewest}: add more, or "
            "lower --text-lengths."
        )
    return texts
