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
from headprof.models.loading import LoadedModel


class RunningAnswer:
    """An answer of which tokens are being generated.

    Args:
        loaded: the model.
        job: the request.
        answering: the answer, of which no token has been chosen yet.
        footprint: what is set aside for it.
        metrics: to be told of its tokens.
    """

    def __init__(
        self, loaded: LoadedModel, job: AnswerJob, answering: Answering, footprint: Footprint, metrics: Metrics
    ) -> None:
        self.job, self.answering, self.footprint = job, answering, footprint
        self._tokenizer, self._ends, self._metrics = loaded.tokenizer, loaded.model.generation_config, metrics
        self._stop = StopText(job.asked.stop)
        self._streamer = TimedStreamer(loaded.tokenizer, self._hand_on)
        self._streamer.put(answering.ids)  # the prompt comes first
        self._logprobs: list[TokenLogprob] = []
        self._last = job.arrived

    def take(self, logits: torch.Tensor) -> bool:
        """Choose the next token by its logits, `[1, vocabulary]`; whether the answer is done."""
        ended = self.answering.take(logits)
        token, now = self.answering.new[-1], time.monotonic()
        self._metrics.token(now - self._last, first=len(self.answering.new) == 1)
        self._last = now
        if self.job.asked.logprobs is not None and not self._is_end(token):
            self._logprobs.append(self._logprob(logits, token, self.job.asked.logprobs))
        self._streamer.put(torch.tensor([token]))
        if ended and not self._stop.found:
            self._streamer.end()
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
            self._tell(self._stop.add(text))

    def _tell(self, text: str, *, last: bool = False) -> None:
        """Tell a piece of the text; the last tokens are told even if they have none, as special ones do."""
        if text or (last and self._logprobs):
            self.job.tell(Piece(text, tuple(self._logprobs)))
            self._logprobs.clear()

    def _logprob(self, logits: torch.Tensor, token: int, likeliest: int) -> TokenLogprob:
        """Of the model's own distribution, before temperature and `top_p`."""
        own = logits[0].float().log_softmax(dim=-1)
        values, ids = own.topk(likeliest)
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        return TokenLogprob(self._text(token), float(own[token]), [(self._text(each), value) for each, value in pairs])

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token])
