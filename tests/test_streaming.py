"""Text that is handed on while it comes is, piece by piece, what the tokenizer makes of all tokens at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from headprof.compression.streaming import TimedStreamer

CODE = "def f(x):\n    if x:\n        return 'größer 😀'\n\n    return 0\n"


def blank_dropping_tokenizer():
    """A tokenizer like Llama-2's: blanks are letters of tokens, the first is dropped, unknown characters are bytes."""
    pieces = ["▁", "▁▁▁▁", "▁def", "▁f", "(x):", "▁if", "▁x:", "▁return", "▁0", "def", "if", "return", "x", "e", "▁'"]
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(vocab)}, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def streamed(tokenizer, ids):
    """The pieces, and what the streamer says that the text is."""
    pieces: list[str] = []
    streamer = TimedStreamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([[5, 6, 7]]))
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert len(streamer.token_times) == len(ids)
    return pieces, streamer.text


TOKENIZERS = {"byte-level": tiny_tokenizer(), "blanks dropped": blank_dropping_tokenizer()}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_code_keeps_its_blanks(name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(CODE, add_special_tokens=False).input_ids
    pieces, text = streamed(tokenizer, [*ids, tokenizer.eos_token_id])
    assert "".join(pieces) == text == tokenizer.decode(ids, skip_special_tokens=True)
    assert "\n    if" in text and "😀" in text
    assert all("\ufffd" not in piece for piece in pieces) and len([piece for piece in pieces if piece]) > 10


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(TOKENIZERS)), st.lists(st.integers(0, 270), max_size=40))
def test_any_tokens_are_handed_on_as_the_whole_is_decoded(name, ids):
    tokenizer = TOKENIZERS[name]
    pieces, text = streamed(tokenizer, ids)
    assert "".join(pieces) == text == tokenizer.decode(ids, skip_special_tokens=True)


def test_blanks_that_are_cleaned_up_are_never_handed_on():
    tokenizer = tiny_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    ids = tokenizer("Hello , you don 't know me . Do n't you ? ", add_special_tokens=False).input_ids
    pieces, text = streamed(tokenizer, ids)
    assert "".join(pieces) == text == tokenizer.decode(ids)
