"""Rows that no method may evict: in every head, as they were, from the prompt to the last recompression."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.commands import headprof
from support.host_reads import device_watched
from support.observations import as_held_rows, observed_prompt
from support.profiles import judging, random_profile
from support.prompts import GREEDY, left_padded, random_ids
from support.tiny_models import load_tiny, tiny_model, tiny_tokenizer
from support.unlike import UNLIKE

from headprof import METHODS, HeadCache, ask, compress_document, compressed, load_document, make_plan, save_document
from headprof.compression import pattern_search
from headprof.compression.cache.fan_out import FanOutCache
from headprof.compression.cache.head_cache import stack_caches
from headprof.compression.cache.schedule import LayerSchedule
from headprof.compression.generation import generate_text
from headprof.compression.inputs import demo_document
from headprof.compression.keeping import Keeping
from headprof.compression.methods.fit import Fit
from headprof.compression.methods.importance import assessed
from headprof.compression.pattern_search import find_matches
from headprof.compression.protected import ProtectedTokens
from headprof.compression.rows import HeadCounts
from headprof.errors import CacheError, UsageError
from headprof.models.prompt_encoder import PromptEncoder
from headprof.profile.head_profile import HeadProfile
from headprof.utils.assets import asset_dir
from headprof.utils.tensor_files import checksum

PROMPT, BUDGET = 80, 24
SPANS = [(10, 17), (40, 43)]
KEPT = {*range(10, 17), *range(40, 43)}
MERGING = {"threshold": 0.3, "coverage": 1.0}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def planned(model, name, budget=BUDGET, **options):
    options = {"buffer": 6} | (MERGING if "ems" in name else {}) | options
    return make_plan(model, random_profile(model), method=name, budget=budget, **judging(model, name), **options)


def context(model, name, budget=BUDGET, **options):
    options = {"buffer": 6} | (MERGING if "ems" in name else {}) | options
    return compressed(model, random_profile(model), method=name, budget=budget, **judging(model, name), **options)


def keeping_all(name):
    """What lets a method that spends no more than it needs keep as much as the budget allows."""
    return {"recovery": 1.0} if METHODS[name].budget.follows_content else {}


def rows_of(layer):
    """Positions, keys and values of each head, by position."""
    rows = layer.storage.compact().unpacked()
    parts = [each.split(layer.lengths) for each in (rows.positions, rows.keys, rows.values)]
    return [{int(p): (key, value) for p, key, value in zip(*head, strict=True)} for head in zip(*parts, strict=True)]


def positions_of(cache):
    return [[sorted(head) for head in map(dict, rows_of(layer))] for layer in cache.head_layers]


def assert_kept(cache, whole, kept=KEPT):
    """Every head holds the rows `kept`, just as the full cache has them, but for what changes them on purpose."""
    fitted = isinstance(cache.plan.method.reduction, Fit)
    held = cache.plan.method.representation.name
    near, compared = {"int8": 0.1, "int4": 1.0}.get(held, 0.0), slice(0, 1) if fitted else slice(held == "thin", 2)
    if held in ("lowrank", "latent"):  # of which random keys leave little
        compared = slice(0, 0)
    for layer, full in zip(cache.head_layers, whole.head_layers, strict=True):
        for own, all_rows in zip(rows_of(layer), rows_of(full), strict=True):
            assert kept <= own.keys()
            for position in kept:
                pairs = list(zip(own[position], all_rows[position], strict=True))[compared]
                assert all((one - two).abs().max() <= near for one, two in pairs)


def test_spans_marks_and_nothing():
    marks = torch.zeros(2, 6, dtype=torch.bool)
    marks[0, 1:3] = marks[1, 5] = True
    both = ProtectedTokens.of(marks)
    assert both.positions == ((1, 2), (5,)) and torch.equal(both.marks(2, 6), marks)
    assert ProtectedTokens.of([(1, 3), (2, 4), (9, 9)]).positions == ((1, 2, 3),)
    assert ProtectedTokens.of(marks[:1].expand(3, -1)).positions == ((1, 2),)  # alike in all
    assert [ProtectedTokens.of(each) for each in (None, [], [(3, 3)], torch.zeros(4, dtype=torch.bool))] == [None] * 4
    assert both.count(2) == [1, 1] and both.count(0, 5) == [2, 0]
    assert both.of_sequences([1, 1, 0]).positions == ((5,), (5,), (1, 2))
    assert both.for_batch(4, 6).positions == ((1, 2), (1, 2), (5,), (5,))
    assert ProtectedTokens.joined([both, None], [2, 1]).positions == ((1, 2), (5,), ())
    held = torch.tensor([[[0, 2, 5, 70]], [[0, 2, 5, 70]]], dtype=torch.int32)
    assert both.among(held).tolist() == [[[False, True, False, False]], [[False, False, True, False]]]


@pytest.mark.parametrize(
    "keep", [torch.ones(4), torch.ones(1, 1, 4, dtype=torch.bool), [(3, 1)], [(-1, 2)], [3], ["ab"]]
)
def test_what_names_no_tokens_is_refused(model, keep):
    with pytest.raises(UsageError, match="Protected tokens cannot be"):
        HeadCache(planned(model, "snapkv")).protect(keep)


def test_there_must_be_such_tokens(model):
    with context(model, "snapkv") as plan:
        with pytest.raises(CacheError, match="Token 99 is protected where the prompt has 80 tokens"):
            model(random_ids(1, PROMPT), past_key_values=HeadCache(plan).protect([(90, 100)]))
        with pytest.raises(CacheError, match="Tokens of 2 sequences are protected where the prompt has 3"):
            model(random_ids(3, PROMPT), past_key_values=HeadCache(plan).protect(torch.eye(2, dtype=torch.bool)))
        cache = HeadCache(plan)
        model(random_ids(1, PROMPT), past_key_values=cache)
        with pytest.raises(CacheError, match="only before the prompt is read"):
            cache.protect(SPANS)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.always_kept < 8])
def test_every_head_keeps_them_as_they_are(model, name, chunk):
    ids = random_ids(1, PROMPT)
    with context(model, "full", prefill_chunk=chunk) as plan:
        model(ids, past_key_values=(whole := HeadCache(plan)))
    with context(model, name, prefill_chunk=chunk) as plan:
        cache = HeadCache(plan).protect(SPANS)
        model(ids, past_key_values=cache)
        assert_kept(cache, whole)
        allotted = plan.allocation(PROMPT, len(KEPT))
        total = BUDGET if name != "full" else PROMPT
        assert int(allotted.sum()) == total * allotted.numel()
        kept = int(cache.lengths.sum())
        assert kept <= int(allotted.sum()) if plan.follows_content else kept == int(allotted.sum())
        assert int(allotted.min()) >= len(KEPT) + plan.method.always_kept
        compressions = 0
        for token in random_ids(1, 60, seed=1)[0]:
            before = cache.lengths.sum()
            model(token[None, None], past_key_values=cache)
            compressions += bool(cache.lengths.sum() < before)
            assert_kept(cache, whole)
        assert compressions >= 5 or name == "full"
        if name != "full":
            assert int(cache.lengths.sum()) <= (BUDGET + 6) * allotted.numel()


@pytest.mark.parametrize("name", METHODS)
def test_without_protection_nothing_changes(model, name):
    ids, made = random_ids(2, PROMPT), []
    for keep in (None, [(5, 5)], torch.zeros(2, PROMPT, dtype=torch.bool)):
        with context(model, name, keep=keep):
            out = model.generate(ids, max_new_tokens=30, return_dict_in_generate=True, **GREEDY)
        rows = [layer.storage.compact() for layer in out.past_key_values.head_layers]
        made.append([out.sequences, *(tensor for each in rows for tensor in each.tensors)])
    for other in made[1:]:
        assert all(torch.equal(*pair) for pair in zip(made[0], other, strict=True))


@pytest.mark.parametrize("name", [name for name in UNLIKE if METHODS[name].representation.is_full])
def test_a_budget_of_the_whole_context_is_the_full_cache(model, name):
    ids = random_ids(1, PROMPT)
    full = model.generate(ids, max_new_tokens=12, **GREEDY)
    for keep in (SPANS, [(0, 2), (70, PROMPT)]):
        with context(model, name, PROMPT + 2, keep=keep, buffer=64, **keeping_all(name)):
            assert torch.equal(model.generate(ids, max_new_tokens=12, **GREEDY), full)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_recency_keeps_what_loops_would(model, data):
    """StreamingLLM's choice is known: sinks, what is protected, and the latest of the rest."""
    tokens = data.draw(st.integers(8, 40))
    spans = data.draw(st.lists(st.tuples(st.integers(0, tokens), st.integers(0, 6)), max_size=4))
    spans = [(start, min(tokens, start + width)) for start, width in spans]
    sinks, last = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    wanted = {position for span in spans for position in range(*span)}
    always = wanted | set(range(sinks)) | set(range(tokens - last, tokens))
    budget = data.draw(st.integers(max(1, len(always)), tokens + 2))
    with compressed(
        model, method="streamingllm", budget=budget, sinks=sinks, keep_last=last, buffer=None, keep=spans
    ) as plan:
        out = model(random_ids(1, tokens))
    free = [position for position in reversed(range(tokens)) if position not in always]
    expected = sorted(always | set(free[: max(0, budget - len(always))]))
    assert positions_of(out.past_key_values) == [[expected] * 2] * 2
    assert plan.allocation(tokens).shape == (2, 2)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(UNLIKE), st.integers(0, 30), st.integers(1, 30), st.booleans())
