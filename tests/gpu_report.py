"""All that only a GPU can tell, with one command: the tests that need one, and what decoding takes there.

python tests/gpu_report.py                      # everything, about eight minutes on one H100
python tests/gpu_report.py --parts steps,batch  # some of it
python tests/gpu_report.py --lengths 8k         # shorter

Figures go to `results.json`, and as tables to `results.md`, after each part: what a part found stays if the next fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from bench_compress import run_compress_bench
from support.gpu_tables import markdown

from headprof.bench.attention import LAYOUTS, run_attention_bench
from headprof.bench.generate import BenchRequest, BenchResult, beside_full, figures, largest_batches, run_bench
from headprof.bench.generate.cases import all_cases, random_ids
from headprof.bench.generate.full_cache import free_memory
from headprof.bench.generate.largest_batch import LargestBatch, decode_copies
from headprof.bench.measure import describe_device, median_seconds
from headprof.errors import HeadprofError
from headprof.models.loading import LoadedModel
from headprof.models.published import find_shape
from headprof.models.random_weights import device_and_dtype, load_random
from headprof.profile.random_scores import random_profile
from headprof.utils.files import check_writable, write_json
from headprof.utils.units import parse_lengths

LIMITS = {"steps": 240, "prefill": 60, "attention": 45, "batch": 170, "layer": 45, "tests": 220}
"""Seconds that each part may take, the most important first."""

HERE = Path(__file__).parent


class OutOfTime(Exception):
    """A part has taken as long as it may."""


@dataclass
class Report:
    """What has been found so far, and how it is found.

    Attributes:
        given: the command line.
        found: by part, plain values.
    """

    given: argparse.Namespace
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    @cached_property
    def loaded(self) -> LoadedModel:
        """A model with random weights, made once for all parts."""
        longest = max(self.given.lengths) + 1024
        return load_random(self.given.shape, device=self.given.device, max_positions=longest)

    @property
    def run(self) -> tuple[Any, ...]:
        loaded = self.loaded
        return loaded.model, loaded.max_positions, random_profile(loaded.shape)

    @property
    def device_and_dtype(self) -> dict[str, Any]:
        """Where parts without a model are measured, and in what."""
        device, dtype = device_and_dtype(self.given.device, "auto")
        return {"device": device, "dtype": dtype}

    def request(self, methods: str, lengths: Sequence[int], **others: Any) -> BenchRequest:
        given = self.given
        steps = tuple(given.step.split(","))
        return BenchRequest(
            tuple(methods.split(",")),
            (given.budget,),
            tuple(lengths),
            **{"new_tokens": given.new_tokens, "repeats": 1, "prefill_chunk": given.prefill_chunk, "steps": steps}
            | others,
        )


def steps(report: Report) -> Iterator[dict[str, Any]]:
    """A decode step at batch 1 beside its floor and both full caches; the static one up to `--longest-static`."""
    lengths = report.given.lengths
    short = [length for length in lengths if length <= report.given.longest_static]
    long = [length for length in lengths if length > report.given.longest_static]
    kept: dict[str, Any] = {}
    for some, full in ((short, ("eager", "compiled")), (long, ("eager",))):
        if not some:
            continue
        request = report.request("headkv-r2", some, full=full, warm_up=not kept)
        for result in _by_length(report, request):
            kept = _joined(kept, figures(result))
            yield kept
    yield kept | {"forward_alone": [_forward_alone(report, length) for length in short]}


def _by_length(report: Report, request: BenchRequest) -> Iterator[BenchResult]:
    """What is known after each length, and at the end."""
    seen: list[BenchResult] = []
    try:
        yield run_bench(*report.run, request, _say, seen.append)
    except OutOfTime:
        yield from seen[-1:]
        raise


def _joined(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return after | {"measurements": before.get("measurements", []) + after["measurements"]}


def _forward_alone(report: Report, length: int) -> dict[str, Any]:
    """A step of our cache without what `generate` does between two."""
    model, max_positions, profile = report.run
    request = report.request("headkv-r2", (length,), full=())
    (case, *_) = all_cases(model, max_positions, profile, request)
    ids = random_ids(model, 1, length, request.seed)
    decoded = decode_copies(model, case, ids, 1, request.new_tokens, request.prefill_chunk)
    return {"method": case.method, "budget": case.budget, "length": length, "step_seconds": 1 / decoded.rate}


def prefill(report: Report) -> Iterator[dict[str, Any]]:
    """What compressing takes of reading a prompt."""
    lengths = [length for length in report.given.lengths if length <= report.given.longest_static]
    request = report.request("headkv-r2,headkv-ems", lengths, full=("eager",), new_tokens=2, repeats=3)
    for result in _by_length(report, request):
        found = figures(result)
        steps = ("step_seconds", "floor_seconds", "times_floor", "decode_ratio")  # of two tokens, which say nothing
        yield found | {"measurements": [each | dict.fromkeys(steps) for each in found["measurements"]]}


def attention(report: Report) -> Iterator[dict[str, Any]]:
    """The attention kernel alone, at the share of the bandwidth at which it reads."""
    times: list[dict[str, Any]] = []
    for layout in LAYOUTS:
        found = run_attention_bench(report.given.shape, [layout], **report.device_and_dtype)
        times += [asdict(each) | {"ratio": each.ratio} for each in found]
        yield {"times": times}


def layer(report: Report) -> Iterator[dict[str, Any]]:
    """Compressing one layer by each method."""
    times: list[dict[str, Any]] = []
    for length in report.given.lengths:
        if length <= report.given.longest_static:
            times += map(asdict, run_compress_bench(report.given.shape, [length], **report.device_and_dtype))
            yield {"times": times}


def batch(report: Report) -> Iterator[dict[str, Any]]:
    """The largest batch of each cache at the shortest length, and what its matrix products alone would take."""
    length = min(report.given.lengths)
    found: list[LargestBatch] = []
    for methods, full in (("headkv-r2", ()), ("full", ("compiled",)), ("full", ("eager",))):
        request = report.request(methods, (length,), full=full, new_tokens=16)
        found += largest_batches(*report.run, request, _say)
        yield _batches(found)
    yield _batches(found) | {"products_seconds": _products_seconds(report.loaded, found[0].batch)}


def _batches(found: list[LargestBatch]) -> dict[str, Any]:
    return {"batches": [asdict(each) | {"ratio": ratio} for each, ratio in zip(found, beside_full(found), strict=True)]}


def _products_seconds(loaded: LoadedModel, batch: int) -> float | None:
    """What the products of a step's rows with all of the model's matrices take, one after the other."""
    if not batch:
        return None
    matrices = [module for module in loaded.model.modules() if isinstance(module, torch.nn.Linear)]
    rows = {
        width: torch.randn(batch, width, dtype=loaded.dtype, device=loaded.device)
        for width in {matrix.in_features for matrix in matrices}
    }

    def multiply() -> None:
        for matrix in matrices:
            matrix(rows[matrix.in_features])

    with torch.no_grad():
        return median_seconds([multiply], 7, loaded.device)[0]


def tests(report: Report) -> Iterator[dict[str, Any]]:
    """The tests marked `gpu`, in a process of their own."""
    vars(report).pop("loaded", None)  # its memory, which tests may need
    free_memory()
    output = Path(report.given.output).resolve()
    notes, log = output / "tests.xml", output / "tests.txt"
    notes.unlink(missing_ok=True)
    marked = sorted(str(file) for file in HERE.glob("test_*.py") if "mark.gpu" in file.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--continue-on-collection-errors", f"--junitxml={notes}"]
    command += ["-p", "no:cacheprovider", *marked]
    if importlib.util.find_spec("xdist"):  # tests wait for Triton's compiler most of their time
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    with log.open("w", encoding="utf-8") as said:
        limit = max(1.0, report.given.limit - 1)
        ended = subprocess.run(command, cwd=HERE.parent, stdout=said, stderr=subprocess.STDOUT, timeout=limit)
    if not notes.exists():
        raise HeadprofError(f"pytest ended with {ended.returncode}: {log.read_text(encoding='utf-8')[-400:]}")
    yield {"counts": counted(notes), "troubles": troubles(notes), "returncode": ended.returncode}


def counted(notes: Path) -> dict[str, int]:
    """How many tests passed, failed, were skipped, and how many files could not be read, from pytest's JUnit file."""
    cases = list(ElementTree.parse(notes).getroot().iter("testcase"))
    known = {kind: sum(case.find(kind) is not None for case in cases) for kind in ("failure", "error", "skipped")}
    return {"passed": len(cases) - sum(known.values()), **known}


