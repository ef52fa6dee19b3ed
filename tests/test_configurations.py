"""What must hold whatever the model, the method and the numbers: on small configurations drawn at random.

`pytest -m slow tests/test_configurations.py` draws many more, as many as `HEADPROF_CONFIGURATIONS` says.
"""

import gc
import os
import random
from dataclasses import dataclass, replace

import pytest
import torch
from support.profiles import judging, random_profile
from support.prompts import GREEDY, left_padded, random_ids
from support.tiny_models import ARCHITECTURES, load_tiny

from headprof.compression.cache.head_cache import HeadCache
from headprof.compression.document import load_document, save_document
from headprof.compression.methods.table import METHODS
from headprof.compression.session import attending_ragged, compressed, make_plan

EXACT = [
    name
    for name, method in METHODS.items()
    if name != "full" and method.representation.is_full and method.always_kept < 8
]
"""Methods that hold rows as they are: a rounding that turns another way says nothing of the rest.

None of them keeps more in any case than the smallest budget here.
"""

FEW = 6
MANY = int(os.environ.get("HEADPROF_CONFIGURATIONS", "100"))
CLOSE = {"atol": 2e-3, "rtol": 1e-3}
NEW = 24


@dataclass(frozen=True)
class Configuration:
    arch: str
    num_heads: int
    num_kv_heads: int
    layers: int
    head_dim: int
    sliding_window: int
    lengths: tuple[int, ...]  # of the prompts of a batch
    method: str
    budget: int | str
    decode_budget: int | str | None
    buffer: int | None
    chunk: int
    seed: int

    @property
    def loaded(self):
        sizes = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "layers": self.layers}
        sizes |= {"head_dim": self.head_dim, "hidden": self.num_heads * self.head_dim}
        attn = "eager" if self.arch == "gemma2" else None
        return load_tiny(self.arch, **sizes, sliding_window=self.sliding_window, seed=self.seed, attn=attn)

    @property
    def width(self):
        return max(self.lengths)

    def plan(self, model, **changes):
        options = {"budget": self.budget, "decode_budget": self.decode_budget, "buffer": self.buffer} | changes
        return make_plan(model, random_profile(model), **self.by(model), **options)

    def by(self, model):
        """The method, and what it judges by."""
        return {"method": self.method} | judging(model, self.method)

    def prompts(self):
        """Token ids and mask, padded in front; and the positions of the tokens."""
        ids, mask = left_padded(random_ids(len(self.lengths), self.width, seed=self.seed), self.lengths)
        return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def drawn(seed):
    rng = random.Random(f"configuration {seed}")
    groups, num_kv_heads = rng.choice([1, 2, 3]), rng.choice([1, 2, 3])
    shortest = rng.choice([3, 9, 20])
    configuration = Configuration(
        arch=rng.choice(ARCHITECTURES),
        num_heads=groups * num_kv_heads,
        num_kv_heads=num_kv_heads,
        layers=rng.choice([1, 2, 3]),
        head_dim=rng.choice([8, 16, 32]),
        sliding_window=rng.choice([3, 4, 8, 30]),
        lengths=tuple(rng.randint(shortest, 40) for _ in range(rng.choice([1, 2, 3]))),
        method=rng.choice(EXACT),
        budget=rng.choice([8, 12, 20, "60%"]),
        decode_budget=rng.choice([None, None, 8, 16]),
        buffer=rng.choice([None, 1, 4, 12, 64, 10**6]),
        chunk=rng.choice([1, 1, 2, 3, 7]),
        seed=seed,
    )
    if configuration.budget == "60%" and (shortest < 20 or configuration.sliding_window < 20):
        return replace(configuration, budget=10)  # a share of so few tokens is less than every head keeps
    return configuration


