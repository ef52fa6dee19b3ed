"""The profile file and its checks, finding it, KV-head scores, comparing profiles, and the papers' JSON and CSV."""

import json
import math
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from support.profiles import SHAPE, small_profile

from headprof.errors import HeadprofError, ProfileError, UsageError
from headprof.models.shape import HeadShape
from headprof.profile import finding as profile_module
from headprof.profile.csv_table import import_csv, read_csv, write_csv
from headprof.profile.finding import find_profile, profile_filename
from headprof.profile.head_profile import HeadProfile
from headprof.profile.papers_json import (
    import_papers_json,
    read_papers_json,
    read_papers_samples,
    write_papers_json,
)
from headprof.utils.ranks import spearman, top_overlap
from headprof.utils.tensor_files import CHECKSUM_NAMES

make_profile = partial(
    small_profile,
    intervals={},
    metadata={"seed": "7", "settings": json.dumps({"lengths": [512, 1024]}), "command": "headprof score"},
)


def parts_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


# The file


def test_round_trip_keeps_every_bit(tmp_path):
    profile, path = make_profile(), tmp_path / "new" / "folder" / "p.safetensors"
    profile.save(path)
    loaded = HeadProfile.load(path, SHAPE)
    for table, original in ((loaded.scores, profile.scores), (loaded.standard_errors, profile.standard_errors)):
        assert table.keys() == original.keys()
        for kind in table:
            assert table[kind].dtype == torch.float32
            assert table[kind].numpy().tobytes() == original[kind].numpy().tobytes()
    assert (loaded.model_name, loaded.shape) == (profile.model_name, profile.shape)
    assert (loaded.probes_used, loaded.metadata) == (profile.probes_used, profile.metadata)
    assert loaded.settings == {"lengths": [512, 1024]}
    assert loaded.digest() == profile.digest()


def test_the_file_holds_what_the_format_says(tmp_path):
    make_profile().save(tmp_path / "p.safetensors")
    tensors, metadata = parts_of(tmp_path / "p.safetensors")
    assert set(tensors) == {"retrieval", "reasoning", "retrieval_se", "reasoning_se", "probes_used"}
    assert tensors["probes_used"].dtype == torch.int64
    assert tensors["probes_used"].tolist() == [40, 31]
    assert metadata["format"] == "headprof.profile"
    assert metadata["format_version"] == "2"
    assert metadata["model"] == "org/Small-Model"
    assert json.loads(metadata["fingerprint"]) == SHAPE.to_dict()


def test_intervals_round_trip_and_version_1_without_them_is_read(tmp_path):
    low, high = torch.zeros(5, 6), torch.full((5, 6), 2.0)
    profile = replace(make_profile(), intervals={"reasoning": (low, high)})
    profile.save(tmp_path / "p.safetensors")
    loaded = HeadProfile.load(tmp_path / "p.safetensors")
    assert list(loaded.intervals) == ["reasoning"]
    assert torch.equal(loaded.intervals["reasoning"][0], low) and torch.equal(loaded.intervals["reasoning"][1], high)
    make_profile().save(tmp_path / "old.safetensors")
    tensors, metadata = parts_of(tmp_path / "old.safetensors")
    older = {name: text for name, text in metadata.items() if name not in CHECKSUM_NAMES} | {"format_version": "1"}
    save_file(tensors, tmp_path / "old.safetensors", older)
    assert HeadProfile.load(tmp_path / "old.safetensors").intervals == {}


def test_intervals_that_contradict_are_refused():
    low, high = torch.zeros(5, 6), torch.ones(5, 6)
    with pytest.raises(ValueError, match="end before they begin"):
        replace(make_profile(), intervals={"retrieval": (high, low)})
    with pytest.raises(ValueError, match="lower interval ends have shape"):
        replace(make_profile(), intervals={"retrieval": (low[:2], high)})
    only = HeadProfile("m", SHAPE, {"retrieval": torch.ones(5, 6)})
    with pytest.raises(ValueError, match="reasoning intervals but no reasoning scores"):
        replace(only, intervals={"reasoning": (low, high)})


