"""How well the sum of influence curves foretells what all heads lose together.

Random allocations at one total are tried on held-out probes: what their caches lose is measured, beside the sum of the
profile's curves. Allocations are drawn around equal budgets, and around those of HeadKV-R2, each head's multiplied by
a factor whose logarithm is normal; and those of some methods are measured too.

python tests/measure_curves.py --profile NAME.safetensors --question known --budgets 32,64 --allocations 50 --probes 24

Nothing is kept but `results.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from bench_parts import print_table
from torch import Tensor

from headprof.compression.methods.allocation import normalized, water_filled
from headprof.compression.methods.curve_budget import curve_scores
from headprof.compression.methods.solver import losses_at
from headprof.compression.session import make_plan
from headprof.errors import HeadprofError
from headprof.models.loading import LoadedModel, load_model
from headprof.profile.finding import load_profile
from headprof.profile.head_profile import HeadProfile
from headprof.profile.kinds import PROBE_KINDS
from headprof.tuning.exams import JUDGES, Exams, ExamSettings
from headprof.tuning.joint import joint_losses
from headprof.utils.files import write_text
from headprof.utils.ranks import spearman

METHODS = {
    "known": ("headkv-curves", "headkv-r2", "snapkv"),
    "unknown": ("curves-kvzip", "learned-kvzip", "headkv-kvzip"),
}
FEWEST = 5
"""Tokens of a head in a random allocation."""
COLUMNS = ["allocations", "Pearson", "Spearman", "foretold", "measured", "bias"]


def drawn(center: Tensor, count: int, spread: float, length: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Allocations around one, int64 `[L, K]`, with its total."""
    for _ in range(count):
        factors = torch.randn(center.shape, generator=generator).mul(spread).exp().double()
        upper = torch.full(center.shape, length)
        yield water_filled(normalized(center * factors), 0, FEWEST, upper, int(center.sum()))


def allocations(
    loaded: LoadedModel, profile: HeadProfile, given: argparse.Namespace, budget: int
) -> dict[str, list[Tensor]]:
    """Everything that is tried at one budget, by what it is."""
    generator = torch.Generator().manual_seed(given.seed)
    made = {
        name: make_plan(loaded.model, profile, method=name, budget=budget).allocation(given.length)
        for name in METHODS[given.question]
        if name != "learned-kvzip" or profile.kept_shares is not None
    }
    equal, center = torch.full_like(made[METHODS[given.question][0]], budget), made[METHODS[given.question][1]]
    tried = {
        f"around equal budgets, {budget}": list(drawn(equal, given.allocations, 1.0, given.length, generator)),
        f"around {METHODS[given.question][1]}, {budget}": list(
            drawn(center, given.allocations, 0.5, given.length, generator)
        ),
    }
    return tried | {f"{name}, {budget}": [counts] for name, counts in made.items()}


def foretold(profile: HeadProfile, question: str, counts: Tensor) -> Tensor:
    """The sum of the curves, levelled as the solver has them, float64 `[P]`."""
    grid, losses = curve_scores(profile.curves_of(question))
    return losses_at(losses.movedim(0, -1), grid[:, 0, 0].tolist(), counts).sum(dim=(1, 2))


def _shown(name: str, sums: Tensor, lost: Tensor) -> list[str]:
    means = [f"{float(each.mean()):.3f}" for each in (sums, lost, sums - lost)]
    if len(sums) < 2:
        return [name, "", "", *means]
    pearson = float(torch.corrcoef(torch.stack([sums, lost]))[0, 1])
    return [f"{len(sums)} {name}", f"{pearson:.2f}", f"{spearman(sums, lost):.2f}", *means]


def _run(given: argparse.Namespace) -> None:
    loaded = load_model(given.model, device=given.device)
    profile = load_profile(loaded.name, given.profile, loaded.shape, loaded.given)
    curves = profile.curves_of(given.question)
    tried: dict[str, list[Tensor]] = {}
    for budget in map(int, given.budgets.split(",")):
        tried |= allocations(loaded, profile, given, budget)
    counts = torch.stack([each for group in tried.values() for each in group])
    settings = ExamSettings(given.probes, length=given.length, seed=given.seed, split="eval")
    exams = Exams(loaded, JUDGES[given.question], settings)
    lost = joint_losses(
        loaded, exams, counts, lambda done, total: print(f"{done} of {total} prompts", file=sys.stderr, flush=True)
    )
    sizes = [len(group) for group in tried.values()]
    divergence = lost[..., 0].double().mean(dim=0)
    sums = foretold(profile, given.question, counts)
    parts = zip(tried, sums.split(sizes), divergence.split(sizes), strict=True)
    print_table([COLUMNS, *(_shown(*part) for part in parts)])
    for kind in (kind for kind in PROBE_KINDS if kind in profile.scores):
        print(
            f"Spearman of the curves' area and {kind} scores: {spearman(profile.kv_head_scores(kind), curves.area):.2f}"
        )
    found = {"groups": {name: [each.tolist() for each in group] for name, group in tried.items()}}
    found |= {"foretold": sums.tolist(), "answers": lost.tolist()}
    write_text(given.output / "results.json", json.dumps(found) + "\n")


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as for headprof score; by default SmolLM2-135M-Instruct")
    parser.add_argument("--profile", type=Path, help="head profile with curves; by default the one for the model")
    parser.add_argument("--question", default="known", choices=sorted(METHODS), help="when rows go")
    parser.add_argument("--budgets", default="32,64", help="tokens per KV head")
    parser.add_argument("--allocations", type=int, default=50, help="random ones of each kind")
    parser.add_argument("--probes", type=int, default=24, help="of the held-out half")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--seed", type=int, default=77, help="of probes and allocations")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("-o", "--output", type=Path, default=Path("results/curves"), help="folder of the results")
    try:
        _run(parser.parse_args(words))
    except HeadprofError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
