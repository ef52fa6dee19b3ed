"""What filled caches say next: the tokens they choose, and how far their logits are from the full cache's.

A stack (`stack_caches`) has an entry for each cache, and one forward pass continues them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from headprof.compression.cache.head_cache import HeadCache
from headprof.models.decoder import end_tokens
from headprof.models.loading import LoadedModel, require_finite

MOST_LOGITS = 2**25
"""Numbers that the logits of one forward pass over the reference answer may have, unless one token has more."""


def fed_reference(
    loaded: LoadedModel, stack: HeadCache, tail: Sequence[int], reference: Sequence[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Feed the same answer to each entry of a stack, and see what they would have said at each of its tokens.

    Call it inside `attending_ragged`.

    Args:
        loaded: the model.
        stack: continued in place, by all of these tokens but the last.
        tail: token ids that come before the answer, at least one.
        reference: those of the answer, at least one.

    Yields:
        Logits `[entries, N, vocabulary]`, and the tokens int64 `[N]` that are fed next; of `N` tokens at a time, so
        that logits stay within `MOST_LOGITS`.
    """
    entries = stack.batch_size
    ids = torch.tensor([[*tail, *reference[:-1]]], device=loaded.device).expand(entries, -1)
    wanted = torch.tensor(reference, device=loaded.device)
    most = max(1, MOST_LOGITS // (entries * loaded.shape.vocab_size))
    start, first = 0, len(tail) - 1  # the first token that predicts one of the answer
    for done in range(0, len(reference), most):
        count = min(most, len(reference) - done)
        stop = first + done + count
        logits = loaded.model(ids[:, start:stop], past_key_values=stack, use_cache=True, logits_to_keep=count).logits
        yield logits, wanted[done : done + count]
        start = stop


def said_greedily(
    loaded: LoadedModel,
    stack: HeadCache,
    tail: Sequence[int],
    max_new_tokens: int,
    is_complete: Callable[[str], bool] = lambda text: False,
) -> list[tuple[list[int], str]]:
    """What each entry of a stack goes on to say, greedily; those that are done leave the stack in good time.

    Call it inside `attending_ragged`.

    Args:
        loaded: the model.
        stack: continued in place.
        tail: token ids that come before what is said, at least one.
        max_new_tokens: most tokens that each entry says.
        is_complete: whether nothing that comes after a text counts.

    Returns:
        Of each entry the tokens, without the one that ends them, and their text.
    """
    tokenizer, ends = loaded.tokenizer, end_tokens(loaded.model, loaded.tokenizer)
    said: list[list[int]] = [[] for _ in range(stack.batch_size)]
    texts = [""] * len(said)
    running = list(range(len(said)))  # whose answer each entry of the stack is
    finished: set[int] = set()
    fed = torch.tensor([[*tail]], device=loaded.device).expand(len(said), -1)
    for _ in range(max_new_tokens):
        logits = loaded.model(fed, past_key_values=stack, use_cache=True, logits_to_keep=1).logits
        chosen = loaded.shard.agreed(logits[:, -1].argmax(dim=-1))
        for number, token in zip(running, chosen.tolist(), strict=True):
            if number in finished:
                continue
            if token in ends:
                finished.add(number)
                continue
            said[number].append(token)
            texts[number] = tokenizer.decode(said[number], skip_special_tokens=True)
            if is_complete(texts[number]):
                finished.add(number)
        kept = [entry for entry, number in enumerate(running) if number not in finished]
        if not kept:
            break
        if len(kept) <= len(running) // 2:
            indices = torch.tensor(kept)
            stack.batch_select_indices(indices)
            chosen, running = chosen[indices.to(chosen.device)], [running[entry] for entry in kept]
        fed = chosen[:, None]
    return list(zip(said, texts, strict=True))


def divergences(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`KL(own || other)` of each token in nats, float64 `[N]`, at least 0.

    Args:
        own: log-probabilities `[N, vocabulary]`.
        other: logits of the same shape.
    """
    terms = own.exp() * (own - other.float().log_softmax(dim=-1))
    return terms.sum(dim=-1).clamp(min=0).double()


class ReferenceRun:
    """What each entry of a stack makes of the right answer, and how far it is from entry `full`."""

    def __init__(self, entries: int, full: int | None):
        self._full = full
        self._tokens = 0
        self._right = torch.ones(entries, dtype=torch.bool)
        self._divergence = torch.zeros(entries, dtype=torch.float64)
        self._agreement = torch.zeros(entries, dtype=torch.int64)

    def add(self, logits: torch.Tensor, wanted: torch.Tensor) -> None:
        """Take in logits `[entries, N, vocabulary]` of tokens that should be `wanted`, `[N]`."""
        self._tokens += len(wanted)
        highest, chosen = logits.max(dim=-1)
        require_finite(highest, logits.dtype)
        self._right &= (chosen == wanted).all(dim=-1).cpu()
        if self._full is None:
            return
        own = logits[self._full].float().log_softmax(dim=-1)
        self._agreement += (chosen == chosen[self._full]).sum(dim=-1).cpu()
        for entry, other in enumerate(logits):  # one by one, to hold no second copy of all logits
            self._divergence[entry] += divergences(own, other).sum().cpu()

    @property
    def right(self) -> list[bool]:
        """Whether each entry's arg-max is right at every token."""
        return self._right.tolist()

    @property
    def divergence(self) -> list[float] | None:
        """In nats, a token; `None` without tokens or something to compare with."""
        return None if self._full is None or not self._tokens else (self._divergence / self._tokens).tolist()

    @property
    def agreement(self) -> list[float] | None:
        """Share of tokens; `None` likewise."""
        return None if self._full is None or not self._tokens else (self._agreement / self._tokens).tolist()
