"""A compressed document whose evicted rows stay in its file, and are brought back from there."""

from pathlib import Path

import pytest
import torch
from support.crafted_files import craft, parts_of
from support.profiles import random_profile
from support.tiny_models import load_tiny

from headprof.compression.cache.head_cache import HeadCache, stack_caches
from headprof.compression.conversation import Conversation
from headprof.compression.document import load_document, save_document
from headprof.compression.generation import ask, compress_document
from headprof.compression.session import attending_ragged, make_plan, prefill
from headprof.errors import CacheError

TEXT = "The lighthouse keeper counted nine grey boats before breakfast. " * 12


def compressed_document(loaded, method="headkv-cluster", buffer=64, **options):
    options = {"budget": 30, "cluster": 16} | options
    plan = make_plan(loaded.model, random_profile(loaded.model), method=method, buffer=buffer, **options)
    return compress_document(loaded, TEXT, plan)


@pytest.fixture(scope="module")
def tiny():
    return load_tiny(layers=2)


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("documents") / "doc.kv.safetensors"
    cache = compressed_document(tiny)
    save_document(cache, path, tiny)
    return cache, path


@pytest.mark.parametrize("method", ["clusterkv", "headkv-cluster", "headkv-r2", "learned-kvzip"])
@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma2"])
def test_a_loaded_document_answers_as_the_one_that_was_saved(tmp_path, method, arch):
    """Also while what comes after it is compressed, and goes to the second tier too."""
    loaded = load_tiny(arch, layers=2, sliding_window=40, attn="eager" if arch == "gemma2" else None)
    cache = compressed_document(loaded, method, buffer=6)
    save_document(cache, tmp_path / "doc.kv.safetensors", loaded)
    again, notes = load_document(tmp_path / "doc.kv.safetensors", loaded)
    assert notes["format_version"] == "6" and again.plan.method.recall == cache.plan.method.recall
    assert torch.equal(again.lengths, cache.lengths)
    assert (again.nbytes, again.second_tier_bytes) == (cache.nbytes, cache.second_tier_bytes)
    one, other = (ask(loaded, each, "Who counted?", max_new_tokens=20) for each in (cache, again))
    assert one.text == other.text and one.second_tier_bytes == other.second_tier_bytes


def test_the_second_tier_stays_in_the_file(tiny, saved):
    """Its rows are read where they lie, also by copies of the cache."""
    _, path = saved
    again, _ = load_document(path, tiny)
    mapped = [range(*(int(end, 16) for end in line.split()[0].split("-"))) for line in _maps() if str(path) in line]
    for cache in (again, stack_caches([again])):
        for layer in cache.head_layers:
            (part,) = layer.tiers[0].parts
            assert all(any(each.data_ptr() in place for place in mapped) for each in part.tensors)


def _maps():
    try:
        return Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        pytest.skip("this system does not tell what is mapped where")


def test_a_question_finds_what_was_evicted(tiny, saved):
    """With everything brought back the answer is the full cache's, though the file keeps but 18 rows of each head."""
    whole = compressed_document(tiny, "full", cluster=None)
    cache = compressed_document(tiny, "clusterkv", budget=1000)
    path = saved[1].with_name("whole.kv.safetensors")
    save_document(cache, path, tiny)
    again, _ = load_document(path, tiny)
    assert all(max(layer.storage.lengths) - max(layer.held.slots) == 18 for layer in again.head_layers)
    answers = [ask(tiny, each, "How many boats?", max_new_tokens=20).text for each in (whole, again)]
    assert answers[0] == answers[1]


def test_a_conversation_is_kept_with_what_it_may_bring_back(tiny, saved):
    _, path = saved
    cache, _ = load_document(path, tiny)
    talk = Conversation(tiny, cache)
    talk.ask("Who counted?", max_new_tokens=10)
    kept = path.with_name("talk.kv.safetensors")
    save_document(talk.document(), kept, tiny)
    assert len(talk.cache.head_layers[0].tiers[0].parts) >= 1
    again, _ = load_document(kept, tiny)
    one, other = (ask(tiny, each, "How many?", max_new_tokens=20) for each in (talk.cache, again))
    assert one.text == other.text


def test_a_stack_of_which_some_bring_back_rows_is_not_saved(tiny, tmp_path):
    stack = stack_caches([compressed_document(tiny, "clusterkv"), compressed_document(tiny, "snapkv", cluster=0)])
    with pytest.raises(CacheError, match=r"only some bring back rows: save each of them by itself\.$"):
        save_document(stack, tmp_path / "doc.kv.safetensors", tiny)


