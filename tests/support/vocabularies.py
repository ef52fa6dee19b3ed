"""Tokenizers of other kinds than that of the tiny models: of characters, and one that makes more of line ends."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from support.tiny_models import BOS, CHAT_TEMPLATE, EOS, PAD

SPACE = "\u2581"


def of_characters() -> PreTrainedTokenizerFast:
    """As SentencePiece's: blanks are characters, one stands before each text, what is unknown is parted in bytes."""
    pieces = [SPACE, *"abcdefgh.,é", "ab", "cd", f"{SPACE}ab", f"{SPACE}cd", f"{SPACE}."]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {name: number for number, name in enumerate(names)}
    merges = [("a", "b"), ("c", "d"), (SPACE, "ab"), (SPACE, "cd"), (SPACE, ".")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def merging_line_ends(text: str) -> PreTrainedTokenizerFast:
    """One that makes single tokens of line ends that follow one another, at the end of a text like this one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{text.strip()}\n\n\n"] * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    made.chat_template = CHAT_TEMPLATE
    return made
