"""Head scores as papers publish them: recognised, imported, exported, shown, compared; and ways to break them."""

import io
import json
import math
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.commands import invoke
from support.profiles import small_profile
from support.tiny_models import save_tiny, tiny_model

from headprof.cli.profile import FORMAT_HELP
from headprof.compression.methods.learned_budget import kept_at
from headprof.compression.session import make_plan
from headprof.errors import ProfileError
from headprof.models.shape import HeadShape
from headprof.profile.comparing import compare, compare_profiles
from headprof.profile.head_profile import HeadProfile
from headprof.profile.published.forms import CSV, FORMS, recognised
from headprof.profile.published.pruning_curves import PERCENT_KEPT, ROWS

SIZES = {"layers": 3, "num_heads": 4, "num_kv_heads": 2}
SHAPE = HeadShape("LlamaForCausalLM", 3, 4, 2, 16, 512)
LAYERS, HEADS, KV_HEADS = 3, 4, 2
GATES = [[0.60546875, 0.0], [1.0, 0.25], [-0.0035400390625, 0.5]]
SHARES = [[0.1, 0.2], [0.3, 0.05], [0.15, 0.2]]
ATTENTION = [[0.015625, 1.0], [0.5, 0.25], [0.75, 0.125]]


def all_heads(num_heads=HEADS):
    return [(layer, head) for layer in range(LAYERS) for head in range(num_heads)]


def write_gates(path: Path, table=GATES) -> None:
    np.savetxt(path, np.array(table), delimiter="\t")


def write_tensor(path: Path, table=ATTENTION, dtype=torch.float16) -> None:
    torch.save(torch.tensor(table, dtype=dtype), path)


def write_shares(path: Path, changes=()) -> None:
    shares = {f"L{layer}H{head}": SHARES[layer][head] for layer, head in all_heads(KV_HEADS)} | dict(changes)
    path.write_text(json.dumps({name: share for name, share in shares.items() if share is not None}, indent=2))


def write_list(path: Path, heads="2-3,0-1,1-0,2-0", model="org/Tiny") -> None:
    path.write_text(
        f'# heads\n\nattn_head_set: "{heads}" # top\nmodel_base_class: "Tiny"\nmodel_name_or_path: "{model}"\n'
    )


def results(probes=5, mean=0.1):
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(LAYERS, HEADS, probes, generator=generator, dtype=torch.float64) - 0.5 + mean).tolist()


def write_results(path: Path, samples, envelope: bool, changes=()) -> None:
    table = {f"{layer}-{head}": samples[layer][head] for layer, head in all_heads()} | dict(changes)
    meta = {"method": "logit_contribution", "model": "org/Tiny"}
    path.write_text(json.dumps({"meta": meta, "scores": table, "trial_ids": []} if envelope else table))


def curves(seed=0):
    """What each head gives up where all give up `t` together: `t` on average, and never less where `t` is more."""
    bent = np.random.default_rng(seed).uniform(-0.9, 0.9, (LAYERS, KV_HEADS))
    bent -= bent.mean()
    bent /= max(1, np.abs(bent).max())
    return np.stack([t + bent * t * (1 - t) for t in np.arange(1, 100) / 100])


