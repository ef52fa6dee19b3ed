"""Tokens of an answer and their bytes: of a vocabulary of bytes, one of characters, and one that cleans up blanks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import tiny_tokenizer
from support.vocabularies import of_characters
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from headprof.compression.streaming import TimedStreamer
from headprof.integrations.server.told_tokens import Chosen, ToldTokens, shared
from headprof.models.token_bytes import BYTE_OF, TokenBytes


def cleaning_up() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    return tokenizer


KINDS = {"bytes": tiny_tokenizer(), "characters": of_characters(), "cleaning up": cleaning_up()}
TEXTS = st.text(alphabet="ab cdé.,😀\n", max_size=24)


def told_of(tokenizer, ids):
    """The text of an answer, and its tokens, as they come one by one."""
    known = TokenBytes(tokenizer)
    told, pieces = [], []

    def hand_on(piece):
        pieces.append(piece)
        told.extend(tokens.take(piece))

    streamer = TimedStreamer(tokenizer, hand_on)
    tokens = ToldTokens(known, lags=streamer.holds_words_back)
    streamer.put(torch.tensor([[1]]))
    for token in ids:
        tokens.add(Chosen(token, -1.0, [(token, -1.0)]))
        streamer.put(torch.tensor([token]))
    streamer.end()
    told.extend(tokens.take("", last=True))
    return "".join(pieces), told


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_the_bytes_of_all_tokens_are_those_of_the_text(kind, data):
    """Whatever the tokens are, such as bytes that make no character, and special ones."""
    tokenizer = KINDS[kind]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 1), max_size=12))
    text, told = told_of(tokenizer, ids)
    assert text == tokenizer.decode(ids, skip_special_tokens=True)
    assert len(told) == len(ids)
    assert b"".join(each.own.written or b"" for each in told) == text.encode()
    offsets = [each.offset for each in told]
    assert offsets == sorted(offsets) and offsets[:1] in ([0], [])
    special = [token in tokenizer.all_special_ids or token >= len(tokenizer) for token in ids]
    assert [each.own.written is None for each in told] == special


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
def test_tokens_of_a_text_are_where_they_are_said_to_be(kind, text):
    tokenizer = KINDS[kind]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    whole, told = told_of(tokenizer, ids)
    known, at = TokenBytes(tokenizer), 0
    for token, each in zip(ids, told, strict=True):
        own = each.own.written
        assert own in (known.of(token), known.of(token).removeprefix(b" "))
        assert each.likeliest[0] == each.own
        assert each.offset == len(whole.encode()[:at].decode(errors="ignore"))
        try:
            assert own.decode() == each.own.text and whole[each.offset :].startswith(each.own.text)
        except UnicodeDecodeError:
            assert each.own.text.startswith("bytes:\\x")
        at += len(own)


@given(text=TEXTS)
def test_bytes_of_tokens_are_those_that_were_encoded(text):
    for kind, before in (("bytes", ""), ("characters", " ")):
        tokenizer = KINDS[kind]
        known = TokenBytes(tokenizer)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert b"".join(map(known.of, ids)) == (f"{before}{text}" if text else "").encode()


def test_names_of_tokens():
    assert set(BYTE_OF) == set(pre_tokenizers.ByteLevel.alphabet()) and sorted(BYTE_OF.values()) == list(range(256))
    tokenizer = KINDS["characters"]
    known = TokenBytes(tokenizer)
    added, special = tokenizer.convert_tokens_to_ids(["<tool>", "</s>"])
    assert known.of(added) == b"<tool>" and not known.is_special(added)
    assert known.of(special) == b"" and known.is_special(special)


RAWS = st.lists(st.sampled_from([b"", b"a", b" a", b" ", b"\xc3", b"\xa9", b"ab", b"\x80"]), max_size=6)


@given(RAWS, st.binary(max_size=6))
def test_a_text_is_shared_out_among_its_tokens(raws, other):
    joined = b"".join(raws)
    shown = joined.decode(errors="replace").encode()
    parts = shared(shown, raws)
    assert b"".join(parts) == shown and len(parts) == len(raws)
    if shown == joined:
        assert parts == raws
    if raws:
        parts = shared(other, raws)
        assert b"".join(parts) == other and len(parts) == len(raws)
    bare = shared(shown.removeprefix(b" "), raws)
    assert len(bare) == len(raws) and b"".join(bare) == shown.removeprefix(b" ")


def test_bytes_that_make_no_character_are_those_of_the_token_in_which_they_begin():
    shown = "a\ufffdb\ufffd\ufffd".encode()
    none = "\ufffd".encode()
    assert shared(shown, [b"a\xe2", b"\x9c", b"b\xff", b"\xff"]) == [b"a" + none, b"", b"b" + none, none]
