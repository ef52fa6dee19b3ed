"""Many questions to one document: needles of all kinds in one text, each asked of a copy of the same compressed cache.

After SCBench (arXiv 2412.10319), whose requests share a context that is compressed before any of them is known. Needles
are those of the half that no profile was made from.
"""

from __future__ import annotations

from collections.abc import Sequence

from headprof.errors import UsageError
from headprof.evaluation.questions import Question, of_probe
from headprof.evaluation.results import MULTI, multi_name
from headprof.models.loading import LoadedModel
from headprof.probes.build import ProbeBuilder, ProbeSettings, needles_for

FEWEST, MOST = 5, 10
"""Questions about one document: from about 200 tokens on, and from about 700 tokens on."""


class MultiDocuments(Sequence[Sequence[Question]]):
    """The questions about each document; retrieval and reasoning take turns.

    Args:
        loaded: the model.
        number: how many questions there are at least, over whole documents.
        lengths: of the documents, question and answer included, in tokens; they take turns.
        families: names of those to ask; all when there are none.
        seed: of the needles.

    Raises:
        UsageError: the settings ask for something that does not exist, or a length has no room for `FEWEST` needles.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        number: int,
        lengths: tuple[int, ...],
        families: tuple[str, ...] | None,
        seed: int,
    ):
        self._lengths = lengths
        self._builders = [_builder(loaded, number, length, families, seed) for length in lengths]
        self._documents = 0
        while number > 0:
            number -= self._builders[self._documents % len(lengths)].count(0)
            self._documents += 1

    def __len__(self) -> int:
        return self._documents

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        turn, which = divmod(index, len(self._lengths))
        context = self._builders[which].context(turn)
        return tuple(
            of_probe(MULTI, multi_name(index, number), self._lengths[which], context, probe)
            for number, probe in enumerate(context.probes)
        )


class FirstQuestions(Sequence[Question]):
    """The first question about each document, for what is to be known of the documents."""

    def __init__(self, documents: MultiDocuments):
        self._documents = documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index):
        return self._documents[index][0]


def _builder(
    loaded: LoadedModel, number: int, length: int, families: tuple[str, ...] | None, seed: int
) -> ProbeBuilder:
    """Of documents of one length, with as many needles as there are to be, or as fit; raises `UsageError`."""
    most = max(FEWEST, min(MOST, needles_for(length)))
    for needles in range(most, FEWEST - 1, -1):
        settings = ProbeSettings(
            probes=-(-number // needles) * needles,
            lengths=(length,),
            families=families,
            needles_per_context=needles,
            seed=seed,
            split="eval",
        )
        try:
            return ProbeBuilder(loaded.tokenizer, settings, max_positions=loaded.max_positions)
        except UsageError:
            if needles == FEWEST:
                raise
    raise AssertionError("there is no number of needles to try")