def test_a_profile_of_one_kind_round_trips_and_says_what_it_lacks(tmp_path):
    retrieval = HeadProfile("m", SHAPE, {"retrieval": torch.ones(5, 6)})
    retrieval.save(tmp_path / "p.safetensors")
    loaded = HeadProfile.load(tmp_path / "p.safetensors")
    assert loaded.kinds == ("retrieval",)
    assert (loaded.standard_errors, loaded.probes_used) == ({}, {})
    with pytest.raises(ProfileError, match=r"holds no reasoning scores.*`headprof score --model m`"):
        _ = loaded.reasoning


def test_a_view_of_a_larger_tensor_is_saved_alone(tmp_path):
    wide = torch.rand(6, 5)
    HeadProfile("m", SHAPE, {"retrieval": wide.T}).save(tmp_path / "p.safetensors")
    assert torch.equal(HeadProfile.load(tmp_path / "p.safetensors").retrieval, wide.T)


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "p.safetensors"
    make_profile(seed=1).save(path)
    before = path.read_bytes()

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(HeadprofError, match="no space left"):
        make_profile(seed=2).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.safetensors"]


def test_digest_depends_on_scores_and_shape_alone():
    profile = make_profile()
    assert replace(profile, metadata={}, standard_errors={}).digest() == profile.digest()
    assert make_profile(seed=1).digest() != profile.digest()
    assert replace(profile, shape=replace(SHAPE, num_kv_heads=3)).digest() != profile.digest()
    swapped = {"retrieval": profile.reasoning, "reasoning": profile.retrieval}
    assert replace(profile, scores=swapped).digest() != profile.digest()


@pytest.mark.parametrize("text", ["", "not json", "[1]", "null"])
def test_unusable_settings_are_empty(text):
    assert replace(make_profile(), metadata={"settings": text}).settings == {}


# Damage


def change(name, edit):
    def apply(tensors, metadata):
        tensors[name] = edit(tensors[name])

    return apply


def poke(value):
    def edit(tensor):
        tensor[2, 3] = value
        return tensor

    return edit


def remove(*names):
    def apply(tensors, metadata):
        for name in names:
            tensors.pop(name)

    return apply


def note(key, value):
    def apply(tensors, metadata):
        metadata[key] = value

    return apply


def fingerprint(**fields):
    return note("fingerprint", json.dumps(SHAPE.to_dict() | fields))


DAMAGE = {
    "another format": (note("format", "other"), "not a head profile"),
    "a newer version": (
        note("format_version", "7"),
        "version 7 where this headprof reads 1, 2, 3, 4, 5 and 6: update",
    ),
    "score not a number": (change("retrieval", poke(math.nan)), "retrieval scores are not all finite"),
    "score infinite": (change("reasoning", poke(math.inf)), "reasoning scores are not all finite"),
    "score negative": (change("reasoning", poke(-0.1)), "reasoning scores are not all zero or more"),
    "error not a number": (change("retrieval_se", poke(math.nan)), "retrieval standard errors are not all finite"),
    "wrong type": (change("retrieval", torch.Tensor.double), "retrieval scores are float64, not float32"),
    "half precision": (change("reasoning_se", torch.Tensor.half), "reasoning standard errors are float16"),
    "layer lost": (change("retrieval", lambda t: t[1:].clone()), r"have shape \[4, 6\] where the fingerprint says \[5"),
    "transposed": (change("reasoning", lambda t: t.T.contiguous()), r"reasoning scores have shape \[6, 5\]"),
    "error of other shape": (change("reasoning_se", torch.Tensor.flatten), r"errors have shape \[30\]"),
    "no scores": (remove("retrieval", "reasoning", "retrieval_se", "reasoning_se"), "it holds no scores"),
    "one kind lost": (remove("reasoning"), "reasoning standard errors but no reasoning scores"),
    "kind lost with its errors": (remove("reasoning", "reasoning_se"), "reasoning probes but no reasoning scores"),
    "counts lost": (remove("probes_used"), "probes_used is not 2 int64 counts"),
    "counts of other type": (change("probes_used", torch.Tensor.float), "probes_used is not 2 int64 counts"),
    "one count": (change("probes_used", lambda t: t[:1].clone()), "probes_used is not 2 int64 counts"),
    "negative count": (change("probes_used", torch.neg), "counts fewer than zero probes"),
    "stranger": (lambda tensors, metadata: tensors.update(speed=torch.ones(2)), "unknown tensor speed"),
    "fingerprint of other heads": (fingerprint(num_heads=8), "where the fingerprint says"),
    "impossible groups": (fingerprint(num_kv_heads=4), "6 query heads for 4 KV heads"),
    "no KV heads": (fingerprint(num_kv_heads=0), "6 query heads for 0 KV heads"),
    "fingerprint not JSON": (note("fingerprint", "{"), "fingerprint is missing or unreadable"),
    "fingerprint not an object": (note("fingerprint", "null"), "fingerprint is missing or unreadable"),
    "fingerprint field lost": (note("fingerprint", "{}"), "fingerprint is missing or unreadable"),
    "fingerprint field not a number": (fingerprint(head_dim="wide"), "fingerprint is missing or unreadable"),
    "model name lost": (lambda tensors, metadata: metadata.pop("model"), "model name or fingerprint is missing"),
}


