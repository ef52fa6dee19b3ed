"""What is done with models that several processes hold together, and by one process alone, to be compared.

`torchrun --nproc-per-node N support/split_runs.py PLACE MODEL ...` does it in `N` processes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from headprof.compression.batches import answer_each
from headprof.compression.document import load_document, save_document
from headprof.compression.encoding import encoded_prompt
from headprof.compression.generation import ask, compress_document, generate_text
from headprof.compression.session import make_plan
from headprof.models.loading import LoadedModel, load_model
from headprof.scoring.request import ScoreRequest, build_probes, score_to_file
from headprof.utils.in_step import InStep, join_in_step
from headprof.validation.head_drops import per_head_drops
from headprof.validation.settings import ValidationSettings
from support.profiles import random_profile, random_surrogate
from support.tiny_models import TEXT

METHODS = (
    "full",
    "headkv-r2",
    "think",
    "headkv-ems",
    "tova",
    "adakv",
    "prefixkv",
    "fastgen",
    "expected-attention",
    "kvzip",
)
"""Those of each kind that some other head has a say in, and of each that none has."""
DOCUMENTS = ("headkv-ems", "kvzip", "kvzap", "adakv-kvzip:norms=true")
MANY, FEW = (METHODS, DOCUMENTS), (("headkv-r2",), ("kvzip",))
"""What is tried on one model, and on the others."""
QUESTIONS = ("What is the code?", "Who keeps the key?")
PARAGRAPH = TEXT[:400]
BUDGET, NEW = 24, 12


def tried(name: str) -> tuple[Sequence[str], Sequence[str]]:
    """Methods by which a model generates, and by which it compresses documents."""
    return MANY if name == "llama" else FEW


def plan_for(loaded: LoadedModel, method: str, **options: Any) -> Any:
    """A plan with a made-up profile, which compresses again and again while it generates."""
    profile = random_profile(loaded.model)
    surrogate = random_surrogate(loaded.model) if "kvzap" in method else None
    options = {"budget": BUDGET, "buffer": 4, "surrogate": surrogate, "tokenizer": loaded.tokenizer} | options
    return make_plan(loaded.model, profile, method=method, **options)


def generated(loaded: LoadedModel, method: str, **options: Any) -> dict[str, Any]:
    """New tokens, and the bytes of the cache behind them."""
    ids, _ = encoded_prompt(loaded, PARAGRAPH, QUESTIONS[0], NEW)
    tokens: list[int] = []
    plan = None if method == "full" else plan_for(loaded, method)
    made = generate_text(loaded, ids, plan, max_new_tokens=NEW, on_ids=tokens.extend, **options)
    return {"tokens": tokens, "bytes": made.cache_bytes}


def documents(loaded: LoadedModel, place: Path, methods: Sequence[str]) -> dict[str, Any]:
    """Compress a document by some methods, write each to a file, and answer questions from it."""
    found = {}
    for method in methods:
        cache = compress_document(loaded, PARAGRAPH, plan_for(loaded, method))
        save_document(cache, place / f"{method.replace(':', '-')}.kv.safetensors", loaded)
        found[method] = ask(loaded, cache, QUESTIONS[0], max_new_tokens=NEW).text
        found[f"{method}, own bytes"] = cache.nbytes
    return found


def answers(loaded: LoadedModel, place: Path) -> dict[str, list[str]]:
    """Answer questions from documents that are there, several at a time."""
    found = {}
    for file in sorted(place.glob("*.kv.safetensors")):
        cache, _ = load_document(file, loaded)
        found[file.name] = [each.text for each in answer_each(loaded, cache, QUESTIONS, max_new_tokens=NEW)]
    return found


def work(loaded: LoadedModel, place: Path, others: Path, team: InStep | None = None) -> dict[str, Any]:
    """All that is compared of one model; files go to `place`, and documents are read from `others` too."""
    place.mkdir(parents=True, exist_ok=True)
    methods, compressing = tried(loaded.name)
    found: dict[str, Any] = {method: generated(loaded, method) for method in methods}
    found["sampled"] = generated(loaded, "headkv-r2", temperature=1.0, seed=3, prefill_chunk=32)
    found["documents"] = documents(loaded, place, compressing)
    found["answers"] = answers(loaded, others) if others.exists() else {}
    if loaded.name == "llama":
        asked = ValidationSettings(probes=4, length=450, pack=1, ablate="mean", where="question")
        found["drops"] = per_head_drops(loaded, asked).values
    request = ScoreRequest("quick", probes=4, lengths=(450,), pack=2, include_failed=True)
    how: dict[str, Any] = {"resume": False, "command": "", "team": team}
    score_to_file(loaded, build_probes(loaded, request), request, place / "profile.safetensors", **how)
    return found


def main(arguments: Sequence[str]) -> None:
    place, ranks, *models = Path(arguments[0]), int(arguments[1]), *arguments[2:]
    team = join_in_step(ranks)
    found = {}
    for name in models:
        loaded = load_model(str(place / name), tp=ranks)
        found[name] = work(loaded, place / "split" / name, place / "alone" / name, team)
    torch.save(found, place / f"found-{team.rank}.pt")
    team.leave()


if __name__ == "__main__":
    main(sys.argv[1:])
