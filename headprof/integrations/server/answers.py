"""An answer on its way: its text, cut at stop texts, and its log-probabilities are told as they become final."""

from __future__ import annotations

import time

import torch

from headprof.compression.answering import Answering
from headprof.compression.streaming import TimedStreamer
from headprof.integrations.server.admission import Footprint
from headprof.integrations.server.jobs import AnswerJob, Done, Piece, TokenLogprob
from headprof.integrations.server.metrics import Metrics
from headprof.integrations.server.stopping import StopText
from headprof.integrations.server.told_tokens import Chosen, ToldTokens
from headprof.models.loading import LoadedModel
from headprof.models.token_bytes import TokenBytes


class RunningAnswer:
    """An answer of which tokens are being generated.

    Args:
        loaded: the model.
        job: the request.
        answering: the answer, of which no token has been chosen yet.
        footprint: what is set aside for it.
        metrics: to be told of its tokens.
        token_bytes: of the model's tokenizer.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        job: AnswerJob,
        answering: Answering,
        footprint: Footprint,
        metrics: Metrics,
        token_bytes: TokenBytes,
    ) -> None:
        self.job, self.answering, self.footprint = job, answering, footprint
        self._ends, self._metrics = loaded.model.generation_config, metrics
        self._stop = StopText(job.asked.stop)
        self._streamer = TimedStreamer(loaded.tokenizer, self._hand_on)
        self._streamer.put(answering.ids)  # the prompt comes first
        self._tokens: ToldTokens | None = None
        if job.asked.logprobs is not None:
            self._tokens = ToldTokens(token_bytes, lags=self._streamer.holds_words_back)
        self._logprobs: list[TokenLogprob] = []
        self._characters = 0  # of the text that has been told
        self._last = job.arrived

    def take(self, logits: torch.Tensor) -> bool:
        """Choose the next token by its logits, `[1, vocabulary]`; whether the answer is done."""
        ended = self.answering.take(logits)
        token, now = self.answering.new[-1], time.monotonic()
        self._metrics.token(now - self._last, first=len(self.answering.new) == 1)
        self._last = now
        if self._tokens is not None and not self._is_end(token):
            self._tokens.add(_chosen(logits, token, self.job.asked.logprobs or 0))
        self._streamer.put(torch.tensor([token]))
        if ended and not self._stop.found:
            self._streamer.end()
            self._settle("", last=True)
            self._tell(self._stop.end(), last=not self._stop.found)
        if not (ended or self._stop.found):
            return False
        at_most = len(self.answering.new) >= self.job.asked.choosing.max_new_tokens
        of_itself = self._stop.found or self._is_end(token)
        self._finish("length" if at_most and not of_itself else "stop")
        return True

    def _finish(self, reason: str) -> None:
        made = self.answering
        self._metrics.answered(made.prompt_tokens - made.cached_tokens)
        self.job.tell(Done(reason, made.prompt_tokens, made.cached_tokens, len(made.new)))

    def _is_end(self, token: int) -> bool:
        ends = self._ends.eos_token_id
        return token in ends if isinstance(ends, list) else token == ends

    def _hand_on(self, text: str) -> None:
        if text and not self._stop.found:
            self._settle(text)
            piece = self._stop.add(text)
            if self._stop.found:
                self._settle("", last=True)
            self._tell(piece)

    def _settle(self, text: str, *, last: bool = False) -> None:
        """Have the tokens of a piece of the text, which is final, be told with what is told next."""
        if self._tokens is not None:
            self._logprobs += self._tokens.take(text, last=last)

    def _tell(self, text: str, *, last: bool = False) -> None:
        """Tell a piece of the text, and the tokens whose own part of it begins there; after the last, any others too.

        Such are special ones, which have none.
        """
        self._characters += len(text)
        told = [each for each in self._logprobs if last or each.offset < self._characters]
        if text or told:
            self.job.tell(Piece(text, tuple(told)))
            self._logprobs = self._logprobs[len(told) :]


def _chosen(logits: torch.Tensor, token: int, likeliest: int) -> Chosen:
    """A token that was chosen by logits `[1, vocabulary]`: of the model's own distribution, before temperature."""
    own = logits[0].float().log_softmax(dim=-1)
    values, ids = own.topk(likeliest)
    return Chosen(token, float(own[token]), list(zip(ids.tolist(), values.tolist(), strict=True)))
