"""Heads that several processes share, without processes: what each has, and what they decide together."""

from __future__ import annotations

import sys
from dataclasses import replace
from io import BytesIO, TextIOWrapper

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from support.commands import headprof
from support.observations import as_held_rows, observed_prompt
from support.profiles import random_profile
from support.talking import in_step
from support.tiny_models import TEXT, load_tiny, tiny_model

from headprof.cli import generate
from headprof.cli.context import standard_input
from headprof.cli.options import LoadOptions
from headprof.cli.terminal import Terminal
from headprof.compression.cache.schedule import LayerSchedule
from headprof.compression.cache.whole_cache import own_cache, whole_cache
from headprof.compression.document import load_document, save_document
from headprof.compression.generation import compress_document
from headprof.compression.inputs import what_to_ask
from headprof.compression.methods.all_heads import by_content, spread
from headprof.compression.methods.budget import AdaptiveBudget
from headprof.compression.methods.expected_attention import ExpectedAttention
from headprof.compression.methods.observation import Observation
from headprof.compression.methods.received_attention import Accumulated
from headprof.compression.methods.recovery_budget import RecoveryBudget
from headprof.compression.methods.reduction import ranking
from headprof.compression.methods.surrogate import SurrogateImportance
from headprof.compression.methods.window_attention import LastQuery, WindowAttention
from headprof.compression.rows import HeadCounts
from headprof.compression.session import make_plan
from headprof.errors import ModelError, UsageError
from headprof.models.loading import load_model
from headprof.models.placement import split_device
from headprof.models.shape import HeadShape
from headprof.models.tensor_parallel import WHOLE, HeadShard, check_split
from headprof.profile.random_scores import random_surrogate
from headprof.tuning import refining, refining_known
from headprof.utils.in_step import InStep
from headprof.utils.team import Team

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 1000))


@given(SIZES)
def test_own_heads_are_all_heads_put_together(sizes):
    ranks, each, seed = sizes
    values = torch.rand(2, ranks * each, 5, generator=torch.Generator().manual_seed(seed))
    parts = [HeadShard(rank, ranks).own(values, dim=1) for rank in range(ranks)]
    assert torch.equal(torch.cat(parts, dim=1), values)
    assert all(part.shape[1] == HeadShard(0, ranks).count(ranks * each) for part in parts)
    for found in in_step(ranks, lambda shard: shard.together(shard.own(values, dim=1), dim=1)):
        assert torch.equal(found, values)


def test_what_processes_bring_is_joined():
    def work(shard):
        rows = torch.full((1, 1, 2 + shard.rank), float(shard.rank))
        return shard.rows_together(rows, fill=9.0), shard.least(5 - shard.rank), shard.sums([shard.rank, 1])

    for rows, least, sums in in_step(3, work):
        assert rows.tolist() == [[[0, 0, 9, 9], [1, 1, 1, 9], [2, 2, 2, 2]]]
        assert (least, sums) == (3, [3, 3])
    assert WHOLE.least(4) == 4 and WHOLE.sums([1, 2]) == [1, 2] and WHOLE.of_first("mine") == "mine"


@pytest.mark.parametrize("method", ["headkv-r2", "snapkv", "adakv", "pyramidkv"])
def test_budgets_are_those_of_one_process_sliced(method):
    model = tiny_model("llama", num_heads=8, num_kv_heads=4, layers=3)
    plan = make_plan(model, random_profile(model), method=method, budget=17)
    prompt = observed_prompt(torch.rand(1, 8, 4, 8), torch.rand(1, 4, 100, 8), scaling=1.0)
    for layer in range(3):
        whole = LayerSchedule(plan, layer).prompt_counts(prompt, 100)
        for ranks in (2, 4):
            shards = [HeadShard(rank, ranks) for rank in range(ranks)]
            own = [LayerSchedule(replace(plan, shard=shard), layer) for shard in shards]
            counts = [schedule.prompt_counts(_of_heads(prompt, schedule.plan.shard), 100) for schedule in own]
            assert torch.equal(torch.cat([each.counts for each in counts], dim=1), whole.counts)
            assert sum(each.total for each in counts) == whole.total
            targets = [schedule.targets(150) for schedule in own]
            assert torch.equal(torch.cat(targets, dim=1), LayerSchedule(plan, layer).targets(150))


class Held:
    """Rows of heads, as far as a schedule asks."""

    hides = False

    def __init__(self, lengths):
        self.lengths, self.num_heads = lengths, len(lengths)

    def sums(self, heads):
        return [sum(self.lengths[at : at + heads]) for at in range(0, self.num_heads, heads)]


