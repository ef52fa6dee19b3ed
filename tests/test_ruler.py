"""RULER's tasks: answers are checked by reading the documents, lengths by counting."""

import random
import re
from collections import Counter
from itertools import islice
from math import pi

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import tiny_tokenizer

from headprof.errors import UsageError
from headprof.evaluation.questions import digest_of
from headprof.evaluation.tasks import TASKS, TaskRequest, ruler
from headprof.evaluation.tasks.ruler import fill, prompt_tokens
from headprof.evaluation.tasks.ruler_puzzles import (
    FULL_LENGTH,
    CommonWords,
    FrequentWords,
    Needles,
    VariableTracking,
    zeta_counts,
)
from headprof.models.prompt_encoder import PromptEncoder
from headprof.utils.units import format_length

NAMES = list(ruler.GENERATORS)
TOKENIZERS = {"plain": tiny_tokenizer(), "chat": tiny_tokenizer(chat=True)}
UUID = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


def shortest(name):
    """A length of prompts; the tiny tokenizer takes about two tokens a word more than a real one."""
    return 1500 if name in ("vt", "cwe") else 1024


def full(name):
    """A length of prompts that leaves room for what a task has from `FULL_LENGTH` on."""
    return 8192 if name == "cwe" else FULL_LENGTH


def examples(name, *, limit=4, lengths=None, tokenizer="chat", seed=0):
    lengths = lengths or (shortest(name),)
    request = TaskRequest(None, limit, lengths, TOKENIZERS[tokenizer], seed)
    return list(TASKS[f"ruler/{name}"].examples(request))


def facts(document):
    """What the needles of a document say: `{thing: values}`."""
    found = {}
    for thing, number in re.findall(rf"A (?:number|code) of ((?:the \w+ \w+)|{UUID}) is (\d{{7}}|{UUID})\.", document):
        found.setdefault(thing, []).append(number)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_answers_take_the_length_or_up_to_2_percent_less(name):
    for tokenizer in TOKENIZERS:
        for length in (shortest(name), 1700, full(name)):
            for example in examples(name, limit=3, lengths=(length,), tokenizer=tokenizer):
                encoder = PromptEncoder(TOKENIZERS[tokenizer])
                after, reply = encoder.cued(example.after, example.reply)
                prompt = encoder.prompt_ids(example.before + example.document + after)
                taken = len(prompt) + len(TOKENIZERS[tokenizer](reply).input_ids) + example.max_new_tokens
                line = 0 if name != "niah_multikey_3" else len(encoder.texts.ids(example.document.split("\n")[0]))
                assert length - max(0.02 * length, line + 5) <= taken <= length
                assert example.group == format_length(length)


@pytest.mark.parametrize("name", NAMES)
def test_examples_depend_on_the_seed_and_their_number_alone(name):
    few, many = examples(name, limit=2), examples(name, limit=4)
    assert many[:2] == few
    assert many[:2] == examples(name, limit=2, lengths=(2048, shortest(name)))[2:]
    documents = {example.document for example in many + examples(name, seed=1)}
    answers = {example.answers for example in many + examples(name, seed=1)}
    assert len(documents) == len(answers) == 8


EARLIER = {
    "niah_single": "379b9d5c94a204f0",
    "niah_multikey": "b12878ee28191407",
    "niah_multivalue": "4a11e842f734abe9",
    "niah_multiquery": "2a6c27091b2d4598",
    "variable_tracking": "8a3a6117dea112f5",
    "common_words": "b9ebd719d547393f",
    "frequent_words": "4e8a3644d60f1186",
}
UUID_VALUES = re.compile("niah_single_3|niah_multikey_3")


def test_long_documents_of_needles_have_as_many_different_keys():
    document = ruler.GENERATORS["niah_multikey_2"].puzzle(random.Random(0), 131072).document(8000)
    assert len(facts(document)) == len(document.split("\n")) == 8001


@pytest.mark.parametrize("name", ["niah_single_1", "vt"])
def test_noise_is_the_same_few_sentences(name):
    for example in examples(name, limit=5, lengths=(2048,)):
        lines = example.document.split("\n")
        needles = [line for line in lines if "number" in line or line.startswith("Let ")]
        noise = [line for line in lines if line not in needles]
        assert len(needles) == {"niah_single_1": 1, "vt": 5}[name]
        assert len(set(noise)) <= 2  # the last round may be a part of one
        assert all(line == noise[0] or noise[0].startswith(line) for line in noise)


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_2", "niah_multikey_3"])
def test_needles_between_lines_are_spread_over_the_document(name):
    depths = [each.document.index(each.answers[0]) / len(each.document) for each in examples(name, limit=40)]
    assert min(depths) < 0.15 and max(depths) > 0.85


