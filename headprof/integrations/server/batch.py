"""Answers that are generated together: they join and leave between two steps, and none depends on the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from inspect import signature

from headprof.compression.answering import next_logits
from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.cache.together import TogetherCache
from headprof.errors import HeadprofError
from headprof.integrations.server.answers import RunningAnswer
from headprof.integrations.server.errors import as_api_error
from headprof.integrations.server.jobs import Failed
from headprof.models.decoder import running_model
from headprof.models.loading import LoadedModel

logger = logging.getLogger(__name__)


class _Group:
    """Answers whose caches can take tokens in one forward pass."""

    def __init__(self) -> None:
        self.answers: list[RunningAnswer] = []
        self._together: TogetherCache | None = None

    def add(self, answer: RunningAnswer) -> None:
        self._part()
        self.answers.append(answer)

    def remove(self, answer: RunningAnswer) -> None:
        self._part()
        self.answers.remove(answer)

    def together(self) -> TogetherCache | None:
        """The caches of all answers; `None` for a single one."""
        if self._together is None and len(self.answers) > 1:
            self._together = TogetherCache([answer.answering.cache for answer in self.answers])
        return self._together

    def _part(self) -> None:
        if self._together is not None:
            self._together.part()
            self._together = None

    @property
    def nbytes(self) -> int:
        if self._together is not None:
            return self._together.nbytes
        return sum(answer.answering.cache.nbytes for answer in self.answers)


class Batch:
    """All answers of which tokens are being generated.

    Caches that are compressed by different plans share a forward pass where these look at queries alike; others take
    turns. Call everything inside `attending_ragged`, in one thread.

    Args:
        loaded: the model.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._groups: dict[object, _Group] = {}
        self._takes_positions = "position_ids" in signature(running_model(loaded.model).forward).parameters

    def __len__(self) -> int:
        return sum(len(group.answers) for group in self._groups.values())

    def __iter__(self) -> Iterator[RunningAnswer]:
        return iter([answer for group in self._groups.values() for answer in group.answers])

    @property
    def nbytes(self) -> int:
        """Bytes of key/value cache that all answers hold."""
        return sum(group.nbytes for group in self._groups.values())

    @property
    def reserved(self) -> int:
        """Bytes that are set aside for them."""
        return sum(answer.footprint.lasting for answer in self)

    def add(self, answer: RunningAnswer) -> None:
        """Let an answer, which has its first token, go on with the others."""
        self._groups.setdefault(self._kind(answer), _Group()).add(answer)

    def remove(self, answers: Callable[[RunningAnswer], bool]) -> None:
        """Let go of the answers for which this is true, and of what they hold."""
        for kind, group in list(self._groups.items()):
            for answer in [each for each in group.answers if answers(each)]:
                group.remove(answer)
            if not group.answers:
                del self._groups[kind]

    def step(self) -> None:
        """One token for each answer; those that are done, or fail, are let go."""
        for kind, group in list(self._groups.items()):
            ended = set()
            try:
                logits = next_logits(
                    self._loaded, group.together(), [answer.answering for answer in group.answers]
                ).split(1)
            except Exception as error:  # nobody knows what their caches hold now
                self._fail(group.answers, error)
                del self._groups[kind]
                continue
            for answer, own in zip(group.answers, logits, strict=True):
                try:
                    if answer.take(own):
                        ended.add(answer)
                except Exception as error:
                    self._fail([answer], error)
                    ended.add(answer)
            if ended:
                self.remove(ended.__contains__)

    @staticmethod
    def _fail(answers: list[RunningAnswer], error: Exception) -> None:
        if not isinstance(error, HeadprofError):
            logger.error("A step failed.", exc_info=error)
        for answer in answers:
            answer.job.tell(Failed(as_api_error(error)))

    def _kind(self, answer: RunningAnswer) -> object:
        """What the caches of answers must have in common to take tokens together."""
        if not self._takes_positions:
            return answer
        return cache_kind(answer.answering.cache)


def cache_kind(cache: HeadCache) -> object:
    """Equal for caches of which `TogetherCache` keeps the queries that each of them needs."""
    schedules = [layer.schedule for layer in cache.head_layers]
    held = cache.plan.method.representation.name
    return held, tuple((each.goes_on, each.recent_queries, each.at_hand) for each in schedules)
