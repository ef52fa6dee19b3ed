"""Metrics of the benchmarks: cases worked out by hand, properties, and the packages that the benchmarks call."""

import sys
from functools import partial
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headprof.errors import UsageError
from headprof.evaluation import chinese_words
from headprof.evaluation.metrics import METRICS, first_line, possible_labels
from headprof.evaluation.rouge import longest_common_subsequence
from headprof.evaluation.tasks import babilong, longbench, loogle

CHINESE = ("longbench.qa_f1_zh", "longbench.rouge_l_zh")
KINDS = ("Animal", "Date", "entity", "Other entity")
PEOPLE = babilong.LABELS["qa5"]

CASES = {
    "longbench.qa_f1": [
        ("the red door", ["red door"], 1),  # the article does not count
        ("a red door", ["the blue door"], 1 / 2),  # 1 of 2, both ways
        ("red red door", ["red door"], 4 / 5),  # 2 of 3 and 2 of 2: 2 (2/3) / (5/3)
        ("Paris, France", ["London", "Paris"], 2 / 3),  # the second: 1 of 2 and 1 of 1
        ("42km", ["42"], 0),  # a glued number is another word
        ("in 1,024 days", ["1024 days"], 4 / 5),  # the comma goes: 2 of 3 and 2 of 2
        ("NAÏVE Café", ["naïve café au lait"], 2 / 3),  # 2 of 2 and 2 of 4
        ("It's Ann's", ["its anns"], 1),  # apostrophes go
        ("door", ["window"], 0),
        ("the", ["The"], 0),  # no word is left
        ("red", [""], 0),
        ("", ["red"], 0),
        ("door", [], 0),
    ],
    "longbench.qa_f1_zh": [
        ("我来到北京！", ["我来到北京"], 1),  # 我 来到 北京; punctuation goes
        ("北京", ["我来到北京"], 1 / 2),  # 1 of 1 and 1 of 3
        ("《红楼梦》", ["红楼梦"], 2 / 3),  # 《 红楼梦 》, of which only 》 goes: 1 of 2 and 1 of 1
        ("我来到 北京", ["我来到北京"], 1),  # spaces are no words
        ("GPT", ["gpt"], 1),
        ("，。！", ["北京"], 0),  # no word
        ("", ["北京"], 0),
    ],
    "longbench.rouge_l": [
        ("the cat sat", ["the cat sat"], 1),
        ("the cat ran", ["the cat sat"], 2 / 3),  # 2 of 3, both ways; articles count
        ("the dog the cat", ["the cat"], 4 / 5),  # 2 of 3 different words and 2 of 2
        ("a a a a", ["a"], 1),  # a word counts once
        ("Cat sat", ["cat sat"], 1 / 2),  # case counts
        ("cat, sat", ["cat sat"], 1 / 2),  # as does a comma
        ("b a", ["a b"], 1 / 2),  # in order, 1 of 2
        ("x y. a b", ["a b. x y"], 1),  # order of sentences does not count
        ("a b. c d", ["a c b d"], 1),  # a, b with one sentence, c, d with the other
        ("a b. b c", ["b d"], 2 / 5),  # b of a, b, c, however often: 1 of 3 and 1 of 2: 2 (1/6) / (5/6)
        ("a b.\n", ["a b."], 4 / 5),  # the newline is a sentence of an empty word: 2 of 3 and 2 of 2
        ("a  b\nc", ["a b c"], 1),  # any space is one
        ("Größe zählt", ["größe zählt"], 1 / 2),
        ("a", ["b c", "a b"], 2 / 3),  # the second: 1 of 1 and 1 of 2
        ("...", ["a"], 0),  # no sentence
        ("a", ["..."], 0),
        ("", ["a"], 0),
    ],
    "longbench.rouge_l_zh": [
        ("我来到北京清华大学", ["我来到北京清华大学"], 1),
        ("我来到北京", ["我来到北京清华大学"], 6 / 7),  # 我 来到 北京 (清华大学): 3 of 3 and 3 of 4: 2 (3/4) / (7/4)
        ("我来到北京。", ["我来到北京"], 6 / 7),  # 。 is a word: 3 of 4 and 3 of 3
        ("北京", ["段落", "北京"], 1),
        ("", ["北京"], 0),
    ],
    "longbench.classification": [
        ("Date", ["Date"], 1),
        ("Type: Date.", ["Date"], 1),
        ("date", ["Date"], 0),  # case counts
        ("Date or Animal", ["Date"], 1 / 2),  # 1 of 2 labels
        ("Animals, Dates and an entity", ["Date"], 1 / 3),  # glued letters do not matter: 1 of 3
        ("Other entity", ["Other entity"], 1),  # "entity" is part of the right one
        ("Other entity", ["entity"], 1 / 2),  # but not the other way round
        ("entity", ["Other entity"], 0),
        ("Plant", ["Date"], 0),
        ("Date", ["Animal", "Date"], 1),
        ("", ["Date"], 0),
    ],
    "longbench.retrieval": [
        ("Paragraph 12", ["Paragraph 12"], 1),
        ("12", ["Paragraph 12"], 1),
        ("It is paragraph12.", ["Paragraph 12"], 1),  # glued, but the number is the same
        ("Paragraph 12 and Paragraph 3", ["Paragraph 12"], 1 / 2),  # 1 of 2
        ("12, 12 or 1", ["Paragraph 12"], 2 / 3),  # 2 of 3
        ("Paragraph 112", ["Paragraph 12"], 0),
        ("012", ["Paragraph 12"], 0),  # digit for digit
        ("Paragraph twelve", ["Paragraph 12"], 0),
        ("2", ["Paragraph 1", "Paragraph 2"], 1),
        ("12", ["12"], 0),  # the right answer names no paragraph
        ("", ["Paragraph 12"], 0),
    ],
    "longbench.retrieval_zh": [
        ("段落7", ["段落7"], 1),
        ("答案是段落7，不是段落8。", ["段落7"], 1 / 2),  # 1 of 2
        ("Paragraph 7", ["段落7"], 1),  # only the number counts
        ("段落７", ["段落7"], 0),  # a full-width digit is another
        ("7", ["Paragraph 7"], 0),  # the right answer names no 段落
        ("", ["段落7"], 0),
    ],
    "longbench.count": [
        ("17", ["17"], 1),
        ("There are 17 of 20.", ["17"], 1 / 2),  # 1 of 2
        ("1.7", ["17"], 0),  # two numbers, 1 and 7
        ("17paragraphs", ["17"], 1),
        ("017", ["17"], 0),
        ("seventeen", ["17"], 0),
        ("", ["17"], 0),
    ],
    "longbench.code_sim": [
        ("    return x", ["    return x"], 1),
        ("\n\nx = 1\ny = 2", ["x = 1"], 1),  # the first line
        ("```python\nreturn x\n```", ["return x"], 1),  # the first without a backtick
        ("# why\n// how\nx = 1", ["x = 1"], 1),  # the first without a comment
        ("x = 1  # one", ["x = 1"], 0),  # no such line
        ("abcd", ["abef"], 0.50),  # "ab": 2 * 2 of 8 letters
        ("abc", ["abd"], 0.67),  # "ab": 2 * 2 of 6 letters, in whole percent
        ("abcdefgh", ["ijklmnoa"], 0.12),  # "a": 2 of 16 letters; 12.5 is rounded to the even number
        (
            "ababab",
            ["aaaaab"],
            0.33,
        ),  # first "ab", after which nothing is left: 2 * 2 of 12; an edit distance gives 0.67
        ("变量 = 1", ["变量 = 2"], 0.83),  # 5 of 6 letters
        ("xyz", ["abc", "xyz"], 1),
        ("", ["x = 1"], 0),
        ("x = 1", [""], 0),
    ],
    "babilong.label": [
        ("The kitchen.", ["kitchen"], 1),
        ("KITCHEN", ["kitchen"], 1),
        ("kitchenette", ["kitchen"], 1),  # glued letters do not matter
        ("garden", ["kitchen"], 0),
        ("kitchen, not garden", ["kitchen"], 0),  # two labels
        ("kitchen, not the attic", ["kitchen"], 1),  # an attic is no label
        ("In the kitchen. Not in the garden.", ["kitchen"], 1),  # the first sentence counts
        ("kitchen <Example> garden", ["kitchen"], 1),  # as does what comes before more examples
        ("kitchen<context>garden", ["kitchen"], 1),
        ("kitchen\nQuestion: garden", ["kitchen"], 0),  # a newline ends nothing
        (". kitchen", ["kitchen"], 0),  # the first sentence is empty
        ("hallway", ["kitchen", "Hallway"], 1),
        ("", ["kitchen"], 0),
    ],
    "loogle.rouge_l": [
        ("b a", ["a b"], 1 / 2),  # in order, 1 of 2
        ("x a y b z", ["a b"], 1),  # length does not matter
        ("the cat", ["no", "the cat sat"], 2 / 3),
        ("", ["the"], 0),
    ],
    "loogle.cloze": [
        ("{'<mask-0>': 'Ann', '<mask-1>': 'Bo'}", ["Ann", "Bo"], 1),
        ('\n{"<mask-0>": "Ann", "<mask-1>": "Ann"} ', ["Ann", "Bo"], 1 / 2),  # 1 of 2; JSON will do
        ('{"<mask-1>": "Bo"}', ["Ann", "Bo"], 1 / 2),
        ('{"<mask-1>": "Bo"}', ["", "Bo"], 1),  # there is no mask 0
        ('{"<mask-0>": "Ann", "<mask-9>": "Bo"}', ["Ann"], 1),  # nor a mask 9
        ('{"<mask-0>": "ann"}', ["Ann"], 0),  # exactly
        ('{"<mask-0>": "Ann Lee"}', ["Ann"], 0),
        ('{"<mask-0>": 7}', ["7"], 0),  # not a text
        ('The names are {"<mask-0>": "Ann"}', ["Ann"], 0),  # not a dictionary alone
        ('["Ann"]', ["Ann"], 0),
        ("{['a']: 'b'}", ["Ann"], 0),  # not a dictionary that there can be
        ("{'<mask-0>': str('Ann')}", ["Ann"], 0),  # nothing is run
        ("Ann", ["Ann"], 0),
        ("", ["Ann"], 0),
        ("{}", [], 0),
    ],
    "ruler.all": [
        ("12 and 34", ["12", "34", "56"], 2 / 3),  # 2 of 3
        ("APPLE, pear", ["apple", "Pear"], 1),  # in either case
        ("x512y", ["12"], 1),  # glued digits do not matter
        ("12", ["12", ""], 1 / 2),  # nothing is not found anywhere
        ("", ["12"], 0),
        ("12", [], 0),
        ("1\n2\t3", ["123"], 1),  # kvpress takes control characters out
    ],
    "ruler.any": [
        ("12 and 34", ["56", "34"], 1),
        ("APPLE", ["apple", "pear"], 1),
        ("twelve", ["12", ""], 0),
        ("a b\nc", ["bc"], 1),
        ("", ["12"], 0),
        ("12", [], 0),
    ],
}
CLASSES = {"longbench.classification": KINDS, "babilong.label": babilong.PLACES}