@pytest.mark.parametrize("name", ["vt", "cwe"])
def test_a_worked_example_comes_first(name):
    """As its own puzzle: its answers are right and none of the real one's; the earlier tasks have none."""
    for example in examples(name, limit=3, lengths=(1500, full(name))):
        found = re.fullmatch(r"(.*)\n(The \d+ [^\n]* are: [^\n]*)\n\n([^\n]*\n\n)", example.before, re.DOTALL)
        shown, said, before = found.groups()
        answers = said.partition("are: ")[2].split(", ")
        assert shown.startswith(before)
        assert not {*answers} & {*example.answers}
        if name == "vt":
            values = {}
            for variable, value in re.findall(r"Let (\w+) = (\w+)\.", shown):
                values[variable] = value if value.isdigit() else values[value]
            assert set(values) == set(answers) and len(set(values.values())) == 1
            assert next(iter(values.values())) not in example.document
        else:
            counts = Counter(word for _, word in re.findall(r"(\d+)\. (\w+)", shown))
            assert {word for word, _ in counts.most_common(10)} == {*answers}
            assert {*counts.values()} == ({3, 1} if example.group == "1500" else {10, 3})
            assert len(counts) == (20 if example.group == "1500" else 40)


def test_short_lists_of_common_words_are_as_in_ruler():
    for length, most, fewest in ((1500, 6, 1), (4000, 6, 1), (8192, 30, 3)):
        for example in examples("cwe", limit=2, lengths=(length,)):
            counts = Counter(word for _, word in re.findall(r"(\d+)\. (\w+)", example.document))
            assert {counts[word] for word in example.answers} == {most}
            assert {count for word, count in counts.items() if word not in example.answers} == {fewest}


def test_examples_under_earlier_names_stay_as_they_were():
    """By digests of what the version before the thirteen tasks made; two tasks have the same name in both."""
    assert {name: digest_of(examples(name, limit=1)[0])[:16] for name in EARLIER} == EARLIER
    assert set(ruler.EARLIER) == set(EARLIER) - set(ruler.GENERATED)


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_asked_for_without_being_told(name):
    for example in examples(name):
        assert len(set(example.answers)) == len(example.answers)
        told = example.before + example.after + example.reply
        for answer in example.answers:
            assert re.search(rf"\b{answer}\b", example.document)
            assert answer not in told


# Keys, values of each, and how many of them are asked for, of documents that are not all needles.
NEEDLES = {
    **dict.fromkeys(("niah_single", "niah_single_1", "niah_single_2", "niah_single_3"), (1, 1, 1)),
    **dict.fromkeys(("niah_multikey", "niah_multikey_1"), (4, 1, 1)),
    "niah_multivalue": (1, 4, 1),
    "niah_multiquery": (4, 1, 4),
}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("niah")])
def test_needles_hold_the_answers_and_no_other_holds_one(name):
    for example in examples(name, limit=10):
        held = facts(example.document)
        lines = example.document.count("\n") + 1
        keys, values, queries = NEEDLES.get(name, (lines, 1, 1))
        asked = [thing for thing in held if thing in example.after]
        assert len(held) == keys
        assert len(asked) == queries
        assert all(len(numbers) == values for numbers in held.values())
        if name not in NEEDLES:
            assert lines > 8
        if UUID_VALUES.match(name):
            assert re.fullmatch(UUID, *example.answers)
            assert re.findall(UUID, example.document).count(*example.answers) == 1
            continue
        assert sorted(number for thing in asked for number in held[thing]) == sorted(example.answers)
        distractors = [number for thing in held if thing not in asked for number in held[thing]]
        assert not set(distractors) & set(example.answers)
        numbers = re.findall(r"\d+", example.document)
        assert sorted(numbers) == sorted([*distractors, *example.answers])  # none in the filler


def test_needles_are_spread_over_the_document():
    depths = []
    for example in examples("niah_single", limit=60):
        depths.append(example.document.index(example.answers[0]) / len(example.document))
    assert min(depths) < 0.15
    assert max(depths) > 0.85
    assert 0.4 < sum(depths) / len(depths) < 0.6


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("chains", [1, 2])
def test_variables_are_those_that_following_the_assignments_finds(chains, noise, monkeypatch):
    monkeypatch.setitem(ruler.GENERATORS, "variable_tracking", VariableTracking(chains, noise=noise, worked=noise))
    for example in examples("variable_tracking", limit=10, lengths=(2048,)):
        values = {}
        for name, value in re.findall(r"Let (\w+) = (\w+)\.", example.document):
            assert name not in values
            values[name] = value if value.isdigit() else values[value]  # each is assigned before it is used
        number = re.search(r"value (\d{5})", example.after)[1]
        assert {name for name, value in values.items() if value == number} == set(example.answers)
        assert sorted(Counter(values.values()).values()) == chains * [5]


