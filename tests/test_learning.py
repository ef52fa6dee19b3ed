"""What a profile says of how it came by learned budgets: read, shown in lines, and shown when it is learned."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from support.commands import headprof
from support.profiles import random_profile, random_shares, small_profile
from support.tiny_models import save_tiny, tiny_model

from headprof.profile.head_profile import HeadProfile
from headprof.profile.learning import NOTE, Learning, is_mixed
from headprof.tuning import mixing

NOTES = {
    "texts": 12,
    "lengths": [512, 1024, 2048],
    "seed": 3,
    "folder": None,
    "date": "2026-11-27",
    "command": "headprof score --reconstruction",
}
MIXED = NOTES | {"mixes": [0.5, 0], "mix_losses": [[4.63262, 4.1, 3.9, 4, 4.57943], [0.11, 0.2, 0.3, 0.4, 0.5]]}
MIXED |= {"mix_probes": 48}


def noted(notes):
    shape = small_profile().shape
    text = notes if isinstance(notes, str) else json.dumps(notes)
    return small_profile(kept_shares=random_shares(shape), metadata={NOTE: text, "date": "2026-01-02"})


def shown(place, profile):
    profile.save(place / "p.safetensors")
    done = headprof(place, "profile", "show", "p.safetensors", "--top", "1")
    assert done.returncode == 0, done.stderr
    return [" ".join(line.split()) for line in done.stdout.splitlines()]


def test_mixed_budgets_are_shown_in_lines(tmp_path):
    profile = noted(MIXED)
    lines, shares = shown(tmp_path, profile), profile.shares_together
    assert "learned from 12 texts of 512, 1024 and 2048 tokens, repeated by the model; seed 3" in lines
    assert "learned on 2026-11-27" in lines and "learned by headprof score --reconstruction" in lines
    assert "Learned budgets, mixed with headkv-r2's by what was lost on 48 probes" in lines
    at = lines.index("all heads keep weight of headkv-r2 lost, nats a token without mixing headkv-r2 alone")
    rows = [f"{shares[0]} 0.5 3.9 4.63 4.58", f"{shares[1]} 0 0.11 0.11 0.5", f"{shares[2]} 0 - - -"]
    assert lines[at + 1 : at + 4] == rows
    assert not any("mix_losses" in line for line in lines)


def test_budgets_that_were_not_mixed(tmp_path):
    profile = noted(NOTES | {"folder": "my texts", "lengths": [320]})
    lines = shown(tmp_path, profile)
    assert "learned from 12 texts in my texts of 320 tokens, repeated by the model; seed 3" in lines
    assert "Learned budgets, mixed with no others" in lines and "all heads keep weight of headkv-r2" in lines
    assert [f"{share} 0" for share in profile.shares_together] == [line for line in lines if line.endswith("% 0")]


@pytest.mark.parametrize(
    "notes",
    [
        "no JSON",
        [1],
        {"texts": 3},
        NOTES | {"texts": -1},
        NOTES | {"lengths": 512},
        NOTES | {"lengths": ["512"]},
        NOTES | {"seed": True},
        NOTES | {"folder": 7},
        MIXED | {"mixes": [0.5]},
        MIXED | {"mixes": [0.5, 1.5]},
        MIXED | {"mixes": [0.5, "0"]},
        MIXED | {"mixes": 0.5},
        MIXED | {"mix_losses": [[1.0], []]},
        MIXED | {"mix_losses": [[1.0], 2]},
        MIXED | {"mix_losses": [[1.0], [-2]]},
        MIXED | {"mix_probes": 0.5},
    ],
)
def test_notes_of_another_form_are_shown_as_they_are(tmp_path, notes):
    profile = noted(notes)
    assert Learning.of(profile.metadata) is None and is_mixed(profile.metadata)  # for all that is known
    lines = shown(tmp_path, profile)
    assert f"{NOTE} {' '.join(profile.metadata[NOTE].split())}" in lines
    assert not any(line.startswith(("learned from", "all heads keep")) for line in lines)


def test_whether_budgets_are_mixed():
    assert not is_mixed({}) and not is_mixed({NOTE: json.dumps(NOTES)}) and is_mixed({NOTE: json.dumps(MIXED)})
    assert not is_mixed({NOTE: json.dumps(MIXED | {"mixes": [0.0, 0]})})
    assert Learning.of({NOTE: json.dumps(MIXED)}).losses[1] == (0.11, 0.2, 0.3, 0.4, 0.5)


def test_budgets_from_elsewhere_have_no_such_lines(tmp_path):
    lines = shown(tmp_path, small_profile(kept_shares=random_shares(small_profile().shape)))
    assert any(line.startswith("learned budgets of each KV head") for line in lines)
    assert not any(line.startswith(("learned from", "all heads keep")) for line in lines)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(mixing, "PROBES", 1)
    monkeypatch.setattr(mixing, "LENGTH", 400)
    save_tiny(tmp_path / "tiny", chat=True)
    return tmp_path


LEARN = (
    "score",
    "--model",
    "tiny",
    "--reconstruction",
    "--texts",
    "2",
    "--text-lengths",
    "320",
    "-o",
    "new.safetensors",
)
PROBES = ("--probes", "4", "--lengths", "512", "--include-failed", "--no-tune")


@pytest.mark.parametrize("way", ["probes", "add-to", "no-probes"])
def test_score_ends_with_what_was_learned(place, way):
    replace(random_profile(tiny_model()), model_name="tiny", kept_shares=None).save(place / "p.safetensors")
    refining = ("--no-refine",)
    more = {
        "probes": (*PROBES, *refining),
        "add-to": ("--add-to", "p.safetensors", *refining),
        "no-probes": ("--no-probes",),
    }[way]
    done = headprof(place, *LEARN, *more)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stderr.splitlines()]
    assert "Top reconstruction heads" in lines
    profile = HeadProfile.load(place / "new.safetensors")
    learning = Learning.of(profile.metadata)
    assert learning is not None and learning.texts == 2 and learning.lengths == (320,)
    if way == "no-probes":
        assert "all heads keep weight of headkv-r2" in lines and learning.mixes == ()
    else:
        assert learning.probes == 1 and len(learning.mixes) == 5
        assert "Learned budgets, mixed with headkv-r2's by what was lost on 1 probes" in lines
    for number, share in enumerate(profile.shares_together):
        weight = learning.mixes[number] if number < len(learning.mixes) else 0
        assert any(f"{line} ".startswith(f"{share} {weight:g} ") for line in lines)
    assert done.stdout.strip() == "new.safetensors"


# A run for more probes.


SCORE = ("score", "--model", "tiny", *PROBES, "-o", "p.safetensors")


def scored(place, notes, **parts):
    """A profile from probes with what was learned in it, as written; `notes` say how."""
    done = headprof(place, *SCORE)
    assert done.returncode == 0, done.stderr
    made, drawn = HeadProfile.load(place / "p.safetensors"), random_profile(tiny_model())
    scores = {**made.scores, "reconstruction": drawn.scores["retrieval"]}
    errors = {**made.standard_errors, "reconstruction": drawn.scores["reasoning"]}
    metadata = {**made.metadata, **({} if notes is None else {NOTE: json.dumps(notes)})}
    parts = {"scores": scores, "standard_errors": errors, "kept_shares": drawn.kept_shares} | parts
    profile = replace(made, metadata=metadata, **parts)
    profile.save(place / "p.safetensors")
    return profile


@pytest.mark.parametrize("notes", [None, NOTES, MIXED | {"mixes": [0, 0]}])
def test_more_probes_leave_what_was_learned(place, notes):
    before = scored(place, notes)
    done = headprof(place, *SCORE, "--resume", "--probes", "8")
    assert done.returncode == 0 and "What p.safetensors has learned from repeated texts stays in it." in done.stderr
    after = HeadProfile.load(place / "p.safetensors")
    assert torch.equal(after.kept_shares, before.kept_shares)
    assert torch.equal(after.scores["reconstruction"], before.scores["reconstruction"])
    assert torch.equal(after.standard_errors["reconstruction"], before.standard_errors["reconstruction"])
    assert after.metadata.get(NOTE) == before.metadata.get(NOTE)
    assert sum(after.probes_used.values()) > sum(before.probes_used.values())
    (place / "p.safetensors").unlink()
    assert headprof(place, *SCORE, "--resume", "--probes", "8").returncode == 0
    alone = HeadProfile.load(place / "p.safetensors")
    assert alone.kinds == tuple(kind for kind in after.kinds if kind != "reconstruction") and alone.kept_shares is None
    assert all(torch.equal(alone.scores[kind], after.scores[kind]) for kind in alone.kinds)


def test_scores_are_learned_without_budgets_too(place):
    before = scored(place, None, kept_shares=None)
    assert headprof(place, *SCORE, "--resume", "--probes", "8").returncode == 0
    after = HeadProfile.load(place / "p.safetensors")
    assert torch.equal(after.scores["reconstruction"], before.scores["reconstruction"]) and after.kept_shares is None


def test_budgets_that_were_mixed_are_learned_again_or_kept_as_they_are(place):
    scored(place, MIXED)
    before = (place / "p.safetensors").read_bytes()
    done = headprof(place, *SCORE, "--resume", "--probes", "8")
    assert done.returncode == 2 and "add --reconstruction to learn them again, or move that file away" in done.stderr
    assert (place / "p.safetensors").read_bytes() == before
    learn = ("--resume", "--probes", "8", "--reconstruction", "--no-refine", "--texts", "1", "--text-lengths", "320")
    assert headprof(place, *SCORE, *learn).returncode == 0
    learning = Learning.of(HeadProfile.load(place / "p.safetensors").metadata)
    assert learning.texts == 1 and learning.probes == 1


@pytest.mark.parametrize("other", [{"model_name": "other"}, {"layers": 3}])
def test_what_another_model_has_learned_does_not_stay(place, other):
    model = tiny_model(layers=other.get("layers", 2))
    replace(random_profile(model), model_name=other.get("model_name", "tiny")).save(place / "p.safetensors")
    done = headprof(place, *SCORE, "--resume")
    assert done.returncode == 0 and "The budgets learned for p.safetensors go with it" in done.stderr
    assert HeadProfile.load(place / "p.safetensors").kept_shares is None