def test_a_stack_that_brings_back_rows_is_saved_as_one(tiny, saved, tmp_path):
    cache, _ = saved
    stack = stack_caches([cache, cache])
    save_document(stack, tmp_path / "two.kv.safetensors", tiny)
    again, _ = load_document(tmp_path / "two.kv.safetensors", tiny)
    fed = torch.tensor([[7, 8, 9]])
    with attending_ragged(tiny.model), torch.no_grad():
        expected = prefill(tiny.model, fed, stack_caches([cache]))
        assert torch.allclose(prefill(tiny.model, fed.expand(2, -1), again), expected.expand(2, -1), atol=1e-4)


def test_a_method_that_recalls_no_more_is_what_the_file_says(tiny, tmp_path):
    cache = compressed_document(tiny, "headkv-cluster", cluster=0)
    save_document(cache, tmp_path / "doc.kv.safetensors", tiny)
    again, _ = load_document(tmp_path / "doc.kv.safetensors", tiny)
    assert not again.recalls and not again.plan.method.recall.is_on


def drop(name):
    return lambda tensors, _: [tensors.pop(name)]


def changed(name, change):
    return lambda tensors, _: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (drop("layers.1.tier_keys"), "lacks the tensor layers.1.tier_keys"),
        (drop("layers.0.recalled"), "lacks the tensor layers.0.recalled"),
        (changed("layers.0.tier_values", lambda rows: rows[:-1]), "tier_values are F32"),
        (changed("layers.0.tier_keys", lambda rows: rows.double()), "tier_keys are F64"),
        (changed("layers.0.tier_centroids", lambda means: means[:, :, :0]), "tier_centroids are F32"),
        (changed("layers.0.tier_sizes", lambda sizes: sizes + 1), "tier_sizes are not those of the"),
        (changed("layers.0.tier_sizes", lambda sizes: sizes - 2 * sizes.max()), "tier_sizes are not those"),
        (changed("layers.0.recalled", lambda counts: counts + 10000), "recalled are more than the rows there are"),
        (changed("layers.0.recalled", lambda counts: -counts), "recalled are more than the rows there are"),
        (changed("layers.0.tier_positions", lambda positions: positions + 5000), "tier_positions hold what cannot be"),
        (changed("layers.1.tier_keys", lambda keys: keys / 0), "tier_keys hold what cannot be"),
        (changed("layers.1.tier_centroids", lambda means: means / 0), "tier_centroids hold what cannot be"),
    ],
)
def test_a_file_that_holds_what_cannot_be_is_refused(tiny, saved, tmp_path, change, fault):
    crafted = craft(saved[1], tmp_path / "crafted.kv.safetensors", change)
    with pytest.raises(CacheError, match=fault) as refused:
        load_document(crafted, tiny)
    assert str(refused.value).endswith("make it again with `headprof compress`.")


def test_a_second_tier_of_a_method_that_has_none_is_refused(tiny, saved, tmp_path):
    def change(_, metadata):
        metadata["options"] = metadata["options"].replace('"cluster": 16', '"cluster": 0')

    crafted = craft(saved[1], tmp_path / "crafted.kv.safetensors", change)
    with pytest.raises(CacheError, match="which its method brings nothing back from"):
        load_document(crafted, tiny)


@pytest.mark.parametrize("left", [0.3, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_refused(tiny, saved, tmp_path, left):
    content = saved[1].read_bytes()
    (tmp_path / "cut.kv.safetensors").write_bytes(content[: int(left * len(content))])
    with pytest.raises(CacheError, match="is cut short or altered"):
        load_document(tmp_path / "cut.kv.safetensors", tiny)


def test_an_altered_row_is_noticed(tiny, saved, tmp_path):
    content = bytearray(saved[1].read_bytes())
    row = parts_of(saved[1])[0]["layers.1.tier_keys"][3].numpy().tobytes()
    content[content.index(row)] ^= 1
    (tmp_path / "altered.kv.safetensors").write_bytes(content)
    with pytest.raises(CacheError, match="has been altered"):
        load_document(tmp_path / "altered.kv.safetensors", tiny)


def test_a_cache_made_anew_has_no_second_tier(tiny):
    cache = compressed_document(tiny)
    cache.reset()
    assert not cache.recalls and cache.second_tier_bytes == 0 and isinstance(cache, HeadCache)
