"""Answering a prompt, about a document or alone, with the full cache or a compressed one."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import TextStreamer
from transformers.cache_utils import Cache, DynamicCache

from headprof.assets import asset_dir
from headprof.compression.cache import CompressionPlan, HeadCache
from headprof.compression.session import attending_ragged
from headprof.errors import UsageError
from headprof.models import LoadedModel


@dataclass(frozen=True)
class Generation:
    """A text, and what it took.

    Attributes:
        text: the new text alone.
        prompt_tokens, new_tokens: tokens read and written.
        cache_bytes: bytes that the cache held when the text was done.
        prefill_seconds: until the first token, compression included.
        decode_seconds: from the first token to the last.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    cache_bytes: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float:
        """New tokens per second after the first; 0 when there is only one."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else 0.0


class _TimedStreamer(TextStreamer):
    """Hands text on as it becomes final, and remembers when tokens came."""

    def __init__(self, tokenizer, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.pieces: list[str] = []
        self.token_times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.token_times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.pieces.append(text)
        self.on_text(text)


def demo_document() -> tuple[str, str]:
    """The built-in document and the built-in question about it."""
    folder = asset_dir("data") / "demo"
    return (folder / "document.txt").read_text("utf-8").strip(), (folder / "question.txt").read_text("utf-8").strip()


def what_to_ask(file: Path | None, prompt: str | None, stdin: TextIO | None) -> tuple[str | None, str, bool]:
    """The document, if any, the prompt, and whether both are the built-in ones.

    The prompt is the one given, else what `stdin` holds if it is no terminal, else the built-in question.

    Raises:
        UsageError: the file cannot be used, the prompt is empty, or there is a file but no question about it.
    """
    document = read_document(file) if file else None
    if prompt is None and stdin is not None and not stdin.isatty():
        prompt = stdin.read().strip() or None
    if prompt is not None and not prompt.strip():
        raise UsageError('The prompt is empty: give one with --prompt "...".')
    if prompt is not None:
        return document, prompt, False
    if file is not None:
        raise UsageError(f'There is no question about {file}: ask one with --prompt "...".')
    return *demo_document(), True


def read_document(path: Path) -> str:
    """A text file, as UTF-8.

    Raises:
        UsageError: it is not there, is not a text file, or is empty.
    """
    try:
        text = path.read_text("utf-8").strip()
    except FileNotFoundError as error:
        raise UsageError(f"There is no file {path}: check the path given with --file.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a UTF-8 text file: convert it to plain text first.") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): give a text file with --file.") from error
    if not text:
        raise UsageError(f"{path} is empty: give a file with text in it.")
    return text


def prompt_ids(loaded: LoadedModel, document: str | None, prompt: str, max_new_tokens: int) -> torch.Tensor:
    """Tokens of a prompt, with the document before it and in the model's chat format if it has one, int64 `[1, T]`.

    Raises:
        UsageError: prompt and answer together are longer than the model's context.
    """
    tokenizer = loaded.tokenizer
    content = f"{document}\n\n{prompt}" if document else prompt
    if tokenizer.chat_template:
        content = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    ids = tokenizer(content, add_special_tokens=not tokenizer.chat_template, return_tensors="pt").input_ids
    if (needed := ids.shape[1] + max_new_tokens) > loaded.max_positions:
        raise UsageError(
            f"The prompt of {ids.shape[1]} tokens and {max_new_tokens} new ones exceed the {loaded.max_positions} that "
            f"{loaded.name} can read: shorten the document by {needed - loaded.max_positions} tokens or lower "
            "--max-new-tokens."
        )
    return ids


def cache_nbytes(cache: Cache) -> int:
    """Bytes that a cache holds, ours or one of Transformers' dynamic ones."""
    if isinstance(cache, HeadCache):
        return cache.nbytes
    held = [
        tensor for layer in cache.layers for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
    ]
    return sum(tensor.untyped_storage().nbytes() for tensor in held if tensor is not None)


def generate_text(
    loaded: LoadedModel,
    ids: torch.Tensor,
    plan: CompressionPlan | None = None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] = lambda _: None,
) -> Generation:
    """Continue a prompt.

    Args:
        loaded: the model.
        ids: the prompt, int64 `[1, T]`.
        plan: how to compress the prompt's cache; none for Transformers' own full cache.
        max_new_tokens: most tokens to write.
        temperature: 0 for greedy decoding, else sampling.
        seed: of the sampling.
        on_text: called with each piece of text as it becomes final.
    """
    model: Any = loaded.model
    ids = ids.to(model.device)
    cache = DynamicCache(config=model.config) if plan is None else HeadCache(plan)
    streamer = _TimedStreamer(loaded.tokenizer, on_text)
    sampling = {"do_sample": temperature > 0, "temperature": temperature or None, "top_p": None, "top_k": None}
    forked = torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else [])
    with nullcontext() if plan is None else attending_ragged(model), forked:
        torch.manual_seed(seed)
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            pad_token_id=loaded.tokenizer.pad_token_id or loaded.tokenizer.eos_token_id,
            streamer=streamer,
            **sampling,
        )
    times = streamer.token_times
    return Generation(
        text="".join(streamer.pieces),
        prompt_tokens=ids.shape[1],
        new_tokens=len(times),
        cache_bytes=cache_nbytes(cache),
        prefill_seconds=times[0] - start,
        decode_seconds=times[-1] - times[0],
    )