def test_common_words_are_the_most_common_ones():
    for length in (640, 1024, 4096, 8192):
        for example in examples("common_words", limit=2, lengths=(length,)):
            numbered = re.findall(r"(\d+)\. (\w+)", example.document)
            assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
            counts = Counter(word for _, word in numbered)
            assert {word for word, _ in counts.most_common(10)} == set(example.answers)
            common = {counts[word] for word in example.answers}
            others = {count for word, count in counts.items() if word not in example.answers}
            assert len(common) == len(others) == 1
            assert min(common) > 2 * max(others)
            assert min(common) == (30 if length >= 4096 else round(30 * (length - 120) / 3976))
            assert not [word for word in counts for answer in example.answers if answer in word and answer != word]


def test_long_lists_go_on_with_made_up_words():
    puzzle = CommonWords().puzzle(random.Random(0), 65536)
    words = Counter(re.findall(r"[a-z]+", puzzle.document(2000)))
    assert len(words) == 2010
    assert set(words.values()) == {30, 3}


def test_frequent_words_are_the_most_frequent_ones():
    for length in (1024, 4096):
        for example in examples("frequent_words", lengths=(length,)):
            counts = Counter(example.document.split())
            ranked = counts.most_common()
            assert ranked[0][0] == "..."
            assert {word for word, _ in ranked[1:4]} == set(example.answers)
            assert ranked[3][1] > ranked[4][1]
            # In a zeta distribution with exponent 2 the second rank has a quarter of the first's, and so on.
            assert [count for _, count in ranked[:5]] == pytest.approx(
                [ranked[0][1] / k**2 for k in range(1, 6)], abs=1
            )


def test_zeta_counts_by_a_slow_twin():
    for total in (10, 100, 1234):
        slow = [int(total / (pi**2 / 6) / k**2) for k in range(1, 1000)]
        assert zeta_counts(total, 2.0) == [count for count in slow if count]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=200), st.integers(0, 400))
def test_filling_reaches_what_trying_every_size_reaches(steps, room):
    """Sizes that take more and more tokens, unevenly; after the last step ten more for each."""
    sizes = [sum(steps[:count]) for count in range(len(steps) + 1)]

    def taken(text):
        size = len(text)
        return sizes[size] if size < len(sizes) else sizes[-1] + 10 * (size - len(sizes) + 1)

    best = max(taken("x" * size) for size in range(len(steps) + 50) if taken("x" * size) <= room)
    found = taken(fill(lambda size: "x" * size, taken, room))
    assert found <= room
    assert found == best or room - found <= room * 0.005


def test_a_length_that_the_model_cannot_read():
    request = TaskRequest(None, 1, (1024, 2048), TOKENIZERS["chat"], 0, max_positions=1024)
    generated = TASKS["ruler/niah_single"].examples(request)
    assert next(generated).group == "1k"
    with pytest.raises(UsageError, match="A length of 2048 tokens is more than the 1024 positions of the model"):
        next(generated)


@pytest.mark.parametrize("name", NAMES)
def test_a_length_that_is_too_short_names_one_that_is_not(name):
    with pytest.raises(
        UsageError, match=rf"length of 32 tokens is too short for ruler/{name}: use at least \d+"
    ) as caught:
        examples(name, lengths=(32,))
    enough = int(re.search(r"at least (\d+)", str(caught.value))[1])
    # Other examples may need a little more.
    assert examples(name, limit=1, lengths=(enough + 200,))


def test_parameters_are_fields():
    rng = random.Random(3)
    needles = Needles(keys=5, values=2, queries=3).puzzle(rng, 1024)
    assert len(needles.answers) == 6
    assert {len(numbers) for numbers in facts(needles.document(50)).values()} == {2}
    tracking = VariableTracking(chains=3, hops=1).puzzle(rng, 1024)
    assert len(tracking.answers) == 2
    assert tracking.document(50).count("Let ") == 6
    assert len(CommonWords(common=4).puzzle(rng, 1024).answers) == 4
    assert len(FrequentWords(asked=2).puzzle(rng, 1024).answers) == 2


def test_there_are_a_hundred_examples_unless_told_otherwise():
    generated = TASKS["ruler/niah_single"].examples(TaskRequest(None, None, (320,), TOKENIZERS["plain"], 0))
    assert len(list(islice(generated, 200))) == ruler.EXAMPLES


def test_tokens_are_counted_with_template_and_reply():
    plain, chat = TOKENIZERS["plain"], TOKENIZERS["chat"]
    parts = ("Read. ", "A text.", " And?", "So:")
    assert prompt_tokens(*parts, plain) == len(plain("Read. A text. And?\nAnswer: So:").input_ids)
    assert prompt_tokens(*parts, chat) > prompt_tokens(*parts, plain)
