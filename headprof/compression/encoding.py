"""Users' texts as token ids, once it is known that the model has room for them."""

from __future__ import annotations

import torch

from headprof.compression.keeping import Keeping
from headprof.compression.protected import ProtectedTokens
from headprof.errors import UsageError
from headprof.models.loading import LoadedModel
from headprof.models.prompt_encoder import PromptEncoder


def prompt_ids(loaded: LoadedModel, document: str | None, prompt: str, max_new_tokens: int) -> torch.Tensor:
    """Tokens of a prompt, with the document before it if there is one, framed by `PromptEncoder`, int64 `[1, T]`.

    Raises:
        UsageError: prompt and answer together are longer than the model's context.
    """
    return encoded_prompt(loaded, document, prompt, max_new_tokens)[0]


def encoded_prompt(
    loaded: LoadedModel, document: str | None, prompt: str, max_new_tokens: int, keeping: Keeping = Keeping()
) -> tuple[torch.Tensor, ProtectedTokens | None]:
    """As `prompt_ids`, and which of the tokens every head is to keep.

    Raises:
        UsageError: the prompt is too long, or what is to be kept cannot be found.
    """
    encoder = keeping.encoder(loaded.tokenizer)
    for text in (document or "", prompt, keeping.system or ""):
        _check_length(loaded, encoder, text)
    keeping.check(document, prompt)
    ids, protected = keeping.prompt(encoder, document, prompt)
    return fitting(loaded, ids, 0, max_new_tokens), protected


def question_ids(loaded: LoadedModel, seen: int, question: str, max_new_tokens: int) -> torch.Tensor:
    """Tokens of a question about a document of `seen` tokens, int64 `[1, Q]`.

    Raises:
        UsageError: document, question and answer together are longer than the model's context.
    """
    encoder = PromptEncoder(loaded.tokenizer)
    _check_length(loaded, encoder, question)
    ids = encoder.question_ids(question)
    return fitting(loaded, ids, seen, max_new_tokens)


def encoded_document(loaded: LoadedModel, document: str, keeping: Keeping) -> tuple[list[int], ProtectedTokens | None]:
    """Token ids of everything before the question about a document, and which of them every head keeps.

    Raises:
        UsageError: the document is longer than the model's context, what is to be kept is not there, or there is no
            place for a system message.
    """
    encoder = keeping.encoder(loaded.tokenizer)
    for text in (document, keeping.system or ""):
        _check_length(loaded, encoder, text)
    keeping.check(document)
    ids, protected = keeping.document(encoder, document)
    fitting(loaded, ids, 0, 0)
    return ids, protected


def check_length(loaded: LoadedModel, text: str) -> None:
    """Raise `UsageError` for a text that is longer than the model's context, before all of it is encoded."""
    _check_length(loaded, PromptEncoder(loaded.tokenizer), text)


def _check_length(loaded: LoadedModel, encoder: PromptEncoder, text: str) -> None:
    """Refuse a text that is far too long before all of it is encoded, which takes minutes for some megabytes."""
    if encoder.texts.is_longer(text, loaded.max_positions):
        raise UsageError(
            f"The text of {len(text)} characters has more tokens than the {loaded.max_positions} that {loaded.name} "
            "can read: shorten it."
        )


def fitting(loaded: LoadedModel, ids: list[int], seen: int, max_new_tokens: int) -> torch.Tensor:
    """The tokens as int64 `[1, T]`, if there is room for them.

    Args:
        loaded: the model.
        ids: the tokens.
        seen: how many come before them, or observe them.
        max_new_tokens: how many may come after them; 0 for those of a document.

    Raises:
        UsageError: they are more than the model can read.
    """
    prompt = seen + len(ids)
    needed = prompt + max_new_tokens
    if needed > loaded.max_positions and not max_new_tokens:
        raise UsageError(
            f"The document of {prompt} tokens exceeds the {loaded.max_positions} that {loaded.name} can read: shorten "
            f"it by {needed - loaded.max_positions} tokens."
        )
    if needed > loaded.max_positions:
        excess = needed - loaded.max_positions
        what = "question" if seen and excess >= seen else "document"
        raise UsageError(
            f"The prompt of {prompt} tokens and {max_new_tokens} new ones exceed the {loaded.max_positions} that "
            f"{loaded.name} can read: shorten the {what} by {excess} tokens or lower --max-new-tokens."
        )
    return torch.tensor([ids])