@pytest.mark.parametrize("method", ["headkv-r2", "adakv"])
@settings(max_examples=20)
@given(extra=st.lists(st.integers(0, 9), min_size=4, max_size=4))
def test_layers_are_compressed_again_at_the_same_time(method, extra):
    model = tiny_model("llama", num_heads=8, num_kv_heads=4, layers=1)
    plan = make_plan(model, random_profile(model), method=method, budget=17, buffer=10)
    schedule = LayerSchedule(plan, 0)
    lengths = [length + more for length, more in zip(schedule.targets(90)[0].tolist(), extra, strict=True)]

    def left(shard):
        own = shard.own(torch.tensor(lengths)).tolist()
        return LayerSchedule(replace(plan, shard=shard), 0).until_due(90, Held(own))

    assert in_step(2, left) == [schedule.until_due(90, Held(lengths))] * 2


def _of_heads(observed: Observation, shard: HeadShard) -> Observation:
    """Some heads of an observation."""
    rows = observed.rows.map(lambda each: shard.own(each, dim=1))
    valid = observed.valid if observed.valid.ndim == 2 else shard.own(observed.valid, dim=1)
    layer = replace(observed.layer, shard=shard)
    return replace(observed, queries=shard.own(observed.queries, dim=1), rows=rows, valid=valid, layer=layer, shared={})


def _held(seed: int, padded: bool) -> Observation:
    """Held rows at various positions, of which heads hold unequal numbers."""
    generator = torch.Generator().manual_seed(seed)
    prompt = observed_prompt(
        torch.randn(2, 8, 4, 8, generator=generator), torch.randn(2, 4, 30, 8, generator=generator), scaling=0.3
    )
    held = as_held_rows(prompt)
    if not padded:
        return held
    kept = torch.rand(2, 4, 30, generator=generator).argsort(dim=-1)[..., :12].sort(dim=-1).values
    rows = held.rows.map(lambda each: torch.take_along_dim(each, kept.view(*kept.shape, *[1] * (each.ndim - 3)), 2))
    lengths = torch.tensor([[3, 6, 9, 12], [12, 5, 4, 8]])
    return replace(held, rows=rows, valid=torch.arange(12) < lengths[..., None], padded=True, shared={})


def _cut(observed: Observation) -> Observation:
    """Without the columns in which no head has a row, as a process lays out its heads' rows."""
    longest = int(observed.valid.sum(dim=-1).max())
    rows = observed.rows.map(lambda each: each[:, :, :longest])
    return replace(observed, rows=rows, valid=observed.valid[..., :longest], shared={})


@pytest.mark.parametrize(
    "importance",
    [LastQuery(), WindowAttention(window=3, shared=True), Accumulated(shared=True), ExpectedAttention(future=16)],
    ids=lambda each: type(each).__name__,
)
@pytest.mark.parametrize("padded", [True, False])
def test_importance_that_looks_at_all_heads(importance, padded):
    held = _held(1, padded)
    whole = importance.score(held)

    def score(shard):
        own = _cut(_of_heads(held, shard)) if padded else _of_heads(held, shard)
        return importance.score(own), own.valid

    for rank, (own, valid) in enumerate(in_step(2, score)):
        expected = HeadShard(rank, 2).own(whole, dim=1)[..., : own.shape[2]]
        torch.testing.assert_close(own.masked_fill(~valid, 0), expected.masked_fill(~valid, 0))


@pytest.mark.parametrize("importance", [LastQuery(), WindowAttention(window=3, shared=True)])
def test_importance_of_a_prompt_that_looks_at_all_heads(importance):
    generator = torch.Generator().manual_seed(2)
    prompt = observed_prompt(
        torch.randn(2, 8, 20, 8, generator=generator), torch.randn(2, 4, 20, 8, generator=generator), scaling=0.3
    )
    whole = importance.score(prompt)
    for rank, own in enumerate(in_step(2, lambda shard: importance.score(_of_heads(prompt, shard)))):
        torch.testing.assert_close(own, HeadShard(rank, 2).own(whole, dim=1))


