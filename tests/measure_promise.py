"""How well `headprof compress --max-loss` keeps its promise on questions that it has never seen.

Each document is compressed to each promised loss, judging by itself alone. Then a question about it that nobody has
asked before is fed to the full cache and to the compressed one, with its right answer: the divergence at the answer's
tokens is what has truly been lost. Documents are needle probes of the held-out half, and a user's own: NAME.txt beside
NAME.questions.jsonl, each line of it {"question": ..., "answer": ...}.

python tests/measure_promise.py --documents 40 --losses 0.02,0.05,0.1,0.2 --method learned-kvzip -o results/promise

Answers are appended to answers.jsonl, document by document; the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import torch
from bench_parts import print_table

from headprof.compression.cache.head_cache import HeadCache, stack_caches
from headprof.compression.continuing import ReferenceRun, fed_reference
from headprof.compression.methods.table import find_method
from headprof.compression.promise import Candidates, Promise
from headprof.compression.session import attending_ragged, make_plan
from headprof.errors import HeadprofError, UsageError
from headprof.evaluation.questions import ProbeQuestions
from headprof.models.loading import LoadedModel, load_model
from headprof.models.prompt_encoder import GAP, INSTRUCTION, PromptEncoder
from headprof.profile.finding import load_profile
from headprof.utils.files import append_text, read_text, write_text
from headprof.utils.intervals import mean_interval, wilson_interval
from headprof.utils.records import parse_object
from headprof.utils.units import parse_lengths

TASKS = ("niah", "reasoning")


@dataclass(frozen=True)
class Unseen:
    """A question about a document, and its right answer, as token ids."""

    tail: tuple[int, ...]
    reference: tuple[int, ...]


@dataclass(frozen=True)
class Document:
    """A document, and what is asked about it once it has been compressed."""

    name: str
    text: str
    questions: tuple[Unseen, ...]


def probe_documents(loaded: LoadedModel, number: int, length: int, seed: int) -> Iterator[Document]:
    """Held-out needle probes, the two tasks in turns."""
    per_task = -(-number // len(TASKS))
    asked = [ProbeQuestions(loaded, task, per_task, (length,), None, seed) for task in TASKS]
    for index in range(number):
        task, within = TASKS[index % len(TASKS)], index // len(TASKS)
        question = asked[index % len(TASKS)][within]
        whole = loaded.tokenizer.decode(question.document_ids)
        text = whole.partition(f"{INSTRUCTION}{GAP}")[2].strip()
        unseen = Unseen((*question.asked_ids, *question.reply_ids), question.reference_ids)
        yield Document(f"{task} {within}", text, (unseen,))


def own_documents(loaded: LoadedModel, folder: Path) -> Iterator[Document]:
    """A user's texts and questions.

    Raises:
        UsageError: a text has no questions, or they cannot be read.
    """
    encoder = PromptEncoder(loaded.tokenizer)
    for file in sorted(folder.glob("*.txt")):
        beside = file.with_suffix(".questions.jsonl")
        if not beside.is_file():
            raise UsageError(f"There are no questions about {file}: write them to {beside}.")
        questions = []
        for line in read_text(beside).splitlines():
            row = parse_object(line)
            end = encoder.encode_question(row["question"], "", row["answer"])
            questions.append(Unseen((*end.asked, *end.reply), end.answer))
        yield Document(file.name, read_text(file).strip(), tuple(questions))


@torch.inference_mode()
def true_loss(loaded: LoadedModel, full: HeadCache, kept: HeadCache, questions: Sequence[Unseen]) -> float:
    """Mean divergence of `kept` from `full` at the tokens of right answers, in nats a token."""
    found = []
    with attending_ragged(loaded.model):
        for question in questions:
            run = ReferenceRun(2, full=0)
            for logits, wanted in fed_reference(loaded, stack_caches([full, kept]), question.tail, question.reference):
                run.add(logits, wanted)
            found.append((run.divergence or [0.0, 0.0])[1])
    return fmean(found)


def measured(loaded: LoadedModel, document: Document, plan: Any, losses: Sequence[float]) -> list[dict[str, Any]]:
    """A row for each promised loss."""
    start = time.perf_counter()
    candidates = Candidates(loaded, document.text, plan)
    rows = []
    for max_loss in losses:
        kept, promise = candidates.keep(max_loss)
        true = true_loss(loaded, candidates.caches[0], kept, document.questions)
        rows.append(_row(document, promise, true))
    return [row | {"seconds": time.perf_counter() - start} for row in rows]


def _row(document: Document, promise: Promise, true: float) -> dict[str, Any]:
    return {
        "document": document.name,
        "promised": promise.promised,
        "measured": promise.kept.measured,
        "at_most": promise.kept.at_most,
        "true": true,
        "tokens": promise.kept.tokens,
        "document_tokens": promise.document_tokens,
        "measured_on": promise.measured_on,
    }


def summary(rows: Sequence[dict[str, Any]], promised: float) -> dict[str, Any]:
    """What all documents came to under one promise, with 95 % intervals."""
    own = [row for row in rows if row["promised"] == promised]
    true, shares = [row["true"] for row in own], [row["tokens"] / row["document_tokens"] for row in own]
    held = sum(loss <= promised for loss in true)
    tokens = [row["tokens"] for row in own]
    return {
        "promised": promised,
        "documents": len(own),
        "measured": fmean(row["measured"] for row in own),
        "true": fmean(true),
        "true_interval": mean_interval(true),
        "true_median": median(true),
        "held": held / len(own),
        "held_interval": wilson_interval(held, len(own)),
        "tokens_median": median(tokens),
        "tokens_quartiles": quantiles(tokens, n=4)[::2] if len(own) > 1 else tokens * 2,
        "share_median": median(shares),
    }


def _earlier(path: Path, run: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows of documents that are done, of the same run; the file begins with what the run is."""
    if not path.exists():
        write_text(path, json.dumps({"run": run}) + "\n")
        return {}
    whole = [line for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]
    try:
        first, *rows = map(parse_object, whole)
        if first["run"] != run:
            raise UsageError(f"The answers in {path} are of another run: choose another folder with -o.")
        done = {row["document"]: row["rows"] for row in rows}
    except (ValueError, KeyError) as error:
        raise UsageError(f"The answers in {path} are damaged: delete that file.") from error
    write_text(path, "".join(whole))  # without a last line that was cut off
    return done