def test_the_least_budget_that_is_named_works_and_no_less(model, name, start, width, generates):
    tokens, spans = 30, [(start, min(30, start + width))]
    protected, buffer = ProtectedTokens.of(spans), 4 if generates else None
    assume(protected is not None)
    with pytest.raises(UsageError, match="that every head keeps") as refused:
        planned(model, name, 1, buffer=buffer).check(tokens, protected)
    if "are protected" not in str(refused.value):  # they are all kept in any case
        assert set(protected.positions[0]) <= {*range(4), 28, 29}
        return
    least = int(str(refused.value).split(" or more")[0].split()[-1])
    with pytest.raises(UsageError, match="raise --budget"):
        planned(model, name, least - 1, buffer=buffer).check(tokens, protected)
    options = {"method": name, "budget": least, "buffer": buffer, "keep": spans} | judging(model, name)
    with compressed(model, random_profile(model), **options) as plan:
        plan.check(tokens, protected)
        out = model.generate(random_ids(1, tokens), max_new_tokens=14, return_dict_in_generate=True, **GREEDY)
    for layer in positions_of(out.past_key_values):
        for head in layer:
            assert set(range(*spans[0])) <= set(head)


def test_a_small_decode_budget_is_named(model):
    with pytest.raises(UsageError, match="raise --decode-budget to 13 or more, or protect less"):
        planned(model, "snapkv", decode_budget=12).check(PROMPT, ProtectedTokens.of(SPANS))
    with (
        context(model, "snapkv", decode_budget=12, keep=SPANS),
        pytest.raises(UsageError, match="raise --decode-budget to 13 or more"),
    ):
        model(random_ids(1, PROMPT))