def find_metric(name):
    if name in CHINESE:
        pytest.importorskip("jieba")
    return METRICS[name]


@pytest.mark.parametrize(
    ("name", "prediction", "references", "expected"),
    [(name, *case) for name, cases in CASES.items() for case in cases],
)
def test_cases_worked_out_by_hand(name, prediction, references, expected):
    assert find_metric(name)(prediction, references, CLASSES.get(name, ())) == pytest.approx(expected, abs=1e-12)


def test_each_metric_has_cases_and_a_task():
    assert set(CASES) == set(METRICS)
    tables = {"longbench": longbench.METRICS_AND_LENGTHS, "loogle": loogle.METRICS_AND_LENGTHS}
    named = {f"{benchmark}.{name}" for benchmark, table in tables.items() for name, _ in table.values()}
    assert set(METRICS) == {*named, "babilong.label", "ruler.all", "ruler.any"}


def test_labels_that_stand_in_the_question_do_not_count():
    label_match = METRICS["babilong.label"]
    possible = possible_labels(PEOPLE, "What did mary give to Fred?")
    assert possible == ("Bill", "Jeff", "apple", "football", "milk")
    assert label_match("Mary gave Fred the milk.", ["milk"], possible) == 1
    assert label_match("Mary gave Fred the milk.", ["milk"], PEOPLE) == 0
    assert label_match("Mary did.", ["Mary"], possible) == 0  # as for the benchmark, no such label can be right


