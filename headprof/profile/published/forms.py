"""The forms in which head scores are published, and which of them a file is of."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headprof.errors import ProfileError, UsageError
from headprof.profile.imported_scores import ImportedScores
from headprof.profile.papers_json import papers_scores
from headprof.profile.published import head_list, locos
from headprof.profile.published.budget_shares import share_scores
from headprof.profile.published.gates import gate_scores, looks_like_gates
from headprof.profile.published.pruning_curves import curve_scores
from headprof.profile.published.torch_tensor import kvzip_scores

if TYPE_CHECKING:
    from headprof.models.shape import HeadShape

CSV = "csv"
"""A table that headprof exports, whose columns say what they hold; read by `headprof.profile.csv_table`."""
PAPERS = "retrieval-heads"
_BEGINNING = 2**16


@dataclass(frozen=True)
class Form:
    """A form of published head scores.

    Attributes:
        paper: where it comes from.
        read: scores of a file for a model's shape; raises `ProfileError`.
        kind: as which scores they are taken unless another is asked for; `None` where it has to be said.
        model: what a file calls its model, for forms that may say it.
    """

    paper: str
    read: Callable[[Path, HeadShape], ImportedScores]
    kind: str | None = None
    model: Callable[[Path], str | None] | None = None


FORMS = {
    PAPERS: Form("Wu et al. 2024, arXiv 2404.15574; Fu et al. 2025, arXiv 2410.19258", papers_scores),
    "locos": Form("Gema et al. 2026, arXiv 2607.01002", locos.locos_scores, "retrieval", locos.named_model),
    "duoattention": Form("Xiao et al. 2024, arXiv 2410.10819", gate_scores, "retrieval"),
    "rlkv": Form("Du et al. 2025, arXiv 2510.08525", gate_scores, "reasoning"),
    "kvzip": Form("Kim et al. 2025, arXiv 2505.23416", kvzip_scores),
    "qrhead": Form("Zhang et al. 2025, arXiv 2506.09944", head_list.listed_scores, "retrieval", head_list.named_model),
    "lu-kv": Form("Tang et al. 2026, arXiv 2602.08585", curve_scores),
    "attention-matching": Form("Zweiger et al. 2026, arXiv 2602.16284", share_scores),
}
"""By the names that `--format` takes."""

_MAGIC = {b"\x93NUMPY": "lu-kv", b"PK\x03\x04": "kvzip"}
_TEXTS = {
    r'\A\{\s*"L\d+H\d+"': "attention-matching",
    r'\A\{(?s:.*)"scores"\s*:': "locos",
    r"\A\{": PAPERS,
    r'\A\[\s*\[\s*"\d+-\d+"': "qrhead",
    r"\A\[": PAPERS,
    r"(?m)^[ \t]*attn_head_set[ \t]*:": "qrhead",
    r'\A"?\w+"?(,"?\w+"?)*,"?(layer|head)\b': CSV,
}
"""What texts have in them; the first that is found is it."""
_SUFFIXES = {
    ".csv": CSV,
    ".json": PAPERS,
    ".npy": "lu-kv",
    ".pt": "kvzip",
    ".yaml": "qrhead",
    ".yml": "qrhead",
}
"""What a file is taken for if its content is nothing that is known, so that its reader says what ails it."""
_GATES = {"full_attention_heads": "duoattention", "duo": "duoattention", "adapter_weights": "rlkv", "rlkv": "rlkv"}
"""What names of files tell of tables that look alike."""


def check_form(name: str | None) -> None:
    """Raise `UsageError` when there is no form of this name."""
    if name is not None and name not in (*FORMS, CSV):
        raise UsageError(f"There is no format {name!r} of head scores: choose one of {', '.join((*FORMS, CSV))}.")


def recognised(path: Path) -> str:
    """The name of the form that a file is of, by its content; by its name where two are alike.

    Raises:
        ProfileError: the file cannot be read, or is of no form that is known.
        UsageError: it could be of two forms.
    """
    beginning = _beginning(path)
    for magic, form in _MAGIC.items():
        if beginning.startswith(magic):
            return "lu-kv" if path.suffix in (".npy", ".npz") else form  # several arrays are packed as tensors are
    text = beginning.decode("utf-8-sig", "replace").replace("\r\n", "\n").lstrip()
    for pattern, form in _TEXTS.items():
        if re.search(pattern, text):
            return "locos" if form == PAPERS and "logit_contrib" in path.name else form
    if looks_like_gates(text) or path.suffix == ".tsv":
        return _form_of_gates(path)
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix]
    raise ProfileError(
        f"{path} is of no format of head scores that is read here: name it with --format, one of "
        f"{', '.join((*FORMS, CSV))}."
    )


def is_published(path: Path) -> bool:
    """Whether a file is of one of these forms, rather than a profile."""
    if path.suffix == ".safetensors":
        return False
    try:
        recognised(path)
    except UsageError:
        return True
    except ProfileError:
        return False
    return True


def _form_of_gates(path: Path) -> str:
    for part, form in _GATES.items():
        if part in path.name.lower():
            return form
    raise UsageError(f"{path} may be of DuoAttention or of RLKV: say --format duoattention or --format rlkv.")


def _beginning(path: Path) -> bytes:
    """The first bytes of a regular file; raises `ProfileError` for anything else."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ProfileError(f"{path} is no regular file: give a file of head scores.")
    try:
        with path.open("rb") as file:
            return file.read(_BEGINNING)
    except OSError as error:
        raise ProfileError(f"{path} cannot be read ({error.strerror}): check the path and its permissions.") from error