def chosen_by_loops(method, importance, counts, valid, protected):
    """Which rows each head keeps, where no row is handed on from head to head."""
    kept = torch.zeros_like(protected)
    for b, k in torch.cartesian_prod(*map(torch.arange, importance.shape[:2])).tolist():
        count, rows = int(counts[b, k]), valid[b].nonzero().flatten().tolist()
        others = [row for row in rows if protected[b, k, row] or row in rows[: method.sinks]]
        last = max(method.keep_last, 0)
        named = set(others) | set(rows[max(0, len(rows) - last) :])
        wanted = int(count * method.recent_share)
        if wanted > last:
            wanted = max(last, min(wanted, count - len(named) + last))
            named |= set(rows[len(rows) - min(wanted, len(rows)) :])
        rest = sorted(set(rows) - named, key=lambda row: (-float(importance[b, k, row]), row))
        kept[b, k, [*named, *rest[: count - len(named)]]] = True
    return kept


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 2), st.integers(0, 3), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_the_ranking_keeps_what_loops_would(seed, sinks, keep_last, recent_share):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high, *shape: torch.randint(low, high + 1, shape, generator=generator)  # noqa: E731
    method = replace(METHODS["snapkv"], sinks=sinks, keep_last=keep_last, recent_share=recent_share)
    valid = torch.arange(20)[None] >= draw(0, 8, 2, 1)
    protected = torch.rand(2, 3, 20, generator=generator) < 0.2
    importance = torch.rand(2, 3, 20, generator=generator)
    real = protected & valid[:, None]
    least = (real.sum(-1) + sinks + keep_last).minimum(valid.sum(-1)[:, None])
    counts = least + (torch.rand(2, 3, generator=generator) * (valid.sum(-1)[:, None] - least + 1)).long()
    ranked, found = method.ranked(importance, HeadCounts.looked_up(counts), valid, protected)
    kept = torch.zeros_like(protected)
    for b, k in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        kept[b, k, ranked[b, k].argsort(descending=True, stable=True)[: int(counts[b, k])]] = True
    assert torch.equal(found.counts, counts)
    assert torch.equal(kept, chosen_by_loops(method, importance, counts, valid, real))


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("seed", range(10))
def test_heads_that_share_leave_room_for_them(seed, share):
    generator = torch.Generator().manual_seed(seed)
    method = METHODS["adakv"].with_options(safeguard=share)
    importance = torch.rand(1, 3, 40, generator=generator) ** torch.tensor([8.0, 1.0, 0.1])[:, None]
    protected = torch.zeros(1, 3, 40, dtype=torch.bool)
    protected[..., torch.randperm(40, generator=generator)[:9]] = True
    counts = HeadCounts.looked_up(torch.full((1, 3), 15))
    ranked, spread = method.ranked(importance, counts, None, protected)
    assert int(spread.counts.sum()) == 45
    always = (ranked == float("inf")).sum(-1)
    assert (spread.counts >= always + ((15 - always) * share).long()).all()
    assert (ranked[protected] == float("inf")).all()