def troubles(notes: Path) -> list[str]:
    """Which tests failed, and with what."""
    return [
        f"{case.get('classname')}::{case.get('name')}: {' '.join((trouble.get('message') or '').split())[:300]}"
        for case in ElementTree.parse(notes).getroot().iter("testcase")
        for trouble in (*case.findall("failure"), *case.findall("error"))
    ]


PARTS: dict[str, Callable[[Report], Iterator[dict[str, Any]]]] = {
    "steps": steps,
    "prefill": prefill,
    "attention": attention,
    "batch": batch,
    "layer": layer,
    "tests": tests,
}


def run_parts(report: Report, keep: Callable[[], None]) -> None:
    """Run the parts that are asked for; what goes wrong in one is noted, and the next begins."""
    ends = time.monotonic() + 60 * report.given.minutes
    for name in report.given.parts:
        limit = min(LIMITS[name], ends - time.monotonic())
        if limit < 1:
            report.found[name] = {"failed": "no time was left", "seconds": 0.0}
            continue
        report.given.limit = limit
        report.found[name] = {"failed": "it was cut off"}
        started = time.monotonic()
        failed = _run_part(report, name, limit, keep)
        report.found[name] |= {"failed": failed, "seconds": time.monotonic() - started}
        print(f"{name}: {failed or 'done'} after {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        keep()
        free_memory()


def _run_part(report: Report, name: str, limit: float, keep: Callable[[], None]) -> str:
    """Why a part came to no end; empty if it did."""
    try:
        with _at_most(limit):
            for found in PARTS[name](report):
                report.found[name] |= found
                keep()
    except (OutOfTime, subprocess.TimeoutExpired):
        return f"not done after {limit:.0f} s"
    except HeadprofError as error:
        return str(error)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def over(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _say(text: str, done: int, total: int) -> None:
    print(f"  {text} ({done}/{total})", file=sys.stderr, flush=True)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which, with commas, in this order")
    parser.add_argument("-o", "--output", default="gpu", help="folder for what is found")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--shape", default="llama-3-8b", help="of the model, whose weights are random")
    parser.add_argument("--lengths", default="8k,32k,128k", help="prompts of the steps")
    parser.add_argument("--longest-static", default="32k", help="longest prompt that the static cache reads too")
    parser.add_argument("--budget", default="128", help="tokens per KV head")
    parser.add_argument("--new-tokens", type=int, default=32, help="timed after each prompt")
    parser.add_argument("--step", default="auto", help="auto, eager, graph, compiled, with commas")
    parser.add_argument("--prefill-chunk", type=int, help="tokens that a layer reads at a time")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1")
    return parser


def read(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked as far as that can be done without a device.

    Raises:
        HeadprofError: something cannot be meant, or nothing can be written.
    """
    given = arguments().parse_args(words)
    given.parts = given.parts.split(",")
    if unknown := [name for name in given.parts if name not in PARTS]:
        raise HeadprofError(f"There is no part {unknown[0]!r}: choose of {', '.join(PARTS)} with --parts.")
    given.lengths = parse_lengths(given.lengths)
    (given.longest_static,) = parse_lengths(given.longest_static)
    find_shape(given.shape)
    Report(given).request("headkv-r2,headkv-ems", given.lengths).check()
    if "tests" in given.parts and importlib.util.find_spec("pytest") is None:
        raise HeadprofError("The GPU tests need pytest: install it, or leave them out with --parts.")
    Path(given.output).mkdir(parents=True, exist_ok=True)
    check_writable(Path(given.output) / "results.json")
    return given


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write and print; ends with 1 where a part came to no end or a test failed."""
    try:
        given = read(words)
        if given.device.startswith("cuda") and not torch.cuda.is_available():
            raise HeadprofError("Everything is ready, but a CUDA device is needed from here on, and there is none.")
        device, _ = device_and_dtype(given.device, "auto")
    except HeadprofError as error:
        sys.exit(f"Error: {error}")
    report, output, environment = Report(given), Path(given.output), describe_device(torch.device(device))

    def keep() -> None:
        found = {"environment": environment, "request": _plain(given), "parts": report.found}
        write_json(output / "results.json", found)
        (output / "results.md").write_text(markdown(found), encoding="utf-8")

    run_parts(report, keep)
    keep()
    print((output / "results.md").read_text(encoding="utf-8"))
    wrong = [name for name, part in report.found.items() if part["failed"] or part.get("troubles")]
    if wrong:
        sys.exit(f"Error: not all is well with {', '.join(wrong)}: see {output / 'results.md'}.")


def _plain(given: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(given).items() if name != "limit"}


if __name__ == "__main__":
    main()
