"""The report of an evaluation: one HTML page with its pictures, its tables, and how it was made."""

from __future__ import annotations

import tempfile
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from headprof.evaluation.results import counted, main_cells
from headprof.plots.depths import depths_plot
from headprof.plots.page import escape, with_policy
from headprof.plots.scores import budget_order, scores_plot
from headprof.utils.files import write_text
from headprof.utils.units import human_bytes

if TYPE_CHECKING:
    from headprof.evaluation.perplexity import PerplexityCell
    from headprof.evaluation.results import Answer, Cell, Evaluation

MOST_TEXTS = 10
"""Questions of a task whose generated answers are shown, of those where they differ."""


def write_report(found: Evaluation, path: str | Path) -> Path:
    """Write the page atomically; returns `path`.

    Raises:
        HeadprofError: the disk refused.
    """
    write_text(path, render_report(found))
    return Path(path)


def render_report(found: Evaluation) -> str:
    """The whole page; all that users have named is escaped."""
    template = Template(files("headprof.plots").joinpath("report.html").read_text(encoding="utf-8"))
    return with_policy(
        template.substitute(
            title=escape(f"headprof eval: {found.about.get('model', '')}"),
            command=escape(str(found.about.get("command", ""))),
            pictures="".join(_pictures(found)),
            tables="".join([*map(_task_tables, _by_task(found.cells)), _perplexity_table(found.perplexities)]),
            texts="".join(_texts(found.answers)),
            about=_facts({name: value for name, value in found.about.items() if name != "command"}),
        )
    )


def markdown_table(cells: Sequence[Cell], measure: str = "score") -> str:
    """One task's scores, or its divergences, as a GitHub table: methods down, budgets across, the best bold."""
    text, best = _TEXTS[measure]
    budgets = budget_order(cell.budget for cell in cells)
    lines = [f"| method | {' | '.join(budgets)} |", "| --- " * (len(budgets) + 1) + "|"]
    for method, row in _rows(cells).items():
        if set(row) != {""}:
            entries = [_marked(cells, row.get(budget), text, best, "**{}**") for budget in budgets]
            lines.append(f"| `{method}` | {' | '.join(entries)} |")
    return "\n".join(lines)


def _score_text(cell: Cell) -> str:
    """With a decimal where answers are graded, and the score no whole number of right answers."""
    right = cell.score * cell.questions
    decimals = int(abs(right - round(right)) > 1e-6)
    score, *ends = (f"{100 * share:.{decimals}f}" for share in (cell.score, *(cell.interval or ())))
    return f"{score} %" + (f" ({' to '.join(ends)})" if ends else "")


def _fidelity_text(cell: Cell) -> str:
    return "" if cell.divergence is None else f"{cell.divergence:#.2g}, {100 * (cell.agreement or 0):.0f} %"


Text = Callable[["Cell"], str]
Best = Callable[["Cell"], float]
_TEXTS: dict[str, tuple[Text, Best]] = {
    "score": (_score_text, lambda cell: cell.score),
    "divergence": (_fidelity_text, lambda cell: -(cell.divergence or 0.0)),
}
"""What is written of a cell, and of what the highest is best."""


def _rows(cells: Iterable[Cell]) -> dict[str, dict[str, Cell]]:
    rows: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.method, {})[cell.budget] = cell
    return rows


def _marked(cells: Sequence[Cell], cell: Cell | None, text: Text, best: Best, mark: str) -> str:
    """A cell's text, marked if no compressed cache of the same budget is better, to what is shown of it."""
    if cell is None or not text(cell):
        return ""
    rivals = [best(other) for other in cells if other.budget == cell.budget and text(other)]
    return mark.format(text(cell)) if cell.budget and best(cell) == max(rivals) else text(cell)


def _by_task(cells: Sequence[Cell]) -> list[list[Cell]]:
    return [list(group) for _, group in groupby(cells, key=lambda cell: (cell.task, cell.group))]


def _task_tables(cells: Sequence[Cell]) -> str:
    first = cells[0]
    length = f", prompts of {first.group} tokens" if first.group else ""
    title = f"<h3>{escape(first.task)}{escape(length)}, {first.questions} {counted(first.task)}</h3>"
    fidelity = [cell for cell in cells if cell.divergence is not None and cell.budget]
    tables = [_matrix(cells, "score", "score, and its 95 % interval")]
    if fidelity:
        tables.append(_matrix(fidelity, "divergence", "divergence in nats, same token"))
    return f'<section>{title}<div class="pair">{"".join(tables)}</div></section>'


def _matrix(cells: Sequence[Cell], measure: str, caption: str) -> str:
    """Methods down, budgets across; what has no budget takes the whole row."""
    text, best = _TEXTS[measure]
    budgets = budget_order(cell.budget for cell in cells)
    rows = []
    for method, row in _rows(cells).items():
        if "" in row:
            body = f'<td class="full" colspan="{max(1, len(budgets))}">{escape(text(row[""]))}</td>'
        else:
            entries = [
                "" if budget not in row else _marked(cells, row[budget], text, best, "<b>{}</b>") for budget in budgets
            ]
            body = "".join(f"<td>{entry}</td>" for entry in entries)
        rows.append(f"<tr><th>{escape(method)}</th>{body}</tr>")
    if measure == "score":
        rows.append(_bytes_row(cells, budgets))
    head = "".join(f"<th>{escape(budget)}</th>" for budget in budgets or [""])
    return f"<table><caption>{caption}</caption><tr><th>method</th>{head}</tr>{''.join(rows)}</table>"


