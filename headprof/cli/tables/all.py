"""Rows of the tables that the command line shows: `(columns, rows)` or `(columns, rows, title)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from headprof.utils.units import human_bytes

if TYPE_CHECKING:
    from headprof.bench.generate import BenchResult, LargestBatch
    from headprof.bench.score import ScoreBenchResult, SideResult
    from headprof.compression.cache.head_cache import HeadCache
    from headprof.compression.generation import Generation
    from headprof.evaluation.perplexity import PerplexityCell
    from headprof.evaluation.results import Cell, Evaluation
    from headprof.profile.comparing import Agreement
    from headprof.profile.finding import FoundProfile
    from headprof.profile.head_profile import HeadProfile
    from headprof.scoring.run import Progress
    from headprof.validation.causal_check import Validation

Rows = list[list[str]]


def scoring_progress(name: str, now: Progress) -> str:
    """Where a scoring run stands, for its progress bar."""
    text = f"Scoring {name}, {now.answered} of {now.done} right"
    if now.change:
        text += ", others would change " + ", ".join(f"{share:.0%} of {kind}" for kind, share in now.change.items())
    return text


def stability(profile: HeadProfile) -> str:
    """What became of `--until-stable`."""
    settings = profile.settings
    rule = settings["until_stable"]
    changes = " and ".join(
        f"{share:.1%} of the top {rule['top']} {kind} heads" for kind, share in rule["change"].items()
    )
    state = "Stable" if rule["stable"] else "Not yet stable"
    found = f": other probes would change {changes}" if changes else ", too few probes were answered to tell"
    mend = "" if rule["stable"] else "; ask more with --resume --probes"
    return f"{state} after {settings['asked']} of at most {settings['probes']} probes{found}{mend}."


def runs(generations: Mapping[str, Generation], full_bytes: int) -> tuple[list[str], Rows]:
    """What each way of answering took, beside the full cache."""
    rows = [
        [
            name,
            str(run.prompt_tokens),
            str(run.new_tokens),
            human_bytes(run.cache_bytes),
            f"{run.cache_bytes / full_bytes:.1%}",
            f"{run.prefill_rate:.0f}",
            f"{run.decode_rate:.1f}" if run.decode_rate else "-",
        ]
        for name, run in generations.items()
    ]
    if len(generations) == 1:
        rows.append(["full (not run)", "", "", human_bytes(full_bytes), "100.0%", "", ""])
    return (
        ["cache", "prompt tokens", "new tokens", "bytes", "of full", "prefill tokens/s", "decode tokens/s"],
        rows,
    )


def evaluation(found: Evaluation) -> list[tuple[list[str], Rows, str]]:
    """Scores and fidelity of methods at budgets: two tables for each task, or for all of a suite's together.

    Of a suite's single tasks there are the scores at the largest budget; and there is a table of perplexities.
    """
    from headprof.evaluation.results import main_cells, suite_of

    groups: dict[tuple[str, str], list[Cell]] = {}
    shown = main_cells(found.cells)
    for cell in shown:
        groups.setdefault((cell.task, cell.group), []).append(cell)
    made = [table for group in groups.values() for table in (scores(group), fidelity(group)) if table[1]]
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
    return columns, [*rows, _cache_bytes(cells, len(columns))], f"{_title(cells)}: score, and its 95 % interval"


def fidelity(cells: Sequence[Cell]) -> tuple[list[str], Rows, str]:
    """How far each method's next tokens are from the full cache's; no rows if that was not run."""
    known = [cell for cell in cells if cell.divergence is not None and cell.method != "full"]
    columns, rows = _by_budget(known, lambda cell: f"{cell.divergence:.2g}, {cell.agreement:.0%}")
    return columns, rows, f"{_title(cells)}: divergence from the full cache in nats, and share of tokens that agree"


def _title(cells: Sequence[Cell]) -> str:
    first = cells[0]
    return f"{first.task}{f', {first.group}' if first.group else ''}, {first.questions} questions"


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


def _cache_bytes(cells: Sequence[Cell], columns: int) -> list[str]:
    """The mean size of the compressed caches at each budget."""
    sizes: dict[str, list[float]] = {}
    for cell in cells:
        if cell.budget or len(cells) == 1:
            sizes.setdefault(cell.budget, []).append(cell.cache_bytes)
    return ["cache bytes", *(human_bytes(sum(each) / len(each)) for each in sizes.values())][:columns]


def sharing(found: Evaluation) -> str:
    """What the shared prefill saved, in words."""
    saved = found.about["sharing"]
    if not saved["questions"]:
        return "Nothing was left to ask."
    return (
        f"One prefill served {saved['candidates']} caches: {saved['questions']} prompts were read and compressed in "
        f"{saved['seconds']:.0f} s; reading them once for each cache would have taken {saved['seconds_apart']:.0f} s."
    )


def perplexities(table: Iterable[PerplexityCell]) -> tuple[list[str], Rows]:
    """Methods at budgets, beside the full cache if it was run."""
    rows = [
        [
            cell.method,
            cell.budget or "-",
            str(cell.documents),
            f"{cell.perplexity:.2f}",
            _number(cell.ratio, ".3f", "x"),
            "-" if cell.ratio_interval is None else "{:.3f} to {:.3f}".format(*cell.ratio_interval),
            human_bytes(cell.cache_bytes),
        ]
        for cell in table
    ]
    return ["method", "budget", "texts", "perplexity", "of full", "95 % interval", "cache bytes"], rows


def compression(cache: HeadCache, file: Path, full_bytes: int) -> dict[str, Any]:
    """What a compressed document came to, as numbers."""
    return {
        "file": str(file),
        "method": cache.plan.name,
        "document_tokens": cache.get_seq_length(),
        "tokens_per_head": float(cache.lengths.float().mean()),
        "cache_bytes": cache.nbytes,
        "file_bytes": file.stat().st_size,
        "full_cache_bytes": full_bytes,
    }


def summary(numbers: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """The same as a table."""
    share = numbers["file_bytes"] / numbers["full_cache_bytes"]
    return (
        ["method", "document tokens", "tokens per head", "file", "of the full cache"],
        [
            [
                numbers["method"],
                str(numbers["document_tokens"]),
                f"{numbers['tokens_per_head']:.1f}",
                human_bytes(numbers["file_bytes"]),
                f"{share:.1%}",
            ]
        ],
    )


def _number(value: float | None, style: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{style}}{unit}"


def _bytes(value: float | None) -> str:
    return "-" if value is None else human_bytes(value)


def benchmark(result: BenchResult) -> tuple[list[str], Rows]:
    """Every case beside the full cache of the same length."""
    from headprof.bench.generate import comparison

    rows = []
    for compared in comparison(result):
        case = compared.measurement
        rows.append(
            [
                f"{case.method} {case.budget}".strip(),
                case.backend,
                str(case.length),
                _number(case.prefill_seconds, ".2f", " s") if not case.failed else case.failed,
                _number(case.overhead_share, ".1%"),
                _number(case.decode_rate, ".1f"),
                _number(compared.decode_ratio, ".2f", "x"),
                _number(case.floor_rate, ".1f"),
                _bytes(case.cache_bytes),
                _number(compared.cache_ratio, ".1%"),
                _bytes(case.largest_cache_bytes),
                _number(case.steadiness, ".2f"),
                _bytes(case.peak_bytes),
            ]
        )
    columns = ["cache", "attention", "prompt", "prefill", "compressing", "tokens/s", "of full", "floor tokens/s"]
    return [*columns, "cache bytes", "of full ", "at most", "steadiness", "peak"], rows


def largest_batches(found: Iterable[LargestBatch]) -> tuple[list[str], Rows]:
    """How many sequences fit, and how fast they decode together."""
    rows = [
        [
            f"{each.method} {each.budget}".strip(),
            each.backend,
            str(each.length),
            str(each.batch),
            _number(each.decode_rate, ".0f"),
            _bytes(each.cache_bytes),
        ]
        for each in found
    ]
    return ["cache", "attention", "prompt", "largest batch", "tokens/s", "cache bytes"], rows


def found_profiles(found: Iterable[FoundProfile]) -> tuple[list[str], Rows]:
    """Every profile that is found, a row each."""
    rows = []
    for each in found:
        state = "shadowed" if each.shadowed_by else "found"
        if each.profile is None:
            texts = ["-", "-", "-", "-", "-", "damaged"]
        else:
            profile = each.profile
            texts = [
                profile.model_name,
                _grid(profile),
                ", ".join(profile.kinds),
                ", ".join(str(profile.probes_used.get(kind, "-")) for kind in profile.kinds),
                profile.metadata.get("date") or profile.metadata.get("source") or "-",
                state,
            ]
        rows.append([escape(text) for text in (each.path.stem, _short(each.path.parent), *texts)])
    return ["name", "where", "model", "layers x heads on KV", "scores", "probes", "from", "state"], rows


def profile_facts(profile: HeadProfile, path: Path) -> list[tuple[str, str]]:
    """What a profile says about itself, as names and texts: model, shape, probes, settings, provenance."""
    shape = profile.shape
    facts = [
        ("file", str(path)),
        ("model", profile.model_name),
        ("shape", f"{shape.architecture}, {_grid(profile)} of {shape.head_dim}, vocabulary {shape.vocab_size}"),
        ("probes used", ", ".join(f"{kind} {profile.probes_used.get(kind, 'unknown')}" for kind in profile.kinds)),
    ]
    if profile.settings:
        facts.append(("settings", ", ".join(f"{name} {value}" for name, value in profile.settings.items())))
    others = ((name, text) for name, text in profile.metadata.items() if name not in ("settings", "accuracy"))
    return facts + [(name.replace("_", " "), text) for name, text in sorted(others)]


def family_accuracy(profile: HeadProfile) -> tuple[list[str], Rows]:
    """Probes answered of those asked, by family."""
    rows = [
        [escape(family), f"{answered}/{asked}", f"{answered / asked:.0%}" if asked else "-"]
        for family, (answered, asked) in profile.accuracy.items()
    ]
    return ["probe family", "answered", "share"], rows


def ranked_heads(profile: HeadProfile, which: str, count: int) -> tuple[list[str], Rows, str]:
    """The best heads of a profile, with all that is known of how sure their scores are."""
    errors, ends = profile.standard_errors.get(which), profile.intervals.get(which)
    rows = [
        [
            f"{place}.",
            str(layer),
            str(head),
            f"{value:.3f}",
            "-" if errors is None else f"{errors[layer, head]:.3f}",
            "-" if ends is None else f"{ends[0][layer, head]:.3f} to {ends[1][layer, head]:.3f}",
        ]
        for place, (layer, head, value) in enumerate(profile.top_heads(which, count), 1)
    ]
    counted = profile.probes_used.get(which)
    title = f"Top {which} heads" + (f", from {counted} counted probes" if counted else "")
    return ["", "layer", "head", "score", "standard error", "95 % interval"], rows, title


def overlaps(agreements: Mapping[str, Agreement]) -> tuple[list[str], Rows]:
    """Top heads that two rankings share, beside what chance would give."""
    rows = [
        [name, str(count), f"{share:.0%}", f"{agreement.expected_overlap(count):.1%}"]
        for name, agreement in agreements.items()
        for count, share in agreement.overlaps.items()
    ]
    return ["scores", "top heads", "in common", "by chance"], rows


def _short(folder: Path) -> str:
    home = Path.home()
    return str("~" / folder.relative_to(home) if folder.is_relative_to(home) else folder)


def _grid(profile: HeadProfile) -> str:
    return f"{profile.shape.num_layers} x {profile.shape.num_heads} on {profile.shape.num_kv_heads}"


def validation(result: Validation) -> tuple[list[str], Rows]:
    """Answers while heads are silent: all counts for the heads of the probes' own kind, and the top of the other."""
    from headprof.validation.causal_check import FAMILIES
    from headprof.validation.verdict import curve

    points = []
    for probes in result.probe_kinds:
        points.append(curve(result, probes, result.kinds[0], "top")[0])  # nothing is silent
        for kind in sorted(result.kinds, key=lambda kind: kind != probes):
            for family in FAMILIES if kind == probes else ("top",):
                shown = result.counts if kind == probes else [result.settings.top]
                points += [point for point in curve(result, probes, kind, family) if point.count in shown]
    rows = [
        [
            point.probes,
            f"{point.family} {point.chosen_by}" if point.count else "none",
            str(point.count),
            f"{point.right}/{point.asked}",
            f"{point.accuracy:.0%}",
            f"{point.low:.0%} to {point.high:.0%}",
            f"{point.log_prob:.2f}",
        ]
        for point in points
    ]
    return ["probes", "silent heads", "k", "right", "accuracy", "95 % interval", "log-probability"], rows


