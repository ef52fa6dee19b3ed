"""The rotary embedding of a model's layers, beside what the model itself does to its keys."""

import pytest
import torch
from support.prompts import random_ids
from support.tiny_models import ARCHITECTURES, tiny_model

from headprof.compression.session import compressed, make_plan
from headprof.errors import ModelError
from headprof.models.rotary import rotary_of


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_keys_turned_back_are_those_before_the_model_turned_them(arch):
    """The same token at every position has the same key in the first layer, once it is turned back."""
    model, tokens = tiny_model(arch, layers=3), 7  # no more than a sliding window holds
    with compressed(model, method="full") as plan:
        cache = model(torch.full((1, tokens), 7), use_cache=True).past_key_values
    keys = cache.head_layers[0].storage.compact().keys.view(1, plan.shape.num_kv_heads, tokens, -1)
    turned_back = rotary_of(model).unrotate(keys, torch.arange(tokens))
    torch.testing.assert_close(turned_back, turned_back[:, :, :1].expand_as(keys), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(keys[:, :, 0], keys[:, :, 5], atol=1e-3)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_turning_is_linear_in_the_angles(arch):
    rotary, states = rotary_of(tiny_model(arch)), torch.randn(1, 2, 3, 16)
    assert rotary.turns_back(16)
    angles = [rotary.angles(torch.tensor([position] * 3)) for position in (3, 50)]
    mean = rotary.rotate(states, *((a + b) / 2 for a, b in zip(*angles, strict=True)))
    torch.testing.assert_close(mean, (rotary.rotate(states, *angles[0]) + rotary.rotate(states, *angles[1])) / 2)


def test_kinds_of_layers_turn_by_their_own_embedding():
    model = tiny_model("gemma3", layers=2)
    cos = [rotary_of(model, index).angles(torch.arange(40))[0] for index in range(2)]
    assert rotary_of(model, 0).layer_type == "sliding_attention" and not torch.allclose(cos[0], cos[1])


def test_a_model_without_rotary_embeddings_is_refused(monkeypatch):
    model = tiny_model()
    monkeypatch.delattr(model.get_decoder(), "rotary_emb")
    assert rotary_of(model) is None
    with pytest.raises(ModelError, match=r"expected-attention.*choose another method"):
        make_plan(model, method="expected-attention")
    make_plan(model, method="keydiff")


def test_padding_before_a_prompt_changes_nothing_of_what_is_expected():
    model, ids = tiny_model(num_kv_heads=2, layers=2), random_ids(1, 30)
    padded = torch.cat([torch.full((1, 5), 2), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 5), torch.ones(1, 30)], dim=1).long()
    with compressed(model, method="expected-attention", budget=12):
        alone = model.generate(ids, max_new_tokens=8, do_sample=False)
        beside = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert alone[0, 30:].tolist() == beside[0, 35:].tolist()


def test_looking_ahead_leaves_the_models_embedding_alone():
    """A dynamic embedding (NTK) goes on otherwise once it is asked about positions beyond those it has seen."""
    model, ids = tiny_model(max_positions=32), random_ids(1, 40)
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    with compressed(model, method="expected-attention", budget=12):
        model.generate(ids, max_new_tokens=4, do_sample=False)
    assert model.model.rotary_emb.max_seq_len_cached <= 44