@pytest.mark.parametrize(("edit", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_every_damage_is_named(tmp_path, edit, message):
    path = tmp_path / "p.safetensors"
    make_profile().save(path)
    tensors, metadata = parts_of(path)
    edit(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(ProfileError, match=message) as caught:
        HeadProfile.load(path)
    assert "p.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 5, 100])
def test_a_file_cut_short_in_its_header(tmp_path, kept):
    path = tmp_path / "p.safetensors"
    make_profile().save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ProfileError, match="is not a safetensors file"):
        HeadProfile.load(path)


@pytest.mark.parametrize("kept", [-1, -400])
def test_a_file_cut_short_in_its_tensors(tmp_path, kept):
    path = tmp_path / "p.safetensors"
    make_profile().save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ProfileError, match="is cut short or altered"):
        HeadProfile.load(path)


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "p.safetensors"
    torch.save({"retrieval": torch.ones(5, 6)}, path)
    with pytest.raises(ProfileError, match="is not a safetensors file"):
        HeadProfile.load(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ProfileError, match="is a safetensors file but not a head profile"):
        HeadProfile.load(path)
    for missing in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(ProfileError, match="There is no profile file at"):
            HeadProfile.load(missing)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def denied(path, framework):
        raise PermissionError(13, "Permission denied")

    make_profile().save(tmp_path / "p.safetensors")
    monkeypatch.setattr("headprof.utils.tensor_files.safe_open", denied)
    with pytest.raises(ProfileError, match=r"cannot be read .*Permission denied.*: check its permissions"):
        HeadProfile.load(tmp_path / "p.safetensors")


def test_a_profile_of_another_model_says_what_differs_and_which_command_mends_it(tmp_path):
    path = tmp_path / "p.safetensors"
    make_profile().save(path)
    other = replace(SHAPE, num_layers=30, vocab_size=1000)
    with pytest.raises(ProfileError) as caught:
        HeadProfile.load(path, other, model_name="org/Other Model")
    assert str(caught.value) == (
        f"The profile {path} is for another model (layers 5 instead of 30, vocabulary size 49152 instead of 1000): "
        "choose another, or run `headprof score --model 'org/Other Model'`."
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": {}}, "holds no scores"),
        ({"scores": {"retrieval": torch.ones(5, 7), "reasoning": torch.ones(5, 6)}}, r"retrieval scores have shape"),
        ({"scores": {"speed": torch.ones(5, 6)}, "standard_errors": {}, "probes_used": {}}, "unknown kind 'speed'"),
        ({"metadata": {"format": "mine"}}, "may not hold 'format'"),
        ({"probes_used": {"retrieval": -1}}, "fewer than zero"),
    ],
)
def test_a_contradictory_profile_cannot_be_made(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(make_profile(), **changes)


# Scores


@st.composite
def grouped_scores(draw):
    num_layers, num_kv_heads, group = (draw(st.integers(1, high)) for high in (4, 5, 4))
    num_heads = num_kv_heads * group
    values = draw(
        st.lists(st.floats(0, 1e6, width=32), min_size=num_layers * num_heads, max_size=num_layers * num_heads)
    )
    shape = HeadShape("M", num_layers, num_heads, num_kv_heads, 8, 100)
    return HeadProfile("m", shape, {"reasoning": torch.tensor(values).view(num_layers, num_heads)})


@given(grouped_scores())
@settings(max_examples=60, deadline=None)
def test_kv_head_scores_match_a_loop_over_the_group(profile):
    shape = profile.shape
    best, mean = (profile.kv_head_scores("reasoning", aggregate) for aggregate in ("max", "mean"))
    assert best.shape == mean.shape == (shape.num_layers, shape.num_kv_heads)
    for layer in range(shape.num_layers):
        for kv_head in range(shape.num_kv_heads):
            members = [h for h in range(shape.num_heads) if h // shape.group_size == kv_head]
            values = [float(profile.reasoning[layer, head]) for head in members]
            assert float(best[layer, kv_head]) == max(values)
            assert float(mean[layer, kv_head]) == pytest.approx(sum(values) / len(values), rel=1e-5)


@given(grouped_scores(), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_top_heads_match_a_sort(profile, k):
    heads = [
        (layer, head, float(profile.reasoning[layer, head]))
        for layer in range(profile.shape.num_layers)
        for head in range(profile.shape.num_heads)
    ]
    assert profile.top_heads("reasoning", k) == sorted(heads, key=lambda item: (-item[2], item[0], item[1]))[:k]


def test_unknown_words_are_usage_errors():
    profile = make_profile()
    with pytest.raises(UsageError, match="choose retrieval, reasoning, write or"):
        profile.top_heads("speed", 3)
    with pytest.raises(UsageError, match="choose max or mean"):
        profile.kv_head_scores("retrieval", "median")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="0 or more"):
        profile.top_heads("retrieval", -1)


# Finding a profile


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", "Meta-Llama-3-8B-Instruct.safetensors"),
        ("gpt2", "gpt2.safetensors"),
        ("/models/Qwen2.5-0.5B/", "Qwen2.5-0.5B.safetensors"),
        ("./smol.Q4_1.gguf", "smol.Q4_1.safetensors"),
    ],
)
def test_profile_filename(model, name):
    assert profile_filename(model) == name