@pytest.mark.parametrize("name", ["headkv-r2", "adakv", "h2o", "ems"])
def test_sequences_of_a_batch_keep_their_own(model, name):
    lengths, spans = [PROMPT, 65], [[(10, 14)], [(20, 23), (30, 36)]]
    ids = random_ids(2, PROMPT)
    batch, mask = left_padded(ids, lengths)
    marks = torch.zeros(2, PROMPT, dtype=torch.bool)
    for row, (length, own) in enumerate(zip(lengths, spans, strict=True)):
        for start, stop in own:
            marks[row, PROMPT - length + start : PROMPT - length + stop] = True
    with context(model, name) as plan:
        together = HeadCache(plan).protect(marks)
        model(batch, attention_mask=mask, past_key_values=together)
        for row, (length, own) in enumerate(zip(lengths, spans, strict=True)):
            alone = HeadCache(plan).protect(own)
            model(ids[row : row + 1, :length], past_key_values=alone)
            shift = PROMPT - length
            for layer, other in zip(positions_of(together), positions_of(alone), strict=True):
                assert layer[2 * row : 2 * row + 2] == [[each + shift for each in head] for head in other]
        for step in range(40):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            model(random_ids(2, 1, step), attention_mask=mask, past_key_values=together)
        for layer in positions_of(together):
            for head, held in enumerate(layer):
                assert set(marks[head // 2].nonzero().flatten().tolist()) <= set(held)


def test_they_go_with_their_sequence(model):
    ids = random_ids(2, PROMPT)
    marks = torch.zeros(2, PROMPT, dtype=torch.bool)
    marks[0, 10:15] = marks[1, 30:38] = True

    def kept(cache):
        return [[set(head) & {*range(10, 15), *range(30, 38)} for head in layer] for layer in positions_of(cache)]

    def go_on(cache, count=30):
        for step in range(count):
            model(random_ids(1, 1, step).expand(cache.batch_size, -1), past_key_values=cache)

    first, second = set(range(10, 15)), set(range(30, 38))
    with context(model, "streamingllm", 20) as plan:
        cache = HeadCache(plan).protect(marks)
        model(ids, past_key_values=cache)
        go_on(cache)
        assert kept(cache) == [[first, first, second, second]] * 2
        cache.reorder_cache(torch.tensor([1, 0]))
        go_on(cache)
        assert kept(cache) == [[second, second, first, first]] * 2
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0, 1]))
        go_on(cache)
        assert kept(cache) == [[first, first, second, second, second, second]] * 2
        cache.crop(-1)
        go_on(cache)
        assert kept(cache) == [[first, first, second, second, second, second]] * 2
        stack = stack_caches([cache, cache])
        go_on(stack)
        assert stack.batch_size == 6 and kept(stack) == [[*[first] * 2, *[second] * 4] * 2] * 2
        cache.reset()
        assert cache.protected is None


