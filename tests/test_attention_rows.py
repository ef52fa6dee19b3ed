"""Attention rows: against Transformers' own eager attention weights, on every architecture; and leaving no trace."""

import pytest
import torch
from support.prompts import random_ids
from support.tiny_models import ARCHITECTURES, tiny_model
from transformers.cache_utils import DynamicCache

from headprof.models.attention_hook import wrapped_attention
from headprof.scoring import attention_rows as capture
from headprof.scoring.attention_rows import RowReader, attention_rows, causal_visibility


def eager_rows(model, ids, rows):
    """`[L, H, N, T]` from `output_attentions`."""
    previous = model.config._attn_implementation
    model.set_attn_implementation("eager")
    attentions = model(ids, output_attentions=True).attentions
    model.set_attn_implementation(previous)
    return torch.stack([attention[0, :, rows] for attention in attentions])


def keep(seen):
    """A sink that keeps each layer's rows."""

    def sink(block):
        for layer, rows in zip(block.layers, block.rows, strict=True):
            seen[layer] = torch.cat([*([seen[layer]] if layer in seen else []), rows[0]], dim=1)

    return sink


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_equal_eager_attention(arch, num_kv_heads):
    model = tiny_model(arch, num_kv_heads=num_kv_heads, layers=3)
    ids = random_ids(1, 37, seed=1)
    wanted = torch.tensor([20, 21, 36])
    expected = eager_rows(model, ids, wanted)
    seen = {}
    cache = DynamicCache()
    with RowReader(model).installed() as reader:
        model(ids[:, :11], past_key_values=cache)
        with reader.reading(wanted - 11, keep(seen)):
            model(ids[:, 11:], past_key_values=cache)
    assert sorted(seen) == [0, 1, 2]
    torch.testing.assert_close(torch.stack([seen[layer] for layer in range(3)]), expected, atol=2e-5, rtol=1e-4)


def test_rows_are_read_only_when_asked_for():
    model = tiny_model()
    calls = []
    with RowReader(model).installed() as reader:
        model(torch.arange(5)[None])
        with reader.reading(torch.tensor([0]), lambda block: calls.extend(block.layers)):
            model(torch.arange(5)[None])
        model(torch.arange(5)[None])
    assert calls == [0, 1]


ROW = 2 * 4 * 4 * 20
"""Bytes of a row of four heads over 20 tokens, as logits and as attention; keys, values and queries take 10240."""


@pytest.mark.parametrize(
    ("most_bytes", "sizes"),
    [
        (1, [(1, 1)] * 21),
        (6 * ROW, [(1, 3), (1, 3), (1, 1)] * 3),
        (10240 + 7 * ROW, [(1, 7)] * 3),
        (2 * (10240 + 7 * ROW), [(2, 7), (1, 7)]),
        (1 << 28, [(3, 7)]),
    ],
)
def test_rows_are_read_in_blocks_and_all_arrive(monkeypatch, most_bytes, sizes):
    """Layers and rows of each call."""
    model, ids = tiny_model(layers=3), torch.arange(20)[None]
    wanted = torch.tensor([3, 4, 19, 7, 8, 9, 10])
    expected = eager_rows(model, ids, wanted)
    rows, made, seen = capture.attention_rows, [], {}
    monkeypatch.setattr(
        capture,
        "attention_rows",
        lambda query, *a, **k: made.append((query.shape[0], query.shape[3])) or rows(query, *a, **k),
    )
    with RowReader(model).installed() as reader, reader.reading(wanted, keep(seen), most_bytes=most_bytes):
        model(ids)
    torch.testing.assert_close(torch.stack([seen[layer] for layer in range(3)]), expected, atol=2e-5, rtol=1e-4)
    assert made == sizes


