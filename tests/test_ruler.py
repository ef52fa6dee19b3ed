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
from headprof.evaluation.tasks import BENCHMARKS, TASKS, TaskRequest, ruler
from headprof.evaluation.tasks.ruler import fill, prompt_tokens
from headprof.evaluation.tasks.ruler_puzzles import (
    CommonWords,
    FrequentWords,
    Needles,
    VariableTracking,
    zeta_counts,
)
from headprof.models.prompt_encoder import PromptEncoder
from headprof.utils.units import format_length

NAMES = [name.partition("/")[2] for name in BENCHMARKS["ruler"]]
TOKENIZERS = {"plain": tiny_tokenizer(), "chat": tiny_tokenizer(chat=True)}
SHORTEST = 1024  # the tiny tokenizer takes about two tokens a word more than a real one


def examples(name, *, limit=4, lengths=(SHORTEST,), tokenizer="chat", seed=0):
    request = TaskRequest(None, limit, lengths, TOKENIZERS[tokenizer], seed)
    return list(TASKS[f"ruler/{name}"].examples(request))


def facts(document):
    """What the needles of a document say: `{thing: numbers}`."""
    found = {}
    for thing, number in re.findall(r"A number of the (\w+ \w+) is (\d{7})\.", document):
        found.setdefault(thing, []).append(number)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_answers_take_the_length_or_up_to_2_percent_less(name):
    for tokenizer in TOKENIZERS:
        for length in (1024, 1500, 4096):
            for example in examples(name, limit=3, lengths=(length,), tokenizer=tokenizer):
                encoder = PromptEncoder(TOKENIZERS[tokenizer])
                after, reply = encoder.cued(example.after, example.reply)
                prompt = encoder.prompt_ids(example.before + example.document + after)
                taken = len(prompt) + len(TOKENIZERS[tokenizer](reply).input_ids) + example.max_new_tokens
                assert 0.98 * length <= taken <= length
                assert example.group == format_length(length)


@pytest.mark.parametrize("name", NAMES)
def test_examples_depend_on_the_seed_and_their_number_alone(name):
    few, many = examples(name, limit=2), examples(name, limit=4)
    assert many[:2] == few
    assert many[:2] == examples(name, limit=2, lengths=(2048, SHORTEST))[2:]
    documents = {example.document for example in many + examples(name, seed=1)}
    answers = {example.answers for example in many + examples(name, seed=1)}
    assert len(documents) == len(answers) == 8


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_asked_for_without_being_told(name):
    for example in examples(name):
        assert len(set(example.answers)) == len(example.answers)
        told = example.before + example.after + example.reply
        for answer in example.answers:
            assert re.search(rf"\b{answer}\b", example.document)
            assert answer not in told


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("niah")])
def test_needles_hold_the_answers_and_no_other_holds_one(name):
    generator = ruler.GENERATORS[name]
    for example in examples(name, limit=10):
        held = facts(example.document)
        asked = [thing for thing in held if f"the {thing}" in example.after]
        assert len(held) == generator.keys
        assert len(asked) == generator.queries
        assert all(len(numbers) == generator.values for numbers in held.values())
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


@pytest.mark.parametrize("chains", [1, 2])
def test_variables_are_those_that_following_the_assignments_finds(chains, monkeypatch):
    monkeypatch.setitem(ruler.GENERATORS, "variable_tracking", VariableTracking(chains=chains))
    for example in examples("variable_tracking", limit=10):
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
