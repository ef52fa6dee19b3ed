"""Needles and probes: exact spans, disjoint splits, balance, length, determinism, and what goes wrong."""

import json
import random
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import islice, pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from headprof.errors import ModelError, ProbeError, UsageError
from headprof.models.prompt_encoder import PromptEncoder
from headprof.probes.build import ProbeBuilder, ProbeContext, ProbeSettings, needles_for
from headprof.probes.families import load_families
from headprof.probes.haystack import Haystack
from headprof.probes.needles import Family, load_needles
from headprof.probes.slots import SPLITS

CHAT = (
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>"]
BUILDER = {"max_positions": 8192}


@cache
def corpus() -> tuple[str, ...]:
    rng = random.Random(0)
    needles = [family.sample(rng).text for family in load_families() for _ in range(20)]
    return (*needles, *islice(Haystack.composed().sentences(rng), 1500))


@cache
def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A small BPE trained here: bytes as in GPT-2, also with single digits, or `▁` for blanks."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    alphabet = []
    if kind == "metaspace":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        blanks = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([blanks, pre_tokenizers.Punctuation()])
        tokenizer.decoder = decoders.Metaspace()
    else:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level]) if kind == "digits" else byte_level
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@cache
def chat_tokenizer(kind: str = "digits") -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(kind)._tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = CHAT
    return tokenizer


@cache
def families() -> tuple[Family, ...]:
    return tuple(load_families())


def build(tokenizer: PreTrainedTokenizerFast | None = None, **settings: object) -> list[ProbeContext]:
    values = {"probes": 24, "lengths": (900,), **settings}
    return list(ProbeBuilder(tokenizer or chat_tokenizer(), ProbeSettings(**values), **BUILDER))


def words(text: str) -> str:
    return " ".join(text.replace("▁", " ").split())


# Needles


def test_there_are_enough_families_of_each_kind() -> None:
    kinds = Counter(family.kind for family in families())
    assert kinds["retrieval"] >= 6
    assert kinds["reasoning"] >= 10
    assert len({family.name for family in families()}) == len(families())


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_needles_hold_answer_distractors_and_an_answerable_question(family: Family) -> None:
    rng = random.Random(1)
    for _ in range(40):
        needle = family.sample(rng, "eval")
        assert needle.text[needle.answer_start : needle.answer_stop] == needle.answer
        assert needle.text[needle.answer_start - 1] == " "
        assert needle.text.count(needle.answer) >= 1
        assert needle.question.endswith("?")
        assert needle.answer not in needle.question
        assert needle.answer not in needle.answer_prefix
        assert needle.answer_prefix == needle.answer_prefix.strip() != ""
        assert "{" not in needle.text + needle.question + needle.answer_prefix
        candidates = [needle.answer, *(needle.text[start:stop] for start, stop in needle.distractors)]
        assert len(set(candidates)) == len(candidates)
        assert (len(candidates) > 1) == (needle.kind == "reasoning")


@pytest.mark.parametrize("family", [f for f in families() if f.kind == "reasoning"], ids=lambda family: family.name)
def test_position_of_the_right_answer_gives_nothing_away(family: Family) -> None:
    rng = random.Random(2)
    ranks: Counter[int] = Counter()
    for _ in range(600):
        needle = family.sample(rng)
        ranks[sum(start < needle.answer_start for start, _ in needle.distractors)] += 1
        candidates = 1 + len(needle.distractors)
    assert set(ranks) == set(range(candidates))
    assert max(ranks.values()) < 1.25 * 600 / candidates


