"""The head profile: scores of several kinds per query head, how sure they are, and where they came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from headprof.errors import ProfileError, UsageError
from headprof.models.shape import HeadShape
from headprof.profile.commands import score_command, tune_command
from headprof.profile.faults import tensor_fault, text_fault
from headprof.profile.influence import SITUATIONS, InfluenceCurves, curves_fault, curves_from
from headprof.profile.kept_shares import kept_shares_fault
from headprof.profile.kinds import COUNTED_KINDS, KINDS, PROBE_KINDS, named_kinds
from headprof.profile.profile_checks import (
    FORMAT,
    FORMAT_VERSION,
    KEPT,
    RESERVED,
    TENSOR_NAMES,
    check_format,
    check_parts,
    counted_kinds,
    named_model,
)
from headprof.profile.refined_rows import REFINED_ROWS, refined_rows_fault
from headprof.profile.tuned import NOTE as TUNED_NOTE
from headprof.profile.tuned import Options, Tuned
from headprof.utils.files import atomic_write
from headprof.utils.ranks import top_indices
from headprof.utils.records import is_whole, parse_json, parse_object
from headprof.utils.tensor_files import is_altered, open_tensors, with_checksum

if TYPE_CHECKING:
    from torch import Tensor

_MOST_PROBES = 2**53


@dataclass(frozen=True, eq=False)
class HeadProfile:
    """What each query head of one model is worth for long context.

    Attributes:
        model_name: hub id or folder of the model.
        shape: the model's fingerprint.
        scores: kind (one of `KINDS`) to float32 `[L, H]`, zero or more; any of them may be missing, but not all.
        standard_errors: the same for the standard error of each score; a kind is absent when its error is unknown.
        intervals: the same for the two ends of each score's 95 % bootstrap interval; absent when unknown.
        kept_shares: what share of its tokens each KV head keeps where the rows of all heads are ranked together by how
            a text is repeated, for some shares of all, float32 `[S, L, K]` (see `headprof.profile.kept_shares`); `None`
            when unknown.
        curves: what the right answer loses when one KV head keeps so many rows, by whether the question is `known` or
            `unknown` when rows go (see `headprof.profile.influence`); absent when unknown.
        refined_rows: rows that each KV head keeps of a prompt whose question is known, at some budgets, float32
            `[S, L, K]` (see `headprof.profile.refined_rows`); `None` when unknown.
        probes_used: probes counted per kind; 0 when unknown.
        metadata: provenance as text: settings (JSON), seed, versions, date, command, accuracy per family (JSON).
        given: how the user named the model, for commands in messages; in no file, empty where it is not known.

    Raises:
        ValueError: on construction, when the parts contradict each other.
    """

    model_name: str
    shape: HeadShape
    scores: Mapping[str, Tensor]
    standard_errors: Mapping[str, Tensor] = field(default_factory=dict)
    probes_used: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    intervals: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    kept_shares: Tensor | None = None
    curves: Mapping[str, InfluenceCurves] = field(default_factory=dict)
    refined_rows: Tensor | None = None
    given: str = ""

    def __post_init__(self) -> None:
        if complaint := _find_contradiction(self):
            raise ValueError(complaint)

    @property
    def called(self) -> str:
        """What commands in messages call the model."""
        return self.given or self.model_name

    @property
    def retrieval(self) -> Tensor:
        """Retrieval scores, float32 `[L, H]`; raises `ProfileError` when the profile holds none."""
        return self.scores_of("retrieval")

    @property
    def reasoning(self) -> Tensor:
        """Reasoning scores, float32 `[L, H]`; raises `ProfileError` when the profile holds none."""
        return self.scores_of("reasoning")

    @property
    def reconstruction(self) -> Tensor:
        """What each KV head keeps, float32 `[S, L, K]`; raises `ProfileError` when the profile does not say."""
        if self.kept_shares is None:
            raise ProfileError(
                f"The profile of {self.model_name} holds no budgets learned from reconstruction: add them with "
                f"`{score_command(self.called, 'reconstruction')}`."
            )
        return self.kept_shares

    @property
    def refined(self) -> Tensor:
        """What each KV head keeps when the question is known, `[S, L, K]`; raises `ProfileError` when it is silent."""
        if self.refined_rows is None:
            raise ProfileError(
                f"The profile of {self.model_name} holds no refined budgets: run `{tune_command(self.called)}`, or "
                "choose headkv-r2."
            )
        return self.refined_rows

    def curves_of(self, situation: str) -> InfluenceCurves:
        """Influence curves for a question that is `known` or `unknown`; raises `ProfileError` when there are none."""
        if situation not in self.curves:
            raise ProfileError(
                f"The profile of {self.model_name} holds no influence curves for a question that is {situation}: add "
                f"them with `{score_command(self.called, 'curves')}`."
            )
        return self.curves[situation]

    @property
    def tuned(self) -> Options:
        """The parameters that serve the model best, those that are not the usual ones.

        Raises:
            ProfileError: nobody has looked for them, or the metadata say of them what cannot be.
        """
        if (tuned := Tuned.of(self.metadata)) is None:
            fault = "says of its tuned parameters what cannot be" if TUNED_NOTE in self.metadata else "is not tuned"
            raise ProfileError(
                f"The profile of {self.model_name} {fault}: run `{tune_command(self.called)}`, or choose headkv-r2."
            )
        return tuned.options

    @property
    def shares_together(self) -> list[str]:
        """At which shares of all tokens `kept_shares` are known, as `4%`; empty when they are unknown."""
        kept = self.kept_shares
        return [] if kept is None else [f"{share:.2g}%" for share in (100 * kept.mean(dim=(1, 2))).tolist()]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of score this profile holds, retrieval first."""
        return tuple(kind for kind in KINDS if kind in self.scores)

    @property
    def settings(self) -> dict[str, Any]:
        """The probe settings kept as JSON in the metadata; empty when they are absent or not a JSON object."""
        try:
            return parse_object(self.metadata.get("settings", "{}"))
        except ValueError:
            return {}

    @property
    def accuracy(self) -> dict[str, tuple[int, int]]:
        """Probes answered and asked by family, kept as JSON in the metadata; empty when absent or not so shaped."""
        try:
            tally = parse_object(self.metadata.get("accuracy", "{}"))
            counts = {family: (answered, asked) for family, (answered, asked) in tally.items()}
        except (TypeError, ValueError):
            return {}
        usable = all(
            is_whole(asked, 0, _MOST_PROBES) and is_whole(answered, 0, asked) for answered, asked in counts.values()
        )
        return counts if usable else {}

    def scores_of(self, which: str) -> Tensor:
        """Scores `[L, H]` of one kind; raises `UsageError` for an unknown kind, `ProfileError` for one not held."""
        if which not in KINDS:
            raise UsageError(f"There is no kind of head score named {which!r}: choose {named_kinds()}.")
        if which not in self.scores:
            raise ProfileError(
                f"The profile of {self.model_name} holds no {which} scores: use its {self.kinds[0]} scores, "
                f"or run `{score_command(self.called, which)}`."
            )
        return self.scores[which]

    def kv_head_scores(self, which: str, aggregate: Literal["max", "mean"] = "max") -> Tensor:
        """Scores per KV head, float32 `[L, K]`: the max or mean over the `g` query heads that share it."""
        grouped = self.scores_of(which).unflatten(1, (self.shape.num_kv_heads, self.shape.group_size))
        if aggregate == "max":
            return grouped.amax(dim=-1)
        if aggregate == "mean":
            return grouped.mean(dim=-1)
        raise UsageError(f"Scores of a group cannot be joined by {aggregate!r}: choose max or mean.")

    def top_heads(self, which: str, k: int) -> list[tuple[int, int, float]]:
        """The `k` best query heads as (layer, head, score), best first; equal scores in order of layer, then head."""
        scores = self.scores_of(which)
        return [
            (*divmod(index, self.shape.num_heads), float(scores.flatten()[index])) for index in top_indices(scores, k)
        ]

    def digest(self) -> str:
        """SHA-256 (hex) of the model's shape, scores, budgets, curves and tuned parameters: equal for two that serve
        methods alike."""
        sha = hashlib.sha256(json.dumps(self.shape.to_dict(), sort_keys=True).encode())
        for kind in self.kinds:
            sha.update(kind.encode() + self.scores[kind].detach().cpu().contiguous().numpy().tobytes())
        if self.kept_shares is not None:
            sha.update(KEPT.encode() + self.kept_shares.detach().cpu().contiguous().numpy().tobytes())
        for name, tensor in self._later_tensors().items():
            sha.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        if (tuned := Tuned.of(self.metadata)) is not None:
            sha.update(TUNED_NOTE.encode() + json.dumps(tuned.options, sort_keys=True).encode())
        return sha.hexdigest()

    def _later_tensors(self) -> dict[str, Tensor]:
        """Influence curves and refined budgets, as a file names them."""
        parts = (self.curves[situation].tensors(situation) for situation in SITUATIONS if situation in self.curves)
        found = {name: tensor for part in parts for name, tensor in part.items()}
        return found if self.refined_rows is None else found | {REFINED_ROWS: self.refined_rows}

    def _version(self) -> str:
        """The oldest format that holds all of it."""
        if self.refined_rows is not None:
            return FORMAT_VERSION
        if self.curves:
            return "5"
        if set(self.kinds) - set(PROBE_KINDS):
            return "4"
        return "2" if self.kept_shares is None else "3"

    def save(self, path: str | Path) -> None:
        """Write the profile atomically as safetensors; raises `HeadprofError` when the disk refuses."""
        import torch
        from safetensors.torch import save

        tensors = {TENSOR_NAMES.get(kind, kind): self.scores[kind] for kind in self.kinds}
        tensors |= {f"{TENSOR_NAMES.get(kind, kind)}_se": errors for kind, errors in self.standard_errors.items()}
        for kind, (low, high) in self.intervals.items():
            tensors |= {f"{TENSOR_NAMES.get(kind, kind)}_low": low, f"{TENSOR_NAMES.get(kind, kind)}_high": high}
        if self.kept_shares is not None:
            tensors[KEPT] = self.kept_shares
        tensors |= self._later_tensors()
        version = self._version()
        counted = counted_kinds(version)
        tensors["probes_used"] = torch.tensor([self.probes_used.get(kind, 0) for kind in counted], dtype=torch.int64)
        header = {
            "format": FORMAT,
            "format_version": version,
            "model": self.model_name,
            "fingerprint": json.dumps(self.shape.to_dict()),
        }
        # Copies: two kinds of score may be one tensor, and safetensors takes none twice.
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        content = save(tensors, metadata=with_checksum(tensors, header | dict(self.metadata)))
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)

    @classmethod
    def load(cls, path: str | Path, shape: HeadShape | None = None, model_name: str | None = None) -> HeadProfile:
        """Read a profile and check it, against the model's `shape` too when that is given.

        Args:
            path: the safetensors file.
            shape: shape of the model that the profile is to be used with.
            model_name: how the user named that model, for commands in messages.

        Raises:
            ProfileError: the file is missing, damaged, altered, not a profile, of another version, or for another
                model.
        """
        path = Path(path)
        with open_tensors(path, "profile", f"run `{score_command(model_name)}`", ProfileError) as file:
            mend = f"run `{score_command(model_name or named_model(file.metadata))}`"
            check_format(path, file.metadata, mend)
            try:
                check_parts(file)
                tensors = file.read_all()
                profile = _from_parts(tensors, file.metadata, model_name or "")
            except ValueError as error:
                raise ProfileError(f"The profile {path} is damaged ({error}): restore it, or {mend}.") from error
            if is_altered(tensors, file.metadata):
                raise ProfileError(f"The profile {path} has been altered since it was made: restore it, or {mend}.")
        if shape is not None and (differences := profile.shape.differences(shape)):
            raise ProfileError(
                f"The profile {path} is for another model ({', '.join(differences)}): choose another, "
                f"or run `{score_command(model_name)}`."
            )
        return profile


