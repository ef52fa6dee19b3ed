"""What a profile says of how it came by learned budgets: read, shown in lines, and shown when it is learned."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
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
PROBES = ("--probes", "4", "--lengths", "512", "--include-failed")


@pytest.mark.parametrize("way", ["probes", "add-to", "no-probes"])
def test_score_ends_with_what_was_learned(place, way):
    replace(random_profile(tiny_model()), model_name="tiny", kept_shares=None).save(place / "p.safetensors")
    more = {"probes": PROBES, "add-to": ("--add-to", "p.safetensors"), "no-probes": ("--no-probes",)}[way]
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
