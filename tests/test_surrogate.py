"""Surrogates: predictions and importance by their slow twins, fitting, files, and documents judged by one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.commands import headprof
from support.crafted_files import craft, drop, flipped, forget, note, poke, put, turn
from support.profiles import random_profile, random_surrogate
from support.prompts import distinct_ids, left_padded, random_ids
from support.tiny_models import load_tiny, save_tiny, tiny_model

from headprof.compression.cache.head_cache import HeadCache, stack_caches
from headprof.compression.document import load_document, save_document
from headprof.compression.encoding import prompt_ids, question_ids
from headprof.compression.generation import compress_document, generate_text
from headprof.compression.methods.table import METHODS, name_of
from headprof.compression.session import attending_ragged, compressed, make_plan, prefill
from headprof.errors import CacheError, HeadprofError, ProfileError, UsageError
from headprof.models.decoder import sliding_windows
from headprof.models.rotary import rotary_of
from headprof.profile.finding import list_profiles, user_profile_dir
from headprof.profile.finding_surrogate import find_surrogate, surrogate_path
from headprof.profile.row_features import RowFeatures
from headprof.profile.surrogate import Surrogate
from headprof.scoring.calibration import CalibrationSettings
from headprof.scoring.repetition import repeat_document
from headprof.scoring.surrogate_fit import fit_heads, fit_surrogate

TEXT = "The lighthouse keeper counted nine grey boats before breakfast. " * 3
FEW = CalibrationSettings(texts=6, lengths=(60, 90))


@pytest.fixture(scope="module")
def fitted():
    return fit_surrogate(load_tiny(), FEW)


# What is predicted.


def slowly_predicted(surrogate, layer, key, value, head):
    """One row's log importance, in float64, number by number."""
    parts = {name: part[layer, head].double() for name, part in surrogate.parts.items()}
    partner, features = surrogate.features.partner, []
    for one, other in enumerate(partner):
        if other > one:
            features.append(math.hypot(float(key[one]), float(key[other])))
    features += [float(key[one]) for one, other in enumerate(partner) if one == other]
    features += [float(each) for each in value]
    said = float(parts["output_bias"])
    standard = [
        max(-8.0, min(8.0, (each - float(mean)) / float(scale)))
        for each, mean, scale in zip(features, parts["mean"], parts["scale"], strict=True)
    ]
    said += sum(each * float(factor) for each, factor in zip(standard, parts["linear"], strict=True))
    for unit in range(len(parts["output"])):
        total = float(parts["hidden_bias"][unit])
        total += sum(each * float(parts["hidden"][at, unit]) for at, each in enumerate(standard))
        said += float(parts["output"][unit]) * total * 0.5 * (1 + math.erf(total / 2**0.5))
    return said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predictions_are_those_of_a_loop(dtype):
    surrogate = random_surrogate(tiny_model())
    keys, values = (torch.randn(2, 2, 3, 16).to(dtype) for _ in range(2))
    for layer in range(2):
        found = surrogate.predict(layer, keys, values)
        assert found.dtype == torch.float32
        slow = [
            [
                [slowly_predicted(surrogate, layer, keys[b, k, t], values[b, k, t], k) for t in range(3)]
                for k in range(2)
            ]
            for b in range(2)
        ]
        torch.testing.assert_close(found, torch.tensor(slow), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3"])
def test_features_do_not_depend_on_positions(arch):
    model = tiny_model(arch)
    rotaries = [rotary_of(model, layer) for layer in range(2)]
    features = RowFeatures.of_layers(rotaries, 16)
    assert features.count < 32
    keys, values = torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    for rotary in rotaries:
        here, there = (
            features.of(rotary.rotate(keys, *rotary.angles(torch.arange(9) + start)), values) for start in (0, 777)
        )
        assert here.shape == (1, 2, 9, features.count)
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


def test_where_no_pairs_can_be_told_keys_count_as_they_are():
    class Mixing:
        layer_type = None
        partners = rotary_of(tiny_model()).partners.__func__

        def angles(self, positions):
            return positions.float()[:, None].expand(-1, 8), positions.float()[:, None].expand(-1, 8)

        def rotate(self, states, cos, sin):
            return states.cumsum(dim=-1)

    assert RowFeatures.of_layers([Mixing()], 8) == RowFeatures.of_layers([None], 8) == RowFeatures.as_they_are(8)
    rotary = rotary_of(tiny_model(head_dim=8))
    for mixed in ([rotary, None], [None, rotary]):
        assert RowFeatures.of_layers(mixed, 8) == RowFeatures.as_they_are(8)
    keys, values = torch.randn(3, 8), torch.randn(3, 8)
    assert torch.equal(RowFeatures.as_they_are(8).of(keys, values), torch.cat([keys, values], dim=-1))


# What it is fitted to.


@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma2", "gemma3"])
def test_importance_is_the_largest_entry_of_the_models_own_matrix(arch, monkeypatch):
    seven_queries = 2 * 7 * 2 * 4 * 4 * 90
    monkeypatch.setattr("headprof.scoring.layer_blocks.block_bytes", lambda device: seven_queries)
    options = {"sliding_window": 24} if arch != "llama" else {}
    model = tiny_model(arch, **options, attn="eager" if arch == "gemma2" else None)
    ids, shape, found = random_ids(1, 90)[0].tolist(), load_tiny(arch).shape, {}
    repeat_document(model, shape, ids[:40], ids[40:], lambda layer: found.update({layer.index: layer}))
    attentions = tiny_model(arch, **options, attn="eager")(torch.tensor([ids]), output_attentions=True).attentions
    for index, attention in enumerate(attentions):
        slow = torch.zeros(shape.num_kv_heads, 40)
        for head in range(shape.num_heads):
            for query in range(40, 90):
                paid = attention[0, head, query, :40]
                slow[head // shape.group_size] = slow[head // shape.group_size].maximum(paid)
        torch.testing.assert_close(found[index].importance, slow, rtol=1e-4, atol=1e-6)
    assert any(window for window in sliding_windows(model.config)) == (arch != "llama")


@pytest.mark.parametrize("bent", [False, True])
def test_a_planted_rule_is_found(bent):
    """A line through the features exactly, and one with a bend better than any line could."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(3, 20, generator=generator)

    def rows(count):
        features = 5 + 3 * torch.randn(3, count, 20, generator=generator)
        targets = torch.einsum("knf,kf->kn", features, truth) - 7
        return features, targets + (20 * (features[..., 0] - 5).abs() if bent else 0)

    parts = fit_heads(*rows(3000), *rows(500), torch.Generator().manual_seed(1))
    surrogate = replace(
        random_surrogate(tiny_model()), parts={name: part[None] for name, part in zip(PARTS, parts, strict=True)}
    )
    features, targets = rows(400)
    found = predicted_of(surrogate, features)
    left = (found - targets).square().mean(dim=1) / targets.var(dim=1)
    line = replace(surrogate, parts=surrogate.parts | {"output": torch.zeros_like(surrogate.parts["output"])})
    line_left = (predicted_of(line, features) - targets).square().mean(dim=1) / targets.var(dim=1)
    assert (left < (0.05 if bent else 1e-4)).all()
    assert not bent or (left < 0.3 * line_left).all()


PARTS = ("mean", "scale", "linear", "hidden", "hidden_bias", "output", "output_bias")


def predicted_of(surrogate, features):
    from headprof.profile.surrogate import predicted

    return predicted([surrogate.parts[name][0].float() for name in PARTS], features[None])[0]


def test_a_constant_feature_does_no_harm():
    features, targets = torch.randn(1, 200, 5), torch.randn(1, 200)
    features[..., 2] = 3.0
    parts = fit_heads(features, targets, features, targets, torch.Generator().manual_seed(0))
    assert all(bool(part.isfinite().all()) for part in parts) and float(parts[1].min()) > 0


def test_what_a_tiny_models_repetition_looks_at_is_foreseen(fitted):
    quality = fitted.quality
    assert quality["texts"] == 1 and 0.5 < quality["spearman"] <= 1
    assert quality["model_top_25"] > 0.4  # by chance a quarter
    for name in ("head_top_10", "head_top_25", "layer_top_10", "layer_top_25", "model_top_10"):
        assert 0 <= quality[name] <= 1


def test_two_fits_are_the_same_file_and_another_seed_another(fitted, tmp_path):
    again, other = fit_surrogate(load_tiny(), FEW), fit_surrogate(load_tiny(), replace(FEW, seed=1))
    files = [tmp_path / name for name in ("a", "b", "c")]
    for surrogate, file in zip((fitted, again, other), files, strict=True):
        surrogate.save(file)
    contents = [file.read_bytes() for file in files]
    assert contents[0] == contents[1] != contents[2]
    assert fitted.digest() == again.digest() != other.digest()


def test_a_users_texts_stand_in_place_of_ours(fitted, tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"Number {number}. " + TEXT)
    settings = replace(FEW, folder=tmp_path)
    found = fit_surrogate(load_tiny(), settings)
    assert found.digest() != fitted.digest()
    assert json.loads(found.metadata["settings"])["folder"] == str(tmp_path)
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("Few words.")
    with pytest.raises(UsageError, match="hold 0 texts of such lengths, fewer than 3"):
        fit_surrogate(load_tiny(), settings)
    with pytest.raises(UsageError, match="no folder"):
        fit_surrogate(load_tiny(), replace(FEW, folder=tmp_path / "none"))


def test_impossible_settings_are_refused():
    with pytest.raises(UsageError, match="ask for --texts of at least 3"):
        fit_surrogate(load_tiny(), replace(FEW, texts=2))
    with pytest.raises(UsageError, match="fewer than 32 tokens"):
        fit_surrogate(load_tiny(), replace(FEW, lengths=(4,)))
    with pytest.raises(UsageError, match=r"can repeat texts of at most \d+ tokens"):
        fit_surrogate(replace(load_tiny(), max_positions=100), FEW)


# Files.


def test_a_file_comes_back_as_it_was(fitted, tmp_path):
    fitted.save(tmp_path / "x.surrogate.safetensors")
    again = Surrogate.load(tmp_path / "x.surrogate.safetensors")
    assert again.digest() == fitted.digest() and again.quality == fitted.quality
    assert (again.model_name, again.shape, again.features) == (fitted.model_name, fitted.shape, fitted.features)
    keys, values = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    assert torch.equal(again.predict(1, keys, values), fitted.predict(1, keys, values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (note("format", "headprof.profile"), "not a surrogate"),
        (note("format_version", "9"), "format version 9 where this headprof reads 1"),
        (note("fingerprint", "[]"), "fingerprint"),
        (forget("weights"), "its weights is missing"),
        (note("weights", '{"float32": 3}'), "no fingerprints"),
        (drop("linear"), "lacks the tensor linear"),
        (put("extra", torch.zeros(1)), "unknown tensor extra"),
        (turn("hidden", lambda part: part.float()), "hidden is F32"),
        (turn("mean", lambda part: part[:1]), "mean is F32"),
        (turn("hidden", lambda part: part[..., 0]), "its hidden is not"),
        (poke("mean", math.nan), "mean holds what is no number"),
        (poke("hidden", math.inf), "hidden holds what is no number"),
        (poke("scale", 0.0), "scale is not above 0"),
        (poke("partner", 99), "partner does not pair"),
        (turn("partner", lambda part: torch.arange(len(part), dtype=torch.int32)), "features where its partner says"),
    ],
)
def test_a_file_that_cannot_be_is_refused_in_one_sentence(fitted, tmp_path, change, message):
    fitted.save(tmp_path / "right")
    with pytest.raises(ProfileError, match=message) as refused:
        Surrogate.load(craft(tmp_path / "right", tmp_path / "wrong", change))
    assert "\n" not in str(refused.value) and "--surrogate" in str(refused.value)


def test_an_altered_or_damaged_file_is_refused(fitted, tmp_path):
    fitted.save(tmp_path / "right")
    content = (tmp_path / "right").read_bytes()
    wrong = tmp_path / "wrong"
    for changed in (flipped(content, 8 * len(content) - 20), content[:-9], content[:40], b""):
        wrong.write_bytes(changed)
        with pytest.raises(ProfileError, match=r"altered|cut short|not a safetensors|damaged"):
            Surrogate.load(wrong)
    with pytest.raises(ProfileError, match="no surrogate file"):
        Surrogate.load(tmp_path / "missing")


def test_the_surrogate_of_another_model_is_refused(fitted):
    with pytest.raises(ProfileError, match=r"another model, tiny-llama .same shape, other weights.*--surrogate"):
        make_plan(tiny_model(seed=5), method="kvzap", surrogate=fitted)
    with pytest.raises(ProfileError, match=r"another model, tiny-llama \(layers 2 instead of 3"):
        make_plan(tiny_model(layers=3), method="kvzap", surrogate=fitted)
    with pytest.raises(ProfileError, match="needs a surrogate: make one with `headprof score --surrogate`"):
        make_plan(tiny_model(), method="kvzap")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_weights_in_another_type_are_known(fitted, dtype):
    plan = make_plan(tiny_model(dtype=dtype), method="kvzap", surrogate=fitted)
    assert plan.surrogate is fitted
    in_half = random_surrogate(tiny_model(dtype=dtype))
    assert make_plan(tiny_model(), method="kvzap", surrogate=in_half).surrogate is in_half
    with pytest.raises(ProfileError, match="other weights"):
        make_plan(tiny_model(dtype=dtype, seed=5), method="kvzap", surrogate=fitted)


def test_it_is_found_where_profiles_are(fitted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADPROF_DATA", str(tmp_path / "home"))
    with pytest.raises(ProfileError, match=r"no surrogate for tiny-llama: run `headprof score --model x --surrogate`"):
        find_surrogate("tiny-llama", given="x")
    with pytest.raises(ProfileError, match="no surrogate file at there"):
        find_surrogate("tiny-llama", Path("there"))
    places = [user_profile_dir(), Path("profiles"), Path("elsewhere")]
    for folder in places:
        folder.mkdir(parents=True)
        fitted.save(folder / "tiny-llama.surrogate.safetensors")
        beside = Path("elsewhere/tiny-llama.safetensors") if folder == places[-1] else None
        assert find_surrogate("tiny-llama", profile=beside) == folder / "tiny-llama.surrogate.safetensors"
    assert surrogate_path(Path("a/b.safetensors")) == Path("a/b.surrogate.safetensors")
    assert not [each for each in list_profiles() if "tiny" in each.path.name]


# Caches.


def head_positions(cache):
    """The positions of the rows of each head, by layer."""
    found = []
    for layer in cache.head_layers:
        found.append([part.tolist() for part in layer.storage.compact().positions.split(layer.lengths)])
    return found


def expected_positions(surrogate, layer, keys, values, counts):
    """What one sequence's heads keep of their rows, the first and the last two in any case."""
    score = surrogate.predict(layer, keys[None], values[None])[0]
    tokens = score.shape[1]
    score[:, [0, tokens - 2, tokens - 1]] = math.inf
    return [score[head].topk(int(count)).indices.sort().values.tolist() for head, count in enumerate(counts)]


@pytest.mark.parametrize("prefill_chunk", [None, 7])
@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_a_document_keeps_the_rows_of_which_most_is_foreseen(arch, prefill_chunk):
    """From the keys and values of the full cache."""
    model, ids = tiny_model(arch), distinct_ids(1, 70)
    surrogate = random_surrogate(model)
    options = {"method": "headkv-kvzap", "budget": 16, "surrogate": surrogate, "prefill_chunk": prefill_chunk}
    with compressed(model, random_profile(model), **options) as plan:
        prefill(model, ids, cache := HeadCache(plan))
    full = model(ids, use_cache=True).past_key_values
    for layer, found in enumerate(head_positions(cache)):
        held = full.layers[layer]
        counts = plan.allocation(ids.shape[1])[layer]
        assert found == expected_positions(surrogate, layer, held.keys[0], held.values[0], counts)


@pytest.mark.parametrize("method", ["kvzap", "headkv-kvzap"])
@pytest.mark.parametrize("arch", ["llama", "mistral"])
def test_with_padding_each_prompt_is_judged_as_it_is_alone(arch, method):
    model = tiny_model(arch, sliding_window=12 if arch == "mistral" else None)
    lengths, ids = [40, 25], random_ids(2, 40)
    padded, mask = left_padded(ids, lengths)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    options = {"method": method, "budget": 10, "surrogate": random_surrogate(model)}
    with compressed(model, random_profile(model), **options) as plan, torch.no_grad():
        batch = HeadCache(plan)
        model(padded, attention_mask=mask, position_ids=positions, past_key_values=batch)
        for entry, length in enumerate(lengths):
            alone = HeadCache(plan)
            prefill(model, ids[entry : entry + 1, :length], alone)
            shift = 40 - length
            for both, its in zip(head_positions(batch), head_positions(alone), strict=True):
                assert both[2 * entry : 2 * entry + 2] == [[at + shift for at in head] for head in its]


@pytest.mark.parametrize("method", ["kvzap", "headkv-kvzap"])
def test_a_budget_of_all_tokens_is_the_full_cache(method):
    loaded = load_tiny()
    ids = prompt_ids(loaded, TEXT, "Who counted?", 20)
    surrogate = random_surrogate(loaded.model)
    plan = make_plan(
        loaded.model, random_profile(loaded.model), method=method, budget=ids.shape[1] + 20, surrogate=surrogate
    )
    assert (
        generate_text(loaded, ids, plan, max_new_tokens=20).text == generate_text(loaded, ids, max_new_tokens=20).text
    )


@pytest.mark.parametrize("method", ["kvzap", "headkv-kvzap"])
def test_a_saved_document_goes_on_as_the_one_that_was_saved(tmp_path, method):
    """Also beyond the next compression, for which the surrogate is in the file."""
    loaded = load_tiny()
    surrogate = random_surrogate(loaded.model)
    plan = make_plan(
        loaded.model, random_profile(loaded.model), method=method, budget=16, buffer=4, surrogate=surrogate
    )
    cache = compress_document(loaded, TEXT, plan)
    path = tmp_path / "doc.kv.safetensors"
    save_document(cache, path, loaded)
    again, notes = load_document(path, loaded)
    assert notes["surrogate"] == surrogate.digest() == again.plan.surrogate.digest()
    assert again.plan.name == method
    ids = question_ids(loaded, cache.get_seq_length(), "Who counted?", 40)
    made = [generate_text(loaded, ids, cache=stack_caches([each]), max_new_tokens=40) for each in (cache, again)]
    assert made[0].text == made[1].text and made[0].new_tokens == 40
    with attending_ragged(loaded.model):
        for each in (cache, again):
            for token in random_ids(1, 30)[0]:
                prefill(loaded.model, token.view(1, 1), each)
    assert head_positions(cache) == head_positions(again)
    save_document(again, tmp_path / "again", loaded)
    assert load_document(tmp_path / "again", loaded)[0].plan.surrogate.digest() == surrogate.digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("surrogate.linear"), "lacks the tensor linear"),
        (poke("surrogate.mean", math.nan), "mean holds what is no number"),
        (poke("surrogate.mean", 7.0), "another surrogate than it says"),
        (note("surrogate", "0" * 64), "another surrogate than it says"),
        (note("method", "knorm"), "holds a surrogate, by which its method judges nothing"),
    ],
)
def test_a_document_with_a_wrong_surrogate_is_refused(tmp_path, change, message):
    loaded = load_tiny()
    plan = make_plan(loaded.model, method="kvzap", budget=16, surrogate=random_surrogate(loaded.model))
    save_document(compress_document(loaded, TEXT, plan), tmp_path / "right", loaded)

    def changed(tensors, metadata):
        change(tensors, metadata)
        if metadata["method"] == "knorm":
            metadata["options"] = json.dumps(METHODS["knorm"].options())

    with pytest.raises(CacheError, match=message) as refused:
        load_document(craft(tmp_path / "right", tmp_path / "wrong", changed), loaded)
    assert "\n" not in str(refused.value)