def test_beams_and_generate_keep_them(model):
    with context(model, "streamingllm", 20, keep=SPANS):
        options = GREEDY | {"num_beams": 3, "max_new_tokens": 30, "return_dict_in_generate": True}
        out = model.generate(random_ids(2, PROMPT), **options)
    for layer in positions_of(out.past_key_values):
        assert len(layer) == 12 and all(set(head) >= KEPT for head in layer)


def test_caches_of_one_prefill_and_stacks_keep_their_own(model):
    plans = [planned(model, name) for name in ("snapkv", "streamingllm")]
    caches = [HeadCache(plans[0]).protect(SPANS), HeadCache(plans[1])]
    with context(model, "snapkv"):
        model(random_ids(1, PROMPT), past_key_values=FanOutCache(caches))
        stack = stack_caches(caches)
    held = positions_of(stack)
    assert all(set(head) >= KEPT for layer in held for head in layer[:2])
    assert not any(set(head) >= KEPT for layer in held for head in layer[2:])
    assert stack.protected.positions == (tuple(sorted(KEPT)), ())


@pytest.mark.parametrize("arch", ["mistral", "gemma2", "gemma3"])
def test_a_sliding_window_keeps_what_it_sees(arch):
    """A layer that sees all keeps them for good, one with a window as long as it sees them."""
    model = tiny_model(arch, sliding_window=20, attn="eager" if arch == "gemma2" else None)
    keep, prompt = [(2, 6), (28, 33)], 40
    with compressed(model, method="streamingllm", budget=18, buffer=4, keep=keep, sinks=1) as plan:
        out = model(random_ids(1, prompt))
        cache, gone = out.past_key_values, False
        for step in range(40):
            for layer, window in zip(cache.head_layers, plan.windows, strict=True):
                oldest = 0 if window is None else cache.get_seq_length() - window + 1
                kept = {position for span in keep for position in range(*span) if position >= oldest}
                for head in rows_of(layer):
                    assert kept <= head.keys()
                    gone |= window is not None and not head.keys() & set(range(28, 33))
            model(random_ids(1, 1, step), past_key_values=cache)
    assert gone


@pytest.mark.parametrize("kind", ["prompt", "padded", "held"])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.recall.is_on])
def test_the_host_does_not_wait_for_them(model, name, kind):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 4, PROMPT, 16, generator=generator)
    keys, values = (torch.randn(2, 2, PROMPT, 16, generator=generator) for _ in range(2))
    valid = torch.ones(2, PROMPT, dtype=torch.bool)
    if kind == "padded":
        valid[0, :5] = False
    needed = METHODS[name].importance.queries
    queries = queries if needed is None else queries[:, :, PROMPT - needed :]
    observed = observed_prompt(queries, keys, valid, values, scaling=0.4)
    observed = as_held_rows(observed) if kind == "held" else replace(observed, padded=kind == "padded")
    schedule = LayerSchedule(planned(model, name, **keeping_all(name)), 0, ProtectedTokens.of(SPANS))
    schedule.protected.among(observed.positions)  # so the device knows them
    observed.layer.rotary.turning(16)  # which is found once for a model
    counts = HeadCounts.of(torch.tensor([[BUDGET - 4, BUDGET + 4]] * 2), "cpu")
    with device_watched() as watched:
        rows, _ = schedule.compressed(observed, assessed(schedule.importance, observed), counts)
    assert watched.waits == []
    assert int(rows.counts.sum()) == 4 * BUDGET