def test_profile_filename_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my-model" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "my-model")
    assert profile_filename(".") == "my-model.safetensors"
    monkeypatch.chdir("sub")
    assert profile_filename("..") == "my-model.safetensors"


def test_profiles_are_found_in_the_documented_order(tmp_path, monkeypatch):
    work, data, shipped = (tmp_path / name for name in ("work", "data", "shipped"))
    for folder in (work / "profiles", data / "profiles", shipped):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HEADPROF_DATA", str(data))
    monkeypatch.setattr(profile_module, "asset_dir", lambda name: shipped)
    mine = tmp_path / "mine.safetensors"
    mine.touch()

    assert find_profile("org/model", mine) == mine
    for folder in (Path("profiles"), data / "profiles", shipped):
        found = folder / "model.safetensors"
        assert find_profile("org/model") == found
        found.unlink()
    with pytest.raises(ProfileError, match=r"for org/model: run `headprof score --model org/model`\.$"):
        find_profile("org/model")
    with pytest.raises(ProfileError, match=r"at gone\.st: .*`headprof score --model org/model -o gone\.st`"):
        find_profile("org/model", Path("gone.st"))
    with pytest.raises(ProfileError, match=r"for Q4: run `headprof score --model /my/Q4\.gguf`\.$"):
        find_profile("Q4", given="/my/Q4.gguf")


def test_the_users_folder_without_the_variable(monkeypatch):
    monkeypatch.delenv("HEADPROF_DATA", raising=False)
    folder = profile_module.user_profile_dir()
    assert folder.is_absolute()
    assert (folder.name, folder.parent.name) == ("profiles", "headprof")


# Comparing


def brute_force_ranks(values):
    return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]


def pearson(xs, ys):
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    over = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return over / math.sqrt(sum((x - mean_x) ** 2 for x in xs) * sum((y - mean_y) ** 2 for y in ys))


def test_spearman_by_hand():
    assert spearman(torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 20, 300, 4000])) == pytest.approx(1)
    assert spearman(torch.tensor([1.0, 2, 3, 4]), torch.tensor([4.0, 3, 2, 1])) == pytest.approx(-1)
    # Without ties: 1 - 6 * sum(d^2) / (n (n^2 - 1)), with differences 1, -1, 1, -1.
    assert spearman(torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[2.0, 1], [4, 3]])) == pytest.approx(0.6)
    # Ranks 1.5, 1.5, 3 against 1, 2, 3.
    assert spearman(torch.tensor([0.0, 0, 1]), torch.tensor([0.0, 1, 2])) == pytest.approx(math.sqrt(0.75))
    assert math.isnan(spearman(torch.zeros(4), torch.arange(4.0)))