@pytest.mark.parametrize(
    ("prediction", "line"),
    [("\n\nDate\nType: Food", "Date"), ("Date", "Date"), ("a\r\nb", "a\r"), ("\n", ""), ("", "")],
)
def test_first_line(prediction, line):
    assert first_line(prediction) == line


def test_a_long_sentence_does_not_overflow():
    words = " ".join(f"w{number}" for number in range(1500))
    assert METRICS["longbench.rouge_l"](words, [words]) == 1


def test_missing_jieba_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    monkeypatch.setattr(chinese_words, "_tokenizer", chinese_words._tokenizer.__wrapped__)
    for name in CHINESE:
        with pytest.raises(UsageError, match=r"pip install headprof\[eval\]"):
            METRICS[name]("北京", ["北京"])


def test_tasks_of_longbench_have_the_metrics_of_its_evaluation():
    expected = {
        "qa_f1": ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"),
        "qa_f1_zh": ("multifieldqa_zh",),
        "rouge_l": ("gov_report", "qmsum", "multi_news", "samsum"),
        "rouge_l_zh": ("dureader", "vcsum"),
        "classification": ("trec", "lsht"),
        "retrieval": ("passage_retrieval_en",),
        "retrieval_zh": ("passage_retrieval_zh",),
        "count": ("passage_count",),
        "code_sim": ("lcc", "repobench-p"),
    }
    table = {task: name for task, (name, _) in longbench.METRICS_AND_LENGTHS.items()}
    assert table == {task: name for name, tasks in expected.items() for task in tasks}
    assert len(table) == 21
    assert set(longbench.FEW_SHOT) == {"trec", "triviaqa", "samsum", "lsht"}


