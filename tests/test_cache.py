"""The head-level cache: the full cache's tokens when nothing is cut, and every way a cache is used afterwards."""

import gc

import pytest
import torch
from support.profiles import random_profile
from support.prompts import GREEDY, left_padded, padded_ids, random_ids
from support.tiny_models import ARCHITECTURES, three_layers, tiny_model
from transformers import TextStreamer
from transformers.cache_utils import DynamicCache

from headprof.compression.cache.fan_out import FanOutCache
from headprof.compression.cache.head_cache import HeadCache, stack_caches
from headprof.compression.rows import Rows
from headprof.compression.session import attending_ragged, compressed, make_plan, prefill
from headprof.errors import CacheError, ModelError, UsageError


def generated(model, ids, mask):
    """64 greedy tokens `[B, 64]`, and the logits they were chosen by `[64, B, vocabulary]`."""
    options = GREEDY | {"attention_mask": mask, "max_new_tokens": 64}
    out = model.generate(ids, **options, output_logits=True, return_dict_in_generate=True)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits).float(), out.past_key_values


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_budget_of_the_whole_context_gives_the_full_caches_tokens(arch, num_kv_heads, batch):
    model = three_layers(arch, num_kv_heads)
    ids, mask = padded_ids(batch)
    tokens, logits, _ = generated(model, ids, mask)
    with compressed(model, random_profile(model), method="headkv-r2", budget=40):
        made, made_logits, cache = generated(model, ids, mask)
    assert isinstance(cache, HeadCache)
    assert torch.equal(made, tokens)
    torch.testing.assert_close(made_logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_in_bfloat16_tokens_differ_at_most_from_a_tie_on(arch, num_kv_heads, batch):
    """Random models often find two tokens equally good in bfloat16; what is summed in another order then decides.

    That happens with padding alone, where the full cache attends over masked rows and the compressed one has none, and
    with Gemma-2's eager attention, which rounds the attention weights.
    """
    model = three_layers(arch, num_kv_heads).to(torch.bfloat16)
    ids, mask = padded_ids(batch)
    tokens, logits, _ = generated(model, ids, mask)
    with compressed(model, random_profile(model), method="headkv-r2", budget=40):
        made, made_logits, _ = generated(model, ids, mask)
    best = logits.topk(2, dim=-1).values
    lead = best[..., 0] - best[..., 1]  # [64, B]
    for entry in range(batch):
        same = int((made[entry] == tokens[entry]).long().cumprod(0).sum())
        assert same == 64 or ((entry > 0 or arch == "gemma2") and lead[same, entry] <= 2**-4)
        comparable = slice(0, same + 1)
        torch.testing.assert_close(made_logits[comparable, entry], logits[comparable, entry], atol=0.15, rtol=0.05)


@pytest.mark.parametrize("method", ["headkv-r2", "h2o", "tova", "full"])
@pytest.mark.parametrize("chunk", [1, 7, 13, 40])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "phi3"])
def test_prefill_in_chunks_gives_the_same_cache(arch, chunk, method):
    model = three_layers(arch, 2)
    ids, mask = padded_ids(2)
    plan = make_plan(model, random_profile(model), method=method, budget=12)
    caches = {}
    for prefill_chunk in (None, chunk):
        caches[prefill_chunk] = HeadCache(plan)
        with attending_ragged(model, prefill_chunk=prefill_chunk):
            out = model(ids, attention_mask=mask, past_key_values=caches[prefill_chunk])
            more = torch.cat([mask, torch.ones(2, 9, dtype=torch.int64)], dim=1)
            after = model(random_ids(2, 9), attention_mask=more, past_key_values=caches[prefill_chunk])
        seen = mask.bool()
        if prefill_chunk is None:
            whole, whole_after = out.logits[seen], after.logits
    torch.testing.assert_close(out.logits[seen], whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.logits, whole_after, atol=1e-4, rtol=1e-4)
    for one, other in zip(caches[None].head_layers, caches[chunk].head_layers, strict=True):
        assert one.lengths == other.lengths and torch.equal(one.storage.rows.positions, other.storage.rows.positions)
        torch.testing.assert_close(one.storage.rows.keys, other.storage.rows.keys, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_prefill_in_chunks_leaves_other_caches_and_the_model_alone(attn):
    model = tiny_model(num_kv_heads=2, layers=2)
    model.set_attn_implementation(attn)
    ids = random_ids(1, 30)
    expected = model(ids).logits
    with attending_ragged(model, prefill_chunk=8):
        torch.testing.assert_close(model(ids, past_key_values=DynamicCache()).logits, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-4)
    assert "forward" not in model.model.layers[0].__dict__
    assert torch.equal(model(ids).logits, expected)


def test_chunks_that_cannot_be_run_are_refused():
    model = tiny_model()
    with pytest.raises(UsageError, match="at least 1"), attending_ragged(model, prefill_chunk=0):
        pass
    decoder = torch.nn.Linear(2, 2)
    decoder.config = model.config
    model.get_decoder = lambda: decoder
    with pytest.raises(ModelError, match="does not list its decoder layers"), attending_ragged(model, prefill_chunk=4):
        pass


@pytest.mark.parametrize("prefill_chunk", [None, 250])
def test_no_more_than_one_layer_is_ever_whole(prefill_chunk, monkeypatch):
    """Bytes of all live tensors with a row for each prompt token and KV head, found by the garbage collector."""
    model = tiny_model(num_kv_heads=2, layers=6, max_positions=2048)
    tokens, peak = 1000, 0
    one_layer = 2 * 2 * tokens * 16 * 4

    def whole_bytes():
        found = {}
        for thing in gc.get_objects():
            if type(thing) is torch.Tensor and thing.ndim == 4 and thing.shape[1] == 2 and thing.shape[-1] == 16:
                storage = thing.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
        return sum(found.values())

    before = HeadCache.update
    gc.collect()
    others = whole_bytes()  # of whatever else is alive in this process

    def update(self, *args):
        nonlocal peak
        result = before(self, *args)
        peak = max(peak, whole_bytes() - others)
        return result

    monkeypatch.setattr(HeadCache, "update", update)
    with compressed(model, method="snapkv", budget=10, prefill_chunk=prefill_chunk) as plan, torch.no_grad():
        cache = HeadCache(plan)
        prefill(model, random_ids(1, tokens), cache)
    spare = 0 if prefill_chunk is None else one_layer // 4  # the newest chunk, on its way into its place
    assert one_layer <= peak <= one_layer + spare
    assert cache.nbytes < 6 * one_layer / 30


def test_appending_past_the_slack_loses_nothing():
    model = tiny_model(num_kv_heads=2, layers=2)
    ids = random_ids(1, 60)
    with attending_ragged(model):
        plan = make_plan(model, method="snapkv", budget=100)
        tight, roomy = HeadCache(plan, slack=1), HeadCache(plan, slack=100)
        for cache in (tight, roomy):
            prefill(model, ids[:, :20], cache)
        for start in range(20, 60, 4):
            a = model(ids[:, start : start + 4], past_key_values=tight).logits
            b = model(ids[:, start : start + 4], past_key_values=roomy).logits
            torch.testing.assert_close(a, b)
    assert torch.equal(tight.lengths, roomy.lengths)


def test_appending_within_the_slack_copies_nothing():
    model = tiny_model(num_kv_heads=2, layers=2)
    with compressed(model, method="snapkv", budget=9) as plan:
        cache = HeadCache(plan, slack=8)
        prefill(model, random_ids(1, 30), cache)
        addresses = [layer.storage.rows.keys.data_ptr() for layer in cache.head_layers]
        for _ in range(8):
            model(random_ids(1, 1), past_key_values=cache)
        assert [layer.storage.rows.keys.data_ptr() for layer in cache.head_layers] == addresses
        model(random_ids(1, 1), past_key_values=cache)
        assert [layer.storage.rows.keys.data_ptr() for layer in cache.head_layers] != addresses


def test_several_tokens_at_once_equal_one_by_one_and_crop_takes_them_back():
    model = tiny_model(num_kv_heads=2, layers=2)
    ids = random_ids(1, 36)
    with compressed(model, method="snapkv", budget=9) as plan:
        one, many = HeadCache(plan), HeadCache(plan)
        for cache in (one, many):
            prefill(model, ids[:, :30], cache)
        before = many.lengths
        single = torch.cat([model(ids[:, i : i + 1], past_key_values=one).logits for i in range(30, 36)], dim=1)
        for _ in range(2):
            together = model(ids[:, 30:], past_key_values=many).logits
            torch.testing.assert_close(together, single, atol=1e-5, rtol=1e-4)
            many.crop(-6)
            assert torch.equal(many.lengths, before) and many.get_seq_length() == 30
        with pytest.raises(CacheError, match="Only the last 0 tokens"):
            many.crop(-1)
        assert not many.is_croppable  # since the next tokens may be those that compress it again
    with compressed(model, method="snapkv", budget=9, buffer=None) as plan:
        fresh = HeadCache(plan)
        assert not fresh.is_croppable
        prefill(model, ids[:, :30], fresh)
        assert fresh.is_croppable


def test_a_positive_crop_says_how_many_tokens_are_kept():
    model = tiny_model(num_kv_heads=2, layers=2)
    ids = random_ids(1, 36)
    with compressed(model, method="snapkv", budget=9) as plan:
        cache, expected = HeadCache(plan), HeadCache(plan)
        for each, stop in ((cache, 36), (expected, 34)):
            prefill(model, ids[:, :30], each)
            model(ids[:, 30:stop], past_key_values=each)
        for kept in (50, 36, 34):
            cache.crop(kept)
        assert cache.get_seq_length() == 34 and torch.equal(cache.lengths, expected.lengths)
        assert torch.equal(cache.token_ids, ids[:, :34])
        with pytest.raises(CacheError, match="Only the last 4 tokens"):
            cache.crop(29)
        assert cache.get_seq_length() == 34
        with pytest.raises(CacheError, match="Only the last 0 tokens"):
            HeadCache(plan).crop(-1)


@pytest.mark.parametrize("method", ["headkv-r2", "h2o", "adakv"])
@pytest.mark.parametrize("arch", ["llama", "mistral"])
def test_each_sequence_of_a_batch_is_held_to_the_budgets_of_its_own_length(arch, method):
    """Also those that are shorter than what some heads get, in any order and number."""
    model = tiny_model(arch, num_kv_heads=2, layers=3, **({"sliding_window": 24} if arch == "mistral" else {}))
    lengths, budget, steps = (44, 9, 16, 9), 12, 24
    ids, mask = left_padded(random_ids(4, 44), lengths)
    plan = make_plan(model, random_profile(model), method=method, budget=budget, buffer=1)
    assert method in ("h2o", "adakv") or int(plan.allocation(44).max()) > 16
    with attending_ragged(model), torch.no_grad():
        cache = HeadCache(plan)
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
        chosen = torch.tensor([2, 1, 0, 3, 1])
        cache.batch_select_indices(chosen)
        cache = stack_caches([cache, cache])
        alone = {}
        for entry in set(chosen.tolist()):
            alone[entry] = HeadCache(plan)
            prefill(model, ids[entry : entry + 1, 44 - lengths[entry] :], alone[entry])
        chosen, padding = chosen.repeat(2), 44 - torch.tensor(lengths)
        for token, fed in enumerate(random_ids(4, steps, seed=1).T):
            seen = torch.nn.functional.pad(mask, (0, token + 1), value=1)[chosen]
            places = (44 + token - padding)[chosen, None]
            found = model(fed[chosen, None], attention_mask=seen, position_ids=places, past_key_values=cache).logits
            for entry, own in alone.items():
                expected = model(fed[entry].view(1, 1), past_key_values=own).logits
                for number in (chosen == entry).nonzero().flatten():
                    torch.testing.assert_close(found[number], expected[0], atol=1e-5, rtol=1e-4)
                    assert torch.equal(cache.lengths[:, number], own.lengths[:, 0])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_padding_after_the_document_is_hidden(attn):
    """Questions of different lengths about a compressed document, as a left-padded batch, equal each one alone."""
    model = tiny_model("qwen3", num_kv_heads=2, layers=3, attn=attn)
    document, questions = random_ids(1, 30), [random_ids(1, 4, seed=1), random_ids(1, 9, seed=2)]
    plan = make_plan(model, method="snapkv", budget=9)
    with attending_ragged(model), torch.no_grad():
        cache = HeadCache(plan)
        prefill(model, document, cache)
        batch = stack_caches([cache, cache])
        ids = torch.full((2, 9), 2)
        mask = torch.ones(2, 39, dtype=torch.int64)
        mask[0, 30:35] = 0
        ids[0, 5:], ids[1] = questions[0], questions[1]
        positions = mask.cumsum(-1)[:, 30:] - 1
        together = model(ids, attention_mask=mask, position_ids=positions, past_key_values=batch).logits
        step = {"position_ids": positions[:, -1:] + 1, "attention_mask": torch.nn.functional.pad(mask, (0, 1), value=1)}
        then = model(random_ids(2, 1), past_key_values=batch, **step).logits
        for entry, question in enumerate(questions):
            alone = stack_caches([cache])
            logits = model(question, past_key_values=alone).logits
            torch.testing.assert_close(together[entry, -question.shape[1] :], logits[0], atol=1e-5, rtol=1e-4)
            after = model(random_ids(2, 1)[entry : entry + 1], past_key_values=alone).logits
            torch.testing.assert_close(then[entry], after[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_every_way_of_generating_equals_the_full_cache(options, batch):
    model = tiny_model(num_kv_heads=2, layers=2)
    ids, mask = padded_ids(batch)
    options = GREEDY | {"max_new_tokens": 30, "attention_mask": mask} | options

    def run():
        torch.manual_seed(3)
        return model.generate(ids, **options)

    expected = run()
    with compressed(model, random_profile(model), budget=40):
        assert torch.equal(run(), expected)


def test_streaming_and_a_cache_of_ones_own(tiny, capsys):
    ids = tiny.tokenizer("The keeper of the lighthouse", return_tensors="pt").input_ids
    with compressed(tiny.model, method="snapkv", budget=6) as plan:
        cache = HeadCache(plan)
        streamer = TextStreamer(tiny.tokenizer, skip_prompt=True)
        made = tiny.model.generate(ids, past_key_values=cache, streamer=streamer, max_new_tokens=8, **GREEDY)
    assert cache.get_seq_length() == ids.shape[1] + 7 and made.shape[1] == ids.shape[1] + 8
    assert capsys.readouterr().out.strip() == tiny.tokenizer.decode(made[0, ids.shape[1] :]).strip()


def test_a_cache_is_selected_and_repeated_like_its_sequences():
    model = tiny_model(num_kv_heads=2, layers=2)
    ids = random_ids(3, 30)
    with compressed(model, random_profile(model), budget=9) as plan, torch.no_grad():
        caches = [HeadCache(plan) for _ in range(3)]
        for cache in caches:
            prefill(model, ids, cache)
        picked, repeated, reordered = caches
        picked.batch_select_indices(torch.tensor([2, 0]))
        repeated.batch_repeat_interleave(2)
        reordered.reorder_cache(torch.tensor([1, 1, 0]))
        for cache, entries in ((picked, [2, 0]), (repeated, [0, 0, 1, 1, 2, 2]), (reordered, [1, 1, 0])):
            chosen = HeadCache(plan)
            prefill(model, ids[entries], chosen)
            assert cache.batch_size == len(entries) and torch.equal(cache.lengths, chosen.lengths)
            following = random_ids(len(entries), 3)
            a = model(following, past_key_values=cache).logits
            torch.testing.assert_close(a, model(following, past_key_values=chosen).logits, atol=1e-5, rtol=1e-4)


def test_reset_makes_a_cache_fresh():
    model = tiny_model(num_kv_heads=2, layers=2)
    ids = random_ids(1, 30)
    with compressed(model, method="snapkv", budget=9) as plan:
        cache = HeadCache(plan)
        prefill(model, random_ids(1, 25, seed=5), cache)
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.nbytes == 0 and not cache.is_initialized
        fresh = HeadCache(plan)
        torch.testing.assert_close(prefill(model, ids, cache), prefill(model, ids, fresh))
        assert torch.equal(cache.lengths, fresh.lengths)


@pytest.mark.parametrize("prefill_chunk", [None, 8])
def test_observers_judge_and_are_not_kept(prefill_chunk):
    model = tiny_model(num_kv_heads=2, layers=3)
    document, observers = random_ids(1, 30), random_ids(1, 6, seed=4)
    plans = [make_plan(model, random_profile(model), budget=budget) for budget in (9, 30)]
    caches = [HeadCache(plan) for plan in plans]
    plain = HeadCache(plans[0])
    with attending_ragged(model, prefill_chunk=prefill_chunk), torch.no_grad():
        together = FanOutCache(caches)
        together.expect_observers(6)
        prefill(model, torch.cat([document, observers], dim=1), together)
        prefill(model, document, plain)
        following = random_ids(1, 4, seed=6)
        expected = model(torch.cat([document, following], dim=1), use_cache=False).logits[:, 30:]
        whole = model(following, past_key_values=caches[1]).logits
    assert caches[0].get_seq_length() == plain.get_seq_length() == 30
    assert torch.equal(caches[0].lengths, plain.lengths)
    assert all(int(layer.storage.rows.positions.max()) < 30 for layer in caches[0].head_layers)
    assert any(
        not torch.equal(a.storage.rows.positions, b.storage.rows.positions)
        for a, b in zip(caches[0].head_layers, plain.head_layers, strict=True)
    )
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-4)


def test_head_cache_outside_its_context_says_so():
    model = tiny_model()
    cache = HeadCache(make_plan(model, method="snapkv", budget=8))
    with pytest.raises(CacheError, match=r"inside `with headprof\.compressed"):
        model(random_ids(1, 10), past_key_values=cache)
    single = tiny_model(layers=1)
    cache = HeadCache(make_plan(single, method="snapkv", budget=8))
    single(random_ids(1, 10), past_key_values=cache)
    with pytest.raises(CacheError, match=r"inside `with headprof\.compressed"):
        single(random_ids(1, 1), past_key_values=cache)
    with compressed(model, method="snapkv", budget=8) as plan:
        filled = HeadCache(plan)
        model(random_ids(1, 10), past_key_values=filled)
    with pytest.raises(CacheError, match=r"inside `with headprof\.compressed"):
        model(random_ids(1, 1), past_key_values=filled)


def test_layers_without_plain_attention_are_refused():
    model = tiny_model(layers=2)
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ModelError, match="layers of the kind linear_attention"):
        make_plan(model, method="snapkv")


def test_compact_rows_carry_a_bias_through_everything():
    def rows(lengths, bias):
        count = sum(lengths)
        keys = torch.arange(count * 2.0).reshape(count, 2)
        return Rows(keys, -keys, torch.arange(count).int(), lengths, {"bias": torch.ones(count)} if bias else {})

    joined = Rows.joined([rows([2, 1], False), rows([1, 3], True)])
    assert joined.columns["bias"].tolist() == [0, 0, 0, 1, 1, 1, 1] and joined.lengths == [2, 1, 1, 3]
    chosen = joined.of_heads([3, 0, 3])
    assert chosen.lengths == [3, 2, 3] and chosen.columns["bias"].tolist() == [1, 1, 1, 0, 0, 1, 1, 1]
    assert chosen.positions.tolist() == [1, 2, 3, 0, 1, 1, 2, 3]
    assert not Rows.joined([rows([2], False)]).columns