def test_a_bound_method_is_still_the_one_of_its_name():
    loaded = load_tiny()
    surrogate = random_surrogate(loaded.model)
    plan = make_plan(loaded.model, method="kvzap", surrogate=surrogate, sinks=2)
    assert name_of(plan.method) == "kvzap"
    again = make_plan(loaded.model, method=plan.method, surrogate=surrogate)
    assert again.method == plan.method and again.name == "kvzap"
    with pytest.raises(HeadprofError, match="make its plan with one"):
        prefill_unbound(loaded.model, plan)


def prefill_unbound(model, plan):
    with attending_ragged(model):
        prefill(model, random_ids(1, 30), HeadCache(replace(plan, method=METHODS["kvzap"])))


# The commands.


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a text, and the model's surrogate where it is looked for."""
    place = tmp_path_factory.mktemp("place")
    save_tiny(place / "model", chat=True)
    (place / "report.txt").write_text(TEXT)
    done = headprof(place, "score", "--surrogate", "--model", "model", "--texts", "6", "--text-lengths", "60,90")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "profiles/model.surrogate.safetensors"
    assert "of held-out rows" in done.stderr
    return place


def test_what_score_writes_serves_all_commands(place):
    common = ("--model", "model", "--method", "kvzap", "--budget", "12")
    shown = headprof(place, "generate", *common, "--file", "report.txt", "--prompt", "Who?", "--max-new-tokens", "9")
    assert shown.returncode == 0 and shown.stdout
    done = headprof(place, "compress", *common, "--file", "report.txt", "-o", "doc.kv.safetensors", "-q", "Who?")
    assert done.returncode == 0, done.stderr
    asked = headprof(place, "generate", "--model", "model", "--cache", "doc.kv.safetensors", "--prompt", "Who?")
    assert asked.returncode == 0 and " ".join(asked.stdout.split()) == " ".join(done.stdout.split())
    found = headprof(
        place,
        *("eval", "--model", "model", "--methods", "kvzap", "--budgets", "12", "--probes", "2"),
        *("--lengths", "400", "--query-agnostic", "-o", "results", "--json"),
    )
    assert found.returncode == 0, found.stderr
    surrogate = Surrogate.load(place / "profiles/model.surrogate.safetensors")
    first = json.loads((place / "results/answers.jsonl").read_text().splitlines()[0])
    assert first["run"]["surrogate"] == surrogate.digest()