def _shown(each: dict[str, Any]) -> list[str]:
    low, high = each["true_interval"] or (each["true"], each["true"])
    held = "-".join(f"{end:.0%}" for end in each["held_interval"])
    quartiles = "-".join(f"{end:.0f}" for end in each["tokens_quartiles"])
    return [
        f"{each['promised']:g}",
        str(each["documents"]),
        f"{each['measured']:.4f}",
        f"{each['true']:.4f} ({low:.4f} to {high:.4f})",
        f"{each['true_median']:.4f}",
        f"{each['held']:.0%} ({held})",
        f"{each['tokens_median']:.0f} ({quartiles})",
        f"{each['share_median']:.0%}",
    ]


COLUMNS = ["promised", "documents", "measured", "true mean", "true median", "held", "tokens", "of document"]


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as for headprof compress; by default SmolLM2-135M-Instruct")
    parser.add_argument("--method", default="learned-kvzip", help="of compression")
    parser.add_argument("--profile", type=Path, help="head profile; by default the one for the model")
    parser.add_argument("--documents", type=int, default=40, help="needle probes of the held-out half")
    parser.add_argument("--length", default="1k", help="of these, in tokens")
    parser.add_argument("--folder", type=Path, help="texts of your own: NAME.txt and NAME.questions.jsonl")
    parser.add_argument("--losses", default="0.02,0.05,0.1,0.2", help="promised, in nats a token")
    parser.add_argument("--seed", type=int, default=0, help="of the probes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("-o", "--output", type=Path, default=Path("results/promise"), help="folder of the results")
    given = parser.parse_args(words)
    try:
        _run(given)
    except HeadprofError as error:
        sys.exit(f"Error: {error}")


def _run(given: argparse.Namespace) -> None:
    losses, (length,) = [float(each) for each in given.losses.split(",")], parse_lengths(given.length)
    loaded = load_model(given.model, device=given.device)
    needs_profile = find_method(given.method).budget.profile_scores
    profile = load_profile(loaded.name, given.profile, loaded.shape, loaded.given) if needs_profile else None
    plan = make_plan(loaded.model, profile, method=given.method)
    run = {
        "model": loaded.name,
        "method": given.method,
        "profile": plan.profile_digest,
        "length": length,
        "losses": losses,
        "seed": given.seed,
        "dtype": str(loaded.dtype),
    }
    path = given.output / "answers.jsonl"
    done = _earlier(path, run)
    documents = [*probe_documents(loaded, given.documents, length, given.seed)]
    documents += own_documents(loaded, given.folder) if given.folder else []
    rows = []
    for number, document in enumerate(documents, start=1):
        if document.name not in done:
            done[document.name] = measured(loaded, document, plan, losses)
            append_text(path, json.dumps({"document": document.name, "rows": done[document.name]}) + "\n")
        rows += done[document.name]
        print(f"{number} of {len(documents)}", file=sys.stderr, flush=True)
    if not rows:
        raise UsageError("There are no documents: ask for some with --documents, or give a --folder.")
    found = [summary(rows, each) for each in losses]
    write_text(
        given.output / "results.json", json.dumps({"run": run, "promises": found, "rows": rows}, indent=2) + "\n"
    )
    print_table([COLUMNS, *map(_shown, found)])


if __name__ == "__main__":
    main()
