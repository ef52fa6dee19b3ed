"""A model whose heads several processes share, by Transformers' tensor parallelism: what one process alone finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.split_runs import answers, tried, work
from support.tiny_models import save_tiny

from headprof.models.loading import load_model
from headprof.profile.head_profile import HeadProfile

RANKS = 2
MODELS = {
    "llama": ("llama", {"num_heads": 4, "num_kv_heads": 2, "layers": 3}),
    "qwen3": ("qwen3", {"num_heads": 8, "num_kv_heads": 4, "layers": 2}),
    "mistral": ("mistral", {"num_heads": 8, "num_kv_heads": 8, "layers": 2, "sliding_window": 64}),
    "gemma3": ("gemma3", {"num_heads": 4, "num_kv_heads": 2, "layers": 2, "sliding_window": 48}),
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, list[dict]]:
    """A folder with models and files, what one process found of each model, and what each of two did."""
    place = tmp_path_factory.mktemp("split")
    for name, (arch, options) in MODELS.items():
        save_tiny(place / name, arch, chat=True, **options)
    alone = {
        name: work(load_model(str(place / name), device="cpu"), place / "alone" / name, place / "nothing")
        for name in MODELS
    }
    script = [str(TESTS / "support" / "split_runs.py"), str(place), str(RANKS), *MODELS]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*TORCHRUN, "--nproc-per-node", str(RANKS), *script],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return place, alone, [torch.load(place / f"found-{rank}.pt") for rank in range(RANKS)]


pytestmark = pytest.mark.processes


@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens_whoever_holds_the_heads(runs, name):
    _, alone, split = runs
    for method in (*tried(name)[0], "sampled"):
        for found in split:
            assert found[name][method]["tokens"] == alone[name][method]["tokens"], method


@pytest.mark.parametrize("name", MODELS)
def test_documents_are_the_same_files(runs, name):
    place, _, _ = runs
    for file in sorted((place / "alone" / name).glob("*.kv.safetensors")):
        with safe_open(file, "pt") as one, safe_open(place / "split" / name / file.name, "pt") as other:
            theirs, mine = one.metadata(), other.metadata()
            assert {**theirs, "checksum": ""} == {**mine, "checksum": ""}
            assert set(one.keys()) == set(other.keys())
            for key in one.keys():  # noqa: SIM118
                a, b = one.get_tensor(key), other.get_tensor(key)
                if a.is_floating_point():
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=f"{file.name} {key}")
                else:
                    assert torch.equal(a, b), f"{file.name} {key}"


@pytest.mark.parametrize("name", MODELS)
def test_documents_are_read_by_either(runs, name):
    place, alone, split = runs
    for method in tried(name)[1]:
        assert all(found[name]["documents"][method] == alone[name]["documents"][method] for found in split)
    mine = answers(load_model(str(place / name), device="cpu"), place / "split" / name)
    assert mine == split[0][name]["answers"] == split[1][name]["answers"]
    assert len(mine) == len(tried(name)[1])


@pytest.mark.parametrize("name", MODELS)
def test_each_process_holds_its_share(runs, name):
    _, alone, split = runs
    for method in tried(name)[1]:
        whole = alone[name]["documents"][f"{method}, own bytes"]
        shares = [found[name]["documents"][f"{method}, own bytes"] for found in split]
        assert sum(shares) == pytest.approx(whole, rel=0.05), method  # free space depends on what lies beside it
        assert max(shares) < 0.65 * whole, method  # a half, and what its heads' budgets are above the others'


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_same(runs, name):
    place, _, _ = runs
    one, other = (HeadProfile.load(place / kind / name / "profile.safetensors") for kind in ("alone", "split"))
    assert one.scores.keys() == other.scores.keys() and "write" in one.scores
    for kind in one.scores:
        torch.testing.assert_close(one.scores[kind], other.scores[kind], rtol=1e-4, atol=1e-5)
    assert one.probes_used == other.probes_used
    drop = {"command"}
    assert {k: v for k, v in one.metadata.items() if k not in drop} == {
        k: v for k, v in other.metadata.items() if k not in drop
    }


def test_silent_heads_cost_the_same(runs):
    _, alone, split = runs
    for found in split:
        torch.testing.assert_close(found["llama"]["drops"], alone["llama"]["drops"], rtol=1e-3, atol=1e-3)
