"""The tables of `headprof eval`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from headprof.cli.tables.cells import Rows, number
from headprof.utils.units import human_bytes

if TYPE_CHECKING:
    from headprof.evaluation.perplexity import PerplexityCell
    from headprof.evaluation.results import Cell, Evaluation


def evaluation(found: Evaluation) -> list[tuple[list[str], Rows, str]]:
    """Scores and fidelity of methods at budgets: two tables for each task, or for all of a suite's together.

    Where methods hold their rows in different ways, a third says in how many bytes.

    Of a suite's single tasks there are the scores at the largest budget; and there is a table of perplexities.
    """
    from headprof.evaluation.results import main_cells, suite_of

    groups: dict[tuple[str, str], list[Cell]] = {}
    shown = main_cells(found.cells)
    for cell in shown:
        groups.setdefault((cell.task, cell.group), []).append(cell)
    made = [table for group in groups.values() for table in (scores(group), sizes(group), fidelity(group)) if table[1]]
    single = [cell for cell in found.cells if cell not in shown]
    for suite in dict.fromkeys(suite_of(cell.task) for cell in single):
        made.append(by_task([cell for cell in single if suite_of(cell.task) == suite], suite))
    return [*made, (*perplexities(found.perplexities), "Perplexity")] if found.perplexities else made


def by_task(cells: Sequence[Cell], suite: str) -> tuple[list[str], Rows, str]:
    """The scores of a suite's single tasks at the largest budget, a column for each method."""
    largest = max(cells, key=lambda cell: cell.cache_bytes if cell.budget else 0.0).budget
    rows: dict[str, dict[str, str]] = {}
    for cell in cells:
        if cell.budget in ("", largest):
            name = f"{cell.task}, {cell.group}" if cell.group else cell.task
            rows.setdefault(name, {})[cell.method] = f"{cell.score:.0%}"
    methods = list(dict.fromkeys(method for row in rows.values() for method in row))
    lines = [[escape(name), *(row.get(method, "") for method in methods)] for name, row in rows.items()]
    return ["task", *map(escape, methods)], lines, f"{suite} by task: score{f' at budget {largest}' if largest else ''}"


def scores(cells: Sequence[Cell]) -> tuple[list[str], Rows, str]:
    """The scores of one task, a column for each budget, with 95 % intervals."""
    columns, rows = _by_budget(cells, lambda cell: f"{cell.score:.0%}{_interval(cell.interval)}")
    mean = [_cache_bytes(cells, len(columns))] if _are_of_one_size(cells) else []
    return columns, [*rows, *mean], f"{_title(cells)}: score, and its 95 % interval"


def sizes(cells: Sequence[Cell]) -> tuple[list[str], Rows, str]:
    """Mean bytes of each method's cache after a prompt; no rows if they are about the same for all of a budget."""
    title = f"{_title(cells)}: bytes of the cache after a prompt"
    if _are_of_one_size(cells):
        return [], [], title
    return *_by_budget(cells, _bytes), title


def _bytes(cell: Cell) -> str:
    """Bytes of a cell's caches, and of what they could bring back."""
    host = f" + {human_bytes(cell.second_tier_bytes)} on the host" if cell.second_tier_bytes else ""
    return f"{human_bytes(cell.cache_bytes)}{host}"


def fidelity(cells: Sequence[Cell]) -> tuple[list[str], Rows, str]:
    """How far each method's next tokens are from the full cache's; no rows if that was not run."""
    known = [cell for cell in cells if cell.divergence is not None and cell.method != "full"]
    columns, rows = _by_budget(known, lambda cell: f"{cell.divergence:.2g}, {cell.agreement:.0%}")
    return columns, rows, f"{_title(cells)}: divergence from the full cache in nats, and share of tokens that agree"


def perplexities(table: Iterable[PerplexityCell]) -> tuple[list[str], Rows]:
    """Methods at budgets, beside the full cache if it was run."""
    rows = [
        [
            cell.method,
            cell.budget or "-",
            str(cell.documents),
            f"{cell.perplexity:.2f}",
            number(cell.ratio, ".3f", "x"),
            "-" if cell.ratio_interval is None else "{:.3f} to {:.3f}".format(*cell.ratio_interval),
            human_bytes(cell.cache_bytes),
        ]
        for cell in table
    ]
    return ["method", "budget", "texts", "perplexity", "of full", "95 % interval", "cache bytes"], rows


def sharing(found: Evaluation) -> str:
    """What the shared prefill saved, in words."""
    saved = found.about["sharing"]
    if not saved["questions"]:
        return "Nothing was left to ask."
    alike = saved["candidate_tokens"] == saved["candidates"] * saved["prompt_tokens"]
    served = "One prefill" if alike else "A prefill with the repetition, and one without,"
    return (
        f"{served} served {saved['candidates']} caches: {saved['questions']} prompts were read and compressed in "
        f"{saved['seconds']:.0f} s; reading them once for each cache would have taken {saved['seconds_apart']:.0f} s."
    )


def _title(cells: Sequence[Cell]) -> str:
    from headprof.evaluation.results import counted

    first = cells[0]
    return f"{first.task}{f', {first.group}' if first.group else ''}, {first.questions} {counted(first.task)}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})"


def _by_budget(cells: Sequence[Cell], text: Callable[[Cell], str]) -> tuple[list[str], Rows]:
    """A row for each method, a column for each budget; what has no budget stands in the first one."""
    budgets = list(dict.fromkeys(cell.budget for cell in cells if cell.budget))
    methods: dict[str, dict[str, str]] = {}
    for cell in cells:
        methods.setdefault(cell.method, {})[cell.budget or "".join(budgets[:1])] = text(cell)
    rows = [[escape(name), *(row.get(budget, "") for budget in budgets or [""])] for name, row in methods.items()]
    return ["method", *(budgets or [""])], rows


def _are_of_one_size(cells: Sequence[Cell]) -> bool:
    """Whether the caches of each budget differ by no more than a twentieth, as rounding and remembered queries do."""
    of_budgets: dict[str, list[float]] = {}
    for cell in cells:
        if cell.budget:
            of_budgets.setdefault(cell.budget, []).append(cell.cache_bytes)
    return all(max(each) <= 1.05 * min(each) for each in of_budgets.values())


def _cache_bytes(cells: Sequence[Cell], columns: int) -> list[str]:
    """The mean size of the compressed caches at each budget."""
    sizes: dict[str, list[float]] = {}
    for cell in cells:
        if cell.budget or len(cells) == 1:
            sizes.setdefault(cell.budget, []).append(cell.cache_bytes)
    return ["cache bytes", *(human_bytes(sum(each) / len(each)) for each in sizes.values())][:columns]