# Texts.


def test_matches_of_texts_and_expressions(monkeypatch):
    text = "Note 3: aaa. Note 12: bbb.\nnote 4: ccc."
    assert find_matches("Note", text) == ((0, 4), (13, 17))
    assert find_matches("aa", text) == ((8, 10), (9, 11))
    assert find_matches("/", "a/b") == ((1, 2),)
    assert find_matches(r"/(?i)note \d+/", text) == ((0, 6), (13, 20), (27, 33))
    assert find_matches(r"/(?m)^note.*$/", text) == ((27, 39),)
    assert find_matches("/x*/", text) == ()
    assert find_matches("/é+/", "caféé \U0001f600é") == ((3, 5), (7, 8))
    monkeypatch.setattr(pattern_search, "SECONDS", 0.5)
    with pytest.raises(UsageError, match=r"'/\(a\+\)\+\$/' takes more than .* seconds to search the text"):
        find_matches("/(a+)+$/", "a" * 40 + "!")


@pytest.mark.parametrize(
    "pattern", ["", "  ", "//", "/(/", "/[z-a]/", "/(?P<a>x)(?P<a>y)/", "/a{99999999999999999999}/"]
)
def test_bad_patterns_are_refused_in_a_sentence(pattern):
    with pytest.raises(UsageError) as refused:
        Keeping((pattern,)).check("text")
    assert "\n" not in str(refused.value) and str(refused.value).endswith(".")


@settings(max_examples=60, deadline=None)
@given(
    st.text("ab é日<|end|>\n", max_size=30), st.text("The boats<|end|>", max_size=12), st.sampled_from([True, False])
)
def test_tokens_with_places_are_the_tokens(document, system, chat):
    encoder = PromptEncoder(tiny_tokenizer(chat=chat), system=system if chat and system else None)
    for plain, placed in (
        (encoder.document_ids, encoder.encode_document),
        (encoder.prompt_ids, encoder.encode_prompt),
        (encoder.question_ids, encoder.encode_asked),
    ):
        assert list(placed(document).ids) == plain(document)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(1, 20), st.booleans())
def test_all_tokens_of_a_match_are_kept(start, width, chat):
    document = (
        "The lighthouse keeper counted nine grey boats before breakfast, and wrote the number on the kitchen wall."
    )
    wanted = document[start : start + width]
    assume(wanted.strip())
    tokenizer = tiny_tokenizer(chat=chat)
    keeping = Keeping((wanted,), "Be brief." if chat else None)
    ids, kept = keeping.document(keeping.encoder(tokenizer), document)
    pieces = [tokenizer.decode(ids[position]) for position in kept.positions[0]]
    assert wanted in "".join(pieces) and ("Be brief." in "".join(pieces)) == chat
    ids, kept = Keeping((wanted,)).prompt(PromptEncoder(tokenizer), "Nothing of it.", document)
    assert wanted in "".join(tokenizer.decode(ids[position]) for position in kept.positions[0])


def test_a_system_message_is_written_by_the_template_and_kept():
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|start|>system\nYou are kind.<|end|>\n{% endif %}"
        + tokenizer.chat_template
    )
    ids, kept = Keeping(system="Say <|end|> always.").prompt(
        PromptEncoder(tokenizer, system="Say <|end|> always."), None, "Who?"
    )
    start = "<|start|>system\nSay <|end|> always.<|end|>\n<|start|>user\nWho?<|end|>\n<|start|>assistant\n"
    assert tokenizer.decode(ids) == start and ids.count(1) == 2  # that in the message is no control token
    assert tokenizer.decode([ids[position] for position in kept.positions[0]]) == "Say <|end|> always."
    free = Keeping(system="Be brief.", keep_system=False)
    assert free.prompt(free.encoder(tokenizer), None, "Who?")[1] is None
    ids, kept = Keeping().prompt(PromptEncoder(tokenizer), None, "Who?")
    assert kept is None and "You are kind." in tokenizer.decode(ids)  # not the user's own
    part = Keeping(("brief",), "Be brief.", keep_system=False)
    ids, kept = part.document(part.encoder(tokenizer), "Nine boats.")
    assert tokenizer.decode([ids[position] for position in kept.positions[0]]).strip() == "brief"


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}{{ messages[-1]['content'] }}",
        "[INST]{{ messages[-1]['content'] }}[/INST]",
    ],
)
def test_without_a_system_role_none_is_written(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UsageError, match="leave --system away and begin the document or the prompt with its text"):
        PromptEncoder(tokenizer, system="Be brief.")


