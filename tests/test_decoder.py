"""Looking into a model: its layers under whatever name, their devices, and the tokens that end an answer."""

from types import SimpleNamespace

import pytest
import torch
from support.tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from headprof.errors import ModelError
from headprof.models.decoder import decoder_layers, decoder_of, end_tokens, find_decoder_layers, layer_device


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_layers_are_found(arch):
    model = tiny_model(arch, layers=3)
    assert decoder_of(model) is model.model
    assert list(decoder_layers(model)) == list(model.model.layers) and len(decoder_layers(model)) == 3


def test_layers_under_another_name_are_found():
    config = AutoConfig.for_model("gpt2", n_layer=3, n_head=2, n_embd=8, vocab_size=16, bos_token_id=0, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config)
    assert find_decoder_layers(model) is model.transformer.h


def test_a_model_that_lists_no_layers_is_told_from_others():
    model = tiny_model("llama")
    model.model.layers = torch.nn.Module()
    assert find_decoder_layers(model) is None
    assert layer_device(model, 0) == torch.device("cpu")
    with pytest.raises(ModelError, match="LlamaForCausalLM does not list its decoder layers"):
        decoder_layers(model)


def test_the_device_of_a_layer_is_its_own_unless_its_weights_are_elsewhere():
    model = tiny_model("llama")
    assert layer_device(model, 1) == torch.device("cpu")
    model.model.layers[1].to("meta")  # as where weights that do not fit are kept on the disk
    assert layer_device(model, 1) == torch.device("cpu")


@pytest.mark.parametrize(
    ("configured", "alone", "with_tokenizer"), [(5, {5}, {1, 5}), ([5, 6], {5, 6}, {1, 5, 6}), (None, set(), {1})]
)
def test_end_tokens(configured, alone, with_tokenizer):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=configured))
    assert end_tokens(model) == alone
    assert end_tokens(model, tiny_tokenizer()) == with_tokenizer
    assert end_tokens(SimpleNamespace(generation_config=None)) == set()