def places(cache, padding=()):
    """The positions of the rows of each head of each sequence and layer; `padding` in front of each is taken off."""
    found = []
    for layer in cache.head_layers:
        rows = layer.storage.compact()
        heads = [part.tolist() for part in rows.positions.split(layer.lengths)]
        if padding:
            heads = [[at - padding[number // layer.num_kv_heads] for at in head] for number, head in enumerate(heads)]
        found.append(heads)
    return found


def read(model, configuration, chunk=None, **changes):
    """A cache that has read the prompts, and the logits of their last tokens."""
    ids, mask, positions = configuration.prompts()
    cache = HeadCache(configuration.plan(model, **changes))
    with attending_ragged(model, prefill_chunk=chunk):
        logits = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]
    return cache, logits


def follow(model, configuration, cache, count, start=0, entries=slice(None)):
    """Read `count` more tokens one by one, the same for all caches; their logits `[B, count, vocabulary]`."""
    lengths = torch.tensor(configuration.lengths)[entries]
    ids = random_ids(len(configuration.lengths), start + count, seed=configuration.seed + 1)[entries]
    logits = []
    with attending_ragged(model):
        for i in range(start, start + count):
            width = cache.get_seq_length() + 1
            mask = (torch.arange(width) >= width - (lengths + i + 1)[:, None]).long()
            positions = (lengths + i)[:, None]
            step = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
            logits.append(model(ids[:, i : i + 1], **step).logits)
    return torch.cat(logits, dim=1)


def check_the_whole_budget(configuration, model):
    ids, mask, _ = configuration.prompts()
    options = GREEDY | {"attention_mask": mask, "max_new_tokens": NEW}
    expected = model.generate(ids, **options)
    whole = {"budget": ids.shape[1] + NEW, "decode_budget": None, "buffer": configuration.buffer}
    if configuration.method == "fastgen":  # which spends no more than it needs
        whole["recovery"] = 1.0
    with compressed(model, random_profile(model), **configuration.by(model), **whole):
        assert torch.equal(model.generate(ids, **options), expected)
    with compressed(
        model, random_profile(model), **configuration.by(model), prefill_chunk=configuration.chunk, **whole
    ):
        assert torch.equal(model.generate(ids, **options), expected)


def check_chunks(configuration, model):
    whole, logits = read(model, configuration)
    parts, chunked = read(model, configuration, configuration.chunk)
    torch.testing.assert_close(chunked, logits, **CLOSE)
    assert places(parts) == places(whole)
    after = [follow(model, configuration, each, NEW) for each in (whole, parts)]
    torch.testing.assert_close(after[1], after[0], **CLOSE)
    assert places(parts) == places(whole)


def check_batch(configuration, model):
    """All that comes after the prompt is kept, since a batch is compressed again at the same time."""
    batch, logits = read(model, configuration, buffer=None)
    ids = configuration.prompts()[0]
    after = follow(model, configuration, batch, 4)
    padding = [configuration.width - length for length in configuration.lengths]
    found = places(batch, padding)
    heads = configuration.num_kv_heads
    for entry, length in enumerate(configuration.lengths):
        alone = HeadCache(configuration.plan(model, buffer=None))
        with attending_ragged(model):
            single = model(ids[entry : entry + 1, -length:], past_key_values=alone).logits[:, -1]
        torch.testing.assert_close(logits[entry : entry + 1], single, **CLOSE)
        then = follow(model, configuration, alone, 4, entries=slice(entry, entry + 1))
        torch.testing.assert_close(after[entry : entry + 1], then, **CLOSE)
        assert [layer[entry * heads : (entry + 1) * heads] for layer in found] == places(alone)


def check_saved(configuration, loaded, folder):
    cache, _ = read(loaded.model, configuration)
    start = random.Random(configuration.seed).choice([0, 1, 7, 13])
    if start:
        follow(loaded.model, configuration, cache, start)
    save_document(cache, folder / "doc.safetensors", loaded)
    other, _ = load_document(folder / "doc.safetensors", loaded)
    assert places(other) == places(cache)
    after = [follow(loaded.model, configuration, each, NEW, start) for each in (cache, other)]
    torch.testing.assert_close(after[1], after[0], **CLOSE)
    assert places(other) == places(cache)


def tensors_of(thing, found):
    """All tensors that can be reached from a layer, but for the model's."""
    for part in gc.get_referents(thing):
        if isinstance(part, torch.Tensor):
            found.append(part)
        elif isinstance(part, (list, tuple, dict)) or type(part).__name__ in ("HeldRows", "RowStorage", "Rows"):
            tensors_of(part, found)
        elif type(part).__name__ == "RecentQueries":
            found += part.tensors
    return found


def check_bytes(configuration, model):
    """Counted are all storages that are held, but for where each head's rows begin and end."""
    cache, _ = read(model, configuration)
    for count in (0, 1, 17):
        if count:
            follow(model, configuration, cache, count)
        for layer in cache.head_layers:
            held = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors_of(layer.held, [])}
            index = [layer.storage._bounds, layer.storage._next_positions]
            bytes_held = sum(each.nbytes() for each in held.values()) - sum(each.nbytes for each in index)
            assert layer.nbytes == bytes_held
            own = [part.nbytes for part in layer.storage.rows.tensors + layer.held.recent.tensors]
            assert bytes_held == sum(own)  # and nothing is kept of what they were cut from


def check(seed, folder):
    configuration = drawn(seed)
    loaded = configuration.loaded
    with torch.no_grad():
        check_the_whole_budget(configuration, loaded.model)
        check_chunks(configuration, loaded.model)
        check_batch(configuration, loaded.model)
        check_saved(configuration, loaded, folder)
        check_bytes(configuration, loaded.model)


@pytest.mark.parametrize("seed", range(FEW))
def test_what_must_hold_holds(seed, tmp_path):
    check(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FEW, FEW + MANY))
def test_what_must_hold_holds_for_many(seed, tmp_path):
    check(seed, tmp_path)
