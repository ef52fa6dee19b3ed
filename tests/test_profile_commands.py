"""`headprof profile`: other people's formats with intervals, comparisons, the list, and the Llama-3-8B profile."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import invoke
from support.profiles import SHAPE
from support.profiles import small_profile as make_profile
from support.tiny_models import ARCHITECTURES, save_tiny

from headprof.errors import ModelError, ProfileError, UsageError
from headprof.models.loading import load_model, model_shape, published_shape
from headprof.models.shape import HeadShape
from headprof.profile.comparing import OVERLAPS, compare, compare_profiles
from headprof.profile.csv_table import import_csv, write_csv
from headprof.profile.finding import find_profile, list_profiles
from headprof.profile.head_profile import HeadProfile
from headprof.profile.papers_json import import_papers_json, read_papers_json
from headprof.utils.assets import asset_dir

LLAMA_3 = "meta-llama/Meta-Llama-3-8B-Instruct"
# What meta-llama/Meta-Llama-3-8B-Instruct has as its config.json.
LLAMA_3_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
# By hand from the published lists: the mean of each, best first.
LLAMA_3_TOP = {
    "retrieval": "15-30 16-20 27-7 24-27 8-1 15-1 16-1 5-8 20-14 27-5 16-23 10-14 19-3 20-23 20-1 5-10 26-15 22-14 "
    "5-11 16-0",
    "reasoning": "15-30 8-11 16-1 8-1 20-1 24-27 20-26 17-29 13-18 20-14 20-23 9-27 27-7 14-19 17-24 15-29 17-21 16-19 "
    "16-8 14-22",
}


def papers_table(samples: torch.Tensor) -> dict[str, list[float]]:
    num_layers, num_heads, _ = samples.shape
    return {f"{i}-{j}": samples[i, j].tolist() for i in range(num_layers) for j in range(num_heads)}


def write_table(path: Path, samples: torch.Tensor) -> Path:
    path.write_text(json.dumps(papers_table(samples)))
    return path


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """An empty folder to run in, with no profiles of the user's own and no hub."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HEADPROF_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # its variable was read at import
    return tmp_path / "work"