def spread(table) -> list[list[float]]:
    """Scores of KV heads for query heads, by loops."""
    return [[table[layer][head // (HEADS // KV_HEADS)] for head in range(HEADS)] for layer in range(LAYERS)]


def of_list() -> list[list[float]]:
    scores = [[0.0] * HEADS for _ in range(LAYERS)]
    scores[2][3], scores[0][1], scores[1][0], scores[2][0] = 1.0, 0.75, 0.5, 0.25
    return scores


def means(samples, least=-math.inf):
    return [[max(least, math.fsum(samples[i][j]) / len(samples[i][j])) for j in range(HEADS)] for i in range(LAYERS)]


# By name: the file as it is published, how it is written, further arguments, kinds, and the scores that are expected.
PUBLISHED = {
    "retrieval-heads": (
        "model.json",
        lambda path: write_results(path, results(mean=0.6), envelope=False),
        ["--as", "retrieval"],
        ("retrieval",),
        lambda: means(results(mean=0.6)),
    ),
    "locos": (
        "Tiny_logit_contrib_nolima.json",
        lambda path: write_results(path, results(), envelope=True),
        [],
        ("retrieval",),
        lambda: means(results(), least=0),
    ),
    "duoattention": (
        "full_attention_heads.tsv",
        write_gates,
        [],
        ("retrieval",),
        lambda: spread([[min(1, max(0, gate)) for gate in row] for row in GATES]),
    ),
    "rlkv": (
        "adapter_weights.tsv",
        write_gates,
        [],
        ("reasoning",),
        lambda: spread([[min(1, max(0, gate)) for gate in row] for row in GATES]),
    ),
    "kvzip": (
        "tiny-scbench_qa_eng-0.pt",
        write_tensor,
        ["--as", "both"],
        ("retrieval", "reasoning"),
        lambda: spread(ATTENTION),
    ),
    "qrhead": ("Tiny_qr_head_LME.yaml", write_list, [], ("retrieval",), of_list),
    "lu-kv": (
        "snapkv_avg_ratio.npy",
        lambda path: np.save(path, curves()),
        ["--as", "reasoning"],
        ("reasoning",),
        lambda: spread([[1 - math.fsum(row[i][j] for row in curves()) / ROWS for j in range(2)] for i in range(3)]),
    ),
    "attention-matching": (
        "optimized_agnostic.json",
        write_shares,
        ["--as", "both"],
        ("retrieval", "reasoning"),
        lambda: spread(SHARES),
    ),
}
MODEL = ["--model", "tiny"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The folder of a model, of which nothing but the configuration is read."""
    folder = save_tiny(tmp_path_factory.mktemp("models") / "tiny", **SIZES)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch, tiny) -> Path:
    """An empty folder to run in but for the model, with no profiles of the user's own and no hub."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HEADPROF_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    Path("tiny").symlink_to(tiny)
    return tmp_path / "work"


def headprof(*arguments: str) -> tuple[int, str, str]:
    ended = invoke("profile", *arguments)
    return ended.exit_code, ended.stdout, ended.stderr


def imported(name: str, *arguments: str) -> HeadProfile:
    code, path, said = headprof("import", name, *MODEL, *arguments)
    assert (code, path) == (0, "profiles/tiny.safetensors\n"), said
    return HeadProfile.load("profiles/tiny.safetensors", SHAPE)


# What is read


def test_every_form_is_tested():
    assert PUBLISHED.keys() == FORMS.keys()
    assert all(name in FORMAT_HELP for name in (*FORMS, CSV))


@pytest.mark.parametrize("form", PUBLISHED)
def test_a_published_file_is_imported_exported_and_shown(work, form):
    name, write, arguments, kinds, expected = PUBLISHED[form]
    write(Path(name))
    profile = imported(name, *arguments)
    assert profile.kinds == kinds
    for kind in kinds:
        torch.testing.assert_close(profile.scores[kind], torch.tensor(expected()), rtol=1e-6, atol=1e-7)
    assert profile.metadata["imported_from"] == name
    assert profile.metadata["imported_format"] == f"{' and '.join(kinds)}: {form} ({FORMS[form].paper})"

    assert headprof("export", "profiles/tiny.safetensors", "copy.safetensors")[0] == 0
    assert HeadProfile.load("copy.safetensors").digest() == profile.digest()
    assert headprof("export", "profiles/tiny.safetensors", "all.csv")[0] == 0
    assert headprof("import", "all.csv", *MODEL, "-o", "from-csv.safetensors")[0] == 0
    assert HeadProfile.load("from-csv.safetensors").digest() == profile.digest()
    assert headprof("export", "profiles/tiny.safetensors", "one.json", "--which", kinds[0])[0] == 0
    assert headprof("import", "one.json", *MODEL, "--as", kinds[0], "-o", "from-json.safetensors")[0] == 0
    assert torch.equal(HeadProfile.load("from-json.safetensors").scores[kinds[0]], profile.scores[kinds[0]])

    code, shown, _ = headprof("show", "profiles/tiny.safetensors", "--json")
    assert code == 0
    best = json.loads(shown)["top"][kinds[0]][0]
    assert best["score"] == float(profile.scores[kinds[0]].max())
    code, shown, _ = headprof("show", "profiles/tiny.safetensors")
    assert code == 0 and FORMS[form].paper in shown


@pytest.mark.parametrize("form", PUBLISHED)
def test_a_file_is_recognised_by_its_content(tmp_path, form):
    name, write, *_ = PUBLISHED[form]
    path = tmp_path / name
    write(path)
    assert recognised(path) == form
    if form not in ("duoattention", "rlkv"):  # which look alike
        assert recognised(path.rename(tmp_path / "scores.dat")) == form


def test_a_table_of_ours_is_recognised(tmp_path):
    (tmp_path / "scores.dat").write_text("head,layer,retrieval\n0,0,1\n")
    assert recognised(tmp_path / "scores.dat") == CSV


def test_scores_without_an_envelope_are_those_of_locos_by_the_name_of_the_file_or_when_said(work):
    write_results(Path("Tiny_logit_contrib_nolima.json"), results(), envelope=False)
    by_name = imported("Tiny_logit_contrib_nolima.json")
    write_results(Path("scores.json"), results(), envelope=False)
    assert imported("scores.json", "--format", "locos").digest() == by_name.digest()
    code, _, said = headprof("import", "scores.json", "--as", "retrieval", *MODEL)
    assert code == 1 and "has negative scores, as LOCOS alone has: say --format locos" in said


def test_negative_means_and_ends_of_intervals_are_zero(work):
    write_results(Path("Tiny_logit_contrib_nolima.json"), results(probes=9, mean=0.0), envelope=True)
    profile = imported("Tiny_logit_contrib_nolima.json")
    averages = torch.tensor(means(results(probes=9, mean=0.0)))
    assert (averages < 0).any() and (averages > 0).any()
    torch.testing.assert_close(profile.retrieval, averages.clamp(min=0))
    low, high = profile.intervals["retrieval"]
    assert (low >= 0).all() and (low <= high).all() and (high[averages > 0] > 0).all()
    assert profile.probes_used == {"retrieval": 9}
    assert f"{int((averages < 0).sum())} heads whose mean is below zero get 0." in profile.metadata["imported_notes"]


@given(
    st.lists(st.floats(-0.5, 1.5, width=16), min_size=LAYERS * KV_HEADS, max_size=LAYERS * KV_HEADS),
    st.sampled_from(["duoattention", "rlkv"]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_gates_read_back_as_written(tmp_path, values, form):
    table = [values[:2], values[2:4], values[4:]]
    write_gates(tmp_path / "gates.tsv", table)
    read = FORMS[form].read(tmp_path / "gates.tsv", SHAPE)
    assert read.scores.tolist() == spread([[min(1.0, max(0.0, gate)) for gate in row] for row in table])
    beyond = sum(not 0 <= gate <= 1 for gate in values)
    assert any(text.startswith(f"{beyond} of 6 gates") for text in read.remarks) == bool(beyond)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_curves_are_learned_budgets(tmp_path, seed):
    np.save(tmp_path / "curves.npy", curves(seed))
    learned = FORMS["lu-kv"].read(tmp_path / "curves.npy", SHAPE).kept_shares
    assert len(learned) == len(PERCENT_KEPT)
    for percent in PERCENT_KEPT:
        given_up = torch.from_numpy(curves(seed)[(100 - percent) - 1])  # row 0 is for 1 % given up
        torch.testing.assert_close(kept_at(learned, percent / 100), 1 - given_up, rtol=0, atol=1e-6)


def test_rows_of_curves_that_say_the_same_are_left_out(tmp_path):
    stuck = curves().astype(np.float32)
    stuck[96:] = stuck[96]  # some tokens must stay
    np.save(tmp_path / "curves.npy", stuck)
    learned = FORMS["lu-kv"].read(tmp_path / "curves.npy", SHAPE).kept_shares
    assert len(learned) == len(PERCENT_KEPT) - 2  # of 1, 2 and 3 %
    np.testing.assert_allclose(learned[0], 1 - stuck[96], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_tensor_of_any_floating_type_and_with_empty_dimensions(tmp_path, dtype):
    path = tmp_path / "a.pt"
    torch.save(torch.tensor(ATTENTION, dtype=dtype)[None, :, None], path)
    assert FORMS["kvzip"].read(path, SHAPE).scores.tolist() == spread(ATTENTION)


def test_a_list_with_scores(work):
    Path("heads.json").write_text(json.dumps([["2-3", 0.5], ["0-1", 0.25], ["1-0", -0.125]]))
    profile = imported("heads.json")
    expected = torch.zeros(LAYERS, HEADS)
    expected[2, 3], expected[0, 1] = 0.5, 0.25
    assert torch.equal(profile.retrieval, expected)
    assert profile.metadata["imported_notes"].splitlines()[1:] == [
        "The 9 heads that are not listed get 0.",
        "1 heads with a score below zero get 0.",
    ]
    Path("heads.yaml").write_text("attn_head_set: [2-3, 0-1, 1-0, 2-0]\n")
    assert imported("heads.yaml").retrieval.tolist() == of_list()


# What is said


def test_the_command_says_what_it_made_of_a_file(work):
    write_gates(Path("adapter_weights.tsv"))
    _, _, said = headprof("import", "adapter_weights.tsv", *MODEL)
    assert said.splitlines()[:3] == [
        "Its scores are taken as reasoning scores, unless --as says otherwise.",
        "A score is of a KV head, and stands for each of the 2 query heads that share it.",
        "1 of 6 gates lie beyond 0 or 1, and count as that.",
    ]
    assert imported("adapter_weights.tsv", "--as", "retrieval").kinds == ("retrieval",)
    write_list(Path("heads.yaml"))
    _, _, said = headprof("import", "heads.yaml", *MODEL)
    assert said.splitlines()[1:3] == [
        "4 heads are listed without scores, best first: the first gets 1, the last 1/4.",
        "The 8 heads that are not listed get 0.",
    ]
    write_list(Path("heads.yaml"), model=r"org/Other\e[31m")
    _, _, said = headprof("import", "heads.yaml", *MODEL)
    assert r"The file calls its model org/Other\x1b[31m, and is taken to be of tiny." in said.splitlines()


def test_two_files_make_one_profile(work):
    write_gates(Path("full_attention_heads.tsv"))
    write_tensor(Path("scores.pt"))
    code, path, _ = headprof(
        "import",
        "--retrieval",
        "full_attention_heads.tsv",
        "--reasoning",
        "scores.pt",
        *MODEL,
        "--source",
        "two papers",
    )
    profile = HeadProfile.load(path.strip(), SHAPE)
    assert code == 0 and profile.metadata["source"] == "two papers"
    assert profile.retrieval.tolist() == PUBLISHED["duoattention"][-1]()
    assert profile.reasoning.tolist() == PUBLISHED["kvzip"][-1]()
    assert profile.metadata["imported_from"] == "full_attention_heads.tsv, scores.pt"
    assert profile.metadata["imported_format"].startswith("retrieval: duoattention (Xiao")
    assert "; reasoning: kvzip (Kim" in profile.metadata["imported_format"]


def test_one_file_of_curves_for_both_kinds(work):
    np.save("curves.npy", curves())
    both = imported("curves.npy", "--as", "both")
    assert headprof("import", "--retrieval", "curves.npy", "--reasoning", "curves.npy", *MODEL)[0] == 0
    assert HeadProfile.load("profiles/tiny.safetensors").digest() == both.digest()
    assert json.loads(both.metadata["reconstruction"])["imported_from"] == "curves.npy"
    np.save("others.npy", curves(1))
    code, _, said = headprof("import", "--retrieval", "curves.npy", "--reasoning", "others.npy", *MODEL)
    assert code == 1 and said.startswith("Error: Both files hold learned budgets") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("form", "method", "options"),
    [("duoattention", "headkv", {}), ("rlkv", "headkv-r2", {}), ("lu-kv", "learned-kvzip", {})],
)
def test_methods_use_what_was_imported(work, form, method, options):
    name, write, arguments, *_ = PUBLISHED[form]
    write(Path(name))
    profile = imported(name, *arguments)
    plan = make_plan(tiny_model(**SIZES), profile, method=method, budget=40, **options)
    known = profile.kept_shares if form == "lu-kv" else torch.tensor(GATES).clamp(0, 1)
    assert torch.equal(plan.scores, known)
    counts = plan.method.budget.allocate(plan.scores, budget=40, context_length=200, always_kept=8)
    assert int(counts.sum()) == 40 * LAYERS * KV_HEADS and len(counts.unique()) > 1


# Comparing


def test_a_profile_is_compared_with_a_published_file(work):
    profile = small_profile(shape=SHAPE)
    profile.save("mine.safetensors")
    for form, (name, write, *_, expected) in PUBLISHED.items():
        write(Path(name))
        code, shown, _ = headprof("show", "mine.safetensors", name, "--json", "--top", "2")
        assert code == 0
        found = json.loads(shown)["agreement"]
        assert list(found) == ["retrieval", "reasoning"]
        of_query_heads = form in ("retrieval-heads", "locos", "qrhead")
        theirs = torch.tensor(expected()).float()
        for kind in found:
            mine = profile.scores[kind]
            if not of_query_heads:
                mine = torch.stack([mine[:, :2].amax(dim=1), mine[:, 2:].amax(dim=1)], dim=1)
            slow = compare(mine, theirs if of_query_heads else theirs[:, ::2], 2)
            assert found[kind]["spearman"] == pytest.approx(slow.spearman, nan_ok=True)
            assert found[kind]["heads"] == ("heads" if of_query_heads else "KV heads")
            assert [tuple(head) for head in found[kind]["only_second"]] == slow.only_second
    code, shown, _ = headprof("show", "mine.safetensors", "scores.csv")
    assert code == 1
    code, shown, _ = headprof("show", "mine.safetensors", "full_attention_heads.tsv", "--which", "retrieval")
    assert code == 0 and "over 6 KV heads" in shown and "full_attention_heads.tsv (model not named)" in shown


def test_profiles_of_query_heads_are_compared_as_before():
    first, second = small_profile(0, shape=SHAPE), small_profile(1, shape=SHAPE)
    assert compare_profiles(first, second)["retrieval"] == compare(first.retrieval, second.retrieval)
    constant = HeadProfile("m", SHAPE, {"retrieval": torch.ones(LAYERS, HEADS)})
    assert compare_profiles(first, constant)["retrieval"].num_heads == LAYERS * HEADS


# Mistakes

USAGE = {
    "which scores": (["optimized_agnostic.json", *MODEL], "does not say which scores it holds: add --as retrieval"),
    "another word": (["scores.pt", "--as", "speed", *MODEL], "Scores cannot be taken as 'speed': choose retrieval"),
    "both ways": (["--retrieval", "scores.pt", "--as", "both", *MODEL], "say what a file holds: leave --as away"),
    "a table": (
        ["scores.csv", "--as", "both", *MODEL],
        "is a CSV file, whose columns say what they hold: give it with",
    ),
    "another format": (["scores.pt", "--format", "exl", *MODEL], "There is no format 'exl' of head scores: choose one"),
    "which gates": (["gates.tsv", *MODEL], "may be of DuoAttention or of RLKV: say --format duoattention or --format"),
    "which model": (["scores.pt", "--as", "both"], "does not say which model its scores are of: name it with --model"),
    "model of a list": (["heads.yaml"], "heads.yaml is of org/Tiny by its own words: say so with --model org/Tiny."),
    "model of LOCOS": (["locos.json"], "locos.json is of org/Tiny by its own words: say so with --model org/Tiny."),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE.keys())
def test_what_a_file_does_not_say_is_asked_for(work, arguments, message):
    write_shares(Path("optimized_agnostic.json"))
    write_tensor(Path("scores.pt"))
    write_gates(Path("gates.tsv"))
    write_list(Path("heads.yaml"))
    write_results(Path("locos.json"), results(), envelope=True)
    Path("scores.csv").write_text("layer,head,retrieval\n0,0,1\n")
    before = sorted(work.rglob("*"))
    code, out, said = headprof("import", *arguments)
    assert (code, out) == (2, "") and message in said and said.startswith("Error: ") and said.count("\n") == 1
    assert sorted(work.rglob("*")) == before


def test_gates_of_any_name_when_the_format_is_said(work):
    write_gates(Path("gates.tsv"))
    assert imported("gates.tsv", "--format", "duoattention").kinds == ("retrieval",)
    assert imported("gates.tsv", "--format", "rlkv").kinds == ("reasoning",)
    small_profile(shape=SHAPE).save("mine.safetensors")
    assert headprof("show", "mine.safetensors", "gates.tsv")[0] == 2
    assert headprof("show", "mine.safetensors", "gates.tsv", "--format", "rlkv")[0] == 0
    code, _, said = headprof("show", "mine.safetensors", "--format", "rlkv")
    assert code == 2 and "is that of a file to compare with" in said


class Harmful:
    """What a pickle can ask for: to run a command."""

    def __reduce__(self):
        return os.system, ("touch harm-was-done",)


def cut(write, share=0.6):
    """The beginning of a file."""

    def apply(path):
        write(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return apply


def text(content):
    return lambda path: path.write_text(content)


def gates(*changes):
    def apply(path):
        table = [list(row) for row in GATES]
        for layer, head, value in changes:
            table[layer][head] = value
        write_gates(path, table)

    return apply


def tensor(value):
    return lambda path: torch.save(value, path)


def poked(value, dtype=torch.float32):
    table = torch.tensor(ATTENTION, dtype=dtype)
    table[1, 1] = value
    return tensor(table)


def array(change):
    def apply(path):
        changed = change(curves())
        np.save(path, changed, allow_pickle=True)

    return apply


def bent(row, layer, head, value):
    def apply(table):
        table[row, layer, head] = value
        return table

    return array(apply)


def packed(path):
    """Little on the disk, and much more once it is read."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("archive/data/0", bytes(2**27))


def several(path):
    with path.open("wb") as file:
        np.savez(file, a=curves())


def other_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")


def promising(path):
    """A header that promises more numbers than the file has."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (99, 10**6, 10**6)})
    path.write_bytes(header.getvalue() + bytes(64))


def samples(changes=(), envelope=True, **options):
    return lambda path: write_results(path, results(**options), envelope, changes)


BROKEN = {
    "full_attention_heads.tsv": {
        "cut off": (cut(write_gates, 0.9), "does not end with the end of a line"),
        "a layer lost": (
            lambda path: write_gates(path, GATES[:2]),
            "has 2 layers of 2 heads where the model has 3 of 2",
        ),
        "of query heads": (
            lambda path: write_gates(path, spread(GATES)),
            "3 layers of 4 heads where the model has 3 of",
        ),
        "no number": (gates((1, 0, math.nan)), "has 'nan' in line 2: give numbers with tabs"),
        "infinite": (gates((1, 0, math.inf)), "has inf for head 1-0: give numbers from -0.5 to 1.5"),
        "far below zero": (gates((2, 1, -3)), "has -3 for head 2-1"),
        "words": (text("0.5\tlow\n"), "has 'low' in line 1: give numbers"),
        "nothing": (text(""), "does not end with the end of a line"),
        "nothing but an end": (text("\n"), "has '' in line 1: give numbers"),
        "a row too short": (text("0.5\t0.5\n0.5\n0.5\t0.5\n"), "has 1 gates for layer 1 where layer 0 has 2"),
        "bytes": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "is not UTF-8 text"),
    },
    "scores.pt": {
        "cut off": (cut(write_tensor), "was cut off"),
        "nothing": (text(""), "is no file that torch.save writes"),
        "a pickle": (lambda path: path.write_bytes(pickle.dumps(Harmful())), "is no file that torch.save writes"),
        "an object": (tensor(Harmful()), "holds something other than a plain tensor"),
        "an object beside": (tensor([torch.ones(3, 2), Harmful()]), "holds something other than a plain tensor"),
        "a dictionary": (tensor({"scores": torch.ones(3, 2)}), "other than one tensor of floating-point numbers"),
        "whole numbers": (tensor(torch.ones(3, 2, dtype=torch.int64)), "other than one tensor of floating-point"),
        "a sparse tensor": (tensor(torch.ones(3, 2).to_sparse()), "other than one tensor of floating-point"),
        "a tensor of nothing": (tensor(torch.ones(3, 2, device="meta")), "other than one tensor of floating-point"),
        "another shape": (tensor(torch.ones(2, 3)), "has 2 layers of 3 heads where the model has 3 of 2 KV heads"),
        "three dimensions": (tensor(torch.ones(3, 2, 5)), r"holds a tensor of shape \[3, 2, 5\]"),
        "many in one": (tensor(torch.ones(1).expand(10**6, 10**6)), "has 1000000 layers"),
        "no number": (poked(math.nan), "has nan for head 1-1: give numbers from 0 to 1"),
        "negative": (poked(-0.25, torch.float16), "has -0.25 for head 1-1"),
        "above one": (poked(1.5), "has 1.5 for head 1-1"),
        "a bomb": (packed, "unpacks to more than"),
        "an archive of something else": (other_archive, "or is damaged"),
    },
    "locos.json": {
        "cut off": (cut(samples()), "is not valid JSON"),
        "a head lost": (text('{"scores": {"0-0": [1], "0-1": [1], "1-0": [1]}}'), "has no score for head 1-1"),
        "another model": (
            text('{"scores": {"0-0": [1], "0-1": [1]}}'),
            "has 1 layers of 2 heads where the model has 3",
        ),
        "no number": (samples({"1-1": [math.nan] * 5}), "has no usable scores for head 1-1"),
        "infinite": (samples({"1-1": [-math.inf] * 5}), "has no usable scores for head 1-1"),
        "words": (samples({"1-1": ["a"] * 5}), "has no usable scores for head 1-1"),
        "true": (samples({"1-1": [True] * 5}), "has no usable scores for head 1-1"),
        "a probe lost": (samples({"1-1": [0.5] * 4}), "has 4 scores for head 1-1 where head 0-0 has 5"),
        "no probe": (
            text(json.dumps({"scores": {f"{i}-{j}": [] for i, j in all_heads()}})),
            "scores of no probe at all",
        ),
        "a head twice": (samples({"01-1": [0.5] * 5}), "lists a head twice"),
        "a name twice": (text('{"scores": {"0-0": [1], "0-0": [2]}}'), "a name stands in it twice"),
        "no scores": (text('{"scores": 3}'), "holds no head scores"),
    },
    "model.json": {
        "negative": (
            samples({"1-1": [-1.0] * 5}, envelope=False, mean=0.6),
            "say --format locos if it is of that form",
        ),
        "cut off": (cut(samples(envelope=False, mean=0.6)), "is not valid JSON"),
        "another head": (samples({"1-x": [1.0] * 5}, envelope=False, mean=0.6), "names a head '1-x'"),
    },
    "heads.yaml": {
        "cut off": (cut(write_list, 0.3), "is not valid YAML"),
        "no list": (text("attn_head_set: 3\n"), "lists no heads"),
        "no heads": (text("attn_head_set: []\n"), "lists no heads"),
        "numbers": (text("attn_head_set: [1, 2]\n"), "lists no heads"),
        "another name": (text("heads: 1-2\n"), "lists no heads"),
        "all heads": (lambda path: write_list(path, "full_heads"), "names all heads, and so ranks none"),
        "an unknown head": (
            lambda path: write_list(path, "2-3,3-0"),
            "names a head 3-0, which a model with 3 layers of 4",
        ),
        "a head too far": (lambda path: write_list(path, "2-4"), "names a head 2-4, which a model with 3 layers of 4"),
        "a head twice": (lambda path: write_list(path, "2-3,0-1,2-3"), "lists head 2-3 twice"),
        "no head": (lambda path: write_list(path, "2-3,minus"), "names a head 'minus'"),
        "an object": (
            text("attn_head_set: !!python/object/apply:os.system ['touch harm-was-done']\n"),
            "not valid YAML",
        ),
        "references": (text("a: &a [x, x]\nattn_head_set: [*a, *a]\n"), "has references in it"),
        "twice": (text("attn_head_set: 0-1\nattn_head_set: 0-2\n"), "gives its attn_head_set twice"),
        "a wrong tag": (text("attn_head_set: 0-1\nb: !!int ''\n"), "is not valid YAML"),
        "a wrong time": (text("attn_head_set: 0-1\nb: 2026-99-99\n"), "is not valid YAML"),
        "nested": (text("attn_head_set: " + "[" * 5000), "lists no heads"),
        "nested otherwise": (text("attn_head_set: 0-1\nb:\n" + "- " * 9000 + "1\n"), "is not valid YAML"),
        "too large": (text("attn_head_set: 0-1\n" + "# more\n" * 2**18), "is larger than"),
    },
    "heads.json": {
        "no score": (text('[["0-1", null]]'), "in its list: give pairs such as"),
        "no number": (text('[["0-1", NaN]]'), "has nan for head 0-1: give a finite number"),
        "an unknown head": (text('[["9-1", 0.5]]'), "names a head 9-1"),
        "a head twice": (text('[["0-1", 0.5], ["0-1", 0.5]]'), "lists head 0-1 twice"),
    },
    "curves.npy": {
        "cut off": (cut(lambda path: np.save(path, curves())), "or was cut off: download it again"),
        "nothing": (text(""), "is no array of numbers that NumPy wrote"),
        "objects": (array(lambda table: np.array([Harmful()] * 99, dtype=object)), "is no array of numbers that NumPy"),
        "several arrays": (several, "is no single array"),
        "a promise": (promising, "or was cut off"),
        "texts": (array(lambda table: table.astype(str)), "is no single array of floating-point numbers"),
        "whole numbers": (array(lambda table: table.astype(int)), "is no single array of floating-point numbers"),
        "a row lost": (array(lambda table: table[1:]), r"an array of shape \[98, 3, 2\]"),
        "a table": (array(lambda table: table[:, 0]), r"an array of shape \[99, 2\]"),
        "another model": (array(lambda table: table[:, 1:]), "has 2 layers of 2 heads where the model has 3 of 2"),
        "no number": (bent(50, 1, 1, math.nan), "has nan for head 1-1: give numbers from 0 to 1"),
        "negative": (bent(50, 1, 1, -0.25), "has -0.25 for head 1-1"),
        "the other way round": (array(lambda table: table[::-1].copy()), "Row 1 of .* gives up 99% of the tokens"),
        "up and down": (bent(59, 1, 1, 0.45), "keeps less where all together keep more"),
    },
    "budgets.json": {
        "cut off": (cut(write_shares), "is not valid JSON"),
        "a head lost": (lambda path: write_shares(path, {"L1H1": None}), "has nothing for head 1-1"),
        "an unknown head": (lambda path: write_shares(path, {"L3H0": 0.0}), "names a head L3H0, which a model with 3"),
        "no head": (lambda path: write_shares(path, {"L3": 0.0}), "names a head 'L3': write it as L17H3"),
        "negative": (lambda path: write_shares(path, {"L1H1": -0.05}), "has -0.05 for head L1H1: give a share"),
        "no number": (lambda path: write_shares(path, {"L1H1": math.nan}), "has nan for head L1H1"),
        "words": (lambda path: write_shares(path, {"L1H1": "low"}), "has 'low' for head L1H1"),
        "lists": (lambda path: write_shares(path, {"L1H1": [0.05]}), "for head L1H1: give a share"),
        "a head twice": (lambda path: write_shares(path, {"L01H1": 0.05}), "lists head L01H1 twice"),
        "a name twice": (text('{"L0H0": 0.5, "L0H0": 0.5}'), "a name stands in it twice"),
        "too much": (lambda path: write_shares(path, {"L1H1": 0.9}), "sum to 1.85, not to 1"),
    },
    "scores.dat": {
        "nothing that is known": (
            text("hello"),
            "is of no format of head scores that is read here: name it with --format",
        ),
        "a pickle": (lambda path: path.write_bytes(pickle.dumps(Harmful())), "is of no format of head scores"),
        "bytes": (lambda path: path.write_bytes(bytes(1000)), "is of no format of head scores"),
    },
}
CASES = [
    pytest.param(name, write, message, id=f"{name}: {what}")
    for name, cases in BROKEN.items()
    for what, (write, message) in cases.items()
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "write", "message"), CASES)
def test_a_broken_file_is_one_sentence_and_nothing_is_written(work, name, write, message):
    write(Path(name))
    before = sorted(work.rglob("*"))
    code, out, said = headprof("import", name, "--as", "retrieval", *MODEL)
    assert (code, out) == (1, "")
    assert said.startswith("Error: ") and said.count("\n") == 1 and len(said) < 400
    assert sorted(work.rglob("*")) == before
    assert re.search(message, said), said


@given(st.sampled_from(list(PUBLISHED)), st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_that_is_cut_off_anywhere_is_refused_or_holds_all_scores(tmp_path, form, share):
    name, write, *_ = PUBLISHED[form]
    path = tmp_path / name
    write(path)
    whole = FORMS[form].read(path, SHAPE).scores
    cut(write, share)(path)
    try:
        scores = FORMS[form].read(path, SHAPE).scores
    except ProfileError:
        return
    assert form == "qrhead" and torch.equal(scores, whole)  # what comes after its heads is not needed


def test_a_harmful_pickle_would_have_done_harm(work):
    pickle.loads(pickle.dumps(Harmful()))
    assert Path("harm-was-done").exists()


def test_a_file_that_is_too_large_is_not_read(work):
    for name in ("scores.pt", "curves.npy"):
        write_tensor(Path(name)) if name == "scores.pt" else np.save(name, curves())
        with Path(name).open("ab") as file:
            file.truncate(2**27)
        code, _, said = headprof("import", name, "--as", "both", *MODEL)
        assert code == 1 and "is larger than 67108864 bytes" in said


def test_yaml_is_what_it_would_be_elsewhere(tmp_path):
    """The list that is read is the one that YAML's own reader finds."""
    write_list(tmp_path / "heads.yaml")
    names = yaml.safe_load((tmp_path / "heads.yaml").read_text())["attn_head_set"].split(",")
    scores = FORMS["qrhead"].read(tmp_path / "heads.yaml", SHAPE).scores
    ranked = scores.flatten().argsort(descending=True, stable=True)[: len(names)].tolist()
    assert [f"{index // HEADS}-{index % HEADS}" for index in ranked] == names


def test_results_of_probes_can_be_taken_for_both_kinds(work):
    Path("rh.json").write_text(json.dumps({f"{layer}-{head}": [0.25, 0.75] for layer in range(3) for head in range(4)}))
    both = imported("rh.json", "--as", "both")
    assert both.kinds == ("retrieval", "reasoning") and torch.equal(both.retrieval, both.reasoning)
    code, _, said = headprof("import", "rh.json", "--as", "reconstruction", *MODEL)
    assert code == 2 and "choose retrieval, reasoning or both" in said
