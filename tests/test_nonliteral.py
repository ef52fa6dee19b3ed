"""Non-literal needles: no word in common with their questions, halves apart, chosen by name; others unchanged."""

import hashlib
import json
import random
import re
from itertools import chain, islice

import pytest
from support.commands import headprof
from support.tiny_models import load_tiny, save_tiny

from headprof.errors import ProbeError, UsageError
from headprof.evaluation.questions import ProbeQuestions
from headprof.evaluation.results import suite_of
from headprof.probes.build import ProbeBuilder, ProbeSettings
from headprof.probes.families import NONLITERAL, choose_families, load_families, load_nonliteral
from headprof.probes.haystack import Haystack
from headprof.probes.slots import SPLITS, SlotLists
from headprof.profile.head_profile import HeadProfile
from headprof.scoring.request import ScoreRequest

NAMES = [family.name for family in load_nonliteral()]


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.lower()))


FUNCTION_WORDS = words("a the in to or is was who what that while as at by on of")


def pairs(family) -> dict[str, str]:
    """All values that a family's needles may tell of, and what is known of each."""
    lists, source = family.lists, next(name for name in family.slots.values() if family.lists.has_known(name))
    return {value: lists.known(source, value) for split in SPLITS for value in lists.values(source, split)}


@pytest.mark.parametrize("family", load_nonliteral(), ids=NAMES)
def test_question_and_needle_have_no_word_in_common(family):
    for variant in family.variants:
        told = words(re.sub(r"\{[^}]+\}", " ", variant.needle))
        asked = words(re.sub(r"\{[^}]+\}", " ", f"{variant.question} {variant.answer_prefix}"))
        assert not told & asked - FUNCTION_WORDS
        for value, known in pairs(family).items():
            assert not (words(value) | told) & words(known) - FUNCTION_WORDS
            assert not words(value) & asked - FUNCTION_WORDS
            # Nor does one hold the other, such as Japan and Japanese.
            assert not any(a in b or b in a for a in words(value) for b in words(known) if min(len(a), len(b)) > 3)


@pytest.mark.parametrize("family", load_nonliteral(), ids=NAMES)
def test_what_is_known_leads_to_the_answer(family):
    known, rng = pairs(family), random.Random(1)
    assert len(set(known.values())) == len(known) >= 24  # of each, one value alone
    for turn in range(40):
        needle = family.sample(rng, "eval", turn=turn)
        assert needle.kind == "retrieval" and needle.text[needle.answer_start : needle.answer_stop] == needle.answer
        asked = [value for value, fact in known.items() if re.search(rf"\b{re.escape(fact)}\b", needle.question)]
        assert len(asked) == 1 and asked[0] in needle.text and known[asked[0]] in needle.answer_prefix


def test_halves_share_nothing_with_those_of_any_family():
    used = {split: set() for split in SPLITS}
    for split in SPLITS:
        rng = random.Random(3)
        for family in (*load_families(), *load_nonliteral()):
            for _ in range(150):
                used[split].update(family.sample(rng, split).values)
    assert not used["profile"] & used["eval"]


def test_filler_tells_of_nothing_that_is_asked_about():
    sentences = [each.lower() for each in islice(Haystack.composed().sentences(random.Random(7)), 20_000)]
    words = set(re.findall(r"\w+", " ".join(sentences)))
    for family in load_nonliteral():
        for name in chain.from_iterable(pairs(family).items()):
            first, *others = re.findall(r"\w+", name.lower())
            found = {first, f"{first}s"} & words if not others else [each for each in sentences if name.lower() in each]
            assert not found, (family.name, name)


def test_the_usual_needles_are_what_they_were():
    sha = hashlib.sha256()
    for split in SPLITS:
        rng = random.Random(0)
        for family in load_families():
            for turn in range(20):
                sha.update(repr(family.sample(rng, split, turn=turn)).encode())
    assert sha.hexdigest() == "b9702ca20847be46f47662fc35a5047551870489b22ad4d9090cc1ec908d66c6"
    assert [family.name for family in choose_families(None)] == [family.name for family in load_families()]


def test_families_are_chosen_by_name_or_all_together():
    assert [family.name for family in choose_families([NONLITERAL])] == NAMES
    assert [family.name for family in choose_families(["swap", "state", NONLITERAL])][:3] == [
        "swap",
        "state",
        "country",
    ]
    assert len(choose_families([NONLITERAL, *NAMES])) == len(NAMES)
    with pytest.raises(UsageError, match=r"no needle family 'city'; use some of .*nonliteral"):
        choose_families(["city"])
    assert not {family.name for family in load_families()} & {NONLITERAL, *NAMES}


