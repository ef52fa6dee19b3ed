"""Attention rows: against Transformers' own eager attention weights, on every architecture; and leaving no trace."""

import pytest
import torch
from tiny import ARCHITECTURES, tiny_model
from transformers.cache_utils import DynamicCache

from headprof.interface import wrapped_attention
from headprof.scoring.capture import RowReader, attention_rows, causal_visibility


def eager_rows(model, ids, rows):
    """`[L, H, N, T]` from `output_attentions`."""
    previous = model.config._attn_implementation
    model.set_attn_implementation("eager")
    attentions = model(ids, output_attentions=True).attentions
    model.set_attn_implementation(previous)
    return torch.stack([attention[0, :, rows] for attention in attentions])


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_equal_eager_attention(arch, num_kv_heads):
    model = tiny_model(arch, num_kv_heads=num_kv_heads, layers=3)
    ids = torch.randint(3, 500, (1, 37), generator=torch.Generator().manual_seed(1))
    wanted = torch.tensor([20, 21, 36])
    expected = eager_rows(model, ids, wanted)
    seen = {}
    cache = DynamicCache()
    with RowReader(model).installed() as reader:
        model(ids[:, :11], past_key_values=cache)
        with reader.reading(wanted - 11, seen.__setitem__):
            model(ids[:, 11:], past_key_values=cache)
    assert sorted(seen) == [0, 1, 2]
    torch.testing.assert_close(torch.stack([seen[layer] for layer in range(3)]), expected, atol=2e-5, rtol=1e-4)


def test_rows_are_read_only_when_asked_for():
    model = tiny_model()
    calls = []
    with RowReader(model).installed() as reader:
        model(torch.arange(5)[None])
        with reader.reading(torch.tensor([0]), lambda *_: calls.append(1)):
            model(torch.arange(5)[None])
        model(torch.arange(5)[None])
    assert len(calls) == 2  # one per layer


def test_mistral_sliding_window_hides_old_tokens():
    model = tiny_model("mistral", sliding_window=8, layers=2)
    ids = torch.randint(3, 500, (1, 30), generator=torch.Generator().manual_seed(1))
    seen = {}
    with RowReader(model).installed() as reader, reader.reading(torch.tensor([29]), seen.__setitem__):
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
