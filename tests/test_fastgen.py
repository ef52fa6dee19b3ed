"""FastGen: rows by the policies that keep them, budgets by what heads need, and who is told what tokens there are."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.commands import headprof
from support.observations import observed_prompt
from support.prompts import GREEDY, left_padded, random_ids
from support.tiny_models import TEXT as LONG
from support.tiny_models import load_tiny, save_tiny, tiny_model, tiny_tokenizer
from test_decoding import check_same
from test_reconstruction import TEXT, kept_positions

from headprof.compression.cache.fan_out import FanOutCache
from headprof.compression.cache.head_cache import HeadCache, stack_caches
from headprof.compression.document import load_document, save_document
from headprof.compression.generation import ask, compress_document
from headprof.compression.methods.global_budget import GlobalBudget
from headprof.compression.methods.method import Method
from headprof.compression.methods.policy_order import POLICIES, PolicyOrder
from headprof.compression.methods.received_attention import Accumulated, received_attention
from headprof.compression.methods.recovery_budget import RecoveryBudget, cut_to
from headprof.compression.methods.reduction import largest
from headprof.compression.methods.table import METHODS, find_method, name_of
from headprof.compression.policy_profile import head_policies
from headprof.compression.promise import compress_to_promise
from headprof.compression.request import CompressionRequest
from headprof.compression.session import attending_ragged, compressed, make_plan, prefill
from headprof.errors import UsageError
from headprof.models.token_kinds import OTHER, PUNCTUATION, SPECIAL, TokenKinds
from headprof.plots.policies import policies_plot

KINDS = TokenKinds(frozenset({0, 1}), frozenset({2, 3, 4}))
TOKENIZER = tiny_tokenizer()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def planned(model, recovery=0.85, budget="100%", **options):
    return make_plan(model, method="fastgen", budget=budget, tokenizer=TOKENIZER, recovery=recovery, **options)


# Which tokens are special or punctuation.


def test_the_kinds_of_a_tokenizers_tokens():
    kinds = TokenKinds.of_tokenizer(TOKENIZER)
    assert kinds.special == {0, 1, 2} and TokenKinds.of_tokenizer(TOKENIZER) is kinds
    texts = {number: TOKENIZER.decode([number]).strip() for number in kinds.punctuation}
    assert {".", ",", "?", ";", "-"} <= set(texts.values())
    assert all(text and not any(c.isalnum() or c in "+=$<>|" for c in text) for text in texts.values())
    ids = TOKENIZER("Who? <b>", add_special_tokens=False).input_ids
    found = kinds.of_ids(torch.tensor([[0, *ids, 10**6]]))[0].tolist()
    assert found[0] == SPECIAL and found[-1] == OTHER and found.count(PUNCTUATION) == 1


def test_what_only_a_chat_template_writes_is_special():
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.add_tokens(["<turn>", "whale"])
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ message['role'] }}", "<turn>")
    special = {tokenizer.decode([number]) for number in TokenKinds.of_tokenizer(tokenizer).special}
    assert special == {"<|start|>", "<|end|>", "<|pad|>", "<turn>"}


# Policies, one row at a time.


def slow_policies(ids, received, valid, order, always):
    """The rows of each policy of one head, `[P]` sets; `always` are kept by every head."""
    rows = valid.nonzero().flatten().tolist()
    special = {row for row in rows if int(ids[row]) in KINDS.special}
    punctuation = {row for row in rows if int(ids[row]) in KINDS.punctuation}
    plain = sorted(set(rows) - special - punctuation, key=lambda row: (-float(received[row]), row))
    heavy = set(plain[: int(order.heavy * len(rows))])
    local = set(rows[len(rows) - int(order.local * len(rows)) :])
    kept = [set(always), special, punctuation, heavy, local]
    return [set().union(*kept[: number + 2]) for number in range(4)] + [set(rows)]


def always_kept(valid, sinks, last):
    rows = valid.nonzero().flatten().tolist()
    return {*rows[:sinks], *rows[max(0, len(rows) - last) :]}


@st.composite
def layers(draw):
    """One layer's prompt with any grouping, padding in front, and tokens of few kinds."""
    batch, heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    tokens = draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    valid = torch.ones(batch, tokens, dtype=torch.bool)
    valid[0, : draw(st.integers(0, tokens - 1))] = False
    queries = torch.randn(batch, heads * group, tokens, 8, generator=generator)
    observed = observed_prompt(queries, torch.randn(batch, heads, tokens, 8, generator=generator), valid, scaling=1.0)
    ids = torch.randint(draw(st.sampled_from([5, 10, 30])), (batch, tokens), generator=generator)
    return replace(observed, ids=ids)