@pytest.fixture
def headprof():
    """Run a `headprof profile` command; gives its exit code, its stdout and its stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        ended = invoke("profile", *arguments)
        return ended.exit_code, ended.stdout, ended.stderr

    return run


# Intervals of imported samples


def slow_interval(values: list[list[float]], resamples: int = 2000):
    """Interval ends of each head by loops: draw from the distinct probes, count each with all its repeats.

    `values` holds a list of head scores per probe.
    """
    distinct = sorted({tuple(probe) for probe in values})
    repeats = [sum(tuple(probe) == each for probe in values) for each in distinct]
    draws = torch.randint(len(distinct), (resamples, len(distinct)), generator=torch.Generator().manual_seed(0))
    low, high = [], []
    for head in range(len(values[0])):
        means = sorted(
            math.fsum(repeats[i] * distinct[i][head] for i in draw) / sum(repeats[i] for i in draw)
            for draw in draws.tolist()
        )
        for ends, share in ((low, 0.025), (high, 0.975)):
            index, part = divmod(share * (resamples - 1), 1)
            ends.append(means[int(index)] * (1 - part) + means[int(index) + 1] * part)
    return low, high


@pytest.mark.parametrize(("probes", "repeats"), [(2, 0), (7, 0), (6, 4)])
def test_intervals_match_a_loop(tmp_path, probes, repeats):
    samples = torch.rand(2, 3, probes, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    samples = torch.cat([samples, samples[..., :1].expand(2, 3, repeats)], dim=-1)
    file = write_table(tmp_path / "heads.json", samples)
    found = import_papers_json({"reasoning": file}, "m", HeadShape("M", 2, 3, 1, 8, 10)).intervals["reasoning"]
    for end, slow in zip(found, slow_interval(samples.flatten(0, 1).T.tolist()), strict=True):
        torch.testing.assert_close(end.flatten(), torch.tensor(slow))


def test_repeats_widen_errors_and_are_counted(tmp_path):
    samples = torch.rand(5, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    once = write_table(tmp_path / "once.json", samples)
    tripled = write_table(tmp_path / "tripled.json", samples.repeat(1, 1, 3))
    profile = import_papers_json({"retrieval": once, "reasoning": tripled}, "m", SHAPE)
    assert profile.probes_used == {"retrieval": 8, "reasoning": 24}
    assert profile.metadata["distinct_results"] == "reasoning 8"
    # Repeating every probe tells nothing new.
    torch.testing.assert_close(profile.standard_errors["retrieval"], profile.standard_errors["reasoning"])
    for end, same in zip(profile.intervals["retrieval"], profile.intervals["reasoning"], strict=True):
        torch.testing.assert_close(end, same)
    spread = samples.std(dim=-1) / 8**0.5
    torch.testing.assert_close(profile.standard_errors["retrieval"], spread.float())
    assert "distinct_results" not in import_papers_json({"reasoning": once}, "m", SHAPE).metadata


@pytest.mark.parametrize("probes", [1, 4])
def test_one_result_however_often_says_nothing_of_its_error(tmp_path, probes):
    file = write_table(tmp_path / "heads.json", torch.full((5, 6, probes), 0.5))
    profile = import_papers_json({"retrieval": file}, "m", SHAPE)
    assert (profile.standard_errors, profile.intervals) == ({}, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"0-0": [1], "0-1": [1], "0-0": [2]}', "is not valid JSON .a name stands in it twice"),
        ('{"0-0": [1], "0-1": [1], "00-0": [2]}', "lists a head twice"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_heads_named_twice_and_endless_nesting(tmp_path, text, message):
    (tmp_path / "heads.json").write_text(text)
    with pytest.raises(ProfileError, match=message):
        read_papers_json(tmp_path / "heads.json")


# CSV


def test_csv_keeps_intervals(tmp_path):
    profile = make_profile()
    profile = replace(profile, intervals={"reasoning": profile.intervals["reasoning"]})
    write_csv(tmp_path / "heads.csv", profile)
    header = (tmp_path / "heads.csv").read_text().splitlines()[0]
    assert header == "layer,head,retrieval,retrieval_se,reasoning,reasoning_se,reasoning_low,reasoning_high"
    loaded = import_csv(tmp_path / "heads.csv", "m", SHAPE)
    assert list(loaded.intervals) == ["reasoning"]
    for end, original in zip(loaded.intervals["reasoning"], profile.intervals["reasoning"], strict=True):
        assert torch.equal(end, original)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer,head,retrieval,retrieval_low\n0,0,1,1\n", "fills only one of the columns retrieval_low and"),
        ("layer,head,retrieval,retrieval_low,retrieval_high\n0,0,1,,2\n", "fills only one of the columns"),
        ("layer,head,retrieval,retrieval_low,retrieval_high\n0,0,1,3,2\n", "retrieval_low above the retrieval_high"),
        ("layer,head,retrieval,retrieval_low,retrieval_high\n0,0,1,x,2\n", "has 'x' as retrieval_low"),
        ('layer,head,retrieval\n0,0,"' + "1" * 140_000 + '"\n', "is not valid CSV"),
    ],
)
def test_csv_mistakes_with_intervals(tmp_path, text, message):
    (tmp_path / "heads.csv").write_text(text)
    with pytest.raises(ProfileError, match=message):
        import_csv(tmp_path / "heads.csv", "m", HeadShape("M", 1, 1, 1, 8, 10))


def test_an_interval_without_its_scores_is_left_out(tmp_path):
    (tmp_path / "heads.csv").write_text("layer,head,retrieval,reasoning_low,reasoning_high\n0,0,1,1,2\n")
    assert import_csv(tmp_path / "heads.csv", "m", HeadShape("M", 1, 1, 1, 8, 10)).intervals == {}


# The shape of a model without its weights


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_shape_needs_no_weights(tmp_path, arch):
    folder = save_tiny(tmp_path / arch, arch)
    loaded = load_model(str(folder), device="cpu").shape
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    assert model_shape(str(folder)) == loaded


def test_the_shape_of_a_gguf(tiny_gguf):
    assert model_shape(str(tiny_gguf)) == load_model(str(tiny_gguf), device="cpu").shape


def test_the_shape_of_the_embedded_model_needs_no_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADPROF_CACHE", str(tmp_path / "empty"))
    shipped = HeadProfile.load(asset_dir("profiles") / "SmolLM2-135M-Instruct.safetensors")
    assert model_shape() == model_shape("smollm2-135m-instruct") == shipped.shape
    assert not (tmp_path / "empty").exists()


def test_the_published_shape_of_llama_3_is_that_of_its_configuration(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_CONFIG))
    shape = HeadShape("LlamaForCausalLM", 32, 32, 8, 128, 128256)
    assert published_shape("llama-3-8b") == model_shape(str(tmp_path)) == shape


def test_a_model_that_is_no_decoder_has_no_shape(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ModelError, match="is not a decoder language model"):
        model_shape(str(tmp_path))


# Comparing


def slow_compare(a: list[float], b: list[float], width: int, k: int):
    """Rank correlation, overlaps, and what only one top k holds, from sorted lists."""

    def ranks(values):
        return [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]

    def top(values, count):
        return sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]

    x, y = ranks(a), ranks(b)
    mean = (len(a) - 1) / 2
    over = sum((p - mean) * (q - mean) for p, q in zip(x, y, strict=True))
    under = math.sqrt(sum((p - mean) ** 2 for p in x) * sum((q - mean) ** 2 for q in y))
    overlaps = {n: len({*top(a, n)} & {*top(b, n)}) / n for n in (1, 5, 10, 20, 50) if n <= len(a)}
    only_a = [(i // width, i % width) for i in top(a, k) if i not in top(b, k)]
    only_b = [(i // width, i % width) for i in top(b, k) if i not in top(a, k)]
    return over / under if under else math.nan, overlaps, only_a, only_b


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 90), st.integers(2, 300), st.integers(0, 10_000))
@settings(max_examples=80, deadline=None)
def test_compare_matches_sorted_lists(layers, heads, k, levels, seed):
    rng = random.Random(seed)
    a, b = ([float(rng.randrange(levels)) for _ in range(layers * heads)] for _ in range(2))
    found = compare(torch.tensor(a).view(layers, heads), torch.tensor(b).view(layers, heads), k)
    correlation, overlaps, only_a, only_b = slow_compare(a, b, heads, k)
    assert found.spearman == pytest.approx(correlation, abs=1e-9, nan_ok=True)
    assert found.overlaps == pytest.approx(overlaps)
    assert (found.only_first, found.only_second) == (only_a, only_b)
    assert (found.num_heads, found.k) == (len(a), min(k, len(a)))


def test_the_expected_overlap_is_what_shuffled_scores_have():
    generator = torch.Generator().manual_seed(0)
    fixed, *others = torch.rand(401, 4, 6, generator=generator)
    shared = [6 - len(compare(fixed, other, 6).only_first) for other in others]
    assert compare(fixed, fixed).expected_overlap(6) == 0.25
    assert sum(shared) / len(shared) / 6 == pytest.approx(0.25, abs=0.03)


def test_profiles_that_cannot_be_compared():
    profile, only = make_profile(), make_profile(1, kinds=("reasoning",))
    assert list(compare_profiles(profile, only)) == ["reasoning"]
    assert list(compare_profiles(profile, make_profile(2))) == ["retrieval", "reasoning"]
    with pytest.raises(ProfileError, match="5 layers of 6 heads and 4 layers of 6 heads cannot be compared: choose"):
        compare_profiles(profile, make_profile(shape=replace(SHAPE, num_layers=4)))
    with pytest.raises(ProfileError, match="One profile holds retrieval scores alone and the other reasoning: choose"):
        compare_profiles(make_profile(kinds=("retrieval",)), only)
    with pytest.raises(ProfileError, match="holds no retrieval scores"):
        compare_profiles(profile, only, "retrieval")
    with pytest.raises(UsageError, match="no kind of head score named 'speed'"):
        compare_profiles(profile, profile, "speed")
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[3, 2\]"):
        compare(torch.rand(2, 3), torch.rand(3, 2))


@pytest.mark.parametrize("text", ["", "null", "[1]", '{"a": 3}', '{"a": [1]}', '{"a": [1, null]}'])
def test_unusable_accuracy_is_empty(text):
    assert make_profile().accuracy == {"boats": (9, 12)}
    assert make_profile(metadata={"accuracy": text}).accuracy == {}


# The list


def test_profiles_are_listed_in_the_order_of_search(work, monkeypatch, headprof):
    # Short paths, which a table does not fold.
    monkeypatch.setenv("HEADPROF_DATA", "data")
    monkeypatch.setattr("headprof.profile.finding.asset_dir", lambda name: Path("shipped"))
    yours = Path("data/profiles")
    make_profile().save("profiles/twice.safetensors")
    make_profile(kinds=("reasoning",), metadata={"source": "a [paper]"}).save(yours / "a.safetensors")
    make_profile(1).save(yours / "twice.safetensors")
    make_profile(2).save("shipped/b.safetensors")
    Path("profiles/broken.safetensors").write_text("no")
    Path("profiles/folder.safetensors").mkdir()
    Path("profiles/twice.probes.safetensors").write_text("results of a run")
    Path("profiles/heads.png").write_text("a picture")
    found = list_profiles()
    assert [each.path for each in found] == [
        Path("profiles/broken.safetensors"),
        Path("profiles/twice.safetensors"),
        yours / "a.safetensors",
        yours / "twice.safetensors",
        Path("shipped/b.safetensors"),
    ]
    assert [each.shadowed_by for each in found] == [None, None, None, Path("profiles/twice.safetensors"), None]
    assert found[0].profile is None and "is not a safetensors file" in found[0].fault
    assert found[1].profile.digest() == make_profile().digest()

    code, table, _ = headprof("list")
    assert code == 0
    lines = table.splitlines()
    rows = {tuple(line.split()[:2]): line for line in lines[:-1]}
    assert rows["broken", "profiles"].split()[-1] == "damaged"
    assert rows["twice", "profiles"].split()[-2:] == ["2026-01-02", "found"]
    assert rows["twice", str(yours)].split()[-1] == "shadowed"
    assert "a [paper]" in rows["a", str(yours)] and "5 x 6 on 2" in rows["a", str(yours)]
    assert lines[-1].startswith("The profile profiles/broken.safetensors is not a safetensors file")

    code, text, _ = headprof("list", "--json")
    listed = {each["file"]: each for each in json.loads(text)}
    assert listed[str(yours / "twice.safetensors")]["shadowed_by"] == "profiles/twice.safetensors"
    assert listed[str(yours / "a.safetensors")] == {
        "file": str(yours / "a.safetensors"),
        "shadowed_by": None,
        "model": "org/Small-Model",
        "shape": SHAPE.to_dict(),
        "kinds": ["reasoning"],
        "probes_used": {"reasoning": 40},
        "learned_budgets": [],
        "refined_budgets": [],
        "influence_curves": {},
        "date": None,
        "source": "a [paper]",
    }
    assert "not a safetensors file" in listed["profiles/broken.safetensors"]["fault"]


def test_a_folder_that_is_searched_twice_is_listed_once(work, monkeypatch):
    make_profile().save("profiles/a.safetensors")
    monkeypatch.setattr("headprof.profile.finding.asset_dir", lambda name: work / "profiles")
    assert [(each.path, each.shadowed_by) for each in list_profiles()] == [(Path("profiles/a.safetensors"), None)]


def test_an_empty_list(work, headprof, monkeypatch):
    monkeypatch.setattr("headprof.profile.finding.asset_dir", lambda name: work / "none")
    code, table, remark = headprof("list")
    assert (code, table) == (0, "") and "There are no profiles in profiles, " in remark
    assert headprof("list", "--json")[1].strip() == "[]"


# Showing


def test_show_tells_everything_of_one_profile(work, headprof):
    note = {"date": "2026-01-02", "settings": '{"lengths": [512]}', "accuracy": '{"boats": [9, 12]}', "source": "a [b]"}
    profile = make_profile(metadata=note)
    profile.save("mine.safetensors")
    code, text, _ = headprof("show", "mine.safetensors", "--top", "3")
    assert code == 0
    for line in (
        "model        org/Small-Model",
        "shape        LlamaForCausalLM, 5 x 6 on 2 of 64, vocabulary 49152",
        "probes used  retrieval 40, reasoning 31",
        "settings     lengths [512]",
        "source       a [b]",
    ):
        assert line in text.splitlines()
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "boats 9/12 75%" in rows
    layer, head, score = profile.top_heads("reasoning", 3)[2]
    error, ends = profile.standard_errors["reasoning"], profile.intervals["reasoning"]
    low, high = (float(end[layer, head]) for end in ends)
    assert f"3. {layer} {head} {score:.3f} {error[layer, head]:.3f} {low:.3f} to {high:.3f}" in rows
    assert not any(row.startswith("4.") for row in rows)
    own = compare(profile.retrieval, profile.reasoning)
    assert f"Spearman {own.spearman:.3f} over 30 heads, {own.overlaps[10]:.0%} of the top 10" in text

    code, text, _ = headprof("show", "mine.safetensors", "--top", "3", "--which", "reasoning", "--json")
    shown = json.loads(text)
    assert list(shown["top"]) == ["reasoning"] and len(shown["top"]["reasoning"]) == 3
    third = shown["top"]["reasoning"][2]
    assert third == {
        "layer": layer,
        "head": head,
        "score": score,
        "standard_error": float(error[layer, head]),
        "interval": [low, high],
    }
    assert shown["accuracy"] == {"boats": [9, 12]} and shown["settings"] == {"lengths": [512]}
    assert shown["retrieval_and_reasoning"]["spearman"] == own.spearman


def test_show_of_what_is_little_known(work, headprof):
    HeadProfile("m", SHAPE, {"reasoning": torch.ones(5, 6)}).save("bare.safetensors")
    code, text, _ = headprof("show", "bare.safetensors", "--top", "1")
    assert code == 0 and "probes used  reasoning unknown" in text and "Spearman" not in text
    assert "1. 0 0 1.000 - -" in [" ".join(line.split()) for line in text.splitlines()]
    code, text, _ = headprof("show", "bare.safetensors", "bare.safetensors", "--json")
    assert json.loads(text)["agreement"]["reasoning"]["spearman"] is None  # NaN is not JSON


def test_show_finds_a_profile_by_the_name_of_its_model(work, headprof):
    make_profile().save("profiles/Small-Model.safetensors")
    for name, model in (("org/Small-Model", "org/Small-Model"), (LLAMA_3, LLAMA_3)):
        code, text, _ = headprof("show", name, "--json")
        assert code == 0 and json.loads(text)["model"] == model
    shown = json.loads(headprof("show", "--json")[1])
    assert shown["model"] == "SmolLM2-135M-Instruct"


def test_show_compares_two(work, headprof):
    first, second = make_profile(1), make_profile(2, model_name="org/Other")
    first.save("first.safetensors")
    second.save("second.safetensors")
    code, text, _ = headprof("show", "first.safetensors", "second.safetensors", "--top", "4")
    assert code == 0
    rows = [" ".join(line.split()) for line in text.splitlines()]
    agreements = compare_profiles(first, second, k=4)
    for kind, agreement in agreements.items():
        assert f"{kind}: Spearman {agreement.spearman:.3f} over 30 heads" in rows
        for count in (1, 5, 10, 20):
            assert f"{kind} {count} {agreement.overlaps[count]:.0%} {count / 30:.1%}" in rows
        heads = ", ".join(f"{layer}-{head}" for layer, head in agreement.only_first)
        assert heads and f"only in the top 4 of the first: {heads}" in rows
    code, text, _ = headprof("show", "first.safetensors", "second.safetensors", "--which", "reasoning", "--json")
    shown = json.loads(text)
    assert shown["models"] == ["org/Small-Model", "org/Other"] and list(shown["agreement"]) == ["reasoning"]
    found = shown["agreement"]["reasoning"]
    assert set(found["overlap"]) == {str(count) for count in OVERLAPS if count <= 30} and found["k"] == 10
    assert found["overlap"]["5"]["by_chance"] == pytest.approx(5 / 30)


# Import and export


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_what_is_exported_and_imported_again_is_the_same(work, headprof, suffix):
    profile = make_profile()
    profile.save("mine.safetensors")
    save_tiny(work / "tiny", "llama", layers=5, num_heads=6, num_kv_heads=2, hidden=96)
    files = {kind: f"{kind}{suffix}" for kind in profile.kinds}
    if suffix == ".json":
        for kind, file in files.items():
            assert headprof("export", "mine.safetensors", file, "--which", kind) == (0, f"{file}\n", "")
        code, path, table = headprof(
            "import", "--retrieval", files["retrieval"], "--reasoning", files["reasoning"], "--model", "tiny"
        )
    else:
        assert headprof("export", "mine.safetensors", "all.csv") == (0, "all.csv\n", "")
        code, path, table = headprof("import", "all.csv", "--model", "tiny", "--source", "me")
    assert (code, path) == (0, "profiles/tiny.safetensors\n") and "Top reasoning heads" in table
    loaded = HeadProfile.load(find_profile("tiny"), model_shape("tiny"))
    assert loaded.model_name == "tiny"
    for kind in profile.kinds:
        assert loaded.scores[kind].numpy().tobytes() == profile.scores[kind].numpy().tobytes()
        if suffix == ".csv":
            assert torch.equal(loaded.standard_errors[kind], profile.standard_errors[kind])
            assert torch.equal(loaded.intervals[kind][1], profile.intervals[kind][1])
    assert json.loads(loaded.metadata["versions"])["headprof"]
    assert loaded.metadata["imported_from"] == ("all.csv" if suffix == ".csv" else "retrieval.json, reasoning.json")
    assert loaded.metadata.get("source") == ("me" if suffix == ".csv" else None)


def test_a_profile_is_copied(work, headprof):
    make_profile().save("profiles/mine.safetensors")
    assert headprof("export", "org/mine", "copy.safetensors") == (0, "copy.safetensors\n", "")
    assert Path("copy.safetensors").read_bytes() == Path("profiles/mine.safetensors").read_bytes()


def test_a_profile_of_one_kind_is_exported_without_asking(work, headprof):
    profile = make_profile(kinds=("reasoning",))
    profile.save("mine.safetensors")
    assert headprof("export", "mine.safetensors", "heads.json")[0] == 0
    assert torch.equal(read_papers_json("heads.json"), profile.reasoning)


HEADS = '{"0-0": [0.5], "0-1": [0.25]}'
MISTAKES = {
    "nothing to import": (
        ["import"],
        2,
        "No file was given: give one file of head scores, or files with --retrieval, --reasoning or both.",
    ),
    "two tables": (
        ["import", "a.csv", "b.csv"],
        2,
        "2 files were given where one can be imported: give one, or one each with --retrieval and --reasoning.",
    ),
    "a table and JSON": (
        ["import", "scores.csv", "--retrieval", "heads.json"],
        2,
        "Files were given in both ways: give one file of head scores, or files with --retrieval, --reasoning or both.",
    ),
    "no such file": (
        ["import", "--reasoning", "absent.json"],
        2,
        "There is no file absent.json: check the path.",
    ),
    "a folder to import": (
        ["import", "folder"],
        1,
        "folder cannot be read (Is a directory): check the path and its permissions.",
    ),
    "JSON without its kind": (
        ["import", "heads.json"],
        2,
        "heads.json does not say which scores it holds: add --as retrieval, --as reasoning or --as both.",
    ),
    "a profile to import": (
        ["import", "mine.safetensors"],
        2,
        "mine.safetensors would need no import if it is a profile: copy it into the folder profiles.",
    ),
    "a table as JSON": (
        ["import", "--reasoning", "scores.csv"],
        2,
        "scores.csv is a CSV file, whose columns say what they hold: give it without --reasoning.",
    ),
    "JSON of another shape": (
        ["import", "--reasoning", "list.json"],
        1,
        'list.json holds no head scores: give a JSON object such as {"0-0": [0.1], ...}.',
    ),
    "a malformed table": (
        ["import", "broken.csv"],
        1,
        "broken.csv has 'high' as retrieval of head 0-0: give a number from 0 to 1e+30.",
    ),
    "another model's heads": (
        ["import", "--retrieval", "heads.json", "--model", "x/y", "--shape", "llama-3-8b"],
        1,
        "heads.json has 1 layers of 2 heads where the model has 32 of 32: choose the model it was made for with "
        "--model.",
    ),
    "an unknown shape": (
        ["import", "--retrieval", "heads.json", "--model", "x/y", "--shape", "gpt"],
        2,
        "There is no model shape 'gpt': choose one of llama-3-8b, mistral-7b, qwen3-8b, smollm2-135m.",
    ),
    "a shape without a model": (
        ["import", "--retrieval", "heads.json", "--shape", "llama-3-8b"],
        2,
        "The scores are of some model of the shape llama-3-8b: name it with --model.",
    ),
    "a model of the hub without network": (
        ["import", "--retrieval", "heads.json", "--model", "x/y"],
        1,
        "x/y is not on this machine and HF_HUB_OFFLINE keeps it from being downloaded; unset that, or pass a local "
        "folder with --model, or say with --shape which published shape the model has, such as llama-3-8b.",
    ),
    "a profile that would not be found": (
        ["import", "scores.csv", "-o", "scores.csv"],
        2,
        "A head profile cannot be written to scores.csv: give the name of a .safetensors file with -o.",
    ),
    "a folder as profile": (
        ["import", "scores.csv", "-o", "folder"],
        2,
        "A head profile cannot be written to folder: give the name of a .safetensors file with -o.",
    ),
    "two kinds for one JSON file": (
        ["export", "mine.safetensors", "out.json"],
        2,
        "The profile holds retrieval and reasoning scores where a JSON file holds one kind: choose one with --which.",
    ),
    "an unknown kind": (
        ["export", "mine.safetensors", "out.json", "--which", "speed"],
        2,
        "There is no kind of head score named 'speed': choose retrieval, reasoning, write or reconstruction.",
    ),
    "a kind for a table": (
        ["export", "mine.safetensors", "out.csv", "--which", "reasoning"],
        2,
        "A .csv file holds every kind of score: leave --which away, or export .json.",
    ),
    "an unknown suffix": (
        ["export", "mine.safetensors", "out.xlsx"],
        2,
        "out.xlsx has no suffix that names a format: give a file whose name ends in .json, .csv or .safetensors.",
    ),
    "a folder to export to": (
        ["export", "mine.safetensors", "folder"],
        2,
        "folder is a folder: give a file whose name ends in .json, .csv or .safetensors.",
    ),
    "no such profile": (
        ["export", "absent.safetensors", "out.csv"],
        1,
        "There is no profile file at absent.safetensors: check the path, or run `headprof score --model MODEL`.",
    ),
    "no profile of this model": (
        ["show", "org/absent"],
        1,
        "There is no head profile for org/absent: run `headprof score --model org/absent`.",
    ),
    "a table as profile": (
        ["show", "scores.csv"],
        1,
        "The profile scores.csv is not a safetensors file: restore it, or run `headprof score --model MODEL`.",
    ),
    "profiles of other sizes": (
        ["show", "mine.safetensors", "SmolLM2-135M-Instruct"],
        1,
        "Profiles of 5 layers of 6 heads and 30 layers of 9 heads cannot be compared: choose two of the same model or "
        "shape.",
    ),
}


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_every_mistake_is_one_sentence(work, headprof, arguments, code, message):
    (work / "folder").mkdir()
    (work / "heads.json").write_text(HEADS)
    (work / "list.json").write_text("[1]")
    (work / "scores.csv").write_text("layer,head,retrieval\n0,0,1\n")
    (work / "broken.csv").write_text("layer,head,retrieval\n0,0,high\n")
    make_profile().save("mine.safetensors")
    before = sorted(work.rglob("*"))
    assert headprof(*arguments) == (code, "", f"Error: {message}\n")
    assert sorted(work.rglob("*")) == before


# The profile that ships


def test_the_shipped_profile_of_llama_3(work):
    path = find_profile(LLAMA_3)
    assert path == asset_dir("profiles") / "Meta-Llama-3-8B-Instruct.safetensors"
    profile = HeadProfile.load(path, published_shape("llama-3-8b"), model_name=LLAMA_3)
    assert profile.model_name == LLAMA_3
    assert profile.probes_used == {"retrieval": 107, "reasoning": 74}
    assert profile.metadata["distinct_results"] == "retrieval 87, reasoning 56"
    for named in ("FYYFU/HeadKV", "2410.19258", "KVCache-Factory", "MIT"):
        assert named in profile.metadata["source"]
    for kind, heads in LLAMA_3_TOP.items():
        assert " ".join(f"{layer}-{head}" for layer, head, _ in profile.top_heads(kind, 20)) == heads
        low, high = profile.intervals[kind]
        assert ((low <= profile.scores[kind]) & (profile.scores[kind] <= high)).all()
    assert float(profile.retrieval[15, 30]) == pytest.approx(1.0087, abs=5e-5)
    assert float(profile.reasoning[15, 30]) == pytest.approx(0.3443, abs=5e-5)
    assert int((profile.retrieval == 0).sum()) == 728
    # It would be 0.033 if the repeated probes were independent.
    assert float(profile.standard_errors["retrieval"][15, 30]) == pytest.approx(0.088, abs=5e-4)
