"""Running one context of probes through a model, and scoring every head on each probe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import torch
from transformers import PreTrainedModel

from headprof.errors import ModelError
from headprof.models.decoder import end_tokens
from headprof.models.loading import require_finite
from headprof.models.shape import HeadShape
from headprof.models.tensor_parallel import HeadShard
from headprof.models.write_path import WritePath, find_write_path
from headprof.probes.build import Probe, ProbeContext
from headprof.scoring.attention_rows import RowReader
from headprof.scoring.packing import Packed, Suffix, pack
from headprof.scoring.row_scores import FIRST_KIND, FoundScores, RowScores, answers_of
from headprof.scoring.shared_context import SharedContext
from headprof.utils.memory import free_bytes
from headprof.utils.word_overlap import token_f1

_ENOUGH_TOKENS = 1 << 14
"""Of the contexts in one pass: more would not be read any faster."""
_FREE_SHARE = 0.5
_CACHES, _WIDTHS = 2, 8
"""What a pass takes for each context: so many caches of it, and hidden states so many times as wide, in float32."""


@dataclass(frozen=True)
class ProbeResult:
    """What one probe says about every head.

    Attributes:
        kind: `"retrieval"` or `"reasoning"`: which estimator was used.
        family: the probe's family.
        answered: whether the model gave the right answer.
        scores: float32 `[L, H]`.
        write: what each head writes from the needle towards the answer (`WriteMeter`), in logits, float32 `[L, H]`,
            below zero where that is against it; `None` where it cannot be told, or was not when the probe was asked.
    """

    kind: str
    family: str
    answered: bool
    scores: torch.Tensor
    write: torch.Tensor | None = None


class Prober:
    """Scores the heads of a model on probes; use it as a context, in which the model's attention is wrapped.

    Args:
        model: a causal language model that uses Transformers' attention interface.
        shape: its shape.
        decode: `"teacher"`: the right answer's tokens are fed, and a probe counts as answered when each of them was the
            model's arg-max; `"greedy"`: the model answers by itself, and an answer with F1 above 0.5 counts (Fu et al.
            2025 and Wu et al. 2024).
        tokenizer: needed for `"greedy"` only.
        write_path: as `write_path` gives it, if that is known from before.
    """

    max_extra_tokens = 8

    def __init__(
        self,
        model: PreTrainedModel,
        shape: HeadShape,
        decode: str = "teacher",
        tokenizer=None,
        *,
        write_path: WritePath | str | None = None,
    ):
        self.model = model
        self.shape = shape
        self.decode = decode
        self.tokenizer = tokenizer
        self._reader = RowReader(model)
        self._context = SharedContext(model, self._reader.base)
        self._installed = self._reader.installed()
        self._found = write_path

    def __enter__(self) -> Prober:
        self._installed.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._installed.__exit__(*exception)

    def write_path(self) -> WritePath | str:
        """The way from the model's heads to its logits, or, as a sentence, why it is not known."""
        if self._found is None:
            try:
                self._found = find_write_path(self.model, self.shape)
            except ModelError as error:
                self._found = str(error)
        return self._found

    def most_together(self, length: int) -> int:
        """How many contexts of so many tokens `run_together` should be given at once.

        One on a CPU, which gains nothing by more, where the model answers by itself, or where its attention takes no
        mask; else as many as fill the device (`_ENOUGH_TOKENS`), if they take no more than half of its free memory.
        """
        device = self.model.device
        if device.type == "cpu" or self.decode != "teacher" or not self._context.shares_passes:
            return 1
        held = self.shape.cache_bytes_per_token(self.model.dtype.itemsize) * length
        passing = 4 * length * self.model.config.get_text_config().hidden_size * _WIDTHS
        fitting = int(_FREE_SHARE * free_bytes(device)) // (_CACHES * held + passing)
        return max(1, min(_ENOUGH_TOKENS // length, fitting))

    def run(self, context: ProbeContext, *, anew: bool = True) -> list[ProbeResult]:
        """Prefill the context once, then ask each of its questions over that cache.

        With `anew=False` what the context has in common with the beginning of the one before is not computed again.

        Raises:
            ModelError: the model's numbers overflow, or its attention cannot be read head by head.
        """
        with torch.inference_mode():
            self._context.fill(context.context_ids, anew=anew)
            said = [self._answer(probe) for probe in context.probes]
            parts = list(self._context.together(said))
            found = [self._score([context.context_ids], [context.probes[at]], [said[at]]) for at in parts]
        return [result for (results,) in found for result in results]

    def run_together(self, contexts: Sequence[ProbeContext]) -> list[list[ProbeResult]]:
        """`run` of each of several contexts, in one prefill and one pass for all questions; equal up to rounding.

        Raises:
            ModelError: as `run`.
        """
        if len(contexts) == 1 or self.decode != "teacher" or not self._context.shares_passes:
            return [self.run(context) for context in contexts]
        with torch.inference_mode():
            self._context.fill_together([context.context_ids for context in contexts])
            said = [[probe.answer_ids for probe in context.probes] for context in contexts]
            ids, probes = zip(*((each.context_ids, each.probes) for each in contexts), strict=True)
            return self._score(ids, probes, said)

    def _answer(self, probe: Probe) -> tuple[int, ...]:
        return probe.answer_ids if self.decode == "teacher" else self._greedy_answer(probe)

    def _score(
        self,
        contexts: Sequence[Sequence[int]],
        probes: Sequence[Sequence[Probe]],
        said: Sequence[Sequence[tuple[int, ...]]],
    ) -> list[list[ProbeResult]]:
        """Score probes of the contexts that are held, in one forward pass over their cache."""
        lengths = list(map(len, contexts))
        suffixes = [[_suffix(*each) for each in zip(*of_one, strict=True)] for of_one in zip(probes, said, strict=True)]
        packed = pack(suffixes, lengths)
        path = self.write_path()
        scores = RowScores(
            answers_of(packed, probes, said),
            packed,
            self._seen(contexts, packed),
            lengths,
            (self.shape.num_layers, self.shape.num_heads),
            path if isinstance(path, WritePath) else None,
            HeadShard.of_model(self.model),
        )
        beside = path.bytes_per_layer() if isinstance(path, WritePath) else 0
        with self._reader.reading(packed.rows, scores.take, beside=beside), scores.reading():
            logits = self._context.feed(packed)
        found = scores.results(logits, self._context.peak)
        require_finite(found.peaks, logits.dtype)
        results = iter(self._results(found, list(chain.from_iterable(probes)), list(chain.from_iterable(said))))
        return [list(islice(results, len(each))) for each in probes]

    def _seen(self, contexts: Sequence[Sequence[int]], packed: Packed) -> torch.Tensor:
        """The tokens that the rows see, `[B, T]`."""
        width = self._context.width
        held = torch.tensor([[*ids, *[ids[-1]] * (width - len(ids))] for ids in contexts])
        return torch.cat([held, packed.ids], dim=1).to(self.model.device, non_blocking=True)

    def _results(
        self, found: FoundScores, probes: Sequence[Probe], said: Sequence[Sequence[int]]
    ) -> Iterator[ProbeResult]:
        writes = [None] * len(probes) if found.writes is None else found.writes
        for probe, answer, right, scores, write in zip(probes, said, found.right, found.scores, writes, strict=True):
            answered = all(right) if self.decode == "teacher" else self._is_right(probe, answer)
            yield ProbeResult(probe.kind, probe.family, answered, scores, write)

    def _is_right(self, probe: Probe, said: Sequence[int]) -> bool:
        return token_f1(self.tokenizer.decode(said, skip_special_tokens=True), probe.answer) > 0.5

    def _greedy_answer(self, probe: Probe) -> tuple[int, ...]:
        """The model's own answer, at least one token, without its end-of-sequence token."""
        ends = end_tokens(self.model)
        answer: list[int] = []
        pending = list(probe.question_ids)
        while len(answer) < len(probe.answer_ids) + self.max_extra_tokens:
            token = int(self._context.extend(pending).argmax())
            if answer and token in ends:
                break
            answer.append(token)
            pending = [token]
        self._context.rewind()
        return tuple(answer)


def _suffix(probe: Probe, said: tuple[int, ...]) -> Suffix:
    """A question with its answer but for the last token, after which nothing is asked."""
    return Suffix((*probe.question_ids, *said[:-1]), len(said), 0 if probe.kind == FIRST_KIND else 1)