shares = st.sampled_from([0.0, 0.3, 0.5, 1.0])


@settings(max_examples=80, deadline=None)
@given(layers(), shares, shares, st.floats(0.01, 1), st.integers(0, 2))
def test_each_head_takes_the_smallest_policy_that_recovers_enough(observed, heavy, local, recovery, sinks):
    order, budget = PolicyOrder(heavy=heavy, local=local, kinds=KINDS), RecoveryBudget(recovery=recovery)
    method = Method(order, budget, sinks=sinks, keep_last=1)
    said, received = order.assess(observed), received_attention(observed)
    batch, heads = received.shape[:2]
    allotted = observed.valid.sum(-1)[:, None].expand(-1, heads)
    ranked, _ = method.ranked(said.importance, type("Counts", (), {"counts": allotted})(), observed.valid)
    counts, taken = budget.by_content(ranked, said.weights, allotted), budget.policies(ranked, said.weights)
    kept = largest(ranked, counts, order.noise)
    for b, k in torch.cartesian_prod(torch.arange(batch), torch.arange(heads)).tolist():
        own, valid = received[b, k], observed.valid[b]
        near = own[valid].sort().values
        assume(bool((near.diff() > 1e-4 * near[1:]).all()))
        always = always_kept(valid, sinks, 1)
        policies = slow_policies(observed.ids[b], own, valid, order, always)
        recovered = [float(own[sorted(rows)].double().sum() / own[valid].double().sum()) for rows in policies]
        assume(all(abs(each - recovery) > 1e-6 for each in recovered))
        expected = next((n for n, each in enumerate(recovered[:4]) if each >= recovery), 4)
        assert int(taken[b, k]) == expected
        assert set(kept[b, k].nonzero().flatten().tolist()) == policies[expected]


@settings(max_examples=40, deadline=None)
@given(layers(), st.lists(st.floats(0.01, 1), min_size=2, max_size=5))
def test_more_recovery_keeps_more(observed, recoveries):
    order = PolicyOrder(kinds=KINDS)
    said, allotted = order.assess(observed), observed.valid_rows().sum(-1)
    ranked = said.importance.masked_fill(~observed.valid_rows(), float("-inf"))
    counts = [RecoveryBudget(recovery=each).by_content(ranked, said.weights, allotted) for each in sorted(recoveries)]
    for less, more in pairwise(counts):
        assert (less <= more).all()
    assert torch.equal(RecoveryBudget(recovery=1.0).by_content(ranked, said.weights, allotted), allotted)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(0, 120))
def test_what_is_short_is_dealt_one_by_one(needed, total):
    """Each row goes to a head that still needs one and has fewest; of these to the earliest."""
    expected = [0] * len(needed)
    for _ in range(total):
        wanting = [(expected[head], head) for head in range(len(needed)) if expected[head] < needed[head]]
        if wanting:
            expected[min(wanting)[1]] += 1
    assert cut_to(torch.tensor([needed]), torch.tensor([total]))[0].tolist() == expected


# Caches.