def test_splits_share_no_value() -> None:
    used: dict[str, set[str]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        rng = random.Random(3)
        for family in families():
            for _ in range(150):
                used[split].update(family.sample(rng, split).values)
    assert not used["profile"] & used["eval"]
    assert min(len(values) for values in used.values()) > 400


def test_thousands_of_different_needles() -> None:
    rng = random.Random(4)
    assert len({family.sample(rng).text for family in families() for _ in range(200)}) > 4000


def test_sample_avoids_taken_values_until_none_is_left() -> None:
    family = next(family for family in families() if family.name == "birthplace")
    rng, taken = random.Random(5), set()
    with pytest.raises(ProbeError, match="lower the number of needles per context"):
        for _ in range(200):
            needle = family.sample(rng, "profile", taken)
            assert not taken.intersection(needle.values)
            taken.update(needle.values)
    assert len(taken) >= 60


PAPER_NEEDLE = {
    "needle": " Ann likes to swim at night. Bob likes to read. Ann is 12 years old. Bob is 10 years old.",
    "real_needle": "Ann likes to swim at night.",
    "answer": "Ann likes to swim at night.",
    "question": "What does the older one like?",
}


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_the_papers_needle_format_loads(tmp_path: Path) -> None:
    extra = {**PAPER_NEEDLE, "answer": "swim", "kind": "retrieval", "family": "mine", "answer_prefix": "Ann likes to "}
    first, second = load_needles(write_lines(tmp_path / "old.jsonl", PAPER_NEEDLE, "", extra))
    assert (first.kind, first.family, first.answer_prefix) == ("reasoning", "old", "")
    assert first.text[first.answer_start : first.answer_stop] == first.answer == PAPER_NEEDLE["real_needle"]
    assert (second.kind, second.family, second.answer_prefix) == ("retrieval", "mine", "Ann likes to")
    assert second.answer == "swim"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", "Line 2 .* is not JSON"),
        ("[1]", "Line 2 .* is not a JSON object"),
        ({**PAPER_NEEDLE, "answer": " "}, "Line 2 .* field 'answer'"),
        ({key: value for key, value in PAPER_NEEDLE.items() if key != "question"}, "Line 2 .* field 'question'"),
        ({**PAPER_NEEDLE, "real_needle": "Ann likes tea."}, "Line 2 .* real_needle that is not in its needle"),
        ({**PAPER_NEEDLE, "kind": "guess"}, "Line 2 .* kind 'guess'"),
    ],
)
def test_bad_needle_lines_are_named(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        load_needles(write_lines(tmp_path / "bad.jsonl", PAPER_NEEDLE, line))


def test_missing_and_empty_needle_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_needles(tmp_path / "none.jsonl")
    with pytest.raises(ProbeError, match="is empty"):
        load_needles(write_lines(tmp_path / "empty.jsonl", "", " "))


def write_families(folder: Path, family: dict[str, object]) -> Path:
    base = {"name": "f", "description": "d", "slots": {"answer": "city"}, "question": "Where?", "answer_prefix": "In"}
    (folder / "slots.json").write_text('{"city": ["Aa", "Bb", "Cc", "Dd"]}', encoding="utf-8")
    (folder / "retrieval.json").write_text(json.dumps([{**base, **family}]), encoding="utf-8")
    (folder / "reasoning.json").write_text("[]", encoding="utf-8")
    return folder


def test_families_can_come_from_another_folder(tmp_path: Path) -> None:
    (family,) = load_families(write_families(tmp_path, {"variants": [{"needle": "It is in {answer}."}]}))
    assert {family.sample(random.Random(seed)).answer for seed in range(20)} == {"Aa", "Cc"}
    assert {family.sample(random.Random(seed), "eval").answer for seed in range(20)} == {"Bb", "Dd"}


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ({"variants": [{"needle": "{answer} it is."}]}, "not as its first word"),
        ({"variants": [{"needle": "It is {answer} or {answer}."}]}, "answer} once"),
        ({"variants": [{"needle": "It is {answer} near {place}."}]}, "slot 'place'"),
        ({"slots": {"answer": "moon"}, "variants": [{"needle": "It is {answer}."}]}, "slot list 'moon'"),
    ],
)
def test_faulty_families_are_refused(tmp_path: Path, family: dict[str, object], message: str) -> None:
    with pytest.raises(ProbeError, match=message):
        load_families(write_families(tmp_path, family))


def test_family_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_families(tmp_path)
    (tmp_path / "slots.json").write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match="is not JSON"):
        load_families(tmp_path)


# Probes: spans


@pytest.mark.parametrize("kind", ["bytes", "digits", "metaspace"])
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
def test_spans_are_exact(kind: str, chat: bool) -> None:
    tokenizer = chat_tokenizer(kind) if chat else make_tokenizer(kind)
    seen = set()
    for context in build(tokenizer, probes=52, lengths=(1200,)):
        for probe in context.probes:
            seen.add(probe.family)
            answer = context.context_ids[slice(*probe.answer_span)]
            assert answer == probe.answer_ids
            assert words(tokenizer.decode(answer)) == words(probe.answer)
            needle = words(tokenizer.decode(context.context_ids[slice(*probe.needle_span)]))
            assert needle.endswith(".")
            assert words(probe.answer) in needle
            assert probe.needle_span[0] < probe.answer_span[0] < probe.answer_span[1] <= probe.needle_span[1]
            for start, stop in probe.distractor_spans:
                assert probe.needle_span[0] < start < stop <= probe.needle_span[1]
                assert stop <= probe.answer_span[0] or start >= probe.answer_span[1]
                assert words(tokenizer.decode(context.context_ids[start:stop])) in needle
            assert bool(probe.distractor_spans) == (probe.kind == "reasoning")
    assert seen == {family.name for family in families()}