def test_labels_of_babilong():
    places = {"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"}
    assert list(babilong.LABELS) == [f"qa{number}" for number in range(1, 21)]
    assert {name for name, labels in babilong.LABELS.items() if set(labels) == places} == {
        *("qa1", "qa2", "qa3", "qa4", "qa11", "qa12", "qa13")
    }
    assert {name for name, labels in babilong.LABELS.items() if set(labels) == {"yes", "no"}} == {
        *("qa6", "qa9", "qa17", "qa18")
    }
    assert set(babilong.LABELS["qa5"]) == {"Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"}
    steps = [(first, second) for first in "nesw" for second in "nesw"]  # and never straight back
    there_and_back = {("n", "s"), ("s", "n"), ("e", "w"), ("w", "e")}
    assert set(babilong.LABELS["qa19"]) == {",".join(way) for way in steps if way not in there_and_back}


@pytest.mark.parametrize(
    ("task", "prediction", "right", "score"),
    [
        ("qa8", "football,milk", "football,milk", 1),
        ("qa8", "Daniel is carrying the milk and the football.", "football,milk", 1),
        ("qa8", "football", "football,milk", 0),
        ("qa8", "football, milk, apple", "football,milk", 0),
        ("qa8", "milk, football", "milk", 0),
        ("qa8", "Nothing", "nothing", 1),
        ("qa19", "n,w", "n,w", 1),
        ("qa19", "w,n", "n,w", 0),
        ("qa19", "n, w", "n,w", 0),
        ("qa7", "none", "none", 0),  # which holds "one"
        ("qa7", "two", "two", 1),
        ("qa10", "Maybe.", "maybe", 1),
    ],
)
def test_label_match_of_the_other_tasks(task, prediction, right, score):
    assert METRICS["babilong.label"](prediction, (right,), babilong.LABELS[task]) == score


PIECES = (
    "red",
    "Door",
    "the",
    "Date",
    "kitchen",
    "7",
    "12",
    "Paragraph 7",
    "段落7",
    "北京",
    "ß",
    ".",
    " ",
    "\n",
    "`",
    "#",
    "{",
)
TEXTS = st.text(max_size=30) | st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
WORDS = st.lists(st.sampled_from(("red", "Door", "über", "x1", "北京", "no_1")), min_size=4, max_size=9).map(" ".join)
RIGHT = {
    "longbench.classification": st.sampled_from(KINDS),
    "longbench.retrieval": st.integers(0, 99).map("Paragraph {}".format),
    "longbench.retrieval_zh": st.integers(0, 99).map("段落{}".format),
    "longbench.count": st.integers(0, 99).map(str),
    "babilong.label": st.sampled_from(babilong.PLACES),
}
ALL_ANSWERS = ("loogle.cloze", "ruler.all")
some = settings(max_examples=25, deadline=None)


def references_of(name):
    return st.lists(TEXTS | RIGHT.get(name, WORDS), max_size=4)


@pytest.mark.parametrize("name", METRICS)
@some
@given(data=st.data())
def test_scores_lie_between_0_and_1(name, data):
    metric, labels = find_metric(name), st.lists(TEXTS.filter(bool), max_size=4)
    prediction, references = data.draw(TEXTS), data.draw(references_of(name))
    assert 0 <= metric(prediction, references, data.draw(labels)) <= 1
    assert 0 <= metric(data.draw(WORDS), references, CLASSES.get(name, ())) <= 1
    for blank in ("", " ", "\n"):
        assert metric(blank, [*references, blank], [*KINDS, blank]) == 0


@pytest.mark.parametrize("name", sorted(set(METRICS) - {"loogle.cloze"}))
@some
@given(data=st.data())
def test_the_right_answer_scores_1(name, data):
    right = data.draw(RIGHT.get(name, WORDS))
    others = data.draw(references_of(name)) if name != "ruler.all" else []
    assert find_metric(name)(right, [*others, right], CLASSES.get(name, ())) == 1