def test_a_slow_tokenizer_cannot_say_which_tokens_to_keep():
    slow = SimpleNamespace(
        is_fast=False, chat_template=None, bos_token_id=None, added_tokens_decoder={}, bos_token=None
    )
    with pytest.raises(UsageError, match="fast tokenizers only"):
        Keeping(("boats",)).document(PromptEncoder(slow), "Nine boats.")


# Documents.

TEXT = "The lighthouse keeper counted nine grey boats. Note 3: the bell is rung twice. " * 2 + "Nobody came by. " * 40


@pytest.fixture(scope="module")
def loaded():
    return load_tiny()


def document(loaded, name="headkv-r2", **options):
    by = {"method": name, "budget": 64, "buffer": 8} | judging(loaded.model, name)
    plan = make_plan(loaded.model, random_profile(loaded.model), **by)
    return compress_document(loaded, TEXT, plan, **{"keep": [r"/Note \d: [a-z ]+/"], "system": "Be kind."} | options)


@pytest.mark.parametrize("name", METHODS)
def test_a_document_keeps_them_in_a_file_and_beyond(loaded, name, tmp_path):
    cache = document(loaded, name)
    ids, expected = Keeping([r"/Note \d: [a-z ]+/"], "Be kind.").document(
        PromptEncoder(loaded.tokenizer, system="Be kind."), TEXT
    )
    assert cache.protected == expected and cache.token_ids.tolist() == [ids]
    kept = set(expected.positions[0])
    text = loaded.tokenizer.decode([ids[position] for position in sorted(kept)])
    assert text.count("Note 3: the bell is rung twice") == 2 and "Be kind." in text
    assert all(kept <= set(head) for layer in positions_of(cache) for head in layer)
    save_document(cache, tmp_path / "doc.kv.safetensors", loaded)
    read, _ = load_document(tmp_path / "doc.kv.safetensors", loaded)
    assert read.protected == expected
    answers = [ask(loaded, each, "Who?", max_new_tokens=40).text for each in (cache, read)]
    assert answers[0] == answers[1]
    generate_text(loaded, torch.tensor([[5, 6]]), cache=read, max_new_tokens=80)
    assert all(kept <= set(head) for layer in positions_of(read) for head in layer)