def test_answers_of_several_tokens_are_common() -> None:
    lengths = Counter(
        len(probe.answer_ids) for context in build(probes=52, lengths=(1200,)) for probe in context.probes
    )
    assert sum(count for length, count in lengths.items() if length > 1) > 10


def test_chat_prompt_is_the_rendered_template() -> None:
    tokenizer = chat_tokenizer("bytes")
    context = build(tokenizer, probes=4)[0]
    for probe in context.probes:
        prompt = tokenizer.decode([*context.context_ids, *probe.question_ids, *probe.answer_ids])
        body = prompt[prompt.index("\n") + 1 : prompt.rindex(probe.question)]
        start = tokenizer.apply_chat_template(
            [{"role": "user", "content": body + probe.question}], tokenize=False, add_generation_prompt=True
        )
        assert prompt.startswith(start)
        assert prompt.endswith(" " + probe.answer)
        assert body.endswith(".\n\n")


def test_plain_prompt_asks_a_question() -> None:
    tokenizer = make_tokenizer("bytes")
    context = build(tokenizer, probes=2)[0]
    probe = context.probes[0]
    suffix = tokenizer.decode([*probe.question_ids, *probe.answer_ids])
    assert re.fullmatch(rf"Question: {re.escape(probe.question)}\nAnswer: .+ {re.escape(probe.answer)}", suffix)
    assert context.context_ids[0] != tokenizer.bos_token_id