@some
@given(st.lists(st.text(min_size=1, max_size=9).filter(str.strip), min_size=1, max_size=4))
def test_the_right_names_score_1(names):
    written = repr({f"<mask-{number}>": name for number, name in enumerate(names)})
    assert METRICS["loogle.cloze"](written, names) == 1


@pytest.mark.parametrize("name", sorted(set(METRICS) - {"loogle.cloze"}))
@some
@given(data=st.data())
def test_the_order_of_references_does_not_matter(name, data):
    prediction, references = data.draw(TEXTS | RIGHT.get(name, WORDS)), data.draw(references_of(name))
    metric = partial(find_metric(name), classes=CLASSES.get(name, ()))
    assert metric(prediction, references) == metric(prediction, data.draw(st.permutations(references)))


@pytest.mark.parametrize("name", sorted(set(METRICS) - set(ALL_ANSWERS)))
@some
@given(data=st.data())
def test_the_best_reference_counts(name, data):
    prediction, references = data.draw(TEXTS | RIGHT.get(name, WORDS)), data.draw(references_of(name))
    metric = partial(find_metric(name), classes=CLASSES.get(name, ()))
    assert metric(prediction, references) == max((metric(prediction, [each]) for each in references), default=0)


@some
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=4))
def test_all_of_rulers_references_count_the_same(prediction, references):
    each = [METRICS["ruler.all"](prediction, [reference]) for reference in references]
    assert METRICS["ruler.all"](prediction, references) == pytest.approx(sum(each) / len(each))


@some
@given(st.lists(st.tuples(TEXTS, st.lists(WORDS, min_size=1, max_size=3)), min_size=1, max_size=5))
def test_ruler_and_kvpress_count_likewise(asked):
    """By their own formula, over all predictions at once: control characters are left out, cases are alike."""
    said = ["".join(c for c in text.strip() if ord(c) > 31).strip().lower() for text, _ in asked]
    pairs = list(zip(said, (references for _, references in asked), strict=True))
    every = sum(sum(each.lower() in text for each in references) / len(references) for text, references in pairs)
    some_of = sum(max(each.lower() in text for each in references) for text, references in pairs)
    for name, total in (("ruler.all", every), ("ruler.any", some_of)):
        ours = sum(METRICS[name](text, references) for text, references in asked)
        assert ours == pytest.approx(total)


def is_subsequence(part, whole):
    rest = iter(whole)
    return all(word in rest for word in part)


@settings(deadline=None)
@given(st.text("abc", max_size=8), st.text("abc", max_size=8))
def test_longest_common_subsequence_is_one_and_none_is_longer(first, second):
    common = longest_common_subsequence(first, second)
    assert is_subsequence(common, first) and is_subsequence(common, second)
    longer = combinations(first, len(common) + 1)
    assert not any(is_subsequence(part, second) for part in longer)


SENTENCES = st.lists(
    st.sampled_from(("a", "b", "c", "A", "ü", "北", ".", ".", ". ", "\n", "  ", "1.5")), min_size=1, max_size=25
).map(" ".join) | st.text("ab. \n", min_size=1, max_size=25)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200, deadline=None)
@given(SENTENCES, SENTENCES)
def test_rouge_is_that_of_the_package(prediction, reference):
    rouge = pytest.importorskip("rouge").Rouge()
    if not prediction.strip() or not reference.strip():
        return  # an empty answer, which scores 0 here
    try:
        theirs = rouge.get_scores([prediction], [reference])[0]["rouge-l"]
    except ValueError:  # full stops alone
        theirs = {"f": 0.0, "r": 0.0}
    assert METRICS["longbench.rouge_l"](prediction, [reference]) == pytest.approx(theirs["f"], abs=1e-7)
    assert METRICS["loogle.rouge_l"](prediction, [reference]) == pytest.approx(theirs["r"], abs=1e-12)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200, deadline=None)
@given(st.text("ab= ", max_size=25), st.text("ab= ", max_size=25))
def test_likeness_of_code_is_that_of_the_package(prediction, reference):
    fuzz = pytest.importorskip("fuzzywuzzy.fuzz")
    if fuzz.SequenceMatcher.__module__ != "difflib":
        pytest.skip("fuzzywuzzy uses python-Levenshtein here, which computes another number")
    if prediction.strip() and reference.strip():
        assert METRICS["longbench.code_sim"](prediction, [reference]) == fuzz.ratio(prediction, reference) / 100
