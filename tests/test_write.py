"""The write score: against a loop over heads and tokens from a model's own weights, and what becomes of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.probe_builders import builder_for
from support.tiny_models import ARCHITECTURES, VOCAB_SIZE, load_tiny, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from headprof.errors import ModelError
from headprof.models.attention_hook import wrapped_attention
from headprof.models.decoder import decoder_of, find_decoder_layers
from headprof.models.loading import LoadedModel
from headprof.models.output_projection import attention_modules, projection_of
from headprof.models.shape import HeadShape
from headprof.models.write_path import find_write_path
from headprof.probes.build import ProbeSettings
from headprof.scoring.averages import make_profile
from headprof.scoring.probe_results import ProbesFile
from headprof.scoring.prober import Prober, ProbeResult
from headprof.scoring.run import score_heads
from headprof.scoring.write import contrast_weights, written
from headprof.utils.resuming import KeptResults
from headprof.utils.team import Team

OTHERS = {
    "granite": {"residual_multiplier": 0.3, "logits_scaling": 7.0},
    "olmo2": {},
    "cohere": {"logit_scale": 0.25},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 4096, "num_key_value_heads": 4},
    "gpt_neox": {"num_key_value_heads": 4},
    "starcoder2": {"tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": True},
    "mixtral": {},
}
"""Parallel layers, LayerNorm with and without bias, norms behind the attention, factors, tied and untied embeddings."""


def shaken(model):
    """Norms and biases that are not what a model begins with, so that none can be forgotten."""
    generator = torch.Generator().manual_seed(1)
    for part in model.parameters():
        if part.ndim == 1:
            part.data += 0.4 * torch.randn(part.shape, generator=generator)
    return model


def load(arch: str, num_kv_heads: int = 2, **options) -> LoadedModel:
    """A tiny model of any architecture, `OTHERS` included, with shaken norms."""
    if arch in ARCHITECTURES and not options:
        loaded = load_tiny(arch, num_kv_heads=num_kv_heads)
        shaken(loaded.model)
        return loaded
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": VOCAB_SIZE}
    heads = {"num_attention_heads": 4, "num_key_value_heads": num_kv_heads, "max_position_embeddings": 4096}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(arch, **(sizes | heads | tokens | OTHERS.get(arch, {}) | options))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    model.config.architectures = [type(model).__name__]
    shape = HeadShape.from_config(model.config)
    return LoadedModel(shaken(model), tiny_tokenizer(chat=True), shape, f"tiny-{arch}", 4096)


class Pass:
    """A whole forward pass, with all that a write score can be made from."""

    def __init__(self, loaded: LoadedModel, ids: torch.Tensor):
        model, self.shape = loaded.model, loaded.shape
        self.values, self.projected, self.last = {}, {}, None
        decoder = decoder_of(model)
        names = ("norm", "ln_f", "final_layer_norm")
        self.final_norm = next(each for name, each in decoder.named_children() if name in names)
        self.attentions = attention_modules(model)

        def note(layer):
            return lambda module, given, output: self.projected.update({layer: output[0]})

        hooks = [projection_of(module).register_forward_hook(note(at)) for at, module in self.attentions.items()]
        hooks.append(self.final_norm.register_forward_pre_hook(lambda m, given: setattr(self, "last", given[0][0])))

        def wrap(base):
            def attention(module, query, key, value, *args, **kwargs):
                self.values[module.layer_idx] = value[0]
                return base(module, query, key, value, *args, **kwargs)

            return attention

        model.set_attn_implementation("eager")
        with wrapped_attention(model, wrap):
            self.attention = [each[0] for each in model(ids, output_attentions=True).attentions]
        for hook in hooks:
            hook.remove()
        self.layers, self.head, self.config = find_decoder_layers(model), model.get_output_embeddings(), model.config

    def output_weight(self, layer: int, head: int) -> torch.Tensor:
        """`[D, E]`"""
        projection, size = projection_of(self.attentions[layer]), self.shape.head_dim
        weight = projection.weight if hasattr(projection, "nf") else projection.weight.T  # GPT-2's are [in, out]
        return weight[head * size : (head + 1) * size]

    def through_norm(self, norm, before: torch.Tensor, write: torch.Tensor) -> torch.Tensor:
        """What a write `[E]` is behind a norm that was given `before` `[E]`, the norm's scale as it was."""
        name = type(norm).__name__
        if ("LayerNorm" in name and not getattr(norm, "variance_epsilon", None)) or "Cohere" in name:
            epsilon = getattr(norm, "eps", None) or norm.variance_epsilon
            write, scale = write - write.mean(), (before.var(unbiased=False) + epsilon).rsqrt()
        else:
            epsilon = getattr(norm, "eps", None) or norm.variance_epsilon
            scale = (before.square().mean() + epsilon).rsqrt()
        return write * scale * (1 + norm.weight if "Gemma" in name else norm.weight)

    def into_stream(self, layer: int, position: int, write: torch.Tensor) -> torch.Tensor:
        """What is added to the residual stream where the attention's projection makes `write` `[E]`."""
        if self.config.model_type in ("gemma2", "gemma3_text", "olmo2"):
            norm = self.layers[layer].post_attention_layernorm
            write = self.through_norm(norm, self.projected[layer][position], write)
        return write * getattr(self.config, "residual_multiplier", 1.0)

    def to_logit(self, position: int, token: int, write: torch.Tensor) -> float:
        """By how much a write into the residual stream raises a token's logit."""
        behind = self.through_norm(self.final_norm, self.last[position], write)
        factor = getattr(self.config, "logit_scale", 1.0) / getattr(self.config, "logits_scaling", 1.0)
        return float(self.head.weight[token] @ behind) * factor

    def contribution(self, layer: int, head: int, position: int, token: int, source: int) -> float:
        value = self.values[layer][head // self.shape.group_size, source]
        write = (value * self.attention[layer][head, position, source]) @ self.output_weight(layer, head)
        return self.to_logit(position, token, self.into_stream(layer, position, write))


@pytest.mark.parametrize(
    ("arch", "num_kv_heads"),
    [*((arch, 2) for arch in (*ARCHITECTURES, *OTHERS)), ("llama", 4), ("llama", 1), ("gemma3", 1), ("phi3", 4)],
)
def test_a_probe_scores_what_a_loop_over_its_tokens_says(arch, num_kv_heads):
    loaded = load(arch, num_kv_heads)
    context = builder_for(loaded, probes=2, pack=2, length=600).context(0)
    with Prober(loaded.model, loaded.shape) as prober:
        results = prober.run(context)
    probe, found = context.probes[1], results[1].write
    asked = [*context.context_ids, *probe.question_ids, *probe.answer_ids[:-1]]
    whole = Pass(loaded, torch.tensor([asked]))
    start, stop = probe.needle_span
    size, tokens = stop - start, len(context.context_ids)
    for layer, head in ((0, 0), (1, 1), (1, 3)):
        total = 0.0
        for number, token in enumerate(probe.answer_ids):
            position = len(asked) - len(probe.answer_ids) + number
            each = [whole.contribution(layer, head, position, token, source) for source in range(tokens)]
            needle = sum(each[start:stop])
            total += needle - (sum(each) - needle) * size / (tokens - size)
        assert float(found[layer, head]) == pytest.approx(total / len(probe.answer_ids), rel=2e-3, abs=2e-5)


@pytest.mark.parametrize("arch", [*ARCHITECTURES, *OTHERS])
def test_all_heads_and_tokens_together_write_what_the_layer_adds(arch):
    """But for the bias of the output projection, which is no head's."""
    loaded = load(arch)
    ids = torch.randint(3, VOCAB_SIZE, (1, 40), generator=torch.Generator().manual_seed(2))
    rows = torch.tensor([17, 39])
    whole, tokens = Pass(loaded, ids), [7, 400]
    path = find_write_path(loaded.model, loaded.shape)
    with path.reading_scales(rows) as scales:
        loaded.model(ids)
    for layer in range(loaded.shape.num_layers):
        directions = path.head_directions(layer, path.directions(torch.tensor(tokens)), loaded.shape.num_heads)
        made = written(whole.attention[layer][:, rows], whole.values[layer], directions, torch.ones(40)).sum(dim=0)
        for at, (position, token) in enumerate(zip(rows.tolist(), tokens, strict=True)):
            bias = projection_of(whole.attentions[layer]).bias
            added = whole.projected[layer][position] - (0 if bias is None else bias)
            expected = whole.to_logit(position, token, whole.into_stream(layer, position, added))
            assert float(made[at] * scales()[layer, at]) == pytest.approx(expected, rel=1e-3, abs=1e-4)


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(2, 30), st.integers(1, 5)),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_a_sum_over_tokens(sizes, seed):
    kv_heads, group, count, tokens, width = sizes
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(kv_heads * group, count, tokens, generator=generator).softmax(dim=-1)
    values = torch.randn(kv_heads, tokens, width, generator=generator)
    directions = torch.randn(kv_heads * group, count, width, generator=generator)
    context = int(torch.randint(1, tokens + 1, (), generator=generator))
    start = int(torch.randint(0, context, (), generator=generator))
    stop = int(torch.randint(start + 1, context + 1, (), generator=generator))
    found = written(rows, values, directions, contrast_weights((start, stop), context, tokens))
    for head in range(kv_heads * group):
        for at in range(count):
            each = [
                float(rows[head, at, j] * (values[head // group, j] @ directions[head, at])) for j in range(context)
            ]
            rest = (sum(each) - sum(each[start:stop])) * (stop - start) / max(1, context - stop + start)
            assert float(found[head, at]) == pytest.approx(sum(each[start:stop]) - rest, abs=1e-4)


def test_a_head_that_attends_alike_everywhere_writes_nothing_from_the_needle():
    rows, values = torch.full((2, 1, 10), 0.1), torch.ones(1, 10, 3)
    directions, weights = torch.ones(2, 1, 3), contrast_weights((2, 4), 8, 10)
    assert written(rows, values, directions, weights).abs().max() < 1e-6
    rows[1, 0, 2:4] += 0.1
    assert written(rows, values, directions, weights)[:, 0].tolist() == pytest.approx([0.0, 0.6], abs=1e-6)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2", "granite"])
def test_a_half_precision_model_is_followed_too(arch):
    loaded = load(arch)
    loaded.model.to(torch.bfloat16)
    assert len(find_write_path(loaded.model, loaded.shape).layers) == 2


@pytest.mark.parametrize(
    ("part", "why"),
    [
        ("model.layers.1.self_attn", "something lies behind the output projection of layer 1"),
        ("model.layers.0.mlp.down_proj", ""),
        ("model.layers.0", "something lies before layer 1|layer 0 adds something else"),
        ("model.norm", ""),
        ("lm_head", "its output layer does something else"),
    ],
)
def test_what_a_model_does_otherwise_is_noticed(part, why):
    """A factor that no modelling file has, where it matters; not where the parts found already tell of it."""
    loaded = load("llama")

    def more(module, given, output):
        return (output[0] * 1.5, *output[1:]) if isinstance(output, tuple) else output * 1.5

    loaded.model.get_submodule(part).register_forward_hook(more)
    if not why:
        find_write_path(loaded.model, loaded.shape)
        return
    with pytest.raises(ModelError, match=f"cannot be followed to its logits, because ({why})"):
        find_write_path(loaded.model, loaded.shape)


@pytest.mark.parametrize(
    ("arch", "why"),
    [
        ("bitnet", "something lies between attention and output projection"),
        ("olmo", "what follows its last layer"),
    ],
)
def test_a_model_that_cannot_be_followed_has_the_other_scores(arch, why):
    loaded = load(arch)
    profile = score_heads(loaded, builder_for(loaded, probes=16), include_failed=True)
    assert profile.kinds == ("retrieval", "reasoning")
    noted = profile.metadata["no_write_scores"]
    assert why in noted and "they have no write scores" in noted


def results_of(values, answered, kinds=("retrieval", "reasoning")):
    return [
        ProbeResult(kinds[at % 2], "f", right, torch.ones(2, 4), None if value is None else torch.full((2, 4), value))
        for at, (value, right) in enumerate(zip(values, answered, strict=True))
    ]


def test_a_profile_averages_the_write_scores_of_answered_probes_of_both_kinds():
    loaded, asked = load_tiny(), ProbeSettings(probes=18)
    results = results_of([1.0, -0.5] * 8 + [50.0, 50.0], [True] * 16 + [False] * 2)
    profile = make_profile(loaded, asked, results)
    assert profile.scores["write"][0, 0] == pytest.approx(0.25) and profile.probes_used["write"] == 16
    assert profile.standard_errors["write"][1, 3] == pytest.approx(0.75 * (16 / 15) ** 0.5 / 4)
    assert "no_write_scores" not in profile.metadata
    assert make_profile(loaded, asked, results, include_failed=True).probes_used["write"] == 18
    against = make_profile(loaded, asked, results_of([-1.0] * 18, [True] * 18))
    assert (against.scores["write"] == 0).all() and (against.intervals["write"][1] == 0).all()


def test_probes_without_write_scores_do_not_count_for_them():
    loaded, asked = load_tiny(), ProbeSettings(probes=20)
    some = make_profile(loaded, asked, results_of([None] * 8 + [2.0] * 12, [True] * 20), no_write="Why.")
    assert some.probes_used == {"retrieval": 10, "reasoning": 10, "write": 12} and some.scores["write"][0, 0] == 2
    few = make_profile(loaded, asked, results_of([None] * 16 + [2.0] * 4, [True] * 20), no_write="Why.")
    assert few.kinds == ("retrieval", "reasoning") and few.metadata["no_write_scores"] == "Why."


def test_results_keep_write_scores_and_say_which_have_none(tmp_path):
    results = results_of([1.5, None, -2.0], [True, False, True])
    file = tmp_path / "p.safetensors"
    kept = KeptResults({"key": 1}, ProbesFile(file))
    kept.start(False, Team())
    with kept.keeping():
        kept.add({3: results})
    (again,) = ProbesFile(file).read().results.values()
    assert again[1].write is None
    assert torch.equal(again[0].write, results[0].write) and torch.equal(again[2].write, results[2].write)


def test_results_from_before_there_were_write_scores_are_gone_on_from(tmp_path, monkeypatch):
    loaded, file = load_tiny(), tmp_path / "p.safetensors"
    options = {"include_failed": True, "results_path": file}
    with monkeypatch.context() as before:
        before.setattr(Prober, "write_path", lambda self: "Not yet.")
        old = score_heads(loaded, builder_for(loaded, probes=16), **options)
    assert "write" not in load_file(file) and old.kinds == ("retrieval", "reasoning")
    assert old.metadata["no_write_scores"] == "Not yet."
    same = score_heads(loaded, builder_for(loaded, probes=16), **options, resume=True)
    assert same.kinds == old.kinds and "a run without --resume finds" in same.metadata["no_write_scores"]
    longer = score_heads(loaded, builder_for(loaded, probes=32), **options, resume=True)
    assert longer.probes_used == {"retrieval": 16, "reasoning": 16, "write": 16}
    assert int(load_file(file)["write"].isnan().all(dim=(1, 2)).sum()) == 16