def test_a_surrogate_is_found_beside_the_profile_that_is_named(place, tmp_path):
    (tmp_path / "model").symlink_to(place / "model")
    (tmp_path / "report.txt").write_text(TEXT)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/p.surrogate.safetensors").write_bytes(
        (place / "profiles/model.surrogate.safetensors").read_bytes()
    )
    replace(random_profile(tiny_model()), model_name="model").save(tmp_path / "mine/p.safetensors")
    evaluate = ("eval", "--methods", "headkv-kvzap", "--budgets", "12", "--probes", "2", "--lengths", "400")
    for command in (
        ("compress", "--method", "headkv-kvzap", "--budget", "12", "--file", "report.txt"),
        (*evaluate, "--query-agnostic"),
    ):
        assert headprof(tmp_path, *command, "--model", "model").returncode == 1
        done = headprof(tmp_path, *command, "--model", "model", "--profile", "mine/p.safetensors")
        assert done.returncode == 0, done.stderr


def test_a_surrogate_can_be_named(place):
    common = ("generate", "--model", "model", "--method", "kvzap", "--file", "report.txt", "--prompt", "Who?")
    (place / "other.safetensors").write_bytes((place / "profiles/model.surrogate.safetensors").read_bytes())
    assert headprof(place, *common, "--surrogate", "other.safetensors").returncode == 0
    missing = headprof(place, *common, "--surrogate", "none.safetensors")
    assert missing.returncode != 0 and missing.stderr.count("\n") <= 3
    assert "headprof score --model model --surrogate" in " ".join(missing.stderr.split())