@pytest.mark.parametrize("prefill_chunk", [None, 7])
@pytest.mark.parametrize(("recovery", "sizes"), [(0.1, 2), (0.76, 3), (0.8, 2)])
def test_a_prompt_keeps_what_whole_matrices_say(recovery, sizes, prefill_chunk):
    model, ids = tiny_model(layers=3), random_ids(1, 100, seed=2)
    order, kinds = PolicyOrder(), TokenKinds.of_tokenizer(TOKENIZER)
    with attending_ragged(model, prefill_chunk=prefill_chunk):
        prefill(model, ids, cache := HeadCache(planned(model, recovery)))
    attentions = tiny_model(layers=3, attn="eager")(ids, output_attentions=True, use_cache=False).attentions
    valid, found = torch.ones(100, dtype=torch.bool), kept_positions(cache)
    coarse = torch.tensor([{SPECIAL: 0, PUNCTUATION: 2, OTHER: 9}[kind] for kind in kinds.of_ids(ids[0]).tolist()])
    for layer, attention in zip(found, attentions, strict=True):
        received = attention[0].sum(dim=1).unflatten(0, (2, -1)).mean(dim=1)
        for head, own in zip(layer[0], received, strict=True):
            policies = slow_policies(coarse, own, valid, order, {0, 98, 99})
            enough = [rows for rows in policies if float(own[sorted(rows)].sum()) >= recovery * 100 - 1e-4]
            assert set(head) == enough[0]
    assert len({len(head) for layer in found for head in layer[0]}) >= sizes


def test_a_recovery_of_all_is_the_full_cache_however_long():
    model, ids = tiny_model(layers=3), random_ids(1, 40)
    full = model.generate(ids, **GREEDY, max_new_tokens=30)
    with compressed(model, method="fastgen", budget="100%", tokenizer=TOKENIZER, recovery=1.0, buffer=4):
        assert torch.equal(model.generate(ids, **GREEDY, max_new_tokens=30), full)


def test_a_budget_is_the_most_that_a_layers_heads_keep():
    model, ids = tiny_model(layers=3), random_ids(1, 100, seed=2)
    found = []
    for budget in ("100%", 70, 50, 30):
        with attending_ragged(model):
            prefill(model, ids, cache := HeadCache(planned(model, 0.78, budget)))
        found.append(cache.lengths[:, 0])
    free = found[0]
    for most, lengths in zip((70, 50, 30), found[1:], strict=True):
        assert torch.equal(lengths.sum(-1), free.sum(-1).clamp(max=2 * most))
        assert (lengths <= free).all()
    assert int(free.sum()) > int(found[1].sum()) > int(found[2].sum())


@pytest.mark.parametrize("recovery", [0.5, 0.7])
def test_generation_goes_on_with_what_the_prompt_needed(recovery):
    """Special tokens that come are kept like those of the prompt, by heads that have no more than them, too."""
    model, ids = tiny_model(layers=3), random_ids(1, 60, seed=2)
    with attending_ragged(model):
        prefill(model, ids, cache := HeadCache(planned(model, recovery, buffer=4)))
        counts = cache.lengths[:, 0]
        assert torch.equal(cache.plan.decode_allocation(200), counts)
        plain = [token for token in range(100, 200) if token not in TokenKinds.of_tokenizer(TOKENIZER).punctuation]
        following = [1, *plain[:30], 0, *plain[30:50]]
        for token in following:
            model(torch.tensor([[token]]), past_key_values=cache)
            assert bool((cache.lengths[:, 0] <= counts + 4).all())
    assert torch.equal(cache.token_ids, torch.cat([ids, torch.tensor([following])], dim=1))
    assert all({0, 60, 91} <= set(head) for layer in kept_positions(cache) for head in layer[0])