@given(st.integers(2, 30), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_spearman_matches_brute_force_with_ties(size, seed):
    rng = random.Random(seed)
    a, b = ([float(rng.randrange(6)) for _ in range(size)] for _ in range(2))
    got = spearman(torch.tensor(a), torch.tensor(b))
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(got)
    else:
        assert got == pytest.approx(pearson(brute_force_ranks(a), brute_force_ranks(b)), abs=1e-12)


def test_top_overlap_by_hand():
    a, b = torch.tensor([[0.9, 0.8], [0.1, 0.0]]), torch.tensor([[0.9, 0.0], [0.8, 0.1]])
    assert [top_overlap(a, b, k) for k in (1, 2, 3, 4, 99)] == [1.0, 0.5, 2 / 3, 1.0, 1.0]
    assert top_overlap(a, b, 0) == 1.0


def test_comparing_needs_equal_shapes():
    for compare in (spearman, lambda a, b: top_overlap(a, b, 1)):
        with pytest.raises(ValueError, match=r"\[2, 3\] and \[3, 2\]"):
            compare(torch.rand(2, 3), torch.rand(3, 2))


# The papers' JSON


def write_json(path: Path, table) -> Path:
    path.write_text(json.dumps(table))
    return path


def test_papers_json_is_read_in_any_order(tmp_path):
    table = {"1-2": [0.5, 1.5], "0-0": [0, 1], "0-1": [0, 0], "1-0": [3, 3], "0-2": [0.25, 0.25], "1-1": [2, 4]}
    path = write_json(tmp_path / "heads.json", table)
    scores = read_papers_json(path)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[0.5, 0, 0.25], [3, 3, 1]]
    assert read_papers_samples(path).shape == (2, 3, 2)


def test_papers_json_round_trip_on_one_line(tmp_path):
    path = tmp_path / "heads.json"
    scores = make_profile().retrieval
    write_papers_json(path, scores)
    assert torch.equal(read_papers_json(path), scores)
    assert "\n" not in path.read_text()


def test_papers_json_becomes_a_profile_with_errors_and_counts(tmp_path):
    shape = HeadShape("M", 2, 2, 1, 8, 10)
    table = {"0-0": [1, 2, 3], "0-1": [0, 0, 0], "1-0": [2, 2, 5], "1-1": [0, 1, 0]}
    profile = import_papers_json({"reasoning": write_json(tmp_path / "heads.json", table)}, "m", shape)
    assert profile.kinds == ("reasoning",)
    assert profile.probes_used == {"reasoning": 3}
    assert profile.reasoning[1].tolist() == pytest.approx([3, 1 / 3])
    # Standard deviation 1 over three probes.
    assert float(profile.standard_errors["reasoning"][0, 0]) == pytest.approx(1 / math.sqrt(3))
    assert profile.metadata["imported_from"] == "heads.json"

    single = {key: values[:1] for key, values in table.items()}
    profile = import_papers_json({"retrieval": write_json(tmp_path / "one.json", single)}, "m", shape)
    assert (profile.standard_errors, profile.probes_used) == ({}, {})
    with pytest.raises(ProfileError, match=r"2 layers of 2 heads .* 5 of 6"):
        import_papers_json({"retrieval": tmp_path / "one.json"}, "m", SHAPE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1, 2]", "holds no head scores"),
        ("{}", "holds no head scores"),
        ('{"0-0": [1], "head 3": [1]}', "names a head 'head 3'"),
        ('{"0-0": [1], "-1-0": [1]}', "names a head '-1-0'"),
        ('{"0-0": [1], "0-1-2": [1]}', "names a head '0-1-2'"),
        ('{"0-0": [1], "0-2": [1]}', "no score for head 0-1"),
        ('{"0-0": [1], "0-1": [1], "1-0": [1]}', "no score for head 1-1 among 2 layers of 2 heads"),
        ('{"0-0": [1, 2], "0-1": [1]}', "1 scores for head 0-1 where head 0-0 has 2"),
        ('{"0-0": []}', "no usable scores for head 0-0"),
        ('{"0-0": 0.5}', "no usable scores for head 0-0"),
        ('{"0-0": ["high"]}', "no usable scores for head 0-0"),
        ('{"0-0": [true]}', "no usable scores for head 0-0"),
        ('{"0-0": [NaN]}', "no usable scores for head 0-0"),
        ('{"0-0": [-1]}', "no usable scores for head 0-0"),
        ('{"0-0": [1' + "0" * 400 + "]}", "no usable scores for head 0-0"),
    ],
)
def test_papers_json_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "heads.json"
    path.write_text(text)
    with pytest.raises(ProfileError, match=message) as caught:
        read_papers_json(path)
    assert str(path) in str(caught.value)


