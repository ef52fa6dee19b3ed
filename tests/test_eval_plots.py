"""Pictures and the report of an evaluation, from invented answers."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise, product
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headprof.errors import HeadprofError, UsageError
from headprof.evaluation.perplexity import PerplexityCell
from headprof.evaluation.results import Answer, Evaluation, main_cells, tabulate
from headprof.plots.depths import _draw as draw_depths
from headprof.plots.depths import depth_table, depths_plot, few_budgets
from headprof.plots.labels import spread
from headprof.plots.method_styles import style_of
from headprof.plots.report import markdown_table, render_report
from headprof.plots.results_folder import write_results
from headprof.plots.scores import _draw as draw_scores
from headprof.plots.scores import budget_order, scores_plot

METHODS = ("full", "headkv-r2", "snapkv", "ems:mass=false")


def answers_of(tasks=("niah", "reasoning"), groups=("512", "1k"), methods=METHODS, budgets=("16", "64"), questions=6):
    return [
        Answer(
            task=task,
            question=str(number),
            group=group,
            method=method,
            budget=budget,
            score=float((number + len(method)) % 3 > 0),
            divergence=None if "full" not in methods else 0.0 if method == "full" else 0.1 * (number + 1),
            agreement=None if "full" not in methods else 1.0 - (method != "full") * 0.25,
            text="" if task in ("niah", "reasoning") else f"<b>{method}</b> & so on",
            prompt_tokens=500,
            cache_bytes=1000,
            depth=number / questions if task == "niah" else None,
        )
        for task in tasks
        for group in groups
        for number in range(questions)
        for method in methods
        for budget in (budgets if method != "full" else ("",))
    ]


def found_of(answers, losses=()):
    about = {"command": "headprof eval --x '<y>'", "model": "tiny & small", "versions": {"torch": "2"}, "seed": 1}
    return Evaluation(about, answers, [], tabulate(answers), list(losses))


class Balanced(HTMLParser):
    """Fails on tags that are not closed in order, and notes what the page would load."""

    VOID = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(page):
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def ids_of(path):
    return {element.get("id") for element in ElementTree.parse(path).iter() if element.get("id")}


def test_each_task_and_length_has_a_panel_and_each_method_a_line(tmp_path):
    cells = main_cells(tabulate(answers_of()))
    for measure in ("score", "divergence", "agreement"):
        ids = ids_of(scores_plot(cells, tmp_path / f"{measure}.svg", measure))
        assert {"panel-1", "panel-2"} <= ids and "panel-3" not in ids
        lines = {f"line-{number}-{method}" for number in (1, 2) for method in METHODS}
        assert {each for each in ids if each.startswith("line-")} == (
            lines if measure == "score" else {line for line in lines if not line.endswith("-full")}
        )


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_equal_results_give_equal_pictures(tmp_path, suffix):
    answers = answers_of()
    cells = tabulate(answers)
    for draw, what in ((scores_plot, cells), (depths_plot, answers)):
        one, two = (draw(what, tmp_path / f"{name}{suffix}").read_bytes() for name in "ab")
        assert one == two
    better = [replace(answer, score=1.0) for answer in answers]
    assert scores_plot(tabulate(better), tmp_path / f"c{suffix}").read_bytes() != (tmp_path / f"a{suffix}").read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"budgets": ("64",)},
        {"budgets": ("1.5%", "512MB")},
        {"questions": 1},
        {"methods": ("snapkv",)},
        {"tasks": ("longbench/trec",), "groups": ("",)},
        {"tasks": ("longbench/trec", "longbench/lsht", "niah", "babilong/qa1")},
    ],
)
def test_unusual_evaluations_can_be_drawn(options, tmp_path):
    answers = answers_of(**options)
    files = write_results(found_of(answers), tmp_path)
    assert sorted(file.name for file in files) == sorted(file.name for file in tmp_path.iterdir())
    assert ("divergence.png" in {file.name for file in files}) == ("full" in options.get("methods", METHODS))
    parsed((tmp_path / "report.html").read_text())


def test_the_full_cache_alone_has_no_curve(tmp_path):
    answers = answers_of(methods=("full",))
    with pytest.raises(UsageError, match="No compressed cache"):
        scores_plot(tabulate(answers), tmp_path / "a.png")
    assert {file.name for file in write_results(found_of(answers), tmp_path)} == {
        *("results.json", "answers.csv", "cells.csv", "depths.png", "report.html")
    }


def test_files_of_a_run_before_are_taken_away(tmp_path):
    write_results(found_of(answers_of()), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    losses = [PerplexityCell("ems", "64", 3, 90, 12.34, (10.0, 14.0), 1.2, (1.1, 1.3), 5e6)]
    files = write_results(found_of([], losses), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", *(file.name for file in files)}
    assert {file.name for file in files} == {"results.json", "report.html"}


def test_wrong_requests_are_refused(tmp_path):
    cells = tabulate(answers_of())
    with pytest.raises(UsageError, match=r"not as 'a.pdf'"):
        scores_plot(cells, tmp_path / "a.pdf")
    with pytest.raises(UsageError, match="no measure 'speed'"):
        scores_plot(cells, tmp_path / "a.png", "speed")
    with pytest.raises(UsageError, match="no answer to a needle probe"):
        depths_plot(answers_of(tasks=("reasoning",)), tmp_path / "a.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(HeadprofError, match="is a folder"):
        scores_plot(cells, tmp_path / "folder.png")


@given(
    st.lists(
        st.tuples(st.sampled_from(["512", "1k"]), st.floats(0, 1), st.booleans(), st.sampled_from(["8", "16"])),
        min_size=1,
        max_size=30,
    ),
    st.integers(1, 7),
)
def test_depths_are_counted_like_one_by_one(questions, bins):
    first = answers_of()[0]
    answers = [
        replace(first, group=group, depth=depth, score=float(right), budget=budget)
        for group, depth, right, budget in questions
    ]
    others = [replace(first, task="reasoning"), replace(first, depth=None)]
    tables = depth_table(answers + others, bins)
    assert sum(asked for table in tables.values() for _, asked in table.values()) == len(questions)
    for (_, budget), table in tables.items():
        for (group, row), (right, asked) in table.items():
            own = [
                answer.score
                for answer in answers
                if (answer.budget, answer.group) == (budget, group)
                and row / bins <= answer.depth
                and (answer.depth < (row + 1) / bins or row == bins - 1)
            ]
            assert (sum(own), len(own)) == pytest.approx((right, asked), abs=1e-9)


def test_each_method_and_budget_has_its_grid(tmp_path):
    ids = ids_of(depths_plot(answers_of(), tmp_path / "a.svg"))
    assert {each for each in ids if each.startswith("depths-")} == {
        "depths-full-",
        *(f"depths-{method}-{budget}" for method in METHODS[1:] for budget in ("16", "64")),
    }
    one = ids_of(depths_plot(answers_of(), tmp_path / "a.svg", budgets=["64"]))
    assert "depths-snapkv-64" in one and "depths-snapkv-16" not in one


def test_budgets_are_in_order_of_size():
    assert budget_order(["128", "", "16", "64", "16"]) == ["16", "64", "128"]
    assert budget_order(["5%", "1%"]) == ["5%", "1%"]
    assert few_budgets(["16", "32", "64", "128", "256"]) == ["16", "64", "256"] and few_budgets(["8"]) == ["8"]


def test_methods_keep_their_style():
    assert style_of("ems:mass=false") == style_of("ems:mass=false") != style_of("ems:mass=true")
    assert style_of("headkv-r2").strong and not style_of("snapkv").strong


@given(st.lists(st.floats(0, 1), min_size=1, max_size=15), st.floats(0.01, 0.2))
def test_labels_stand_apart_and_in_order(heights, apart):
    placed = spread(heights, apart, 0.0, 1.0)
    room = min(apart, 1 / max(1, len(heights) - 1))
    order = sorted(range(len(heights)), key=heights.__getitem__)
    tops = [placed[index] for index in order]
    assert all(upper - lower >= room - 1e-9 for lower, upper in pairwise(tops))
    assert all(-1e-9 <= top <= 1 + 1e-9 for top in tops)


def best_by_blocks(heights, apart, low, high):
    """The least sum of squares over all ways to cut the labels into blocks, each as near to its own as it can be."""
    order = sorted(heights)
    best = None
    for cuts in product([False, True], repeat=len(order) - 1):
        starts = [0, *(index for index, cut in enumerate(cuts, 1) if cut), len(order)]
        placed = []
        for start, end in pairwise(starts):
            mean = sum(order[i] - i * apart for i in range(start, end)) / (end - start)
            base = min(max(mean, low), high - (len(order) - 1) * apart)
            placed += [base + i * apart for i in range(start, end)]
        if all(upper - lower >= apart - 1e-9 for lower, upper in pairwise(placed)):
            cost = sum((mine - own) ** 2 for mine, own in zip(placed, order, strict=True))
            best = cost if best is None else min(best, cost)
    return best


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7), st.floats(0.01, 0.15))
def test_labels_stand_as_near_to_their_lines_as_can_be(heights, apart):
    cost = sum((mine - own) ** 2 for mine, own in zip(spread(heights, apart, 0.0, 1.0), heights, strict=True))
    assert cost == pytest.approx(best_by_blocks(heights, apart, 0.0, 1.0), abs=1e-9)


def test_settings_stand_below_a_name_and_do_not_widen_the_grids():
    plain, long = (
        draw_depths(depth_table(answers_of(methods=("full", name))), ["16"], 5)
        for name in ("snapkv", "snapkv:kernel=11:pooling=mean:power=2:ramp=true")
    )
    assert long.get_size_inches()[0] == plain.get_size_inches()[0]
    assert long.get_size_inches()[1] > plain.get_size_inches()[1]
    assert {"snapkv", "kernel=11", "pooling=mean", "power=2", "ramp=true"} <= {text.get_text() for text in long.texts}


@pytest.mark.parametrize("measure", ["score", "divergence", "agreement"])
def test_the_heading_of_a_single_panel_is_within_the_picture(measure):
    cells = [cell for cell in tabulate(answers_of()) if (cell.task, cell.group) == ("niah", "1k")]
    cells = [cell for cell in cells if cell.budget or measure == "score"]
    figure = draw_scores(cells, measure, "")
    assert all(text.get_window_extent().x1 <= figure.bbox.x1 for text in figure.texts)


def test_a_task_without_a_compressed_cache_has_no_panel(tmp_path):
    cells = [cell for cell in tabulate(answers_of()) if cell.group == "512" or cell.method == "full"]
    ids = ids_of(scores_plot(main_cells(cells), tmp_path / "a.svg"))
    assert "panel-1" in ids and "panel-2" not in ids


def test_only_answers_that_differ_are_shown_and_equal_ones_once():
    answers = answers_of(tasks=("longbench/trec",), groups=("",), questions=14)
    answers = [replace(each, text="same" if each.question == "0" else each.text) for each in answers]
    page = render_report(found_of(answers))
    shown = page[page.index("<details>") : page.index("</details>")]
    parsed(page)
    assert "<td>0</td>" not in shown and "<td>1</td>" in shown and "<td>10</td>" in shown and "<td>11</td>" not in shown
    assert shown.count("<td>1</td>") == len(METHODS) and "<b>snapkv</b> 16, 64" in shown
    assert "<details>" not in render_report(found_of([replace(each, text="same") for each in answers]))


def test_graded_scores_have_a_decimal():
    (cell,) = tabulate(answers_of(tasks=("niah",), groups=("",), methods=("snapkv",), budgets=("16",), questions=3))
    assert "| **67 % (" in markdown_table([replace(cell, score=2 / 3)])
    assert "| **66.6 % (" in markdown_table([replace(cell, score=0.6661)])
    assert "| **0.0 % (" in markdown_table([replace(cell, score=1e-5)])
    assert "| **67 %** |" in markdown_table([replace(cell, score=2 / 3, interval=None)])


def test_the_report_holds_everything_and_loads_nothing():
    losses = [PerplexityCell("ems", "64", 3, 90, 12.34, (10.0, 14.0), 1.2, (1.1, 1.3), 5e6)]
    page = render_report(found_of(answers_of(tasks=("niah", "longbench/trec")), losses))
    parser = parsed(page)
    assert parser.loads and all(load.startswith("data:image/svg+xml;base64,") for load in parser.loads)
    assert parser.tags.count("img") == 3 and "script" not in parser.tags
    assert "headprof eval --x &#x27;&lt;y&gt;&#x27;" in page and "tiny &amp; small" in page
    assert "&lt;b&gt;snapkv&lt;/b&gt; &amp; so on" in page and "<b>snapkv</b> &" not in page
    assert "12.34" in page and "1.100 to 1.300" in page and "ems:mass=false" in page
    assert page.count("<h3>") == 2 * 2 + 1  # two tasks at two lengths, and perplexity


def test_the_best_of_a_budget_is_bold():
    cells = [
        replace(cell, score=1.0 if cell.method == "full" else 0.1, questions=10) for cell in tabulate(answers_of())
    ]
    cells = [cell for cell in cells if (cell.task, cell.group) == ("niah", "1k")]
    best = [replace(cell, score=0.9) if (cell.method, cell.budget) == ("snapkv", "64") else cell for cell in cells]
    table = markdown_table(best)
    lines = table.splitlines()
    assert lines[0] == "| method | 16 | 64 |" and len(lines) == 2 + 3 and "full" not in table
    bold = {line.split("`")[1]: re.findall(r"\*\*(\d+ %)", line) for line in lines[2:]}
    assert bold == {"headkv-r2": ["10 %"], "snapkv": ["10 %", "90 %"], "ems:mass=false": ["10 %"]}  # at 16 all are best
    assert "nats" not in markdown_table(best, "divergence") and "75 %" in markdown_table(best, "divergence")