def test_a_batch_goes_on_as_each_prompt_alone():
    """With padding, as a stack, and with beams exchanged; each has its own counts, and its own tokens."""
    model = tiny_model(layers=3)
    prompts, lengths = random_ids(2, 60, seed=2), [60, 43]
    ids, mask = left_padded(prompts, lengths)
    plan = planned(model, 0.7, buffer=4)
    with attending_ragged(model):
        batch = HeadCache(plan)
        model(ids, attention_mask=mask, past_key_values=batch)
        for entry, length in enumerate(lengths):
            alone = HeadCache(plan)
            prefill(model, prompts[entry, :length][None], alone)
            assert torch.equal(batch.lengths[:, entry], alone.lengths[:, 0])
            assert torch.equal(batch.plan.decode_allocation(90)[entry], alone.plan.decode_allocation(90))
            stack = stack_caches([alone, alone])
            stack.reorder_cache(torch.tensor([1, 0]))
            beside = HeadCache(make_plan(model, method="h2o", budget=9))
            fanned = HeadCache(plan)
            prefill(model, prompts[entry, :length][None], FanOutCache([fanned, beside]))
            check_same(fanned, alone)
            for token in range(3, 20):
                step = torch.tensor([[token]])
                for cache in (alone, fanned):
                    model(step, past_key_values=cache)
                model(step.expand(2, 1), past_key_values=stack)
            check_same(fanned, alone)
            assert kept_positions(stack) == [[head * 1 for head in layer] * 2 for layer in kept_positions(alone)]


def test_a_saved_document_goes_on_alike(tmp_path):
    loaded = load_tiny()
    cache = compress_document(loaded, TEXT, planned(loaded.model, 0.7, buffer=6))
    save_document(cache, tmp_path / "doc.kv.safetensors", loaded)
    again, notes = load_document(tmp_path / "doc.kv.safetensors", loaded)
    assert again.plan.method == cache.plan.method and json.loads(notes["options"])["recovery"] == 0.7
    assert torch.equal(again.plan.decode_allocation(300), cache.plan.decode_allocation(300))
    answers = [ask(loaded, each, "How many boats?", max_new_tokens=40).text for each in (cache, again)]
    assert answers[0] == answers[1]


def test_any_budget_may_go_by_the_order_of_policies():
    """Also one that reads the prompt twice, of which both readings know the tokens."""
    model, ids = tiny_model(layers=3), random_ids(1, 50)
    for budget in (GlobalBudget(), METHODS["snapkv"].budget):
        with compressed(model, method=Method(PolicyOrder(), budget), budget=20, tokenizer=TOKENIZER) as plan:
            prefill(model, ids, cache := HeadCache(plan))
        assert int(cache.lengths.sum()) == 20 * 6
        special = {place for place, token in enumerate(ids[0].tolist()) if token < 3}
        assert all(special <= set(head) for layer in kept_positions(cache) for head in layer[0])


# What is refused.


def test_what_makes_no_sense_is_refused():
    model = tiny_model()
    with pytest.raises(UsageError, match="'fastgen' judges rows by what tokens they are: give tokenizer="):
        make_plan(model, method="fastgen")
    for recovery in (0.0, 1.1):
        with pytest.raises(UsageError, match="is no share of a head's attention"):
            find_method(f"fastgen:recovery={recovery}")
    with pytest.raises(UsageError, match=r"A heavy of 2\.0 is no share of the rows"):
        PolicyOrder(heavy=2.0)
    with pytest.raises(UsageError, match="Accumulated knows no policies"):
        Method(Accumulated(), RecoveryBudget())
    with pytest.raises(UsageError, match="without a fixed scale"):
        make_plan(model, method="fastgen", budget=">0.1", tokenizer=TOKENIZER)
    embedded = model.get_input_embeddings()(random_ids(1, 30))
    with attending_ragged(model), pytest.raises(UsageError, match="what tokens they are, which is not known here"):
        model(inputs_embeds=embedded, past_key_values=HeadCache(planned(model)))
    loaded = load_tiny()
    with pytest.raises(UsageError, match="spends what it needs, whatever the budget"):
        compress_to_promise(loaded, LONG, planned(loaded.model), 0.1)


def test_the_table_and_labels():
    method = METHODS["fastgen"]
    assert method == Method(PolicyOrder(), RecoveryBudget(recovery=0.85)) and method.budget.follows_content
    assert name_of(planned(tiny_model()).method) == "fastgen"
    assert CompressionRequest("fastgen", "100%").label == "fastgen, recovery 0.85"
    asked = CompressionRequest("fastgen", "25%", options={"recovery": 0.9})
    assert asked.label == "fastgen, recovery 0.9, budget 25% at most"


