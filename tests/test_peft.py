"""Adapters of PEFT around a model, where it is installed: what they run is compressed."""

import pytest
import torch
from support.prompts import GREEDY, random_ids
from support.tiny_models import load_tiny, tiny_model
from transformers import pipeline

from headprof import HeadCache, compressed
from headprof.errors import ModelError

peft = pytest.importorskip("peft")

BUDGET = {"method": "snapkv", "budget": 8}
WIDE = {"method": "snapkv", "budget": 4096}
IDS = random_ids(1, 40)


def lora(model, **options):
    settings = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False}
    return peft.LoraConfig(task_type="CAUSAL_LM", **settings | options)


@pytest.fixture
def adapted():
    """A tiny llama with a LoRA adapter that changes what it says."""
    torch.manual_seed(0)
    model = tiny_model()
    before = generate(model)
    adapter = peft.get_peft_model(model, lora(model)).eval()
    assert not torch.equal(generate(adapter), before)
    return adapter


def generate(model, **options):
    return model.generate(input_ids=IDS, max_new_tokens=8, **GREEDY, **options)


@pytest.mark.parametrize("which", ["adapter", "its base model", "the model inside"])
def test_what_an_adapter_runs_is_compressed_whatever_part_of_it_is_given(adapted, which):
    given = {"adapter": adapted, "its base model": adapted.base_model, "the model inside": adapted.base_model.model}
    full = generate(adapted)
    with compressed(given[which], **WIDE):
        assert torch.equal(generate(adapted), full)
    with compressed(given[which], **BUDGET) as plan:
        cache = HeadCache(plan)
        made = generate(adapted, past_key_values=cache)
        assert torch.equal(generate(adapted), made) and not torch.equal(made, full)
        assert cache.lengths.max() == 8 + 7
        assert adapted(IDS, use_cache=True).past_key_values.lengths.max() == 8
    assert torch.equal(generate(adapted), full)


def test_adapters_may_be_changed_merged_and_switched_off_inside(adapted):
    full = generate(adapted)
    with adapted.disable_adapter():
        plain = generate(adapted)
    adapted.add_adapter("other", lora(adapted, r=2, target_modules=["q_proj"]))
    with compressed(adapted, **WIDE):
        with adapted.disable_adapter():
            assert torch.equal(generate(adapted), plain)
        adapted.merge_adapter()
        assert torch.equal(generate(adapted), full)
        adapted.unmerge_adapter()
        adapted.set_adapter("other")
        other = generate(adapted)
    assert torch.equal(generate(adapted), other) and not torch.equal(other, full)


def test_a_merged_adapter_and_one_that_transformers_added_are_compressed(adapted):
    full = generate(adapted)
    merged = adapted.merge_and_unload()
    own = tiny_model()
    own.add_adapter(lora(own))
    for model, expected in ((merged, full), (own, generate(own))):
        with compressed(model, **WIDE):
            assert torch.equal(generate(model), expected)
        with compressed(model, **BUDGET):
            assert not torch.equal(generate(model), expected)


@pytest.mark.parametrize("given", ["pipeline", "adapter"])
def test_a_pipeline_over_an_adapter_is_compressed(given):
    tiny = load_tiny()
    torch.manual_seed(0)
    adapter = peft.get_peft_model(tiny.model, lora(tiny.model)).eval()
    speak = pipeline("text-generation", model=adapter, tokenizer=tiny.tokenizer, device="cpu")
    prompt = "The lighthouse keeper counted nine grey boats before breakfast. " * 3
    ids = tiny.tokenizer(prompt, return_tensors="pt").input_ids
    options = {"max_new_tokens": 6, "do_sample": False}
    full = speak(prompt, return_full_text=False, **options)[0]["generated_text"]
    with compressed(speak if given == "pipeline" else adapter, **BUDGET):
        said = speak(prompt, return_full_text=False, **options)[0]["generated_text"]
        made = adapter.generate(input_ids=ids, pad_token_id=2, **options)[0, ids.shape[1] :]
    assert said == tiny.tokenizer.decode(made, skip_special_tokens=True) != full


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_adapters_that_feed_the_model_are_refused_wherever_they_are_seen(kind):
    model = tiny_model()
    adapter = peft.get_peft_model(model, getattr(peft, kind)(num_virtual_tokens=4, task_type="CAUSAL_LM")).eval()
    full = generate(adapter)
    with pytest.raises(ModelError, match=f"The adapter {kind} feeds the model .*such as LoRA"), compressed(adapter):
        pass
    with compressed(model, **BUDGET), pytest.raises(ModelError, match=f"The adapter {kind} feeds the model"):
        generate(adapter)
    assert torch.equal(generate(adapter), full)
