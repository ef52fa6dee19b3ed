"""What a request will hold, known before any of it is read: so memory has a cap that is never passed.

Budgets per head say how many rows each head keeps of a prompt, and while text is generated. A layer's rows lie with
free space behind each head; for a while, a layer's prompt is held whole. All of this has a bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from headprof.compression.cache.held_rows import FOLD
from headprof.compression.cache.schedule import LayerSchedule
from headprof.compression.cache.storage import SLACK
from headprof.compression.plan import BUFFER, CompressionPlan

_POSITION_AND_COLUMNS = 4 + 4 + 4
"""Bytes of a row beside its key and value: its position, and the columns that some methods need."""
_QUESTIONS = 256
"""Tokens that may be read after a document or its repetition while it is compressed: what demands or observes it."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of key/value cache that a request holds.

    Attributes:
        lasting: at most, while it is answered.
        reading: at most beside that, while its prompt is read.
    """

    lasting: int
    reading: int = 0

    @property
    def most(self) -> int:
        return self.lasting + self.reading


@dataclass(frozen=True)
class Sizes:
    """What rows and queries of a model take.

    Attributes:
        plan: how the cache is compressed.
    """

    plan: CompressionPlan

    @property
    def heads(self) -> int:
        """KV heads of all layers."""
        return self.plan.shape.num_layers * self.plan.shape.num_kv_heads

    @property
    def row(self) -> int:
        """Most bytes of one head's row."""
        return 2 * self.plan.shape.head_dim * self.plan.bytes_per_element + _POSITION_AND_COLUMNS

    def layer_prompt(self, tokens: int) -> int:
        """Bytes of a prompt that one layer holds whole."""
        return tokens * self.plan.shape.num_kv_heads * self.row

    def held(self, rows: int, read: int, new: int) -> int:
        """Most bytes of all layers.

        Args:
            rows: that all heads hold together when they have been compressed.
            read: tokens that are read at once then, so that the rows of all come before any is evicted.
            new: tokens that are generated.
        """
        each = -(-rows // self.heads)
        if (buffer := self._buffer) is None:
            grown, free = read + new, (each + read + new) // 2
        else:
            grown, free = max(read, buffer), max(BUFFER, buffer, 2 * read, each // 2)
        return (rows + self.heads * (grown + max(free, SLACK))) * self.row + self._queries(read)

    @property
    def _buffer(self) -> int | None:
        return self.plan.buffer if self.plan.compresses_while_generating else None

    def _queries(self, read: int) -> int:
        """Most bytes of the queries that all layers remember, when so many tokens have been read at once."""
        schedule = LayerSchedule(self.plan, 0)
        if not schedule.goes_on or schedule.recent_queries == 0:
            return 0
        remembered = (schedule.recent_queries or 0) + (schedule.at_hand or 0) + 2 * FOLD + read
        if schedule.recent_queries is None:
            remembered += self._buffer or 0
        shape = self.plan.shape
        each = remembered * shape.num_layers * shape.num_heads * shape.head_dim * self.plan.bytes_per_element
        return 3 * each  # grown by half, and those beside it that caches share while they take tokens together


def prompt_footprint(plan: CompressionPlan, prompt_tokens: int, new_tokens: int) -> Footprint:
    """Of a plain prompt that is compressed by a plan, and of its answer.

    Raises:
        UsageError: the budget for such a prompt cannot be met.
    """
    plan.check(prompt_tokens)
    kept = int(plan.allocation(prompt_tokens).sum())
    lasting = answer_bytes(plan, kept, prompt_tokens, 0, new_tokens)
    return Footprint(lasting, Sizes(plan).layer_prompt(prompt_tokens))


def answer_bytes(plan: CompressionPlan, rows: int, seen: int, read: int, new: int, protected: int = 0) -> int:
    """Most bytes of a filled cache that goes on.

    Args:
        plan: by which it does.
        rows: that all heads hold together.
        seen: tokens so far.
        read: tokens of a question, which are read at once.
        new: most tokens of the answer.
        protected: tokens that every head keeps.
    """
    if plan.compresses_while_generating:
        rows = max(rows, int(plan.decode_allocation(seen + read + new, protected).sum()))
    return Sizes(plan).held(rows, read, new)


def document_footprint(plan: CompressionPlan, tokens: int) -> Footprint:
    """Of a document while it is compressed, its repetition read after it.

    Raises:
        UsageError: the budget for such a document cannot be met.
    """
    plan.check(tokens)
    sizes = Sizes(plan)
    lasting = sizes.held(int(plan.allocation(tokens).sum()), 0, 0)
    return Footprint(lasting, sizes.layer_prompt(2 * tokens + _QUESTIONS))
