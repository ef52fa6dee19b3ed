"""Methods of other people: given as objects, or found by the entry points of an installed package."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.commands import headprof, headprof_process
from support.profiles import random_profile
from support.prompts import random_ids
from support.tiny_models import save_tiny, tiny_model

from headprof import METHODS, HeadCache, Method, compressed, make_plan
from headprof.compression.document import load_document, save_document
from headprof.compression.generation import compress_document
from headprof.compression.methods.budget import ProfileBudget
from headprof.compression.methods.importance import Importance
from headprof.compression.methods.merging import EvictThenMerge
from headprof.compression.methods.names import METHOD_NAMES, method_names
from headprof.compression.methods.observation import Assessment
from headprof.compression.methods.table import find_method, name_of
from headprof.compression.session import prefill
from headprof.errors import CacheError, ProfileError, UsageError

TOY = Path(__file__).parent / "support" / "toy"
TEXT = "The lighthouse keeper counted nine grey boats before breakfast. " * 20


@pytest.fixture
def toy(monkeypatch):
    """The toy package is installed; its module is `toy_method`."""
    monkeypatch.syspath_prepend(str(TOY))
    return __import__("toy_method")


# As an object.


def test_a_method_object_does_what_its_name_does():
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 40)
    profile = random_profile(model)
    found = []
    for method in ("headkv-r2", METHODS["headkv-r2"]):
        with compressed(model, profile, method=method, budget=9, window=5) as plan:
            output = model.generate(ids, max_new_tokens=6, do_sample=False)
        found.append((output.tolist(), plan.name, plan.method, plan.profile_digest))
    assert found[0] == found[1] and found[0][1] == "headkv-r2"


def test_a_method_of_ones_own_keeps_what_it_says(toy):
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 40)
    method = Method(toy.ValueNorm(power=2.0), sinks=0, keep_last=0)
    with compressed(model, method=method, budget=7) as plan:
        cache = HeadCache(plan)
        prefill(model, ids, cache)
    with compressed(model, method="full") as plan:
        whole = HeadCache(plan)
        prefill(model, ids, whole)
    for layer, full in zip(cache.head_layers, whole.head_layers, strict=True):
        sizes = full.storage.compact().values.view(2, 40, -1).norm(dim=-1)
        kept = layer.storage.compact().positions.view(2, 7)
        assert torch.equal(kept, sizes.topk(7).indices.sort().values.int())


def test_a_method_object_that_needs_a_profile_says_so():
    with pytest.raises(ProfileError, match="needs a head profile"):
        make_plan(tiny_model(), method=Method(METHODS["knorm"].importance, ProfileBudget("retrieval")))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_the_table_is_known_by_its_parts(name):
    options = {"sinks": 3} | ({"window": 3} if METHODS[name].has_option("window") else {})
    changed = METHODS[name].with_options(**options)
    assert find_method(name_of(changed)).with_options(**changed.options()) == changed


def test_a_document_needs_a_method_with_a_name(tiny, tmp_path, toy):
    cache = compress_document(tiny, TEXT, make_plan(tiny.model, method=toy.VALUES, budget=20))
    with pytest.raises(CacheError, match=r"headprof\.methods"):
        save_document(cache, tmp_path / "document.kv.safetensors", tiny)
    assert not list(tmp_path.iterdir())
    named = Method(METHODS["snapkv"].with_options(window=5).importance)
    cache = compress_document(tiny, TEXT, make_plan(tiny.model, method=named, budget=20))
    save_document(cache, tmp_path / "document.kv.safetensors", tiny)
    loaded, _ = load_document(tmp_path / "document.kv.safetensors", tiny)
    assert loaded.plan.name == "snapkv" and loaded.plan.method == cache.plan.method


def scored(method):
    """What compressing a prompt by it comes to: the rows of each head."""
    model = tiny_model(num_kv_heads=2, layers=2)
    with compressed(model, method=method, budget=9) as plan:
        cache = HeadCache(plan)
        prefill(model, random_ids(1, 30), cache)
    return cache.lengths


@dataclass(frozen=True)
class Wrong(Importance):
    """An importance that says something else than it should."""

    how: str = ""
    queries = 0

    def assess(self, observed):
        score = torch.rand(observed.keys.shape[:3])
        score[..., 3] = math.nan if self.how == "nan" else 0.0
        columns = {"mine": score} if self.how == "column" else {}
        said = {"shape": score[:, :1], "integers": score.long(), "nothing": None}.get(self.how, score)
        return Assessment(said, columns=columns)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan", "Wrong gives scores that are not finite"),
        ("shape", r"scores rows by \[1, 1, 30\]"),
        ("integers", "int64"),
        ("nothing", "scores rows by NoneType"),
        ("column", "unknown column 'mine'"),
    ],
)
def test_a_wrong_importance_is_told(how, message):
    assert int(scored(Method(Wrong())).sum()) == 9 * 4
    with pytest.raises(UsageError, match=message):
        scored(Method(Wrong(how)))


@dataclass
class Changeable(Importance):
    queries = 0


@dataclass(frozen=True)
class Threshold(Importance):
    threshold: float = 0.9
    queries = 0


def test_what_makes_no_method_is_refused():
    for importance in (None, Wrong, "knorm"):
        with pytest.raises(UsageError, match="is no importance"):
            Method(importance)
    with pytest.raises(UsageError, match="make it a frozen dataclass"):
        Method(Changeable())
    with pytest.raises(UsageError, match="Two parts of a method have a parameter 'threshold'"):
        Method(Threshold(), reduction=EvictThenMerge())
    for method in (3, Method):
        with pytest.raises(UsageError, match="is no method"):
            make_plan(tiny_model(), method=method)


# By name.


def test_an_installed_method_is_found_by_name(toy):
    assert method_names() == [*METHOD_NAMES, "toy-missing", "toy-values", "toy-word"]
    assert find_method("toy-values") is not None and find_method("toy-values") == toy.VALUES
    assert find_method("toy-values:power=0.5") == Method(toy.ValueNorm(0.5))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toy-word", "is no headprof.Method"),
        ("toy-missing", "cannot be imported from toy_method:MISSING"),
        ("tova", "An installed package has a method 'tova' too"),
        ("toy", "choose one of full, .*toy-values"),
        ("toy-values:strength=2", "no parameter 'strength'"),
    ],
)
def test_what_cannot_be_had_is_refused(toy, name, message):
    with pytest.raises(UsageError, match=message):
        find_method(name)


def test_commands_know_an_installed_method(toy, tmp_path):
    save_tiny(tmp_path / "tiny", "llama", chat=True, layers=2)
    (tmp_path / "document.txt").write_text(TEXT)
    model = ("--model", "tiny")
    made = headprof(
        tmp_path,
        *("generate", *model, "--method", "toy-values:power=2", "--budget", "20", "--file", "document.txt"),
        *("--prompt", "Who?", "--max-new-tokens", "4", "--json"),
    )
    assert made.returncode == 0, made.stderr
    assert list(json.loads(made.stdout)["runs"]) == ["toy-values:power=2, budget 20"]
    saved = headprof(tmp_path, "compress", *model, "--method", "toy-values", "--budget", "20", "-f", "document.txt")
    assert saved.returncode == 0, saved.stderr
    asked = headprof(
        tmp_path, "generate", *model, "--cache", "document.kv.safetensors", "--prompt", "Who?", "--max-new-tokens", "4"
    )
    assert asked.returncode == 0, asked.stderr
    found = headprof(
        tmp_path,
        *("eval", *model, "--tasks", "perplexity", "--data-dir", "document.txt", "--lengths", "80"),
        *("--continuation", "16", "--documents", "1", "--methods", "toy-values"),
        *("--budgets", "20", "--json"),
    )
    assert found.returncode == 0, found.stderr
    assert [cell["method"] for cell in json.loads(found.stdout)["perplexities"]] == ["full", "toy-values"]
    timed = headprof(
        tmp_path,
        *("bench", "generate", *model, "--methods", "toy-values", "--budgets", "20", "--lengths", "40"),
        *("--new-tokens", "3", "--repeats", "1", "--json"),
    )
    assert timed.returncode == 0, timed.stderr
    assert [each["method"] for each in json.loads(timed.stdout)["measurements"]] == ["full", "toy-values"]


def test_help_names_an_installed_method(tmp_path, monkeypatch):
    path = os.pathsep.join([str(TOY), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("COLUMNS", "200")
    shown = headprof_process(tmp_path, "generate", "--help").stdout
    assert "toy-values" in shown