def test_bos_comes_once_when_the_tokenizer_uses_it() -> None:
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer.from_str(make_tokenizer("bytes")._tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    context = build(tokenizer, probes=4)[0]
    assert context.context_ids[0] == 1
    assert context.context_ids.count(1) == 1
    assert all(1 not in probe.question_ids + probe.answer_ids for probe in context.probes)
    assert all(context.context_ids[slice(*p.answer_span)] == p.answer_ids for p in context.probes)


def test_an_empty_prefix_lets_the_answer_begin_the_reply(tmp_path: Path) -> None:
    needles = load_needles(write_lines(tmp_path / "n.jsonl", PAPER_NEEDLE))
    tokenizer = chat_tokenizer("bytes")
    contexts = list(ProbeBuilder(tokenizer, ProbeSettings(probes=3, lengths=(400,)), needles=needles, **BUILDER))
    assert [len(context.probes) for context in contexts] == [1, 1, 1]
    probe = contexts[0].probes[0]
    assert tokenizer.decode(probe.answer_ids) == PAPER_NEEDLE["answer"]
    assert tokenizer.decode(probe.question_ids).endswith("assistant\n")
    assert tokenizer.decode(contexts[0].context_ids[slice(*probe.answer_span)]).strip() == PAPER_NEEDLE["real_needle"]


# Probes: plan


def test_contexts_depend_on_seed_and_index_alone() -> None:
    settings = ProbeSettings(probes=40, lengths=(900, 1100), needles_per_context=6)
    whole = list(ProbeBuilder(chat_tokenizer(), settings, **BUILDER))
    assert ProbeBuilder(chat_tokenizer(), settings, **BUILDER).context(4) == whole[4]
    other = ProbeBuilder(chat_tokenizer(), replace(settings, seed=1), **BUILDER).context(4)
    assert other.context_ids != whole[4].context_ids
    with pytest.raises(IndexError):
        ProbeBuilder(chat_tokenizer(), settings, **BUILDER).context(len(whole))


@pytest.mark.parametrize(("probes", "per_context"), [(1, 8), (7, 3), (26, 8), (30, 1)])
def test_number_of_probes_is_exact_and_contexts_are_full(probes: int, per_context: int) -> None:
    sizes = [len(context.probes) for context in build(probes=probes, needles_per_context=per_context)]
    assert sizes == [per_context] * (probes // per_context) + [probes % per_context] * (probes % per_context > 0)


@pytest.mark.parametrize("lengths", [(900,), (900, 2400)])
@pytest.mark.parametrize("per_context", [None, 1, 5])
def test_a_longer_run_begins_like_a_shorter_one(lengths: tuple[int, ...], per_context: int | None) -> None:
    def builder(probes: int) -> ProbeBuilder:
        settings = ProbeSettings(probes, lengths, needles_per_context=per_context)
        return ProbeBuilder(chat_tokenizer(), settings, **BUILDER)

    short, long = builder(17), builder(41)
    sizes = [long.count(index) for index in range(len(long))]
    assert sum(sizes) == 41 and sizes == [len(context.probes) for context in long]
    same = [index for index in range(len(short)) if short.count(index) == long.count(index)]
    assert len(same) >= len(short) - 1 > 0
    assert all(short.context(index) == long.context(index) for index in same)


def test_packing_is_chosen_from_the_length_and_fits() -> None:
    assert [needles_for(length) for length in (512, 1024, 2048, 4096, 8192, 131072)] == [8, 12, 17, 24, 32, 32]
    for length in (250, 1024, 3000):
        settings = ProbeSettings(40, (length,), needles_per_context=None)
        builder = ProbeBuilder(chat_tokenizer(), settings, **BUILDER)
        assert 1 <= builder.count(0) <= needles_for(length)
        assert len(builder.context(0).context_ids) <= length
    with pytest.raises(UsageError, match="too short for one needle"):
        ProbeBuilder(chat_tokenizer(), ProbeSettings(4, (90,), needles_per_context=None), **BUILDER)


def test_a_context_taken_apart_asks_the_same_of_each_needle_alone() -> None:
    settings = ProbeSettings(16, (1100,), needles_per_context=8)
    builder = ProbeBuilder(chat_tokenizer(), settings, **BUILDER)
    packed, alone = builder.context(1), builder.unpacked(1)
    assert len(alone) == len(packed.probes) == 8
    for probe, context in zip(packed.probes, alone, strict=True):
        (only,) = context.probes
        assert (only.question_ids, only.answer_ids, only.kind, only.family) == (
            probe.question_ids,
            probe.answer_ids,
            probe.kind,
            probe.family,
        )
        assert abs(only.depth - probe.depth) < 0.08
        assert abs(len(context.context_ids) - len(packed.context_ids)) < 60
        needle = chat_tokenizer().decode(packed.context_ids[slice(*probe.needle_span)])
        assert needle.strip() in chat_tokenizer().decode(context.context_ids)
        assert sum(other.answer in chat_tokenizer().decode(context.context_ids) for other in packed.probes) <= 2


def test_contexts_that_share_a_filler_begin_alike() -> None:
    settings = ProbeSettings(20, (800, 1200), needles_per_context=1, depths_per_filler=4)
    builder = ProbeBuilder(chat_tokenizer(), settings, **BUILDER)
    assert builder.group_size == 4 and [len(group) for group in builder.groups()] == [4] * 5
    for number, group in enumerate(builder.groups()):
        contexts = [builder.context(index) for index in group]
        assert all(len(context.context_ids) > 1000 for context in contexts) == bool(number % 2)
        depths = [context.probes[0].depth for context in contexts]
        assert depths == sorted(depths) and depths[-1] - depths[0] > 0.4
        for one, other in pairwise(contexts):
            shared = one.probes[0].needle_span[0] - 2
            assert one.context_ids[:shared] == other.context_ids[:shared]
    packed = ProbeBuilder(chat_tokenizer(), replace(settings, needles_per_context=2), **BUILDER)
    assert packed.group_size == 1


def test_kinds_and_families_are_balanced() -> None:
    probes = [probe for context in build(probes=108, lengths=(1000,)) for probe in context.probes]
    kinds = Counter(probe.kind for probe in probes)
    assert kinds["retrieval"] == kinds["reasoning"] == 54
    for kind in kinds:
        members = [family.name for family in families() if family.kind == kind]
        counts = Counter(probe.family for probe in probes if probe.kind == kind)
        assert max(counts[name] for name in members) - min(counts[name] for name in members) <= 1


def test_probes_balance_the_position_of_the_right_answer() -> None:
    ranks: dict[str, Counter[int]] = {}
    for context in build(probes=216, kinds=("reasoning",), lengths=(1200,)):
        for probe in context.probes:
            rank = sum(span[0] < probe.answer_span[0] for span in probe.distractor_spans)
            ranks.setdefault(probe.family, Counter())[rank] += 1
    assert all(set(counts) == set(range(max(counts) + 1)) for counts in ranks.values())
    assert all(max(counts.values()) - min(counts.values()) <= 1 for counts in ranks.values())


def test_kinds_and_families_can_be_chosen() -> None:
    assert {p.kind for c in build(kinds=("reasoning",)) for p in c.probes} == {"reasoning"}
    chosen = ("gift-shop", "swap")
    with pytest.raises(UsageError, match="no needle family 'gift-shop'"):
        build(families=chosen)
    assert {p.family for c in build(families=("birthplace", "swap")) for p in c.probes} == {"birthplace", "swap"}


@pytest.mark.parametrize("length", [400, 600, 1000, 3000])
@pytest.mark.parametrize("kind", ["digits", "metaspace"])
def test_lengths_are_never_exceeded_and_nearly_used(length: int, kind: str) -> None:
    for context in build(chat_tokenizer(kind), probes=9, lengths=(length,), needles_per_context=3):
        used = len(context.context_ids) + max(len(p.question_ids) + len(p.answer_ids) for p in context.probes)
        assert 0.98 * length <= used <= length


def test_lengths_take_turns() -> None:
    contexts = build(probes=12, lengths=(500, 1500), needles_per_context=2)
    assert [len(context.context_ids) > 1000 for context in contexts] == [False, True] * 3


def test_depths_cover_the_context_evenly() -> None:
    for per_context in (1, 6):
        contexts = build(probes=60, lengths=(800,), needles_per_context=per_context)
        depths = sorted(probe.depth for context in contexts for probe in context.probes)
        assert 0 <= depths[0] < 0.1
        assert 0.9 < depths[-1] <= 1
        for tenth in range(10):
            assert 2 <= sum(tenth / 10 <= depth < (tenth + 1) / 10 for depth in depths) <= 12


def test_packed_needles_stand_apart_and_share_no_subject() -> None:
    for context in build(probes=48, lengths=(1100,)):
        spans = sorted(probe.needle_span for probe in context.probes)
        assert all(first[1] + 4 < second[0] for first, second in pairwise(spans))
        assert len({probe.question for probe in context.probes}) == len(context.probes)
        assert len({probe.answer for probe in context.probes}) == len(context.probes)
        text = chat_tokenizer().decode(context.context_ids)
        for probe in context.probes:
            candidate = re.compile(rf"\b{re.escape(probe.answer)}\b")
            needle = chat_tokenizer().decode(context.context_ids[slice(*probe.needle_span)])
            assert len(candidate.findall(text)) == len(candidate.findall(needle)) >= 1


def test_profile_and_eval_probes_share_no_answer() -> None:
    answers = [
        {p.answer for c in build(probes=104, split=split, lengths=(1000,)) for p in c.probes} for split in SPLITS
    ]
    assert not answers[0] & answers[1]


def test_a_folder_haystack_is_used(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(f"The garden gate number {n} was open." for n in range(200)))
    builder = ProbeBuilder(
        chat_tokenizer(), ProbeSettings(probes=2, lengths=(600,)), haystack=Haystack.from_folder(tmp_path), **BUILDER
    )
    assert "The garden gate number" in chat_tokenizer().decode(builder.context(0).context_ids)


# Probes: errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probes": 0}, "Cannot build 0 probes"),
        ({"needles_per_context": 0}, "Cannot put 0 needles"),
        ({"lengths": ()}, "No context length"),
        ({"lengths": (1024, 9000)}, "9000 tokens .* the 8192 positions"),
        ({"lengths": (1024, 500)}, r"500 tokens is too short for 8 needles per context; use at most \d+, or"),
        ({"lengths": (60,)}, r"60 tokens is too short for one needle; use at least \d+"),
        ({"split": "test"}, "no split 'test'"),
        ({"kinds": ("guess",)}, "no probe kind 'guess'"),
        ({"kinds": ()}, "no probe kind"),
        ({"kinds": ("retrieval",), "families": ("swap",)}, "None of the needles is of the kind retrieval"),
    ],
)
def test_impossible_settings_are_refused_before_any_work(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ProbeBuilder(chat_tokenizer(), ProbeSettings(**{"probes": 16, **settings}), **BUILDER)


def test_the_number_of_needles_that_the_error_names_does_fit() -> None:
    with pytest.raises(UsageError) as caught:
        build(lengths=(500,))
    fitting = int(re.search(r"at most (\d+)", str(caught.value))[1])
    assert sum(len(context.probes) for context in build(lengths=(500,), needles_per_context=fitting)) == 24


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ProbeError, match="fast tokenizer"):
        PromptEncoder(Slow(), spans=True)


def test_a_template_without_the_user_text_is_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer("bytes")._tokenizer)
    tokenizer.chat_template = "Hello."
    with pytest.raises(ModelError, match="chat template"):
        PromptEncoder(tokenizer)
