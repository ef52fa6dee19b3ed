"""Kinds of score beside retrieval and reasoning: in the file, in CSV, in pictures and tables, and in budgets."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.commands import headprof
from support.profiles import SHAPE, random_profile, small_profile
from support.tiny_models import tiny_model

from headprof.compression.methods.table import find_method
from headprof.compression.session import make_plan
from headprof.errors import ProfileError, UsageError
from headprof.plots.heads import heatmap
from headprof.plots.heads_page import page_data
from headprof.profile.comparing import compare, compare_profiles, compare_within
from headprof.profile.csv_table import import_csv, write_csv
from headprof.profile.head_profile import HeadProfile
from headprof.profile.kinds import KINDS, PROBE_KINDS
from headprof.utils.tensor_files import CHECKSUM_NAMES
from headprof.validation.head_sets import checked_scores

OTHERS = [kind for kind in KINDS if kind not in PROBE_KINDS]


def profile_of(kinds=KINDS, seed=0) -> HeadProfile:
    counted = [kind for kind in kinds if kind != "reconstruction"]
    return small_profile(seed, kinds=kinds, probes_used=dict.fromkeys(counted, 12))


def version_of(path) -> str:
    with safe_open(path, "pt") as file:
        return file.metadata()["format_version"]


@pytest.mark.parametrize("kinds", [KINDS, *((kind,) for kind in OTHERS), ("reasoning", OTHERS[0])])
def test_a_profile_of_any_kinds_round_trips(tmp_path, kinds):
    profile = profile_of(kinds)
    profile.save(tmp_path / "p.safetensors")
    assert version_of(tmp_path / "p.safetensors") == "4"
    loaded = HeadProfile.load(tmp_path / "p.safetensors", SHAPE)
    assert loaded.kinds == tuple(kinds) and loaded.probes_used == profile.probes_used
    for kind in kinds:
        assert torch.equal(loaded.scores[kind], profile.scores[kind])
        assert torch.equal(loaded.standard_errors[kind], profile.standard_errors[kind])
        assert all(map(torch.equal, loaded.intervals[kind], profile.intervals[kind]))
    assert loaded.digest() == profile.digest()


def test_what_fits_into_an_older_version_is_written_as_that(tmp_path):
    path = tmp_path / "p.safetensors"
    profile_of(PROBE_KINDS).save(path)
    assert version_of(path) == "2" and load_file(path)["probes_used"].tolist() == [12, 12]
    kept = torch.rand(1, SHAPE.num_layers, SHAPE.num_kv_heads)
    replace(profile_of(PROBE_KINDS), kept_shares=kept).save(path)
    assert version_of(path) == "3"
    assert HeadProfile.load(path).kinds == PROBE_KINDS


def test_an_older_version_counts_probes_of_two_kinds(tmp_path):
    path = tmp_path / "p.safetensors"
    profile_of().save(path)
    with safe_open(path, "pt") as file:
        metadata = {name: text for name, text in file.metadata().items() if name not in CHECKSUM_NAMES}
    save_file(load_file(path), path, metadata | {"format_version": "3"})
    with pytest.raises(ProfileError, match="probes_used is not 2 int64 counts"):
        HeadProfile.load(path)


def test_a_kind_changes_the_digest_and_its_scores_do():
    assert profile_of().digest() != profile_of(PROBE_KINDS).digest()
    changed = {kind: scores + (kind == OTHERS[0]) for kind, scores in profile_of().scores.items()}
    assert replace(profile_of(), scores=changed, intervals={}).digest() != profile_of().digest()


@pytest.mark.parametrize("kinds", [KINDS, *((kind,) for kind in OTHERS)])
def test_csv_holds_every_kind(tmp_path, kinds):
    profile, path = profile_of(kinds), tmp_path / "heads.csv"
    write_csv(path, profile)
    header = path.read_text().splitlines()[0].split(",")
    assert header[:6] == ["layer", "head", "retrieval", "retrieval_se", "reasoning", "reasoning_se"]
    assert all(kind in header and f"{kind}_se" in header for kind in kinds)
    loaded = import_csv(path, profile.model_name, SHAPE)
    assert loaded.kinds == tuple(kinds)
    for kind in kinds:
        assert torch.equal(loaded.scores[kind], profile.scores[kind])
        assert all(map(torch.equal, loaded.intervals[kind], profile.intervals[kind]))


@pytest.mark.parametrize("kind", OTHERS)
def test_profiles_are_compared_by_a_kind_that_both_hold(kind):
    one, two = profile_of(seed=1), profile_of(("retrieval", kind), seed=2)
    assert list(compare_profiles(one, two)) == ["retrieval", kind]
    assert compare_profiles(one, two, kind)[kind].spearman == compare(one.scores[kind], two.scores[kind]).spearman


def test_each_two_kinds_of_a_profile_are_compared():
    profile = profile_of()
    found = compare_within(profile)
    assert len(found) == len(KINDS) * (len(KINDS) - 1) // 2
    assert found["retrieval", "write"].spearman == compare(profile.retrieval, profile.scores["write"]).spearman


def test_show_tells_of_every_kind(tmp_path):
    profile, path = profile_of(), tmp_path / "p.safetensors"
    profile.save(path)
    text = headprof(tmp_path, "profile", "show", path.name).stdout
    for kind in KINDS:
        assert f"Top {kind} heads" in text
    for (one, other), agreement in compare_within(profile).items():
        assert f"{one.capitalize()} and {other} scores: Spearman {agreement.spearman:.3f}" in text
    shown = json.loads(headprof(tmp_path, "profile", "show", path.name, "--which", "write", "--json").stdout)
    assert list(shown["top"]) == ["write"] and shown["kinds"] == list(KINDS)
    assert shown["kinds_compared"]["retrieval_and_reasoning"] == shown["retrieval_and_reasoning"]
    best = shown["top"]["write"][0]
    assert (best["layer"], best["head"]) == profile.top_heads("write", 1)[0][:2]


@pytest.mark.parametrize(
    ("which", "marked"), [("all", KINDS), ("both", PROBE_KINDS), ("write", ("write",)), ("reasoning", ("reasoning",))]
)
def test_a_heatmap_shows_the_kinds_asked_for(tmp_path, which, marked):
    path = heatmap(profile_of(), tmp_path / "heads.svg", which=which, top=2)
    assert set(re.findall(r'id="top-(\w+)-\d+"', path.read_text())) == set(marked)


def test_a_page_shows_every_kind(tmp_path):
    data = page_data(profile_of(), KINDS, 3)
    assert [kind["name"] for kind in data["kinds"]] == list(KINDS)
    assert [kind["unit"] for kind in data["kinds"]] == ["logits" if kind == "write" else "" for kind in KINDS]
    assert "12 retrieval + 12 reasoning probes" in data["facts"]
    assert "12 write probes" in page_data(profile_of(("write",)), ["write"], 3)["facts"]
    assert heatmap(profile_of(OTHERS[:1]), tmp_path / "heads.html").is_file()
    with pytest.raises(ProfileError, match="holds no retrieval scores"):
        heatmap(profile_of(OTHERS[:1]), tmp_path / "heads.svg", which="both")


def test_every_kind_is_checked_and_those_of_other_profiles_go_by_their_names():
    profile, other = profile_of(), profile_of(("write",), seed=1)
    found = checked_scores(profile, {"other": other})
    assert [(each.name, each.kind, each.own) for each in found] == [
        *((kind, kind, True) for kind in KINDS),
        ("write of other", "write", False),
    ]
    assert torch.equal(found[2].values, profile.scores["write"])
    assert torch.equal(found[-1].values, other.scores["write"])


# Budgets.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["headkv", "headkv-r2", "headkv-ems", "headkv-kvzip"])
def test_heads_share_a_budget_by_the_kind_that_is_named(method, kind):
    model = tiny_model()
    profile = random_profile(model, kinds=KINDS)
    plan = make_plan(model, profile, method=f"{method}:scores={kind}")
    assert torch.equal(plan.scores, profile.kv_head_scores(kind))
    assert plan.method == find_method(f"{method}:profile_scores={kind}")
    assert "scores" not in plan.method.options() and plan.method.options()["profile_scores"] == kind


def test_a_profile_of_one_other_kind_is_enough():
    model = tiny_model()
    profile = random_profile(model, kinds=OTHERS[-1:])
    plan = make_plan(model, profile, method="headkv-r2", scores=OTHERS[-1])
    assert torch.equal(plan.scores, profile.kv_head_scores(OTHERS[-1]))


def test_a_kind_that_the_profile_lacks_is_refused_in_one_sentence():
    model = tiny_model()
    profile = random_profile(model, kinds=("reasoning",))
    with pytest.raises(ProfileError) as refused:
        make_plan(model, profile, method="headkv-r2:scores=write")
    assert str(refused.value) == (
        "The method 'headkv-r2:scores=write' spends its budget by write scores, which the profile of tiny does not "
        "hold: run `headprof score --model tiny`, or choose another kind, such as scores=reasoning."
    )


def test_a_kind_that_there_is_not_is_refused_before_any_profile():
    with pytest.raises(UsageError, match="no kind of head score named 'speed': choose retrieval, reasoning"):
        find_method("headkv-r2:scores=speed")
    with pytest.raises(ValueError, match="counts probes of reconstruction scores, which are from none"):
        small_profile(kinds=("reconstruction",), probes_used={"reconstruction": 3})
    with pytest.raises(UsageError, match="no parameter 'scores'"):
        find_method("snapkv:scores=write")
