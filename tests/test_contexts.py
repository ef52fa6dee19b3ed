"""What `compressed` and its like do to a model, and that it is exactly as before afterwards."""

import threading
from contextlib import ExitStack

import pytest
import torch
from support.prompts import random_ids
from support.tiny_models import load_tiny, tiny_model
from transformers import GenerationConfig, pipeline
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.session import attending_ragged, compressed, make_plan
from headprof.errors import CacheError, ModelError, UsageError
from headprof.models.attention_hook import other_attention, wrapped_attention
from headprof.validation.silence import silenced

BUDGET = {"method": "snapkv", "budget": 8}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}


def state(model):
    """All that a context may change, by identity where there is one."""
    modules = [(name, dict(vars(module))) for name, module in model.named_modules()]
    hooks = [[list(each) for key, each in attributes.items() if key.endswith("_hooks")] for _, attributes in modules]
    plain = [{key: id(each) for key, each in attributes.items()} for _, attributes in modules]
    registries = [dict(each) for each in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)]
    return hooks, plain, dict(vars(model.config)), dict(vars(model.generation_config)), registries


def rows(model, **options):
    """How many rows the first KV head holds of a prompt of 30 tokens."""
    cache = model(random_ids(1, 30), use_cache=True, **options).past_key_values
    return int(cache.lengths[0, 0, 0]) if isinstance(cache, HeadCache) else cache.get_seq_length()


def contexts(model):
    return {
        "compressed": lambda: compressed(model, **BUDGET),
        "chunks": lambda: compressed(model, **BUDGET, prefill_chunk=8),
        "ragged": lambda: attending_ragged(model),
        "silenced": lambda: silenced(model, [(0, 1)]),
        "wrapped": lambda: wrapped_attention(model, lambda base: base),
        "eager": lambda: other_attention(model, "eager"),
    }


@pytest.mark.parametrize("name", ["compressed", "chunks", "ragged", "silenced", "wrapped", "eager"])
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_model_is_exactly_as_before_whoever_had_changed_it(name, arch):
    model = tiny_model(arch)
    layer, seen = model.model.layers[0], []
    own = layer.forward

    def theirs(*args, **kwargs):
        seen.append(1)
        return own(*args, **kwargs)

    layer.forward = theirs
    model.register_forward_pre_hook(lambda *_: seen.append(2))
    model.generation_config.cache_implementation = "static"
    before = state(model)
    with pytest.raises(KeyError), contexts(model)[name]():
        model(random_ids(1, 30), use_cache=True)
        assert seen
        raise KeyError
    assert state(model) == before and layer.forward is theirs


def test_of_nested_contexts_the_inner_plan_counts_and_the_outer_one_again_after_it():
    model = tiny_model()
    before = state(model)
    with compressed(model, **BUDGET, prefill_chunk=8):
        assert rows(model) == 8
        with compressed(model, method="snapkv", budget=12):
            assert rows(model) == 12
            with attending_ragged(model):
                assert rows(model) == 12
            with silenced(model, [(0, 1)]):
                assert rows(model) == 12
        assert rows(model) == 8
    assert rows(model) == 30 and state(model) == before


def test_nested_contexts_compress_a_prompt_once():
    model, ids = tiny_model(), random_ids(1, 30)
    plan = make_plan(model, method="snapkv", budget=8)
    caches = HeadCache(plan), HeadCache(plan)
    for cache in caches:
        cache.expect_observers(4)
    with attending_ragged(model):
        model(ids, past_key_values=caches[0])
        with compressed(model, **BUDGET):
            model(ids, past_key_values=caches[1])
    for one, other in zip(*(cache.head_layers for cache in caches), strict=True):
        assert torch.equal(one.storage.rows.positions, other.storage.rows.positions)
    assert caches[1].get_seq_length() == 26