def test_pairs_are_drawn_where_neither_part_is_taken():
    lists = SlotLists({"place": [["Rome", "Italy"], ["Paris", "France"], ["Milan", "Italy"], ["Lyon", "France"]]})
    assert lists.values("place", "profile") == ["Rome", "Milan"] and lists.values("place", "eval") == ["Paris", "Lyon"]
    assert lists.known("place", "Rome") == "Italy" and lists.has_known("place")
    assert lists.draw("place", random.Random(0), "profile", {"Rome"}) == ["Milan", "Italy"]
    for taken in ({"Italy"}, {"Rome", "Milan"}):
        with pytest.raises(ProbeError, match="too few values"):
            lists.draw("place", random.Random(0), "profile", taken)
    assert SlotLists({"city": ["Rome", "Paris"]}).known("city", "Rome") is None


@pytest.mark.parametrize("length", [1024, 4096])
def test_packed_needles_are_told_apart(length):
    loaded = load_tiny()
    settings = ProbeSettings(96, (length,), families=(NONLITERAL,), needles_per_context=None, split="eval")
    facts = {known for family in load_nonliteral() for known in pairs(family).values()}
    for context in ProbeBuilder(loaded.tokenizer, settings, max_positions=8192):
        text = loaded.tokenizer.decode(context.context_ids)
        asked = [next(fact for fact in facts if re.search(rf"\b{fact}\b", probe.question)) for probe in context.probes]
        assert len(set(asked)) == len(asked)
        for probe, fact in zip(context.probes, asked, strict=True):
            assert not re.search(rf"\b{re.escape(fact)}\b", text)
            assert context.context_ids[slice(*probe.answer_span)] == probe.answer_ids


def test_a_request_names_single_families():
    request = ScoreRequest("quick", probes=12, families=(NONLITERAL, "swap"))
    request.check()
    assert request.settings().families == (*NAMES, "swap")
    assert ScoreRequest("quick").settings().families is None
    with pytest.raises(UsageError, match="no needle family 'chess'"):
        ScoreRequest("quick", families=("chess",)).check()


def test_an_evaluation_asks_those_that_are_named():
    loaded = load_tiny()

    def asked(task, families):
        questions = ProbeQuestions(loaded, task, 16, (500,), families, 0)
        return {questions[index].family for index in range(len(questions))}

    assert asked("nonliteral", None) == asked("nonliteral", (NONLITERAL,)) == asked("niah", (NONLITERAL,))
    assert asked("nonliteral", None) == set(NAMES)
    assert asked("nonliteral", ("swap", "state")) == {"state"}
    assert not asked("niah", None) & set(NAMES)
    with pytest.raises(UsageError, match="None of these families is of nonliteral: use some of country, "):
        asked("nonliteral", ("swap",))
    assert [suite_of(task) for task in ("niah", "reasoning", "nonliteral")] == ["probes", "probes", "nonliteral"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    save_tiny(place / "tiny", "llama", chat=True)
    return place


SCORE = ("score", "--model", "tiny", "--lengths", "500", "--include-failed", "--families", "nonliteral")


def test_a_profile_of_nonliteral_needles_is_made_and_resumed(place):
    for more in (("--probes", "8"), ("--probes", "12", "--resume")):
        made = headprof(place, *SCORE, *more, "-o", "n.safetensors")
        assert made.returncode == 0, made.stderr
    profile = HeadProfile.load(place / "n.safetensors")
    assert set(profile.scores) == {"retrieval", "write"} and profile.probes_used["retrieval"] == 12
    assert set(profile.accuracy) == set(NAMES) and profile.settings["families"] == NAMES


def test_a_file_of_needles_is_of_no_family(place):
    needle = {"needle": "Ann swims.", "real_needle": "Ann swims.", "answer": "Ann", "question": "Who?"}
    (place / "n.jsonl").write_text(json.dumps(needle))
    made = headprof(place, *SCORE, "--needles", "n.jsonl")
    assert made.returncode == 2 and "leave --families or --needles away" in made.stderr


def test_the_command_evaluates_them(place):
    made = headprof(
        place,
        *("eval", "--model", "tiny", "--tasks", "nonliteral,reasoning", "--methods", "snapkv", "--budgets", "32"),
        *("--lengths", "500", "--probes", "4", "-o", "results"),
    )
    assert made.returncode == 0, made.stderr
    lines = [json.loads(line) for line in (place / "results" / "answers.jsonl").read_text().splitlines()[1:]]
    assert {line["task"] for line in lines} == {"nonliteral", "reasoning"}
    asked = {each["family"] for line in lines if line["task"] == "nonliteral" for each in line["answers"]}
    assert asked <= set(NAMES)