def test_a_surrogate_judges_the_heads_that_there_are():
    model = tiny_model("llama", num_heads=8, num_kv_heads=4, layers=2)
    surrogate = random_surrogate(model, HeadShape.from_config(model.config), 0, units=8)
    importance = SurrogateImportance(surrogate).of_layer(1)
    prompt = observed_prompt(torch.rand(1, 8, 4, 16), torch.rand(1, 4, 30, 16), scaling=1.0)
    whole = importance.score(prompt)
    for rank in range(4):
        shard = HeadShard(rank, 4)
        torch.testing.assert_close(importance.score(_of_heads(prompt, shard)), shard.own(whole, dim=1))


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_tokens_are_handed_on_to_heads_of_other_processes(seed, padded, ragged_kept):
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(2, 4, 20, generator=generator)
    lengths = torch.randint(8, 21, (2, 4), generator=generator) if padded else torch.full((2, 4), 20)
    valid = torch.arange(20) < lengths[..., None]
    counts = HeadCounts.of(torch.randint(3, 8, (2, 4), generator=generator), "cpu")
    kept = torch.randint(1, 4, (2, 4), generator=generator) if ragged_kept else 2
    ranked = ranking(importance, valid if padded else None, sinks=1, keep_last=1)
    policy = AdaptiveBudget(safeguard=0.3)
    whole = policy.spread(counts, ranked, valid if padded else None, kept).counts

    def own(shard):
        longest = int(shard.own(lengths, dim=1).max())
        mine = HeadCounts.of(shard.own(counts.counts, dim=1), "cpu")
        there = shard.own(valid, dim=1)[..., :longest] if padded else None
        always = shard.own(kept, dim=1) if ragged_kept else kept
        return spread(policy, shard, mine, shard.own(ranked, dim=1)[..., :longest], there, always)

    found = in_step(2, own)
    assert torch.equal(torch.cat([each.counts for each in found], dim=1), whole)
    for each in found:
        assert (each.total, each.most) == (int(each.counts.sum()), int(each.counts.max()))


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_heads_that_need_more_than_there_is_are_cut_alike(seed):
    generator = torch.Generator().manual_seed(seed)
    ranked, attention = 2.0 ** torch.randint(-23, 97, (1, 4, 20), generator=generator), torch.rand(1, 4, 20)
    counts, policy = torch.full((1, 4), 6), RecoveryBudget(recovery=0.9)
    whole = policy.by_content(ranked, attention, counts)

    def own(shard):
        return by_content(policy, shard, *(shard.own(each, dim=1) for each in (ranked, attention, counts)))

    assert torch.equal(torch.cat(in_step(2, own), dim=1), whole)


@pytest.mark.parametrize("method", ["headkv-r2", "headkv-ems", "headkv-r2-int4"])
def test_a_cache_goes_apart_and_together_again(method, tmp_path):
    loaded = load_tiny("llama", num_heads=8, num_kv_heads=4, layers=2)
    plan = make_plan(loaded.model, random_profile(loaded.model), method=method, budget=24, buffer=8)
    cache = compress_document(loaded, TEXT, plan)
    save_document(cache, tmp_path / "one.kv.safetensors", loaded)
    stored, _ = load_document(tmp_path / "one.kv.safetensors", loaded)
    for again, *others in (in_step(ranks, lambda shard: whole_cache(own_cache(stored, shard))) for ranks in (2, 4)):
        assert others == [None] * len(others)
        save_document(again, tmp_path / "again.kv.safetensors", loaded)
        assert _content(tmp_path / "again.kv.safetensors") == _content(tmp_path / "one.kv.safetensors")
    own = own_cache(stored, HeadShard(1, 2))
    assert torch.equal(own.lengths, stored.lengths[..., 2:])
    assert own_cache(stored, WHOLE) is stored and whole_cache(stored) is stored


def _content(path):
    """All that a file says; its checksum is one of its tensors too."""
    with safe_open(path, "pt") as file:
        return file.metadata(), sorted(file.keys())


# What cannot be done.


def _config(**options):
    return tiny_model("llama", layers=1, **options).config


@pytest.mark.parametrize(
    ("config", "ranks", "said"),
    [
        (
            lambda: _config(num_heads=6, num_kv_heads=3, hidden=96),
            2,
            "The 3 KV heads of it cannot be split .*: start 3",
        ),
        (lambda: _config(num_heads=4, num_kv_heads=2), 4, "The 2 KV heads of it .* over 4 processes: start 2"),
        (lambda: _config(num_heads=4, num_kv_heads=1), 2, "The 1 KV heads of it .*: leave --tp away"),
        (lambda: tiny_model("phi3", layers=1).config, 2, r"no plan that splits the attention heads of it \(phi3\)"),
    ],
)
def test_models_that_cannot_be_split(config, ranks, said):
    model = config()
    with pytest.raises(ModelError, match=said):
        check_split(model, "it", HeadShape.from_config(model), ranks)