@pytest.mark.parametrize("first", ["compressed", "chunks", "silenced", "wrapped", "eager"])
@pytest.mark.parametrize("second", ["compressed", "chunks", "silenced", "wrapped"])
def test_contexts_are_left_in_any_order(first, second):
    model, other = tiny_model(), tiny_model(seed=3)
    before = state(model)
    one, two = ExitStack(), ExitStack()
    one.enter_context(contexts(model)[first]())
    two.enter_context(contexts(model)[second]())
    with compressed(other, method="snapkv", budget=9):
        one.close()
        assert rows(model) == (8 if second in ("compressed", "chunks") else 30)
        assert rows(other) == 9
    two.close()
    assert rows(model) == 30 and state(model) == before


def test_the_first_plan_counts_when_the_second_context_is_left_first_or_last():
    model = tiny_model()
    one, two = ExitStack(), ExitStack()
    one.enter_context(compressed(model, method="snapkv", budget=8))
    two.enter_context(compressed(model, method="snapkv", budget=12))
    one.close()
    assert rows(model) == 12
    two.close()
    assert rows(model) == 30


def test_a_context_that_cannot_be_entered_changes_nothing():
    model = tiny_model()
    before = state(model)
    with compressed(model, **BUDGET):
        for wrong in ({"backend": "magic"}, {"prefill_chunk": 0}, {"budget": "10Q"}):
            with pytest.raises(UsageError), compressed(model, **({"method": "snapkv"} | wrong)):
                pass
        assert rows(model) == 8
    assert state(model) == before


def test_a_second_thread_is_told_who_holds_the_model():
    model, entered, leave, said = tiny_model(), threading.Event(), threading.Event(), []

    def hold():
        with compressed(model, **BUDGET):
            entered.set()
            leave.wait(20)

    holder = threading.Thread(target=hold, name="holder")
    holder.start()
    entered.wait(20)
    for name, enter in contexts(model).items():
        with pytest.raises(ModelError, match="in use by the thread 'holder'") as error, enter():
            said.append(name)
    assert str(error.value).count(". ") == 0 and not said
    with compressed(tiny_model(), **BUDGET):  # another model is free
        pass
    leave.set()
    holder.join()
    with compressed(model, method="snapkv", budget=12):
        assert rows(model) == 12