# The command line, and the picture.


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    save_tiny(folder / "tiny", chat=True)
    (folder / "doc.txt").write_text(LONG)
    return folder


def test_compress_takes_a_recovery(place):
    compress = ("compress", "--model", "tiny", "--file", "doc.txt", "--method", "fastgen", "--json")
    kept = []
    for options in (("1",), ("0.85",), ("0.6",), ("0.6", "--budget", "12")):
        done = headprof(place, *compress, "--recovery", *options)
        assert done.returncode == 0, done.stderr
        kept.append(json.loads(done.stdout))
    tokens = [each["tokens_per_head"] for each in kept]
    assert tokens[0] == kept[0]["document_tokens"] >= tokens[1] > tokens[2] > tokens[3] == 12
    assert headprof(place, *compress).stdout == headprof(place, *compress, "--recovery", "0.85").stdout
    asked = headprof(place, "generate", "--model", "tiny", "--cache", "doc.kv.safetensors", "--prompt", "Who?")
    assert asked.returncode == 0, asked.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--recovery", "0.8", "--method", "snapkv"), "The method 'snapkv' spends a budget, not what"),
        (("generate", "--recovery", "0", "--method", "fastgen"), "A recovery of 0.0 is no share"),
        (("generate", "--recovery", "0.8", "--cache", "x.kv.safetensors"), "leave --recovery away"),
        (
            ("compress", "--file", "doc.txt", "--method", "fastgen", "--recovery", "0.8", "--max-loss", "1"),
            "leave --recovery or --max-loss away",
        ),
        (("eval", "--recovery", "0.8", "--methods", "fastgen,snapkv"), "add --budgets, or choose --methods fastgen"),
        (("heatmap", "--recovery", "0.8"), "leave --recovery away, or add --policies"),
        (("heatmap", "--policies", "--which", "both"), "leave --which away, or leave --policies away"),
        (("heatmap", "--policies", "-o", "p.html"), "written as .png or .svg"),
    ],
)
def test_one_sentence_says_what_is_wrong(place, arguments, message):
    refused = headprof(place, *arguments, "--model", "tiny")
    told = " ".join(refused.stderr.split())
    assert refused.returncode == 2 and message in told and "Traceback" not in told


def test_eval_takes_a_recovery(place):
    evaluate = ("eval", "--model", "tiny", "--tasks", "niah", "--lengths", "300", "--probes", "1", "--json")
    done = headprof(place, *evaluate, "--methods", "fastgen", "--recovery", "0.7")
    assert done.returncode == 0, done.stderr
    assert {each["budget"] for each in json.loads(done.stdout)["cells"] if each["method"] == "fastgen"} == {"100%"}


def test_the_policies_of_a_model_are_drawn(place):
    done = headprof(place, "heatmap", "--policies", "--model", "tiny", "--file", "doc.txt", "-o", "p.svg")
    assert done.returncode == 0 and done.stdout.strip() == "p.svg", done.stderr
    ids = {element.get("id", "") for element in ET.parse(place / "p.svg").iter()}
    assert {"policies", "policy-heavy-hitters", *(f"policy-{name}" for name in POLICIES if " " not in name)} <= ids
    loaded = load_tiny()
    found = head_policies(loaded, LONG, recovery=0.7)
    assert found.policies.shape == (2, 2) and int(found.policies.max()) < len(POLICIES)
    cache = compress_document(loaded, LONG, planned(loaded.model, 0.7), observe="")
    sizes = [cache.lengths[:, 0][found.policies == policy].tolist() for policy in range(len(POLICIES))]
    ordered = [size for own in sizes for size in sorted(own)]
    assert ordered == sorted(ordered) and all(size == found.tokens for size in sizes[-1])
    first = policies_plot(found, place / "a.png").read_bytes()
    assert policies_plot(found, place / "b.png").read_bytes() == first