@pytest.mark.parametrize("file", ["none.safetensors", "profiles/model.surrogate.safetensors"])
@pytest.mark.parametrize(
    "command",
    [
        ("compress", "--file", "report.txt", "--method", "snapkv"),
        ("compress", "--file", "report.txt", "--method", "headkv-r2", "--max-loss", "0.1"),
        ("compress", "--file", "report.txt"),
        ("generate", "--file", "report.txt", "--prompt", "Who?", "--method", "snapkv"),
        ("eval", "--methods", "snapkv,knorm", "--probes", "2"),
    ],
)
def test_a_surrogate_by_which_nothing_is_judged_is_refused(place, command, file):
    done = headprof(place, *command, "--model", "model", "--surrogate", file)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "Error: No method that is asked for judges by a surrogate: leave --surrogate away.\n"


def test_of_several_methods_one_may_judge_by_the_surrogate(place):
    evaluate = ("eval", "--model", "model", "--methods", "snapkv,kvzap", "--budgets", "12", "--probes", "2")
    named = ("--lengths", "400", "--surrogate", "profiles/model.surrogate.safetensors", "-o", "two", "--json")
    assert headprof(place, *evaluate, *named).returncode == 0


@pytest.mark.parametrize(
    "command",
    [
        ("compress", "--file", "report.txt", "--method", "snapkv"),
        ("generate", "--prompt", "Who?", "--method", "kvzap"),
        ("eval", "--methods", "snapkv,knorm", "--probes", "2"),
    ],
)
def test_a_profile_that_is_not_there_is_missed_by_methods_that_need_none(place, command):
    done = headprof(place, *command, "--model", "model", "--profile", "absent.safetensors")
    assert done.returncode == 2 and "There is no profile file at absent.safetensors" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--surrogate", "--needles", "report.txt"), "leave --needles away"),
        (("--surrogate", "--resume"), "leave --resume away"),
        (("--surrogate", "--refine"), "leave --surrogate, or --refine, away"),
        (("--surrogate", "--others", "64"), "leave --surrogate, or --others, away"),
        (("--surrogate", "--no-tune"), "leave --no-tune away"),
        (("--surrogate", "--until-stable"), "leave --until-stable away"),
        (("--surrogate", "--probes", "2"), "leave --probes away"),
        (("--surrogate", "--texts", "2"), "--texts of at least 3"),
        (("--surrogate", "--text-lengths", "3"), "fewer than 32 tokens"),
        (("--surrogate", "--text-folder", "none"), "no folder none"),
        (("--text-folder", "model"), "add --reconstruction or --surrogate"),
        (("--surrogate", "--reconstruction"), "leave --surrogate, or --reconstruction, away"),
        (("--surrogate", "--preset", "big"), "no preset 'big'"),
        (("--surrogate", "-o", "model/model.safetensors"), "model.safetensors"),
    ],
)
def test_what_cannot_be_fitted_is_refused_and_nothing_written(place, arguments, message):
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    done = headprof(place, "score", "--model", "model", *arguments)
    assert done.returncode != 0 and message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