def test_threads_that_take_turns_get_their_own_budgets():
    model, lock, wrong = tiny_model(), threading.Lock(), []

    def ask(budget):
        for _ in range(5):
            with lock, compressed(model, method="snapkv", budget=budget):
                if rows(model) != budget:
                    wrong.append(budget)

    threads = [threading.Thread(target=ask, args=(budget,)) for budget in (8, 12, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_thread_started_inside_runs_what_was_asked_for():
    """As with a streamer that is read while `generate` runs in a thread of its own."""
    model, found = tiny_model(), []
    with compressed(model, **BUDGET):
        thread = threading.Thread(target=lambda: found.append(rows(model)))
        thread.start()
        thread.join()
    assert found == [8]


# Wrappers around a model, and settings of its own.


class Adapter(torch.nn.Module):
    """What PEFT puts around a model, as far as it is seen from here."""

    def __init__(self, model):
        super().__init__()
        self.base_model = torch.nn.Module()
        self.base_model.model = model

    def get_base_model(self):
        return self.base_model.model

    @property
    def config(self):
        return self.base_model.model.config

    def generate(self, *args, **kwargs):
        return self.base_model.model.generate(*args, **kwargs)

    def forward(self, *args, **kwargs):
        return self.base_model.model(*args, **kwargs)


class Elsewhere(Adapter):
    """A wrapper without `get_base_model`."""

    get_base_model = None


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "adapter": Adapter,
    "elsewhere": Elsewhere,
    "compiled adapter": lambda model: torch.compile(Adapter(model), backend="eager"),
    "parallel": lambda model: torch.nn.DataParallel(model),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_a_wrapper_runs_is_compressed(name):
    model, ids = tiny_model(), random_ids(1, 30)
    wrapper = WRAPPERS[name](model)
    with compressed(model, **BUDGET):
        expected = model.generate(ids, **GREEDY)
    assert not torch.equal(expected, model.generate(ids, **GREEDY))
    forward = vars(wrapper).get("forward")
    with compressed(wrapper, **BUDGET) as plan:
        assert rows(wrapper) == 8
        if hasattr(wrapper, "generate"):
            assert torch.equal(wrapper.generate(ids, **GREEDY), expected)
            cache = HeadCache(plan)
            wrapper.generate(ids, past_key_values=cache, **GREEDY)
            assert cache.lengths[0, 0, 0] == 8 + 5
    assert vars(wrapper).get("forward") is forward and rows(wrapper) == 30


@pytest.mark.parametrize("how", ["module", "forward"])
def test_a_model_compiled_in_place_runs_its_own_code_inside(how):
    model = tiny_model()
    if how == "module":
        model.compile(backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    assert rows(model) == 30
    before = state(model)
    with compressed(model, **BUDGET):
        assert rows(model) == 8
    assert state(model) == before


@pytest.mark.parametrize("kind", [None, "static"])
def test_a_pipeline_is_compressed(kind):
    tiny = load_tiny()
    tiny.model.generation_config.cache_implementation = kind
    speak = pipeline("text-generation", model=tiny.model, tokenizer=tiny.tokenizer, device="cpu")
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    prompt = "The lighthouse keeper counted nine grey boats before breakfast. " * 3
    ids = tiny.tokenizer(prompt, return_tensors="pt").input_ids
    with compressed(tiny.model, **BUDGET):
        made = tiny.model.generate(ids, **GREEDY | {"eos_token_id": 1})[0, ids.shape[1] :]
    for given in (speak, speak.model):
        with compressed(given, **BUDGET):
            assert speak(prompt, **options)[0]["generated_text"] == tiny.tokenizer.decode(
                made, skip_special_tokens=True
            )


def test_what_is_no_model_is_refused():
    with pytest.raises(ModelError, match=r"No model of Transformers is known inside this Linear"):
        make_plan(torch.nn.Linear(2, 2), method="snapkv")


def test_adapters_that_feed_tokens_of_their_own_are_refused():
    adapter = Adapter(tiny_model())
    adapter.active_peft_config = type("PrefixTuningConfig", (), {"is_prompt_learning": True})()
    with pytest.raises(ModelError, match="PrefixTuningConfig feeds the model"), compressed(adapter, **BUDGET):
        pass


@pytest.mark.parametrize("kind", ["static", "offloaded"])
def test_a_kind_of_cache_in_the_models_settings_is_replaced(kind):
    model, ids = tiny_model(), random_ids(1, 30)
    with compressed(model, **BUDGET):
        expected = model.generate(ids, **GREEDY)
    model.generation_config.cache_implementation = kind
    with compressed(model, **BUDGET) as plan:
        assert torch.equal(model.generate(ids, **GREEDY), expected)
        assert torch.equal(model.generate(ids, **GREEDY, past_key_values=HeadCache(plan)), expected)
    with attending_ragged(model):
        assert torch.equal(model.generate(ids, **GREEDY, past_key_values=HeadCache(plan)), expected)
        if kind == "static":
            made = model.generate(ids, **GREEDY, return_dict_in_generate=True)
            assert isinstance(made.past_key_values, StaticCache)
    assert model.generation_config.cache_implementation == kind


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("given", ["argument", "config"])
def test_a_kind_of_cache_that_is_asked_for_is_refused(own, given):
    model = tiny_model()
    asked = {"cache_implementation": "static"}
    options = asked if given == "argument" else {"generation_config": GenerationConfig(**asked)}
    with compressed(model, **BUDGET) as plan:
        if own:
            options["past_key_values"] = HeadCache(plan)
        with pytest.raises(UsageError, match=r"cache_implementation='static' asks for another cache .* leave it away"):
            model.generate(random_ids(1, 30), max_new_tokens=2, **options)


def test_a_users_own_cache_is_used_as_it_is():
    model, ids = tiny_model(), random_ids(1, 30)
    with compressed(model, **BUDGET):
        own = DynamicCache()
        model.generate(ids, past_key_values=own, **GREEDY)
        assert own.get_seq_length() == 35 and own.layers[0].keys.shape[2] == 35
        with pytest.raises(CacheError, match="An empty StaticCache inside `compressed` would not be compressed"):
            model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=64))


# Assisted decoding.


@pytest.mark.parametrize("cache", ["none", "fresh", "filled"])
@pytest.mark.parametrize("how", ["assistant_model", "prompt_lookup_num_tokens", "its settings"])
def test_assisted_decoding_is_refused(how, cache):
    """Its first pass holds prompt and guesses, and over a filled cache all that has been read once more."""
    model, ids = tiny_model(), random_ids(1, 30)
    options = {"assistant_model": {how: tiny_model(seed=1)}, "prompt_lookup_num_tokens": {how: 3}}.get(how, {})
    if not options:
        model.generation_config.prompt_lookup_num_tokens = 3
    with compressed(model, **BUDGET) as plan:
        if cache != "none":
            options["past_key_values"] = HeadCache(plan)
        if cache == "filled":
            model(ids[:, :20], past_key_values=options["past_key_values"])
        with pytest.raises(UsageError, match=r"(assistant_model|prompt_lookup_num_tokens) lets .* leave it away"):
            model.generate(ids, **GREEDY, **options)
        with pytest.raises(CacheError, match=r"leave assistant_model, .* away"):  # whoever calls it otherwise
            type(model).generate(model, ids, past_key_values=HeadCache(plan), prompt_lookup_num_tokens=3, **GREEDY)


def test_an_assistants_own_cache_works_inside():
    model, ids = tiny_model(), random_ids(1, 30)
    expected = model.generate(ids, **GREEDY)
    with compressed(model, **BUDGET):
        made = model.generate(ids, past_key_values=DynamicCache(), prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(made, expected)


# Other ways to read a prompt.


@pytest.mark.parametrize("enter", ["compressed", "ragged"])
@pytest.mark.parametrize("how", ["generate_batch", "continuous_batching_context_manager", "paged"])
def test_continuous_batching_is_refused_and_works_again_afterwards(how, enter):
    model, ids = tiny_model(), random_ids(1, 30)
    if not hasattr(model, "init_continuous_batching"):
        pytest.skip("the installed Transformers has no continuous batching")
    before = state(model)
    with contexts(model)[enter](), pytest.raises(UsageError, match=r"(Continuous batching|'paged').*: (call|leave)"):
        if how == "paged":
            model.generate(ids, cache_implementation="paged", max_new_tokens=2)
            pytest.fail("it went on")
        elif how == "generate_batch":
            model.generate_batch(ids.tolist(), max_new_tokens=2)
        else:
            with model.continuous_batching_context_manager():
                pytest.fail("it went on")
    assert state(model) == before


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("given", ["argument", "config", "model"])
def test_chunks_of_generate_are_refused_where_the_first_alone_would_be_compressed(given, own):
    model, ids = tiny_model(), random_ids(1, 30)
    options = {"prefill_chunk_size": 8} if given == "argument" else {}
    if given == "config":
        options = {"generation_config": GenerationConfig(prefill_chunk_size=8)}
    elif given == "model":
        model.generation_config.prefill_chunk_size = 8
    with compressed(model, **BUDGET) as plan:
        if own:
            options["past_key_values"] = HeadCache(plan)
        with pytest.raises(UsageError, match=r"prefill_chunk_size=8 lets .* give `compressed` prefill_chunk=8"):
            model.generate(ids, max_new_tokens=2, **options)
        cache = HeadCache(plan)
        model(ids, past_key_values=cache)
        options["past_key_values"] = cache  # what follows a prompt may come in pieces
        assert model.generate(ids[:, :3], **GREEDY, **options).shape == (1, 3 + 6)
        assert cache.lengths[0, 0, 0] == 8 + 3 + 5
