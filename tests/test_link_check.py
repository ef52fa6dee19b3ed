"""Models whose attention does not get the cache's own rows are refused; all others give what the full cache gives."""

from __future__ import annotations

import pytest
import torch
from support.causal_classes import CLASSES, Outcome, try_class
from support.tiny_models import load_tiny, tiny_model
from transformers import DynamicCache

from headprof import HeadCache, compressed
from headprof.compression.session import attending_ragged, make_plan, prefill
from headprof.errors import ModelError
from headprof.models.requirements import require_attention_layers
from headprof.scoring.attention_rows import RowReader
from headprof.scoring.shared_context import SharedContext


def outcome(name: str) -> Outcome:
    if name not in CLASSES:
        pytest.skip("the installed Transformers has no such class")
    found = try_class(name)
    assert found.kind != "wrong", found.why
    if found.kind == "not built":
        pytest.skip(found.why)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_causal_class_is_equal_or_refused(name: str) -> None:
    outcome(name)


@pytest.mark.parametrize("name", ["GPTNeoXConfig", "Cohere2Config", "GptOssConfig", "Olmo2Config", "StableLmConfig"])
def test_a_class_is_equal(name: str) -> None:
    assert outcome(name).kind == "equal"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("DiffLlamaConfig", "makes other values of those that the cache returns"),
        ("JetMoeConfig", "makes other keys of those that the cache returns"),
        ("DeepseekV3Config", "KV heads 1 of width"),
        ("GPTBigCodeConfig", "KV heads 1 of width"),
        ("Gemma4TextConfig", "the same in every layer"),
        ("Gemma3nTextConfig", "read the cache of another layer"),
        ("PhimoeConfig", "does not tell its attention of its sliding window"),
        ("MllamaConfig", "layers that attend to images"),
        ("DogeConfig", "attention functions of its own"),
        ("Qwen3NextConfig", "layers of the kind linear_attention"),
        ("FalconH1Config", "layers of the kind hybrid"),
    ],
)
def test_a_class_is_refused(name: str, why: str) -> None:
    found = outcome(name)
    assert found.kind == "refused" and why in found.why
    assert found.why.endswith(".") and len(found.why) < 400


@pytest.mark.parametrize(
    "name",
    [
        "Qwen3NextConfig",
        "Lfm2Config",
        "Lfm2MoeConfig",
        "Lfm3Config",
        "JambaConfig",
        "FalconH1Config",
        "GraniteMoeHybridConfig",
        "RecurrentGemmaConfig",
    ],
)
def test_hybrids_are_not_scored(name: str) -> None:
    from support.causal_classes import silence, tiny_causal

    if name not in CLASSES:
        pytest.skip("the installed Transformers has no such class")
    with silence():
        try:
            model = tiny_causal(CLASSES[name])
        except Exception as error:
            pytest.skip(str(error))
    with pytest.raises(ModelError, match="so its heads cannot be scored"):
        SharedContext(model, "sdpa")
    with pytest.raises(ModelError, match="so its heads cannot be read"):
        require_attention_layers(model, "its heads cannot be read")


def changed_attention(model, change) -> None:
    """Let the model's first layer change what it gets from its cache."""
    attention = model.model.layers[0].self_attn
    forward = attention.forward

    def run(*args, past_key_values=None, **kwargs):
        class Between:
            def update(self, keys, values, *where, **options):
                return change(past_key_values, *past_key_values.update(keys, values, *where, **options))

        between = None if past_key_values is None else Between()
        return forward(*args, past_key_values=between, **kwargs)

    attention.forward = run


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda _, keys, values: (keys * 1, values), "other keys"),
        (lambda _, keys, values: (keys, values * 2), "other values"),
        (lambda _, keys, values: (keys, values[..., :8].repeat(1, 1, 1, 2)), "other values"),
    ],
)
def test_rows_that_are_changed_on_the_way_are_noticed(change, why: str) -> None:
    model = tiny_model()
    changed_attention(model, change)
    with compressed(model, method="snapkv", budget=64), pytest.raises(ModelError, match=why):
        model(torch.arange(3, 30)[None])
    assert model(torch.arange(3, 30)[None]).logits.isfinite().all()


def test_the_check_is_gone_after_the_first_passes_and_with_the_context() -> None:
    model = tiny_model()
    hooks = model.model._forward_pre_hooks, model.model._forward_hooks
    ids = torch.arange(3, 40)[None]
    with compressed(model, method="snapkv", budget=16) as plan:
        assert all(hooks)
        cache = HeadCache(plan)
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        assert not any(hooks) and "update" not in vars(cache)
    with compressed(model, method="snapkv", budget=16):
        pass
    assert not any(hooks)


def test_an_error_in_a_pass_leaves_the_cache_as_it_was() -> None:
    model = tiny_model()
    with compressed(model, method="snapkv", budget=16) as plan:
        cache = HeadCache(plan)
        with pytest.raises(IndexError):
            model(torch.tensor([[100_000]]), past_key_values=cache)
        assert "update" not in vars(cache)


def test_a_prompt_in_chunks_and_other_caches_are_served() -> None:
    model = tiny_model("gemma3")
    ids = torch.arange(3, 40)[None]
    expected = model(ids).logits[:, -1]
    plan = make_plan(model, method="snapkv", budget=4096)
    with attending_ragged(model, prefill_chunk=7):
        assert torch.allclose(prefill(model, ids, HeadCache(plan)), expected, atol=1e-4)
        assert torch.allclose(prefill(model, ids, DynamicCache()), expected, atol=1e-4)


def test_rows_of_a_layer_that_attends_twice_are_not_read() -> None:
    model = load_tiny().model
    second = model.model.layers[1].self_attn
    second.layer_idx = 0
    with (
        RowReader(model).installed() as reader,
        pytest.raises(ModelError, match="attends 2 times in 2 layers, so its heads cannot be scored"),
        reader.reading(torch.tensor([3]), lambda _: None),
    ):
        model(torch.arange(3, 20)[None], use_cache=False)