@pytest.mark.parametrize(
    ("method", "said"),
    [("clusterkv", "give cluster=0"), ("lowrank", "give heads=1"), ("latent", "give heads=1"), ("lowrank:heads=1", "")],
)
def test_what_processes_do_not_do_together_is_refused(monkeypatch, method, said):
    model = tiny_model()
    monkeypatch.setattr(HeadShard, "of_model", lambda model: HeadShard(0, 2))
    if not said:
        assert make_plan(model, random_profile(model), method=method, budget=20).shard.size == 2
        return
    with pytest.raises(UsageError, match=f"leave --tp away, or {said}"):
        make_plan(model, random_profile(model), method=method, budget=20)


@pytest.mark.parametrize("method", ["headkv-cluster", "lowrank"])
def test_documents_that_processes_do_not_read_together(method, tmp_path, monkeypatch):
    loaded = load_tiny()
    plan = make_plan(loaded.model, random_profile(loaded.model), method=method, budget=24)
    save_document(compress_document(loaded, TEXT, plan), tmp_path / "one.kv.safetensors", loaded)
    load_document(tmp_path / "one.kv.safetensors", loaded)
    monkeypatch.setattr(HeadShard, "of_model", lambda model: HeadShard(0, 2))
    with pytest.raises(UsageError, match=r"The document .* processes that share a model's heads .*: leave --tp away\."):
        load_document(tmp_path / "one.kv.safetensors", loaded)
    with pytest.raises(UsageError, match=r": leave --tp away\."):  # before a model is looked for
        generate._load_for(tmp_path / "one.kv.safetensors", "no such model", LoadOptions(), 2)


def test_a_model_is_not_split_without_processes(tiny_folder):
    with pytest.raises(ModelError, match="Here are not the 2 processes"):
        load_model(str(tiny_folder), device="cpu", tp=2)


@pytest.mark.parametrize("refine", [refining.refine, refining_known.refine])
def test_budgets_are_not_refined_by_some_heads_gradients(refine, monkeypatch):
    loaded = load_tiny()
    monkeypatch.setattr(HeadShard, "of_model", lambda model: HeadShard(0, 2))
    with pytest.raises(ModelError, match="where one process holds the model"):
        refine(loaded, random_profile(loaded.model))


def test_a_device_of_its_own_for_each():
    assert split_device("auto", has_cuda=False) == "cpu" and split_device("cuda", has_cuda=True) == "cuda"
    for device, has_cuda in (("cpu", True), ("cuda:1", True), ("mps", False)):
        with pytest.raises(UsageError, match="leave --device away"):
            split_device(device, has_cuda=has_cuda)


@pytest.mark.parametrize(
    ("command", "module", "said"),
    [
        ("score --tp 2 --surrogate", "score", "leave --tp or --surrogate away"),
        ("score --tp 2 --reconstruction --refine", "score", "leave --tp or --refine away"),
        ("generate --tp 2 --cache a.kv.safetensors --chat", "generate", "leave --chat or --tp away"),
        ("generate --tp 2 --prompt x --method clusterkv", "generate", "leave --tp away, or give cluster=0"),
        ("compress --tp 2 --file a.txt --set cluster=8", "compress", "leave --tp away, or give cluster=0"),
        ("eval --tp 2 --methods snapkv,lowrank", "evaluate", "leave --tp away, or give heads=1"),
        ("generate --tp 2 --prompt x", None, "start them with `torchrun --nproc-per-node 2"),
    ],
)
def test_what_processes_together_do_not_do(command, module, said, monkeypatch, tmp_path):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if module is not None:
        monkeypatch.setattr(f"headprof.cli.{module}.join_ranks", lambda tp, **_: Team())
    done = headprof(tmp_path, *command.split(), "--model", "not-there")  # complaints come before the weights
    assert done.returncode == 2 and said in done.stderr, done.stderr


def test_a_process_that_is_not_the_first_is_mute(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    terminal = Terminal()
    terminal.configure(quiet=False, debug=False, mute=True)
    for say in (terminal.write, terminal.result, terminal.remark, terminal.json):
        say("a word")
    terminal.table(["a"], [["b"]])
    terminal.result_table(["a"], [["b"]])
    assert capsys.readouterr() == ("", "")
    terminal.error("It fails alone.")
    assert waited and capsys.readouterr().err == "Error: It fails alone.\n"


def test_the_first_process_reads_the_standard_input_for_all(monkeypatch):
    team = InStep(Team())
    team.ranks = 2
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO("Who? Früh.".encode())))
    given = standard_input(team)
    assert given is not None and what_to_ask(None, None, given) == (None, "Who? Früh.", False)
    assert standard_input(Team()) is sys.stdin
