"""Answering a prompt, about a document or alone, with the full cache or a compressed one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import TextStreamer
from transformers.cache_utils import Cache, DynamicCache

from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.plan import CompressionPlan
from headprof.compression.session import attending_ragged, prefill
from headprof.errors import UsageError
from headprof.models.loading import LoadedModel
from headprof.models.prompt_encoder import OBSERVATION, PromptEncoder
from headprof.utils.assets import asset_dir


@dataclass(frozen=True)
class Generation:
    """A text, and what it took.

    Attributes:
        text: the new text alone.
        prompt_tokens, new_tokens: tokens read and written.
        cached_tokens: those of the prompt that came from a cache already filled.
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
    cached_tokens: int = 0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens read per second."""
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_seconds

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


def what_to_ask(
    file: Path | None, prompt: str | None, stdin: TextIO | None, about: Path | None = None
) -> tuple[str | None, str, bool]:
    """The document, if any, the prompt, and whether both are the built-in ones.

    The prompt is the one given, else what `stdin` holds if it is no terminal, else the built-in question.

    Raises:
        UsageError: the file cannot be used, the prompt is empty, or there is a file (or something else that the
            question should be `about`) but no question.
    """
    document = read_document(file) if file else None
    if prompt is None and stdin is not None and not stdin.isatty():
        prompt = stdin.read().strip() or None
    if prompt is not None and not prompt.strip():
        raise UsageError('The prompt is empty: give one with --prompt "...".')
    if prompt is not None:
        return document, prompt, False
    if (about := about or file) is not None:
        raise UsageError(f'There is no question about {about}: ask one with --prompt "...".')
    return *demo_document(), True


def check_sources(file: Path | None, cache: Path | None, compare: bool, compressing: Sequence[str] = ()) -> None:
    """
    Args:
        file: a document, as text.
        cache: a compressed one.
        compare: whether to answer with the full cache too.
        compressing: options that were given to say how to compress, such as `--budget`.

    Raises:
        UsageError: a compressed document is to be used together with what it stands for, or to be compressed.
    """
    if cache is not None and file is not None:
        raise UsageError("A compressed document and a file cannot be used together: leave --file or --cache away.")
    if cache is not None and compare:
        raise UsageError(
            "A compressed document cannot be compared with the full cache it no longer holds: leave --compare away."
        )
    if cache is not None and compressing:
        *others, last = compressing
        named = f"{', '.join(others)} and {last}" if others else last
        raise UsageError(f"A compressed document already says how it was compressed: leave {named} away.")


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
    encoder = PromptEncoder(loaded.tokenizer)
    ids = encoder.document_ids(document) + encoder.question_ids(prompt) if document else encoder.prompt_ids(prompt)
    return _fitting(loaded, ids, 0, max_new_tokens)


def question_ids(loaded: LoadedModel, cache: HeadCache, question: str, max_new_tokens: int) -> torch.Tensor:
    """Tokens of a question about a document that a cache holds, int64 `[1, Q]`.

    Raises:
        UsageError: document, question and answer together are longer than the model's context.
    """
    ids = PromptEncoder(loaded.tokenizer).question_ids(question)
    return _fitting(loaded, ids, cache.get_seq_length(), max_new_tokens)


def _fitting(loaded: LoadedModel, ids: list[int], seen: int, max_new_tokens: int) -> torch.Tensor:
    prompt = seen + len(ids)
    needed = prompt + max_new_tokens
    if needed > loaded.max_positions and not max_new_tokens:
        raise UsageError(
            f"The document of {prompt} tokens exceeds the {loaded.max_positions} that {loaded.name} can read: shorten "
            f"it by {needed - loaded.max_positions} tokens."
        )
    if needed > loaded.max_positions:
        raise UsageError(
            f"The prompt of {prompt} tokens and {max_new_tokens} new ones exceed the {loaded.max_positions} that "
            f"{loaded.name} can read: shorten the document by {needed - loaded.max_positions} tokens or lower "
            "--max-new-tokens."
        )
    return torch.tensor([ids])


def compress_document(
    loaded: LoadedModel,
    document: str,
    plan: CompressionPlan,
    *,
    observe: str = OBSERVATION,
    backend: str = "auto",
    prefill_chunk: int | None = None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> HeadCache:
    """A compressed cache of a document, ready for questions about it.

    Args:
        loaded: the model.
        document: the text.
        plan: how to compress it.
        observe: text in the place of the question, which is not known yet: methods that judge by the last queries judge
            by its tokens. They are not kept. If empty, the end of the document judges.
        backend, prefill_chunk: as for `headprof.compressed`.
        on_layer: called with the number of layers that are compressed, and of all.

    Raises:
        UsageError: the document is longer than the model's context, or the budget cannot be met.
    """
    encoder = PromptEncoder(loaded.tokenizer)
    document_ids, observers = encoder.document_ids(document), encoder.question_ids(observe) if observe else []
    ids = _fitting(loaded, document_ids + observers, 0, 0)
    plan.check(len(document_ids))
    cache = HeadCache(plan.for_observers(len(observers)))
    cache.expect_observers(len(observers))
    with (
        attending_ragged(loaded.model, backend=backend, prefill_chunk=prefill_chunk),
        _layer_by_layer(loaded, on_layer),
    ):
        prefill(loaded.model, ids.to(loaded.device), cache)
    cache.continue_with(plan)
    return cache


@contextmanager
def _layer_by_layer(loaded: LoadedModel, on_layer: Callable[[int, int], None]) -> Iterator[None]:
    """Report each decoder layer when it has run for the first time."""
    layers = getattr(loaded.model.get_decoder(), "layers", [])
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        if done <= len(layers):
            on_layer(done, len(layers))

    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
    cache: HeadCache | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    backend: str = "auto",
    prefill_chunk: int | None = None,
    on_text: Callable[[str], None] = lambda _: None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> Generation:
    """Continue a prompt.

    Args:
        loaded: the model.
        ids: the prompt, int64 `[1, T]`; what follows the document, when there is a cache that holds one.
        plan: how to compress the prompt's cache; none for Transformers' own full cache.
        cache: one that is filled already; it is continued in place.
        max_new_tokens: most tokens to write.
        temperature: 0 for greedy decoding, else sampling.
        seed: of the sampling.
        backend, prefill_chunk: as for `headprof.compressed`.
        on_text: called with each piece of text as it becomes final.
        on_layer: called while the prompt is read, with the number of layers that have read it, and of all.
    """
    model: Any = loaded.model
    filler = loaded.tokenizer.pad_token_id or loaded.tokenizer.eos_token_id or 0
    seen = 0 if cache is None else cache.get_seq_length()
    ids = _after_seen(ids, seen, filler).to(loaded.device)
    used: Cache = cache or (DynamicCache(config=model.config) if plan is None else HeadCache(plan))
    streamer = _TimedStreamer(loaded.tokenizer, on_text)
    sampling = {"do_sample": temperature > 0, "temperature": temperature or None, "top_p": None, "top_k": None}
    ours = isinstance(used, HeadCache)
    attending = attending_ragged(model, backend=backend, prefill_chunk=prefill_chunk) if ours else nullcontext()
    forked = torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else [])
    with attending, forked, _layer_by_layer(loaded, on_layer):
        torch.manual_seed(seed)
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=used,
            max_new_tokens=max_new_tokens,
            pad_token_id=filler,
            streamer=streamer,
            **sampling,
        )
    times = streamer.token_times
    return Generation(
        text="".join(streamer.pieces),
        prompt_tokens=ids.shape[1],
        new_tokens=len(times),
        cache_bytes=cache_nbytes(used),
        prefill_seconds=times[0] - start,
        decode_seconds=times[-1] - times[0],
        cached_tokens=seen,
    )


def _after_seen(ids: torch.Tensor, seen: int, filler: int) -> torch.Tensor:
    """Ids `[1, T]` after so many that a cache has seen: Transformers drops these, whichever they were."""
    return torch.cat([torch.full((1, seen), filler), ids], dim=1)