def test_layers_that_differ_are_read_apart():
    """A window in every other layer, without a mask that says so."""
    model, ids = tiny_model("gemma3", layers=4, attn="sdpa"), random_ids(1, 30, seed=1)
    layers, seen = [], {}
    wanted = torch.arange(20, 30)

    def sink(block):
        layers.extend(block.layers)
        keep(seen)(block)

    with RowReader(model).installed() as reader, reader.reading(wanted, sink):
        model(ids)
    assert layers == [0, 1, 2, 3]
    torch.testing.assert_close(
        torch.stack([seen[at] for at in range(4)]), eager_rows(model, ids, wanted), atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_flash_attention_is_left_for_passes_with_a_mask(arch):
    model, ids = tiny_model(arch, layers=1, sliding_window=None if arch == "llama" else 64), torch.arange(12)[None]
    mask = torch.zeros(1, 1, 12, 12).masked_fill(~torch.ones(12, 12).tril().bool(), -1e9)
    expected = model(ids).logits
    reader = RowReader(model)
    reader.base = "flash_attention_2"

    def unwanted(*args, **kwargs):
        pytest.fail("FlashAttention was given a mask")

    masks = {"full_attention": mask, "sliding_attention": mask} if arch == "gemma2" else mask
    with wrapped_attention(model, lambda base: reader._wrap(unwanted)):
        torch.testing.assert_close(model(ids, attention_mask=masks).logits, expected, atol=1e-5, rtol=1e-4)


def test_mistral_sliding_window_hides_old_tokens():
    model = tiny_model("mistral", sliding_window=8, layers=2)
    ids = random_ids(1, 30, seed=1)
    seen = {}
    with RowReader(model).installed() as reader, reader.reading(torch.tensor([29]), keep(seen)):
        model(ids, past_key_values=DynamicCache())
    assert (seen[0][..., :22] == 0).all() and (seen[0][..., 22:] > 0).all()
    torch.testing.assert_close(seen[1], eager_rows(model, ids, torch.tensor([29]))[1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_rows_with_every_extra(dtype):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(6, 3, 16, generator=generator).to(dtype)
    key = torch.randn(2, 20, 16, generator=generator).to(dtype)
    sinks = torch.randn(6, generator=generator)
    visible = causal_visibility(torch.tensor([4, 10, 19]), 20, sliding_window=7)
    rows = attention_rows(query, key, visible, scaling=0.3, softcap=5.0, sinks=sinks)
    for head in range(6):
        for number, position in enumerate((4, 10, 19)):
            logits = [
                5.0 * float(torch.tanh(query[head, number].double() @ key[head // 3, j].double() * 0.3 / 5.0))
                for j in range(20)
            ]
            seen = [j for j in range(20) if position - 7 < j <= position]
            weights = torch.tensor([logits[j] for j in seen] + [float(sinks[head])]).softmax(-1)[:-1]
            expected = torch.zeros(20)
            expected[seen] = weights
            torch.testing.assert_close(rows[head, number], expected, atol=1e-5, rtol=1e-4)


def test_additive_and_boolean_masks_agree():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(4, 2, 8, generator=generator), torch.randn(2, 9, 8, generator=generator)
    visible = causal_visibility(torch.tensor([3, 8]), 9)
    additive = torch.zeros(2, 9).masked_fill(~visible, torch.finfo(torch.float32).min)
    torch.testing.assert_close(
        attention_rows(query, key, visible, scaling=1.0), attention_rows(query, key, additive, scaling=1.0)
    )


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_model_is_restored_after_an_exception(attn):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = tiny_model(attn=attn)
    registered = set(ALL_ATTENTION_FUNCTIONS)
    with pytest.raises(KeyError), wrapped_attention(model, lambda base: base):
        assert model.config._attn_implementation != attn
        with wrapped_attention(model, lambda base: base):
            model(torch.arange(5)[None])
        raise KeyError
    assert model.config._attn_implementation == attn
    assert set(ALL_ATTENTION_FUNCTIONS) == registered


def test_wrapping_changes_no_logits():
    model, ids = tiny_model(), torch.arange(20)[None]
    expected = model(ids).logits
    with wrapped_attention(model, lambda base: base):
        assert torch.equal(model(ids).logits, expected)
