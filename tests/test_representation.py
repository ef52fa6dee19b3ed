"""How kept rows are held: methods with int8 and int4 from the prompt to the file, and what cannot be held so."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from support.packed import slow_twin
from support.profiles import random_profile
from support.prompts import random_ids
from support.tiny_models import tiny_model

from headprof import compressed
from headprof.cli.tables.evaluate import scores, sizes
from headprof.compression.cache.fan_out import FanOutCache
from headprof.compression.cache.head_cache import HeadCache, stack_caches
from headprof.compression.cache.schedule import LayerSchedule
from headprof.compression.document import load_document, save_document
from headprof.compression.generation import compress_document
from headprof.compression.kernels.packed_kinds import as_arguments, from_arguments
from headprof.compression.kernels.ragged_rows import Request
from headprof.compression.kernels.triton_attention import attention_unsupported
from headprof.compression.methods.given_budget import Budget
from headprof.compression.methods.quantisation import Int4, Int8
from headprof.compression.methods.representation import Full
from headprof.compression.methods.representations import find_representation
from headprof.compression.methods.table import METHODS, deal_options, find_method, name_of
from headprof.compression.plan import CompressionPlan
from headprof.compression.promise import Candidates
from headprof.compression.rows import Rows
from headprof.compression.session import attending_ragged, make_plan, prefill
from headprof.errors import UsageError
from headprof.models.shape import HeadShape

LOW = "lowrank:key_rank=0.15:value_rank=0.2:heads=1"
"""So small a basis that few rows make up for it."""
LATENT = "latent:rank=0.15:heads=1:group_size=4"
TEXT = "The lighthouse keeper counted nine grey boats before breakfast. " * 30


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_kv_heads=2, layers=2, head_dim=32)


def filled(model, method, ids, *, budget=20, **options) -> HeadCache:
    cache = HeadCache(make_plan(model, random_profile(model), method=method, budget=budget, **options))
    with attending_ragged(model):
        prefill(model, ids, cache)
    return cache


def apart(flat: torch.Tensor, lengths) -> list[torch.Tensor]:
    return list(flat.split(list(lengths)))


def packed_of(cache: HeadCache):
    return [layer.storage.rows.packed for layer in cache.head_layers]


# Rows.


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_kept_is_the_same_and_quantised(model, name, bits, batch):
    """The rows of a first and second layer are chosen by queries; those of the first are the same in either cache."""
    ids = random_ids(batch, 80)
    plain = filled(model, "headkv-r2", ids)
    held = filled(model, f"headkv-r2-{name}", ids, group_size=8)
    full, rows = (cache.head_layers[0].storage.compact() for cache in (plain, held))
    assert torch.equal(full.positions, rows.positions) and list(full.lengths) == list(rows.lengths)
    assert rows.packed.counts == [max(0, length - 3) for length in full.lengths]
    whole = rows.unpacked()
    heads = zip(
        *(apart(flat, full.lengths) for flat in (full.keys, full.values, whole.keys, whole.values)), strict=True
    )
    for keys, values, new_keys, new_values in heads:
        inner, edges = slice(1, len(keys) - 2), [0, -2, -1]
        assert torch.equal(keys[edges], new_keys[edges]) and torch.equal(values[edges], new_values[edges])
        expected = slow_twin(keys[inner], values[inner], [len(keys) - 3], bits, 8)
        for found, own in zip((new_keys[inner], new_values[inner]), expected, strict=True):
            torch.testing.assert_close(found.double(), own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["headkv-r2-int8", "headkv-r2-int4"])
def test_bytes_are_counted_one_by_one(name, dtype):
    model = tiny_model(num_kv_heads=2, layers=2, head_dim=64, dtype=dtype)
    cache = filled(model, name, random_ids(1, 120), budget=50)
    element, bits, slack, expected = torch.empty(0, dtype=dtype).element_size(), int(name[-1]), 16, 0
    for layer in cache.head_layers:
        for length in layer.lengths:
            packed = layer.storage.rows.packed.counts[layer.lengths.index(length)]
            assert length - 3 - 2 <= packed <= length - 3
            groups = -(-packed // 32)
            expected += (length - packed + slack) * 2 * 64 * element  # in full, and the free space
            expected += packed * (2 * 64 * bits // 8 + 4) + groups * 64 * 4
            expected += (length + slack) * 4  # positions
        expected += sum(each.untyped_storage().nbytes() for each in layer.held.recent.tensors)
    assert cache.nbytes == expected
    assert (
        sum(each.untyped_storage().nbytes() for layer in cache.head_layers for each in layer.storage.rows.tensors) > 0
    )


@pytest.mark.parametrize("size", [6_000, 20_000, 60_000])
@pytest.mark.parametrize(
    "representation",
    ["full", "int8", "int4:residual=4", "int4:group_size=3", "int2", "thin", "lowrank", "latent:rank=0.2"],
)
def test_a_budget_in_bytes_is_not_exceeded_and_well_spent(model, representation, size):
    name, options = f"headkv-r2:representation={representation}", {"budget": f"{size}B", "buffer": None}
    cache = filled(model, name, random_ids(1, 300), **options)
    rows = [layer.storage.compact() for layer in cache.head_layers]
    held = sum(each.nbytes for own in rows for each in own.tensors if each is not own.positions)
    assert (0.6 * size < held or int(cache.lengths.min()) == 300) and held <= size
    in_full = size // (2 * 2 * 2 * 32 * 4)
    more = {"full": 1, "thin": 1.1, "lowrank": 1, "latent:rank=0.2": 1}.get(representation, 1.5)
    assert int(cache.lengths.sum()) >= 4 * in_full * (1 if size < 10_000 else more)


@pytest.mark.parametrize("share", ["4%B", "15%B"])
def test_methods_are_compared_at_equal_bytes(model, share):
    sizes, rows = {}, {}
    for representation in ("full", "int8", "int4", "thin", "lowrank"):
        name = f"headkv-r2:representation={representation}"
        cache = filled(model, name, random_ids(1, 400), budget=share, buffer=None)
        held = [each for layer in cache.head_layers for each in layer.storage.compact().tensors]
        sizes[representation] = sum(each.nbytes for each in held) - 4 * int(cache.lengths.sum())  # less positions
        rows[representation] = int(cache.lengths.sum())
    whole = 400 * cache.plan.shape.cache_bytes_per_token(4)
    assert all(0.7 < size / (whole * float(share.removesuffix("%B")) / 100) <= 1 for size in sizes.values())
    assert rows["full"] < rows["thin"] < rows["int8"] < rows["int4"]
    assert rows["full"] < rows["lowrank"] or share == "4%B"  # a basis pays where there are many rows


@pytest.mark.parametrize(("element", "bits", "least"), [(4, 4, 1), (2, 4, 2), (2, 8, 3)])
def test_a_last_group_that_would_save_nothing_is_left_as_it_is(element, bits, least):
    dtype = {4: torch.float32, 2: torch.bfloat16}[element]
    representation = {4: Int4, 8: Int8}[bits](group_size=8)
    for count in range(20):
        keys = torch.randn(count + 3, 64).to(dtype)
        rows = Rows(keys, -keys, torch.arange(count + 3, dtype=torch.int32), [count + 3])
        held = representation.hold(rows, None, first=1, newest=2)
        rest = count % 8
        expected = count if rest == 0 or rest >= least else count - rest
        assert (0 if held.packed is None else held.packed.total) == expected
        assert sum(each.nbytes for each in held.tensors) <= sum(each.nbytes for each in rows.tensors)


def test_the_newest_rows_stay_as_they_are_if_that_is_asked_for(model):
    cache = filled(model, "headkv-r2-int4", random_ids(1, 80), residual=9)
    for layer in cache.head_layers:
        assert layer.storage.rows.packed.counts == [max(0, length - 10) for length in layer.lengths]


@pytest.mark.parametrize("sinks", [0, 4])
def test_the_first_rows_stay_as_they_are(model, sinks):
    cache = filled(model, "headkv-r2-int4", random_ids(1, 80), sinks=sinks)
    assert {packed.first for packed in packed_of(cache)} == {sinks}


# Thinner keys.


@pytest.mark.parametrize("padding", [0, 30])
@pytest.mark.parametrize("options", [{}, {"dropped": 0.7, "judges": 5, "residual": 6}])
def test_the_channels_that_queries_make_least_of_go(model, options, padding, monkeypatch):
    ids, seen = random_ids(2, 60), []
    plain = LayerSchedule.compressed

    def watching(schedule, observed, *rest):
        seen.append(observed)
        return plain(schedule, observed, *rest)

    monkeypatch.setattr(LayerSchedule, "compressed", watching)
    cache = HeadCache(make_plan(model, method="think", budget=20, **options))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    with attending_ragged(model):
        model(ids, attention_mask=mask, past_key_values=cache)
    thin = cache.plan.method.representation
    for layer, observed in zip(cache.head_layers, seen, strict=True):
        rows, keys = layer.storage.compact(), observed.keys
        whole = rows.unpacked().keys.split(list(rows.lengths))
        positions = rows.positions.split(list(rows.lengths))
        for head, (own, places) in enumerate(zip(whole, positions, strict=True)):
            b, k = divmod(head, 2)
            group = observed.queries[b, 2 * k : 2 * k + 2, -thin.judges :].double()
            group = group[:, (mask[b] > 0)[-group.shape[1] :]]
            inner = slice(1, len(own) - max(2, thin.residual))
            kept = keys[b, k, places.long()]
            scores = group.square().mean(dim=(0, 1)) * kept[inner].double().square().mean(dim=0)
            gone = sorted(range(32), key=lambda channel: scores[channel])[: int(32 * thin.dropped)]
            expected = kept.clone()
            expected[inner, gone] = 0
            assert torch.equal(own, expected)


def test_thinner_keys_take_fewer_bytes(model):
    plain, thin = (filled(model, method, random_ids(1, 300), budget=100) for method in ("snapkv", "think"))
    packed = sum(each.total for each in packed_of(thin))
    assert packed == 4 * (100 - 3)
    recent = [
        sum(each.nbytes for layer in cache.head_layers for each in layer.held.recent.tensors) for cache in (plain, thin)
    ]
    assert plain.nbytes - recent[0] - (thin.nbytes - recent[1]) == packed * 12 * 4 - 4 * 20 * 2


@pytest.mark.parametrize("method", ["think", LOW, LATENT])
def test_a_kernel_that_cannot_read_such_rows_says_so(model, method):
    cache = filled(model, method, random_ids(1, 60))
    rows = cache.head_layers[0].storage.in_place()
    request = Request(torch.zeros(1, 4, 1, 32), rows, 2, 1.0)
    assert attention_unsupported(request) == "cannot read rows that are packed in this way"
    again = from_arguments(*as_arguments(rows.packed))
    assert all(
        torch.equal(*pair)
        for pair in zip(again.unpacked(torch.float32), rows.packed.unpacked(torch.float32), strict=True)
    )


# While text is generated, of any representation.


@pytest.mark.parametrize(
    "method", ["headkv-r2-int4", "snapkv:representation=int8", "ems:representation=int4", "think", LOW, LATENT]
)
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_new_rows_stay_as_they_come_until_their_head_is_compressed_again(arch, method):
    model, ids = tiny_model(arch, num_kv_heads=2, layers=2), random_ids(1, 60)
    with compressed(model, random_profile(model), method=method, budget=14, buffer=8) as plan:
        cache = HeadCache(plan)
        token, before, changes = prefill(model, ids, cache).argmax(-1), None, 0
        for _ in range(40):
            token = model(token[:, None], past_key_values=cache).logits[:, -1].argmax(-1)
            layer = cache.head_layers[0]
            now = [list(layer.storage.rows.packed.counts), layer.storage.appended]
            packed = layer.storage.rows.packed.tensors[0].clone()
            assert [length - now[1] - 3 for length in layer.lengths] == now[0]
            if before is not None and now[1] > before[1]:
                assert torch.equal(packed, before[2])
            elif before is not None:
                changes += 1
            before = [*now, packed]
    assert changes >= 3 and int(cache.lengths.sum()) <= (14 + 8) * 4
    made = model.generate(ids, max_new_tokens=4, do_sample=False)  # outside it is the model that it was
    assert made.shape[1] == ids.shape[1] + 4


@pytest.mark.parametrize(
    "method", ["headkv-r2-int4", "adakv:representation=int4", "h2o:representation=int8", "think", LOW, LATENT]
)
def test_attention_is_over_the_rows_as_they_are_held(model, method):
    """Laid out in full, the same rows give the same logits."""
    ids = random_ids(2, 60)
    cache = filled(model, method, ids, buffer=None)
    in_full = stack_caches([cache])
    for layer in in_full.head_layers:
        layer.hold(layer.storage.compact().unpacked())
    assert packed_of(in_full) == [None, None] and None not in packed_of(cache)
    with attending_ragged(model):
        for count in (1, 1, 5, 20, 1):
            new = random_ids(2, count, seed=count)
            found, expected = (model(new, past_key_values=each).logits for each in (cache, in_full))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_tokens_are_taken_out_again(model):
    cache = filled(model, "headkv-r2-int4", random_ids(1, 60))
    with attending_ragged(model):
        first = model(random_ids(1, 3), past_key_values=cache).logits
        cache.crop(-3)
        assert torch.equal(model(random_ids(1, 3), past_key_values=cache).logits, first)


# Several caches.


def test_sequences_are_selected_and_repeated(model):
    ids = random_ids(3, 50)
    cache = filled(model, "headkv-r2-int4", ids)
    cache.batch_select_indices(torch.tensor([2, 0, 0]))
    alone = filled(model, "headkv-r2-int4", ids[[2, 0, 0]])
    assert [each.counts for each in packed_of(cache)] == [each.counts for each in packed_of(alone)]
    with attending_ragged(model):
        new = random_ids(3, 2)
        found, expected = (model(new, past_key_values=each).logits for each in (cache, alone))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("methods", "stays"),
    [
        (["headkv-r2-int4", "headkv-r2-int4"], True),
        (["headkv-r2-int4", "headkv-r2"], True),
        (["think", "headkv-r2", "think"], True),
        ([LOW, "headkv-r2", LOW], True),
        ([LOW, f"{LOW}:unrotated=false"], False),
        ([LOW, "headkv-r2-int8"], False),
        ([LATENT, LATENT, "headkv-r2"], True),
        ([LATENT, f"{LATENT}:bits=8"], False),
        (["headkv-r2", "headkv-r2-int4", "headkv-r2-int8"], False),
        (["headkv-r2-int4", "think"], False),
    ],
)
def test_caches_of_any_representation_are_stacked(model, methods, stays):
    """Those that are quantised alike stay so; where they are not, the stack holds what they attended to in full."""
    ids = random_ids(1, 60)
    caches = [filled(model, method, ids, budget=budget) for method, budget in zip(methods, (20, 30, 20), strict=False)]
    stack = stack_caches(caches)
    assert all((each is not None) == stays for each in packed_of(stack))
    with attending_ragged(model):
        for count in (1, 4):
            new = random_ids(1, count)
            expected = torch.cat([model(new, past_key_values=cache).logits for cache in caches])
            found = model(new.repeat(len(caches), 1), past_key_values=stack).logits
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_one_prefill_fills_caches_of_any_representation(model):
    ids, methods = random_ids(2, 60), ["headkv-r2", "headkv-r2-int4", "headkv-r2-int8", "think", LOW, LATENT]
    alone = [filled(model, method, ids) for method in methods]
    beside = [HeadCache(cache.plan) for cache in alone]
    with attending_ragged(model):
        prefill(model, ids, FanOutCache(beside))
    for one, other in zip(alone, beside, strict=True):
        for own, its in zip(one.head_layers, other.head_layers, strict=True):
            pairs = zip(own.storage.compact().tensors, its.storage.compact().tensors, strict=True)
            assert all(torch.equal(*pair) for pair in pairs)


# Documents.


@pytest.mark.parametrize("budget", [24, "15%B"])
@pytest.mark.parametrize(
    "method",
    [
        "headkv-r2-int4",
        "headkv-r2-int8:group_size=5",
        "tova:representation=int2",
        "think",
        "h2o:representation=thin",
        LOW,
        f"{LOW}:unrotated=false",
        LATENT,
    ],
)
def test_a_document_is_the_same_bit_for_bit_and_goes_on_alike(tiny, tmp_path, method, budget):
    plan = make_plan(tiny.model, random_profile(tiny.model), method=method, budget=budget, buffer=8)
    cache = compress_document(tiny, TEXT, plan)
    save_document(cache, tmp_path / "doc.safetensors", tiny)
    loaded, notes = load_document(tmp_path / "doc.safetensors", tiny)
    assert notes["format_version"] == "5" and loaded.nbytes == cache.nbytes
    assert loaded.plan.method == cache.plan.method and loaded.plan.budget == cache.plan.budget
    for layer, other in zip(cache.head_layers, loaded.head_layers, strict=True):
        own, its = layer.storage.compact(), other.storage.compact()
        assert own.packed.kind == its.packed.kind and own.packed.counts == its.packed.counts
        assert all(torch.equal(*pair) for pair in zip(own.tensors, its.tensors, strict=True))
    with attending_ragged(tiny.model):
        for _ in range(3):
            new = random_ids(1, 7)
            found, expected = (tiny.model(new, past_key_values=each).logits for each in (loaded, cache))
            assert torch.equal(found, expected)


def test_a_document_in_full_is_as_it_was(tiny, tmp_path):
    plan = make_plan(tiny.model, random_profile(tiny.model), budget=24)
    save_document(compress_document(tiny, TEXT, plan), tmp_path / "doc.safetensors", tiny)
    _, notes = load_document(tmp_path / "doc.safetensors", tiny)
    assert notes["format_version"] == "3" and "representation" not in notes["options"] and "packed" not in notes


def test_a_loss_is_measured_beside_the_full_cache_in_full(tiny):
    plan = make_plan(tiny.model, random_profile(tiny.model), method="headkv-r2-int4")
    candidates = Candidates(tiny, TEXT, plan, questions=0)
    assert packed_of(candidates.caches[0]) == [None] * 2 and None not in packed_of(candidates.caches[1])
    assert candidates.caches[0].plan.method.representation == Full()


def test_tables_show_bytes_where_methods_differ_in_them():
    def cell(method, budget, cache_bytes, second_tier_bytes=0):
        return SimpleNamespace(**vars(), task="niah", group="512", questions=3, score=0.5, interval=None)

    alike = [cell("full", "", 10**7), cell("snapkv", "16", 1000), cell("h2o", "16", 1040)]
    assert sizes(alike)[1] == [] and scores(alike)[1][-1] == ["cache bytes", "1.02 kB"]
    unlike = [*alike, cell("headkv-r2-int4", "16", 600)]
    assert sizes(unlike)[1][1:] == [["snapkv", "1 kB"], ["h2o", "1.04 kB"], ["headkv-r2-int4", "600 B"]]
    assert len(scores(unlike)[1]) == 4
    recalling = [*alike, cell("clusterkv", "16", 1200, 9000)]
    assert sizes(recalling)[1][-1] == ["clusterkv", "1.2 kB + 9 kB on the host"]


# How it is asked for, and what is refused.


def test_any_method_is_held_as_asked():
    assert find_method("headkv-r2:representation=int4") == METHODS["headkv-r2-int4"]
    assert find_method("headkv-r2-int4:representation=full") == METHODS["headkv-r2"]
    assert find_method("snapkv:group_size=16:representation=int8").representation == Int8(group_size=16)
    assert name_of(find_method("headkv-r2:representation=int8")) == "headkv-r2-int8"
    assert name_of(changed := find_method("ems:representation=int4:residual=4")) == "ems"
    assert METHODS["ems"].with_options(**changed.options()) == changed


def test_the_full_cache_stays_what_others_are_measured_by():
    dealt = deal_options(["full", "snapkv"], {"representation": "int4", "group_size": 16})
    assert dealt == {"full": {}, "snapkv": {"representation": "int4", "group_size": 16}}
    with pytest.raises(UsageError, match="'int4' is not for the full cache, by which others are measured: choose a"):
        replace(METHODS["full"], representation=Int4())
    with pytest.raises(UsageError, match="None of the methods has a parameter 'group_size'"):
        deal_options(["snapkv"], {"group_size": 16})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "headkv-fit:representation=int4",
            "'int4' would change rows that have been fitted to stand for others: choose",
        ),
        (
            "snapkv:representation=int5",
            "no representation 'int5': choose one of full, int8, int4, int2, thin, lowrank, latent",
        ),
        ("snapkv:representation=4", "no representation 4: choose one of full, int8, int4"),
        ("headkv-r2-int4:group_size=0", "A group of 0 rows has none to quantise: give group_size at least 1"),
        ("headkv-r2-int8:residual=-1", "no -1 newest rows: give residual at least 0"),
        ("full:representation=int4", "'int4' is not for the full cache"),
        ("kvzip:representation=thin", "'thin' judges channels by queries, which are gone when .*: choose adakv-kvzip"),
        ("think:dropped=1.0", "A share of 1.0 of the channels cannot go: give dropped above 0 and below 1"),
        ("lowrank:key_rank=0", "some of their dimensions: give key_rank and value_rank above 0, to 1"),
        ("lowrank:value_rank=1.5", "some of their dimensions: give key_rank and value_rank above 0, to 1"),
        ("lowrank:heads=-1", "no fewer heads and queries than none: give heads, judges and residual at least 0"),
        ("latent:rank=0", "some of the dimensions of key and value: give rank above 0, to 1"),
        ("latent:bits=3", "in 8, 4 or 2 bits, in groups: give bits of these, and group_size at least 1"),
        ("latent:group_size=0", "in 8, 4 or 2 bits, in groups: give bits of these, and group_size at least 1"),
        ("headkv-fit:representation=lowrank", "'lowrank' would change rows that have been fitted"),
        (
            "kvzip:representation=latent",
            "'latent' judges channels by queries, which are gone when .*: choose adakv-kvzip",
        ),
        ("think:judges=0", "Channels are judged by queries: give judges at least 1"),
    ],
)
def test_what_cannot_be_is_refused(name, message):
    with pytest.raises(UsageError, match=message) as refusal:
        find_method(name)
    assert str(refusal.value).count(". ") == 0


def test_heads_whose_codes_fill_no_bytes_are_refused():
    shape, scores = HeadShape("M", 1, 1, 1, 7, 100), torch.ones(1, 1)
    with pytest.raises(
        UsageError, match="cannot be held as 'int4': codes of 4 bits for 7 channels fill no whole bytes"
    ):
        CompressionPlan(METHODS["headkv-r2-int4"], Budget(8.0, "tokens"), shape, scores, 4)
    assert find_representation("int8").fault(7) is None


def test_places_are_those_of_the_heads():
    lengths = [5, 0, 2, 40]
    keys = torch.arange(47.0)[:, None].repeat(1, 8)
    rows = Rows(keys, keys, torch.arange(47).int(), lengths)
    held = Int4(group_size=4).hold(rows, None, first=1, newest=2)
    starts = list(accumulate(lengths, initial=0))
    own = [
        position
        for start, length, count in zip(starts, lengths, held.packed.counts, strict=False)
        for position in [*range(start, start + length)]
        if not start + 1 <= position < start + 1 + count
    ]
    assert held.keys[:, 0].tolist() == own and held.unpacked().keys.shape == keys.shape