def _bytes_row(cells: Sequence[Cell], budgets: Sequence[str]) -> str:
    sizes = [[cell.cache_bytes for cell in cells if cell.budget == budget] for budget in budgets or [""]]
    means = "".join(f"<td>{human_bytes(sum(each) / len(each))}</td>" for each in sizes)
    return f'<tr class="bytes"><th>cache bytes</th>{means}</tr>'


def _perplexity_table(cells: Sequence[PerplexityCell]) -> str:
    if not cells:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("method", "budget", "perplexity", "of full", "95 %", "cache bytes"))
    rows = [
        f"<tr><th>{escape(cell.method)}</th><td>{escape(cell.budget)}</td><td>{cell.perplexity:.2f}</td>"
        f"<td>{'' if cell.ratio is None else f'{cell.ratio:.3f}'}</td>"
        f"<td>{'' if cell.ratio_interval is None else '{:.3f} to {:.3f}'.format(*cell.ratio_interval)}</td>"
        f"<td>{human_bytes(cell.cache_bytes)}</td></tr>"
        for cell in cells
    ]
    caption = f"{cells[0].documents} texts, {cells[0].tokens} tokens predicted"
    table = f"<table><caption>{caption}</caption><tr>{head}</tr>{''.join(rows)}</table>"
    return f"<section><h3>perplexity</h3>{table}</section>"


Drawing = Callable[[Path], Path]
DRAWINGS = ("scores", "divergence", "depths")
"""Names of all pictures there may be."""


def drawings(found: Evaluation) -> dict[str, Drawing]:
    """By their names, the pictures for which there is something to draw; each takes the path to write to."""
    shown = main_cells(found.cells)
    made: dict[str, Drawing] = {}
    if any(cell.budget for cell in shown):
        made["scores"] = lambda path: scores_plot(shown, path)
    if any(cell.budget and cell.divergence is not None for cell in shown):
        made["divergence"] = lambda path: scores_plot(shown, path, "divergence")
    if any(answer.task == "niah" and answer.depth is not None for answer in found.answers):
        made["depths"] = lambda path: depths_plot(found.answers, path)
    return made


def _pictures(found: Evaluation) -> list[str]:
    """The pictures as images within the page."""
    images = []
    with tempfile.TemporaryDirectory() as folder:
        for name, draw in drawings(found).items():
            content = draw(Path(folder) / "picture.svg").read_bytes()
            source = f"data:image/svg+xml;base64,{b64encode(content).decode('ascii')}"
            images.append(f'<img alt="{name}" src="{source}">')
    return images


def _texts(answers: Sequence[Answer]) -> list[str]:
    """For each task that generates, what was said to the first questions where this differs, folded away."""
    tasks: dict[str, dict[str, dict[str, list[Answer]]]] = {}
    for answer in answers:
        tasks.setdefault(answer.task, {}).setdefault(answer.question, {}).setdefault(answer.text, []).append(answer)
    folded = []
    for task, questions in tasks.items():
        differing = [(name, said) for name, said in questions.items() if len(said) > 1][:MOST_TEXTS]
        rows = [_text_row(name, text, same) for name, said in differing for text, same in said.items()]
        head = "<tr><th>question</th><th>methods and budgets</th><th>score</th><th>answer</th></tr>"
        if rows:
            folded.append(
                f"<details><summary>Answers to {escape(task)} that differ</summary>"
                f'<table class="texts">{head}{"".join(rows)}</table></details>'
            )
    return folded


def _text_row(question: str, text: str, same: Sequence[Answer]) -> str:
    """One of the answers to a question, once for all who gave it."""
    budgets: dict[str, list[str]] = {}
    for answer in same:
        budgets.setdefault(answer.method, []).append(answer.budget)
    who = "<br>".join(f"<b>{escape(method)}</b> {escape(', '.join(given))}" for method, given in budgets.items())
    return (
        f"<tr><td>{escape(question)}</td><td>{who}</td><td>{100 * same[0].score:.0f} %</td>"
        f'<td class="text" dir="auto">{escape(text)}</td></tr>'
    )


def _facts(values: Mapping[str, Any]) -> str:
    """A table of names and values; a dictionary is a table within it."""
    rows = [
        f"<tr><th>{escape(str(name).replace('_', ' '))}</th><td>{_fact(value)}</td></tr>"
        for name, value in values.items()
    ]
    return f'<table class="facts">{"".join(rows)}</table>'


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return _facts(value)
    if isinstance(value, list | tuple):
        return escape(", ".join(map(str, value)))
    return escape(f"{value:.4g}" if isinstance(value, float) else str(value))
