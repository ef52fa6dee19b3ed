"""A document compressed before there is a question: seconds and memory, beside a plain prefill of it.

Each case runs in a process of its own, once for each round.

python tests/bench_reconstruction.py --length 4k --segment 2k --prefill-chunk 512 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import torch
from bench_parts import print_table

from headprof.bench.measure import PeakMemory, now
from headprof.compression.generation import compress_document
from headprof.compression.request import CompressionRequest
from headprof.errors import HeadprofError
from headprof.models.loading import LoadedModel, load_model
from headprof.models.prompt_encoder import PromptEncoder
from headprof.utils.units import parse_lengths

METHODS = {
    "text": "snapkv",
    "repetition": "adakv-kvzip",
    "surrogate": "kvzap",
    "two readings": "kvzip",
    "fitted rows": "headkv-fit",
}
"""What compresses in each case. A document is judged by a fixed text in the question's place; by its own repetition; by
what was fitted to foresee that; by it with one ranking of all layers; and by it with rows fitted to what it sees."""
_WARM_TOKENS = 128
_WORDS = ("rope", "pier", "letter", "harbor", "lamp", "bridge", "door", "whale", "key", "wall", "shore", "boat")


@dataclass(frozen=True)
class Case:
    """What is done with a document.

    Attributes:
        name: what is done, in a word; one of `METHODS`, or `plain` for a prefill into Transformers' own cache.
        segment: most tokens that are repeated at once; 0 where nothing is repeated.
        prefill_chunk: as for `headprof.compressed`.
    """

    name: str
    segment: int = 0
    prefill_chunk: int | None = None

    @property
    def label(self) -> str:
        segments = f", segments of {self.segment}" if self.segment else ""
        return f"{self.name}{segments}{f', chunks of {self.prefill_chunk}' if self.prefill_chunk else ''}"


@dataclass(frozen=True)
class Cost:
    """What one run of a case took.

    Attributes:
        tokens: of the document.
        seconds, cpu_seconds: by the clock, and of the processor.
        peak_bytes: most memory in use at a time beyond what was in use before; `None` where the system does not say.
        kept_bytes: of the cache that it left.
        full_bytes: of a full cache of the document.
    """

    tokens: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int | None
    kept_bytes: int
    full_bytes: int


def all_cases(length: int, segment: int, chunk: int) -> list[Case]:
    """The plain prefill, and each way to compress: the first ones with and without chunks."""
    ways = [Case("text"), Case("repetition", length), Case("repetition", segment)]
    chunked = [Case(way.name, way.segment, each) for way in ways for each in (None, chunk)]
    return [Case("plain"), *chunked, Case("surrogate"), Case("two readings", length), Case("fitted rows", length)]


def document(loaded: LoadedModel, tokens: int) -> str:
    """A text of about so many tokens in which no two sentences are alike."""
    encoder = PromptEncoder(loaded.tokenizer)
    sentences: list[str] = []
    while not sentences or sum(encoder.count(sentences)) < tokens:
        start = len(sentences)
        sentences += [
            f"In {1000 + number} the {_WORDS[number % 12]} stood {number * 37 % 91} steps from the "
            f"{_WORDS[number * 7 % 11]}."
            for number in range(start, start + 64)
        ]
    counts = encoder.count(sentences)
    while sum(counts) > tokens - encoder.overhead:
        counts.pop()
    return " ".join(sentences[: len(counts)])


def run_case(case: Case, length: int, model: str | None, budget: int) -> Cost:
    """Do it once in this process, after a short document that does not count."""
    loaded = load_model(model, device="cpu")
    text = document(loaded, length)
    _work(case, loaded, document(loaded, _WARM_TOKENS), budget)()
    work = _work(case, loaded, text, budget)
    peak, start, used = PeakMemory(loaded.device), now(loaded.device), time.process_time()
    kept = work()
    seconds, used = now(loaded.device) - start, time.process_time() - used
    tokens = len(PromptEncoder(loaded.tokenizer).document_ids(text))
    return Cost(tokens, seconds, used, peak.used(), kept, loaded.full_cache_bytes(tokens))


def _work(case: Case, loaded: LoadedModel, text: str, budget: int) -> Callable[[], int]:
    """What is timed; it returns the bytes of the cache that it leaves."""
    if case.name == "plain":
        ids = torch.tensor([PromptEncoder(loaded.tokenizer).document_ids(text)], device=loaded.device)

        def plain() -> int:
            with torch.inference_mode():
                cache = loaded.model(ids, use_cache=True, logits_to_keep=1).past_key_values
            return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

        return plain
    options = {"segment": case.segment} if case.segment else {}
    plan = CompressionRequest(METHODS[case.name], str(budget), options=options).plan(loaded)
    return lambda: compress_document(loaded, text, plan, prefill_chunk=case.prefill_chunk).nbytes


def measure(cases: Sequence[Case], words: Sequence[str], repeats: int) -> list[tuple[Case, Cost]]:
    """Each case in turn, `repeats` rounds of them, each run in a process of its own; medians of each."""
    costs: dict[Case, list[Cost]] = {case: [] for case in cases}
    for done in range(repeats):
        for case in cases:
            command = [sys.executable, __file__, *words, "--case", json.dumps(asdict(case))]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                sys.exit(run.stderr)
            costs[case].append(Cost(**json.loads(run.stdout)))
            print(f"round {done + 1}: {case.label}: {run.stdout.strip()}", file=sys.stderr, flush=True)
    return [(case, _median(each)) for case, each in costs.items()]


def _median(costs: Sequence[Cost]) -> Cost:
    peaks = [cost.peak_bytes for cost in costs]
    known = [peak for peak in peaks if peak is not None]
    first = costs[0]
    return Cost(
        first.tokens,
        median(cost.seconds for cost in costs),
        median(cost.cpu_seconds for cost in costs),
        int(median(known)) if len(known) == len(peaks) else None,
        first.kept_bytes,
        first.full_bytes,
    )


def table(found: Sequence[tuple[Case, Cost]]) -> list[list[str]]:
    """Rows of text with a head; ratios are to the first case."""
    rows = [["case", "tokens", "seconds", "cpu seconds", "ratio", "peak MB", "peak / full cache", "kept MB", "full MB"]]
    for case, cost in found:
        peak = cost.peak_bytes
        rows.append(
            [
                case.label,
                str(cost.tokens),
                f"{cost.seconds:.1f}",
                f"{cost.cpu_seconds:.1f}",
                f"{cost.cpu_seconds / found[0][1].cpu_seconds:.2f}",
                "?" if peak is None else f"{peak / 1e6:.0f}",
                "?" if peak is None else f"{peak / cost.full_bytes:.2f}",
                f"{cost.kept_bytes / 1e6:.1f}",
                f"{cost.full_bytes / 1e6:.1f}",
            ]
        )
    return rows


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model to run; the embedded one if left away")
    parser.add_argument("--length", default="4k", help="tokens of the document, such as 4k")
    parser.add_argument("--segment", default="2k", help="tokens that are repeated at once, beside all of them")
    parser.add_argument("--prefill-chunk", type=int, default=512, help="tokens that a layer runs over at a time")
    parser.add_argument("--budget", type=int, default=256, help="tokens per KV head")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each case, of which the median counts")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    try:
        [length], [segment] = parse_lengths(given.length), parse_lengths(given.segment)
        if given.case:
            print(json.dumps(asdict(run_case(Case(**json.loads(given.case)), length, given.model, given.budget))))
            return
    except HeadprofError as error:
        sys.exit(f"Error: {error}")
    passed = ["--length", given.length, "--budget", str(given.budget)]
    passed += ["--model", given.model] if given.model else []
    found = measure(all_cases(length, segment, given.prefill_chunk), passed, given.repeats)
    if given.json:
        print(json.dumps([asdict(case) | asdict(cost) for case, cost in found], indent=2))
        return
    print_table(table(found))


if __name__ == "__main__":
    main()