def _from_parts(tensors: dict[str, Tensor], metadata: Mapping[str, str], given: str) -> HeadProfile:
    """Build a profile from the parts of a file; raises `ValueError` saying which part is wrong."""
    try:
        shape = HeadShape.from_dict(parse_json(metadata["fingerprint"]))
        model_name = metadata["model"]
    except (KeyError, ValueError) as error:
        raise ValueError("its model name or fingerprint is missing or unreadable") from error
    counts = tensors["probes_used"]
    names = [(kind, TENSOR_NAMES.get(kind, kind)) for kind in KINDS]
    return HeadProfile(
        model_name=model_name,
        shape=shape,
        scores={kind: tensors[name] for kind, name in names if name in tensors},
        standard_errors={kind: tensors[f"{name}_se"] for kind, name in names if f"{name}_se" in tensors},
        probes_used={
            kind: count
            for kind, count in zip(counted_kinds(metadata["format_version"]), counts.tolist(), strict=True)
            if count
        },
        metadata={key: value for key, value in metadata.items() if key not in RESERVED},
        intervals={
            kind: (tensors[f"{name}_low"], tensors[f"{name}_high"]) for kind, name in names if f"{name}_low" in tensors
        },
        kept_shares=tensors.get(KEPT),
        curves=curves_from(tensors),
        refined_rows=tensors.get(REFINED_ROWS),
        given=given,
    )


