"""Who judges a document while there is no question about it: tokens after it that observe it and are not kept."""

from __future__ import annotations

from collections.abc import Sequence

from headprof.compression.methods.table import Method
from headprof.errors import UsageError
from headprof.models.loading import LoadedModel
from headprof.models.prompt_encoder import OBSERVATION, PromptEncoder


def repeats(method: Method, observe: str | None) -> bool:
    """Whether a document is judged by its own repetition: if its method asks for that, and the user for no text."""
    return observe is None and method.importance.asks_for_repetition


def text_observers(encoder: PromptEncoder, observe: str | None) -> list[int]:
    """Token ids of a text in the question's place.

    Args:
        encoder: of the model's texts.
        observe: the text; `None` for `OBSERVATION`, empty for none.
    """
    text = OBSERVATION if observe is None else observe
    return encoder.question_ids(text) if text else []


def repeating_observers(loaded: LoadedModel, encoder: PromptEncoder, document_ids: Sequence[int]) -> list[int]:
    """Token ids of the demand to repeat a document, and of its repetition.

    Raises:
        UsageError: the model's context is too short for it.
    """
    ids = encoder.repetition_ids(document_ids)
    beyond = len(document_ids) + len(ids) - loaded.max_positions
    if beyond > 0:
        raise UsageError(
            f"The document of {len(document_ids)} tokens cannot be repeated within the {loaded.max_positions} that "
            f"{loaded.name} can read: shorten it by {-(-beyond // 2)} tokens, choose another method, or give a text "
            "that judges in place of the repetition with --observe."
        )
    return ids