def score_bench(result: ScoreBenchResult) -> tuple[list[str], Rows]:
    """Each side at each length: its speed and its memory."""
    rows = [
        [
            side.side,
            str(side.length),
            str(side.probes),
            _number(side.answered, "d"),
            side.failed or _number(side.seconds_per_probe, ".3g", " s"),
            _number(side.probes_per_minute, ".1f"),
            _number(side.packed_speedup, ".1f", "x"),
            _peak(side),
        ]
        for side in result.sides
    ]
    return ["side", "length", "probes", "right", "a probe", "probes/min", "packed is faster", "peak memory"], rows


def score_agreement(result: ScoreBenchResult) -> tuple[list[str], Rows, str]:
    """How like our scores those of the other sides are."""
    rows = [
        [
            each.side,
            str(each.length),
            each.kind,
            each.over,
            " and ".join(map(str, each.probes)),
            _number(each.spearman, ".3f"),
            _number(each.overlap, ".0%"),
        ]
        for each in result.agreements
    ]
    columns = ["side", "length", "scores", "over probes", "ours and its", "rank correlation", f"top {result.top}"]
    return columns, rows, "Mean scores of the heads beside ours"


def memory_remarks(result: ScoreBenchResult, limit_bytes: float = 24e9) -> list[str]:
    """How each side's memory grows with the length, where there are lengths enough to tell."""
    from headprof.bench.score import PREFILLS, limit_length, memory_slope

    remarks = []
    for side in dict.fromkeys(each.side for each in result.sides):
        points = result.memory(side)
        line = memory_slope(points)
        if line is None:
            continue
        text = (
            f"{side}: peak memory grows by {human_bytes(line.bytes_per_token)} a token "
            f"(line through {line.lengths} lengths, R2 {line.r_squared:.3f})"
        )
        # Elsewhere what bends is noise.
        limit = limit_length(points, limit_bytes) if PREFILLS.get(side) == "attentions" else None
        if limit is not None:
            text += f"; {human_bytes(limit_bytes)} beside the weights at about {limit} tokens (parabola, extrapolated)"
        remarks.append(f"{text}.")
    return remarks


def _peak(side: SideResult) -> str:
    if side.peak_bytes is None and side.estimated_bytes is not None:
        return f"{human_bytes(side.estimated_bytes)} (estimate)"
    return _bytes(side.peak_bytes)