def test_unreadable_text_files(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x9f")
    for read in (read_papers_json, read_csv):
        with pytest.raises(ProfileError, match="is not UTF-8 text"):
            read(tmp_path / "binary")
        with pytest.raises(ProfileError, match="cannot be read"):
            read(tmp_path / "missing")


# CSV


def test_csv_round_trip_keeps_every_bit(tmp_path):
    profile, path = make_profile(), tmp_path / "heads.csv"
    write_csv(path, profile)
    lines = path.read_text().splitlines()
    assert lines[0] == "layer,head,retrieval,retrieval_se,reasoning,reasoning_se"
    assert len(lines) == 1 + 5 * 6
    loaded = import_csv(path, profile.model_name, SHAPE)
    for kind in profile.kinds:
        assert torch.equal(loaded.scores[kind], profile.scores[kind])
        assert torch.equal(loaded.standard_errors[kind], profile.standard_errors[kind])
    with pytest.raises(ProfileError, match="5 layers of 6 heads where the model has 5 of 8"):
        import_csv(path, "m", replace(SHAPE, num_heads=8))


def test_csv_of_one_kind_leaves_the_other_columns_empty(tmp_path):
    path = tmp_path / "heads.csv"
    write_csv(path, HeadProfile("m", SHAPE, {"reasoning": torch.full((5, 6), 0.1)}))
    assert path.read_text().splitlines()[1] == "0,0,,,0.1,"
    scores, errors = read_csv(path)
    assert (list(scores), errors) == (["reasoning"], {})


def test_csv_rows_and_columns_may_be_in_any_order(tmp_path):
    path = tmp_path / "heads.csv"
    path.write_text("\ufeffretrieval,note,head,layer\n0.5,x,1,0\n0.25,,0,0\n", encoding="utf-8")
    scores, errors = read_csv(path)
    assert scores["retrieval"].tolist() == [[0.25, 0.5]]
    assert errors == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a table of head scores"),
        ("layer,head\n0,0\n", "is not a table of head scores"),
        ("layer,retrieval\n0,1\n", "is not a table of head scores"),
        ("layer,head,retrieval\n0,zero,1\n", "names a head '0-zero'"),
        ("layer,head,retrieval\n0\n", "names a head '0-None'"),
        ("layer,head,retrieval\n0,0,1\n0,0,1\n", "lists a head twice"),
        ("layer,head,retrieval\n0,0,1\n1,1,1\n", "no score for head 0-1"),
        ("layer,head,retrieval\n0,0,1\n0,1,\n", "has '' as retrieval of head 0-1"),
        ("layer,head,retrieval\n0,0,high\n", "has 'high' as retrieval"),
        ("layer,head,retrieval\n0,0,nan\n", "has 'nan' as retrieval"),
        ("layer,head,retrieval\n0,0,1e300\n", "has '1e300' as retrieval"),
        ("layer,head,retrieval,retrieval_se\n0,0,1,-1\n", "has '-1' as retrieval_se"),
        ("layer,head,retrieval,retrieval_se\n0,0,,1\n", "holds no scores"),
    ],
)
def test_csv_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "heads.csv"
    path.write_text(text)
    with pytest.raises(ProfileError, match=message):
        read_csv(path)


def test_a_number_too_long_for_python_is_a_malformed_file(tmp_path):
    path = tmp_path / "heads.json"
    path.write_text('{"0-0": [1' + "0" * (sys.get_int_max_str_digits() + 1) + "]}")
    with pytest.raises(ProfileError, match="is not valid JSON"):
        read_papers_json(path)