def _find_contradiction(profile: HeadProfile) -> str | None:
    """What is wrong with the parts of a profile, as the end of a sentence; `None` when nothing is."""
    shape = profile.shape
    if min(shape.num_layers, shape.num_heads, shape.num_kv_heads) < 1 or shape.num_heads % shape.num_kv_heads:
        return f"its fingerprint has {shape.num_heads} query heads for {shape.num_kv_heads} KV heads"
    if not profile.scores:
        return "it holds no scores"
    for name, kinds in (
        ("standard errors", profile.standard_errors),
        ("intervals", profile.intervals),
        ("probes", profile.probes_used),
    ):
        if orphans := [kind for kind in kinds if kind not in profile.scores]:
            return f"it has {orphans[0]} {name} but no {orphans[0]} scores"
    if unknown := [kind for kind in profile.scores if kind not in KINDS]:
        return f"it holds scores of an unknown kind {unknown[0]!r}"
    if uncounted := [kind for kind in profile.probes_used if kind not in COUNTED_KINDS]:
        return f"it counts probes of {uncounted[0]} scores, which are from none"
    if any(count < 0 for count in profile.probes_used.values()):
        return "it counts fewer than zero probes"
    if any(count > _MOST_PROBES for count in profile.probes_used.values()):
        return "it counts more probes than anybody asks"
    if fault := text_fault(profile.model_name, profile.metadata):
        return fault
    if reserved := [key for key in RESERVED if key in profile.metadata]:
        return f"its metadata may not hold {reserved[0]!r}, which the file format uses"
    lows, highs = ({kind: ends[side] for kind, ends in profile.intervals.items()} for side in (0, 1))
    for name, tensors in (
        ("scores", profile.scores),
        ("standard errors", profile.standard_errors),
        ("lower interval ends", lows),
        ("upper interval ends", highs),
    ):
        for kind, tensor in tensors.items():
            if fault := tensor_fault(tensor, shape):
                return f"its {kind} {name} {fault}"
    if profile.kept_shares is not None and (fault := kept_shares_fault(profile.kept_shares, shape)):
        return f"its shares kept in reconstruction {fault}"
    if profile.refined_rows is not None and (fault := refined_rows_fault(profile.refined_rows, shape)):
        return f"its refined budgets {fault}"
    for situation, curves in profile.curves.items():
        if situation not in SITUATIONS:
            return f"it holds influence curves for a question that is {situation!r}"
        if fault := curves_fault(curves, shape):
            return f"its influence curves for a question that is {situation} {fault}"
    if crossed := [kind for kind in lows if (lows[kind] > highs[kind]).any()]:
        return f"its {crossed[0]} intervals end before they begin"
    return None