def rewritten(path, change):
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    metadata["checksum"] = checksum(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def test_a_filled_cache_takes_no_more_of_them(loaded):
    with pytest.raises(CacheError, match="only before the prompt is read"):
        generate_text(loaded, torch.tensor([[5, 6]]), cache=document(loaded), keep=[(0, 2)])


def test_files_of_the_third_version_are_read(loaded, tmp_path):
    path = tmp_path / "doc.kv.safetensors"
    cache = document(loaded, keep=(), system=None)
    save_document(cache, path, loaded)
    assert "protected" not in load_file(path)
    rewritten(path, lambda _, metadata: metadata.update(format_version="3"))
    read, _ = load_document(path, loaded)
    assert read.protected is None and torch.equal(read.lengths, cache.lengths)


@pytest.mark.parametrize("marks", [torch.ones(1, 5, dtype=torch.bool), torch.ones(1, 5), torch.ones(2, 2).bool()])
def test_a_file_with_other_marks_is_refused(loaded, tmp_path, marks):
    path = tmp_path / "doc.kv.safetensors"
    save_document(document(loaded), path, loaded)
    rewritten(path, lambda tensors, _: tensors.update(protected=marks))
    with pytest.raises(CacheError, match="its protected are not one mark for each token that was seen"):
        load_document(path, loaded)


def test_the_command_line_compresses_and_generates_with_them(tiny_folder, tmp_path):
    (tmp_path / "doc.txt").write_text(TEXT, "utf-8")
    model = ["--model", str(tiny_folder), "--method", "snapkv"]
    method = [*model, "--max-new-tokens", "4"]
    given = ["--file", "doc.txt", "--keep", r"/Note \d/", "--keep", "bell"]
    done = headprof(tmp_path, "compress", *model, *given, "--budget", "30", "--json", "-o", "a.kv.safetensors")
    assert done.returncode == 0 and json.loads(done.stdout)["protected_tokens"] > 8
    done = headprof(tmp_path, "generate", *method, *given, "--budget", "30", "--prompt", "Who?")
    assert done.returncode == 0
    done = headprof(tmp_path, "generate", *method, "--prompt", "Who rang the bell?", "--keep", "bell", "--budget", "12")
    assert done.returncode == 0
    for options in (["--keep", "bell"], ["--system", "Be kind."], ["--no-keep-system"]):
        done = headprof(tmp_path, "generate", *method, "--cache", "a.kv.safetensors", "--prompt", "Who?", *options)
        assert done.returncode == 2 and "already says how it was compressed" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "whale"], "There is no match for --keep 'whale' in what is to be read"),
        (["--keep", "bell", "--keep", r"/\d{5}/"], r"There is no match for --keep '/\d{5}/'"),
        (["--keep", "/(/"], "The regular expression --keep '/(/' cannot be read (missing ), unterminated subpattern"),
        (["--keep", ""], "A --keep without a text keeps nothing"),
        (["--system", " "], "The system message is empty"),
        (["--system", "Be kind."], "there is no place for a system message"),
        (["--keep", "Nobody came by. "], "raise --budget to"),
        (["--keep", "bell", "--decode-budget", "4"], "raise --decode-budget to"),
    ],
)
@pytest.mark.parametrize("command", [["compress"], ["generate", "--prompt", "Who?"]])
def test_what_cannot_be_kept_is_said_in_a_sentence(tiny_folder, tmp_path, command, options, message):
    (tmp_path / "doc.txt").write_text(TEXT, "utf-8")
    given = [
        "--model",
        str(tiny_folder),
        "--chat-template",
        "none",
        "--method",
        "snapkv",
        "--file",
        "doc.txt",
        "--budget",
        "40",
    ]
    done = headprof(tmp_path, *command, *given, *options)
    assert done.returncode == 2 and done.stdout == ""
    assert message in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    assert [each.name for each in tmp_path.iterdir() if each.suffix == ".safetensors"] == []


def test_what_matches_nothing_is_said_before_a_model_is_loaded(tmp_path):
    (tmp_path / "doc.txt").write_text(TEXT, "utf-8")
    done = headprof(tmp_path, "compress", "--model", "no/such-model", "--file", "doc.txt", "--keep", "whale")
    assert done.returncode == 2 and "There is no match for --keep 'whale'" in " ".join(done.stderr.split())


@pytest.mark.long
@pytest.mark.model
@pytest.mark.parametrize("place", ["system", pytest.param("document", marks=pytest.mark.slow)])
def test_a_rule_that_is_lost_under_a_small_budget_is_followed_when_it_is_kept(smollm2, place):
    """Of a document that is compressed before the question is known; the full cache answers right."""
    rule, text = "The password of the harbor office is silver heron.", demo_document()[0][:2000]
    if place == "system":
        kept, lost = {"system": rule}, {"system": rule, "keep_system": False}
    else:
        rule, middle = f"{rule[:-1]}, and no visitor may enter without it.", text.find(". ", 800) + 2
        text = f"{text[:middle]}{rule} {text[middle:]}"
        kept, lost = {"keep": [rule]}, {}
    profile = HeadProfile.load(asset_dir("profiles") / "SmolLM2-135M-Instruct.safetensors", smollm2.shape)

    def said(method, options):
        plan = make_plan(smollm2.model, profile, method=method, budget=48)
        cache = compress_document(smollm2, text, plan, **options)
        return ask(smollm2, cache, "What is the password of the harbor office?", max_new_tokens=16).text

    assert "silver heron" in said("full", kept)
    assert "silver heron" not in said("headkv-r2", lost)
    assert "silver heron" in said("headkv-r2", kept)
